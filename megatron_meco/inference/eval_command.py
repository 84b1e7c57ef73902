"""`meco eval`: evaluates tasks without and with metadata, and prints what the metadata changes.

Flags that lm-evaluation-harness has keep its names and meanings, with dashes for underscores:
`--tasks`, `--num-fewshot`, `--limit`, `--include-path`, `--batch-size`, `--device`. Its other flags
are not supported; for those, give `harness_model.MeCoLM` to the harness. Metadata is rendered, task
names are looked up and data is loaded before the first forward pass, so mistakes show early.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.metadata
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.flag_range import MOST, SEED, check_range
from megatron_meco.inference.candidates import read_candidates
from megatron_meco.inference.conditioning import Conditioning, parse_condition
from megatron_meco.inference.eval_tables import of_paper, print_pairs, print_results, tell_cut
from megatron_meco.inference.model_flags import (
    DEFAULT,
    MOST_AT_ONCE,
    OWN_TASKS,
    SHOTS,
    add_model_arguments,
    add_spelled,
)
from megatron_meco.inference.output_file import check_result_file, write_json
from megatron_meco.inference.paper import PAPER_SHOTS, PAPER_TASKS
from megatron_meco.untrusted.text_file import read_text
from megatron_meco.wording import counted, json_line, shown

if TYPE_CHECKING:
    # Importing them loads torch.
    from megatron_meco.inference.eval_pairs import Arm, Row, Wrong
    from megatron_meco.inference.harness_tasks import Evaluation, TaskResult

_PAPER = "paper"
_METADATA_FILE = "--metadata-per-task"


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `meco eval` to its parser."""
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--tasks",
        required=True,
        nargs="+",
        metavar="TASK",
        help=f"tasks, groups or tags of lm-evaluation-harness, or `{_PAPER}`: the paper's ten, "
        "each conditioned on the paper's URL for it",
    )
    add(
        "--metadata",
        nargs="+",
        metavar="FIELD=VALUE",
        help="condition every task on these fields of the template, or `none`, or `empty` (the "
        "prefix without any value)",
    )
    add(
        _METADATA_FILE,
        type=Path,
        metavar="FILE",
        help="YAML or JSON, {TASK: {FIELD: VALUE}}; overrides --metadata for the tasks it names",
    )
    add_spelled(
        parser,
        "--num-fewshot",
        **SHOTS,
        nargs="+",
        metavar="N",
        help="few-shot examples per question; several numbers are evaluated in turn. "
        f"Default: each task's own; for `{_PAPER}` {' and '.join(map(str, PAPER_SHOTS))}",
    )
    add("--limit", type=float, metavar="N", help="documents per task, or a share below 1")
    add_spelled(parser, "--include-path", type=Path, metavar="DIR", help=OWN_TASKS)
    add_spelled(
        parser, "--batch-size", default="1", metavar="N", help="a number, or auto[:N]; default: 1"
    )
    add(
        "--shuffled",
        action="store_true",
        help="also give each document the metadata of another one, and report right minus wrong: "
        "the effect of what the metadata says",
    )
    add(
        "--shuffled-from",
        type=Path,
        metavar="FILE",
        help="the same with wrong metadata from this file, one per line as in `meco sweep-urls`",
    )
    add("--seed", **SEED, default=0, metavar="S", help=f"of --shuffled; {DEFAULT}")
    add(
        "--against",
        type=Path,
        metavar="DIR",
        help="evaluate this model too, and report --model minus it, paired by document",
    )
    add("--output", type=Path, metavar="FILE", help="write everything as JSON")
    add("--json", action="store_true", help="print one JSON object; the tables go to stderr")


def run_eval(args: argparse.Namespace) -> int:
    """Run `meco eval`; returns the exit status, 0."""
    with contextlib.ExitStack() as stack:
        if args.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        report = _run(args)
    if args.json:
        print(json_line(report))
    return 0


