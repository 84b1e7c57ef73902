"""`meco eval`: which tasks, which metadata for each, and a table of what the metadata changes.

The flags that the harness has keep its meanings and its names, with dashes in place of underscores:
`--tasks`, `--num-fewshot`, `--limit`, `--include-path`, `--batch-size`, `--device`. Metadata is
rendered, names are looked up and data is loaded before the first forward pass, so mistakes show
early. What was given up: the harness's other flags; a prefix for them is one call away
(`harness_model.MeCoLM`).
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.flag_range import MOST, check_range
from megatron_meco.inference.conditioning import NO_METADATA, Conditioning, parse_values
from megatron_meco.inference.model_flags import (
    MOST_AT_ONCE,
    OWN_TASKS,
    SHOTS,
    add_model_arguments,
    add_spelled,
)
from megatron_meco.inference.output_file import check_result_file, write_json
from megatron_meco.inference.paper import PAPER_SHOTS, PAPER_TASKS
from megatron_meco.untrusted.text_file import read_text
from megatron_meco.wording import aligned, counted, shown

if TYPE_CHECKING:
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
        help="condition every task on these fields of the template, or `none`",
    )
    add(
        _METADATA_FILE,
        type=Path,
        metavar="FILE",
        help="YAML or JSON, {TASK: {FIELD: VALUE}}; goes before --metadata for the tasks it names",
    )
    add_spelled(
        parser,
        "--num-fewshot",
        **SHOTS,
        nargs="+",
        metavar="N",
        help="examples before each question; several numbers are evaluated one after the other. "
        f"Default: as each task says; for `{_PAPER}` {' and '.join(map(str, PAPER_SHOTS))}",
    )
    add("--limit", type=float, metavar="N", help="documents of each task, or a share below 1")
    add_spelled(parser, "--include-path", type=Path, metavar="DIR", help=OWN_TASKS)
    add_spelled(
        parser, "--batch-size", default="1", metavar="N", help="a number, or auto[:N]; default: 1"
    )
    add("--output", type=Path, metavar="FILE", help="write everything as JSON")


def run_eval(args: argparse.Namespace) -> int:
    """Run `meco eval`.

    Args:
        args: The parsed flags of `add_eval_arguments`.

    Returns:
        The exit status, 0.
    """
    _check_flags(args)
    if args.output is not None:
        check_result_file(args.output)
    conditioning = Conditioning.of_folder(args.model, args.template)
    given = parse_values(args.metadata or []) if args.metadata != [NO_METADATA] else {}
    # Rendered before anything heavy is loaded: most mistakes show here.
    prefix = conditioning.render(given) if given else ""
    per_task = _read_metadata_file(args.metadata_per_task)
    prefixes = {
        task: conditioning.render(values, f"{_METADATA_FILE} {args.metadata_per_task}: {task}")
        for task, values in per_task.items()
    }

    # Late, because torch takes seconds to load: wrong flags and metadata are answered before that.
    from megatron_meco.inference.harness_tasks import open_evaluation
    from megatron_meco.inference.model import pick_device
    from megatron_meco.inference.model_folder import check_model

    if args.device is not None:
        pick_device(args.device)
    check_model(args.model)
    words = [task for word in args.tasks for task in word.split(",") if task]
    words = list(dict.fromkeys(words))
    if not words:
        raise FlagError("names no task", where="--tasks", remedy="Name one, as in openbookqa.")
    shots: tuple[int | None, ...] = tuple(args.num_fewshot or (None,))
    if _PAPER in words:
        words[words.index(_PAPER) : words.index(_PAPER) + 1] = [t.name for t in PAPER_TASKS]
        shots = tuple(args.num_fewshot or PAPER_SHOTS)
        if args.metadata is None:
            urls = {task.name: conditioning.render({"url": task.url}) for task in PAPER_TASKS}
            prefixes = urls | prefixes
    evaluation = open_evaluation(words, args.include_path)
    _check_tasks(list(per_task), evaluation)

    results = _evaluate(args, evaluation, prefixes, prefix, shots)
    average = _paper_average(results)
    _print_table(results, average)
    if args.output is not None:
        write_json(args.output, _report(args, conditioning, results, average))
        print(f"written to {args.output}", file=sys.stderr)
    return 0


# ---- Flags ----


def _check_flags(args: argparse.Namespace) -> None:
    # ASCII digits: what else counts as one is no number to the harness.
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


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is there twice, whose last value would count in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is there twice")
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


def _evaluate(
    args: argparse.Namespace,
    evaluation: Evaluation,
    prefixes: dict[str, str],
    prefix: str,
    shots: tuple[int | None, ...],
) -> list[TaskResult]:
    # Late, as in `run_eval`.
    from megatron_meco.inference.harness_model import load_harness_model
    from megatron_meco.inference.harness_tasks import evaluate_task
    from megatron_meco.inference.model import enough_memory

    print(f"loading the data of {counted(len(evaluation.names), 'task')}", file=sys.stderr)
    for name in evaluation.names:
        evaluation.load(name)
    size = args.batch_size
    model = load_harness_model(
        args.model, args.device, args.template, int(size) if size.isdecimal() else size
    )
    results: list[TaskResult] = []
    for name in evaluation.names:
        for num_fewshot in shots:
            chosen = prefixes.get(name, prefix)
            with enough_memory("--batch-size", "Give a smaller one, or another --device."):
                done = evaluate_task(
                    evaluation, model, name, chosen, num_fewshot=num_fewshot, limit=args.limit
                )
            # A task may fix its number of examples, whatever is asked for.
            results += [result for result in done if result not in results]
    return results


def _paper_average(results: list[TaskResult]) -> dict[str, dict[str, float | None]]:
    """Means over the paper's ten tasks, by number of examples, when all ten are there."""
    # Late, as in `run_eval`.
    from megatron_meco.inference.harness_tasks import mean_of_independent

    metric_of = {task.name: task.metric for task in PAPER_TASKS}
    averages = {}
    for shots in sorted({r.num_fewshot for r in results if r.num_fewshot is not None}):
        rows = {}
        for result in results:
            # TruthfulQA has its examples in its question, and is the same in both.
            if result.num_fewshot in (shots, 0) and result.task in metric_of:
                [row] = [c for c in result.comparisons if c.metric == metric_of[result.task]]
                if result.num_fewshot == shots or result.task not in rows:
                    rows[result.task] = row
        if rows.keys() == metric_of.keys():
            averages[str(shots)] = mean_of_independent(list(rows.values()))
    return averages