def _run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, print the tables, and return what `--output` gets."""
    _check_flags(args)
    if args.output is not None:
        check_result_file(args.output)
    conditioning = Conditioning.of_folder(args.model, args.template)
    # Rendered before the model loads, because most mistakes show here.
    plan = _plan(args, conditioning)
    _check_against(args, plan, conditioning)

    # Late, because torch takes seconds to load: wrong flags and metadata are answered before that.
    from megatron_meco.inference.eval_pairs import check_pair
    from megatron_meco.inference.harness_tasks import open_evaluation
    from megatron_meco.inference.model import pick_device
    from megatron_meco.inference.model_folder import check_model

    if args.device is not None:
        pick_device(args.device)
    check_model(args.model)
    if args.against is not None:
        check_pair(args.model, args.against)
    evaluation = open_evaluation(plan.tasks, args.include_path)
    _check_tasks(plan.named, evaluation)
    _check_shuffled(args, plan, evaluation)
    about = _about(args, conditioning)
    arm, wrong, report = _evaluate_model(args, plan, evaluation)
    if args.against is not None:
        if args.output is not None:
            # The second model may fail after hours; the results of the first are kept.
            write_json(args.output, about | report)
        report["against"] = _evaluate_against(args, plan, evaluation, arm, wrong)
    if args.output is not None:
        write_json(args.output, about | report)
        print(f"written to {args.output}", file=sys.stderr)
    return about | report


# ---- Flags ----


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is evaluated.

    Attributes:
        tasks: Tasks, groups or tags as given.
        shots: Numbers of examples; None is the task's own.
        prefix: The prefix of every other task; empty without metadata.
        prefixes: The prefixes of single tasks.
        named: The tasks that `--metadata-per-task` names.
        others: Wrong prefixes of `--shuffled-from`, or None.
    """

    tasks: list[str]
    shots: tuple[int | None, ...]
    prefix: str
    prefixes: Mapping[str, str]
    named: list[str]
    others: list[str] | None

    def prefix_of(self, name: str) -> str:
        prefix: str = self.prefixes.get(name, self.prefix)
        return prefix


def _plan(args: argparse.Namespace, conditioning: Conditioning) -> _Plan:
    given = parse_condition(args.metadata or [])
    per_task = _read_metadata_file(args.metadata_per_task)
    prefix = conditioning.prefix_of(given)
    prefixes = {
        task: conditioning.render(values, f"{_METADATA_FILE} {args.metadata_per_task}: {task}")
        for task, values in per_task.items()
    }
    tasks = [task for word in args.tasks for task in word.split(",") if task]
    tasks = list(dict.fromkeys(tasks))
    if not tasks:
        raise FlagError("names no task", where="--tasks", remedy="Give one, such as openbookqa.")
    shots: tuple[int | None, ...] = tuple(args.num_fewshot or (None,))
    if _PAPER in tasks:
        at = tasks.index(_PAPER)
        tasks[at : at + 1] = [task.name for task in PAPER_TASKS]
        shots = tuple(args.num_fewshot or PAPER_SHOTS)
        if args.metadata is None:
            urls = {task.name: conditioning.render({"url": task.url}) for task in PAPER_TASKS}
            prefixes = urls | prefixes
    others = None
    if args.shuffled_from is not None:
        flag = "--shuffled-from"
        found = read_candidates(args.shuffled_from, conditioning, flag=flag)
        others = [candidate.prefix for candidate in found]
    return _Plan(
        tasks=tasks,
        shots=shots,
        prefix=prefix,
        prefixes=prefixes,
        named=list(per_task),
        others=others,
    )


def _check_against(args: argparse.Namespace, plan: _Plan, conditioning: Conditioning) -> None:
    """Refuse a model that would read other prefixes than `--model`."""
    if args.against is None or args.template is not None or not (plan.prefix or plan.prefixes):
        return
    where = f"--against {args.against}"
    remedy = (
        "Give --template T to render the same prefix for both models, or --metadata none to "
        "compare them without metadata."
    )
    try:
        template = Conditioning.of_folder(args.against).template
    except FlagError as error:
        raise FlagError(error.what, where=where, remedy=remedy) from error
    if template != conditioning.template:
        what = f"has the template {template!r}" if template else "was trained without metadata"
        raise FlagError(
            f"{what}, and --model has {conditioning.template!r}", where=where, remedy=remedy
        )


def _check_shuffled(args: argparse.Namespace, plan: _Plan, evaluation: Evaluation) -> None:
    """Refuse a control in which no document could get another prefix than its own."""
    if not (args.shuffled or plan.others):
        return
    own = {plan.prefix_of(name) for name in evaluation.names} - {""}
    flag = "--shuffled" if plan.others is None else f"--shuffled-from {args.shuffled_from}"
    if not own:
        raise FlagError(
            "has no metadata to take away",
            where=flag,
            remedy="Add --metadata or --metadata-per-task, or drop the flag.",
        )
    if len(own) == 1 and own >= set(plan.others or own):
        raise FlagError(
            f"every document has the prefix {own.pop()!r}, so none has a wrong one",
            where=flag,
            remedy="Give other metadata with --shuffled-from FILE, or evaluate several tasks with "
            "different metadata (--metadata-per-task).",
        )


def _check_flags(args: argparse.Namespace) -> None:
    # ASCII digits only: the harness does not read others.
    size = re.fullmatch(r"auto(?::([0-9]{1,5}))?|([0-9]{1,12})", args.batch_size)
    if size is None or (size[1] is not None and int(size[1]) < 1):
        remedy = "Give a number, auto, or auto:N with N 1 or more."
        given = repr(shown(args.batch_size, 40))
        raise FlagError(f"invalid value {given}", where="--batch-size", remedy=remedy)
    check_range("--batch-size", int(size[2] or 1), 1, MOST_AT_ONCE)
    limit = 1.0 if args.limit is None else args.limit
    if not (0 < limit < 1 or (1 <= limit <= MOST and limit == int(limit))):
        remedy = f"Give a whole number up to {MOST:,}, or a share below 1."
        raise FlagError(f"invalid value {limit:g}", where="--limit", remedy=remedy)