# ---- What is shown ----


def _print_table(results: list[TaskResult], averages: dict[str, dict[str, float | None]]) -> None:
    rows = [["task", "shots", "metric", "documents", "plain", "conditioned", "difference"]]
    for result in results:
        shots = "-" if result.num_fewshot is None else str(result.num_fewshot)
        for one in result.comparisons:
            rows.append(
                [
                    result.task,
                    shots,
                    one.metric,
                    f"{one.num_documents:,}" if one.num_documents else "-",
                    *_cells(asdict(one)),
                ]
            )
    for shots, average in averages.items():
        rows.append(["average of the paper's ten", shots, "", "", *_cells(average)])
    print("\n".join(aligned(rows, 3)))
    shown = {(r.task, r.prefix): r for r in results if r.prefix}
    for task, prefix in shown:
        print(f"{task} is conditioned on {prefix!r}")
    for result in results:
        for condition, count in result.num_cut.items():
            if count:
                what = "behind the prefix" if condition == "conditioned" else "from the left"
                print(
                    f"{result.task}, {condition}: {counted(count, 'request')} too long for the "
                    f"model, cut {what}",
                    file=sys.stderr,
                )


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        _with_error(row["plain"], row["plain_stderr"]),
        _with_error(row["conditioned"], row["conditioned_stderr"]),
        _with_error(row["difference"], row["difference_stderr"], sign="+"),
    ]


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    shown = f"{value:{sign}.4f}"
    return shown if error is None or math.isnan(error) else f"{shown} ± {error:.4f}"


def _report(
    args: argparse.Namespace,
    conditioning: Conditioning,
    results: list[TaskResult],
    averages: dict[str, dict[str, float | None]],
) -> dict[str, Any]:
    return {
        "model": str(args.model),
        "template": conditioning.template,
        "limit": args.limit,
        "batch_size": args.batch_size,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("megatron-meco", "lm-eval", "transformers", "torch")
        },
        "results": [asdict(result) for result in results],
        "paper_average": averages,
    }