def _read_metadata_file(path: Path | None) -> dict[str, dict[str, str]]:
    if path is None:
        return {}
    where = f"{_METADATA_FILE} {path}"
    remedy = "Write one entry for each task, as in `arc_easy: {url: www.sciencestudyquiz.com}`."

    def refuse(reason: str) -> FlagError:
        return FlagError(reason, where=where, remedy=remedy)

    try:
        content = yaml.load(read_text(path, refuse), _UniqueKeys)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, MeCoError):
            raise
        raise refuse(f"cannot be read ({' '.join(str(error).split()):.200})") from error
    if not isinstance(content, dict) or not content:
        raise refuse("holds no tasks")
    for task, values in content.items():
        fits = isinstance(values, dict) and all(isinstance(v, str) for v in values.values())
        if not fits or not values:
            raise refuse(f"no fields with texts for {task!r}")
    return {str(task): values for task, values in content.items()}


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc] # yaml has no types
    """Refuses a repeated key, of which YAML silently keeps the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is repeated")
        return found


def _check_tasks(named: list[str], evaluation: Evaluation) -> None:
    for task in named:
        if task not in evaluation.names:
            near = difflib.get_close_matches(task, evaluation.names, n=1)
            raise FlagError(
                f"names {task!r}, which is not evaluated",
                where=_METADATA_FILE,
                remedy=f"Evaluated are: {', '.join(near or evaluation.names)}.",
            )


# ---- Work ----


def _evaluate_model(
    args: argparse.Namespace, plan: _Plan, evaluation: Evaluation
) -> tuple[Arm, Wrong, dict[str, Any]]:
    """Evaluate `--model` and print its tables.

    Returns:
        Its answers, the wrong prefixes that were dealt, and the results for JSON.
    """
    # Late, as in `run_eval`.
    from megatron_meco.inference.harness_tasks import mean_of_independent

    print(f"loading the data of {counted(len(evaluation.names), 'task')}", file=sys.stderr)
    for name in evaluation.names:
        evaluation.load(name)
    wrong: Wrong = {}
    arm = _evaluate(args, args.model, plan, evaluation, wrong)
    averages = {
        shots: mean_of_independent(rows)
        for shots, rows in of_paper(
            (result.task, result.num_fewshot, row.metric, row)
            for result in arm.results
            for row in result.comparisons
        ).items()
    }
    print_results(arm.results, averages)
    report: dict[str, Any] = {
        "results": [result.report() for result in arm.results],
        "paper_average": averages,
    }
    if arm.shuffled:
        report["shuffled"] = _compare_shuffled(args, arm)
    return arm, wrong, report


def _evaluate_against(
    args: argparse.Namespace, plan: _Plan, evaluation: Evaluation, arm: Arm, wrong: Wrong
) -> dict[str, Any]:
    """Evaluate `--against`, print its difference from `--model`, and return both for JSON."""
    # Late, as in `run_eval`.
    from megatron_meco.inference.eval_pairs import about_against, one_and_other

    with about_against(args.against):
        other = _evaluate(args, args.against, plan, evaluation, wrong)
    _tell_unequal_cuts(arm, other)
    rows = one_and_other(arm, other)
    title = f"{args.model} minus {args.against}, on the same documents:"
    means = _print_rows(title, ("model", "against"), rows)
    return {
        "model": str(args.against),
        "results": [result.report() for result in other.results],
        "differences": [row.report("model", "against") for row in rows],
        "paper_average": means,
    }


def _evaluate(
    args: argparse.Namespace, folder: Path, plan: _Plan, evaluation: Evaluation, wrong: Wrong
) -> Arm:
    """Evaluate a model under every condition.

    Args:
        args: The flags.
        folder: The model.
        plan: What to evaluate.
        evaluation: Holds the tasks.
        wrong: Wrong prefixes; filled if empty and asked for, so that a second model gets the same.

    Returns:
        Its answers.
    """
    # Late, as in `run_eval`.
    from megatron_meco.inference.eval_pairs import Arm, deal_prefixes, evaluate_wrong
    from megatron_meco.inference.harness_model import load_harness_model
    from megatron_meco.inference.harness_tasks import evaluate_task
    from megatron_meco.inference.model import enough_memory

    size = args.batch_size
    model = load_harness_model(
        folder, args.device, args.template, int(size) if size.isdecimal() else size
    )
    results: list[TaskResult] = []
    with enough_memory("--batch-size", "Give a smaller one, or another --device."):
        for name in evaluation.names:
            for num_fewshot in plan.shots:
                done = evaluate_task(
                    evaluation,
                    model,
                    name,
                    plan.prefix_of(name),
                    num_fewshot=num_fewshot,
                    limit=args.limit,
                )
                # A task may fix its number of examples and repeat its result.
                results += [result for result in done if result not in results]
        arm = Arm(results=results)
        if args.shuffled or plan.others:
            if not wrong:
                wrong |= deal_prefixes(results, args.seed, plan.others)
            arm = evaluate_wrong(evaluation, model, arm, wrong)
    return arm


def _compare_shuffled(args: argparse.Namespace, arm: Arm) -> dict[str, Any]:
    # Late, as in `run_eval`.
    from megatron_meco.inference.eval_pairs import right_and_wrong

    rows = right_and_wrong(arm)
    source = "of another document" if args.shuffled_from is None else f"of {args.shuffled_from}"
    title = f"right metadata minus that {source} (seed {args.seed}), on the same documents:"
    means = _print_rows(title, ("right", "shuffled"), rows)
    for (_, task), count in arm.num_cut.items():
        tell_cut(task, "shuffled", count)
    return {
        "seed": args.seed,
        "from": None if args.shuffled_from is None else str(args.shuffled_from),
        "results": [row.report("right", "shuffled") for row in rows],
        "paper_average": means,
    }


def _print_rows(title: str, sides: tuple[str, str], rows: list[Row]) -> dict[str, Any]:
    """Print rows with the averages of the paper's ten tasks, and return those for JSON."""
    # Late, as in `run_eval`.
    from megatron_meco.inference.eval_pairs import mean_of_pairs

    means = {
        f"{shots} {condition}".rstrip(): mean_of_pairs(pairs)
        for condition in dict.fromkeys(row.condition for row in rows)
        for shots, pairs in of_paper(
            (row.task, row.num_fewshot, row.metric, row.pair)
            for row in rows
            if row.condition == condition
        ).items()
    }
    print_pairs(title, *sides, rows, means)
    return {name: asdict(mean) for name, mean in means.items()}


def _tell_unequal_cuts(arm: Arm, other: Arm) -> None:
    theirs = {(result.run, result.task): result.num_cut for result in other.results}
    for result in arm.results:
        if result.num_cut != theirs.get((result.run, result.task), result.num_cut):
            print(
                f"{result.task}: the two models cut different numbers of requests, so their "
                "difference is partly one of context lengths",
                file=sys.stderr,
            )


def _about(args: argparse.Namespace, conditioning: Conditioning) -> dict[str, Any]:
    return {
        "model": str(args.model),
        "template": conditioning.template,
        "limit": args.limit,
        "batch_size": args.batch_size,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("megatron-meco", "lm-eval", "transformers", "torch")
        },
    }
