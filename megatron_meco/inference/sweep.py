"""`meco sweep-urls`: finds the prefix that suits a task or a kind of text, without selection bias.

The best of many candidates looks good on the documents that it was chosen on. So a seeded half of
the documents ranks the candidates, and the best few are measured again on the other half, with the
standard error of the paired difference from no metadata. Texts are scored by log-likelihood per
token, tasks by the harness's metric. Each candidate costs a pass over the first half.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_meco.errors import FlagError
from megatron_meco.flag_range import COUNT, SEED, InRange
from megatron_meco.inference.candidates import (
    Candidate,
    add_candidates_argument,
    conditioning_of,
    count_prefixes,
    most_frequent,
    read_candidates,
    read_texts,
)
from megatron_meco.inference.harness_tasks import open_evaluation
from megatron_meco.inference.likelihood import TextScore, longest_prefix
from megatron_meco.inference.model import enough_memory, load_model
from megatron_meco.inference.model_flags import (
    MOST_AT_ONCE,
    OWN_TASKS,
    SHOTS,
    add_model_arguments,
    add_spelled,
)
from megatron_meco.inference.model_folder import check_model
from megatron_meco.inference.output_file import check_result_file, write_json
from megatron_meco.inference.paired import mean_and_error
from megatron_meco.wording import JSON_HELP, counted, json_line

_FEWEST_DOCUMENTS = 4

Score = Callable[[str, list[int]], list[float]]
"""Scores documents, given by their numbers, under a prefix; higher is better."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """How a candidate did.

    Attributes:
        name: Its name.
        prefix: Its prefix.
        first_half: Mean score on the half that ranks.
        second_half: Mean score on the other half, or None if not among the best.
        second_half_stderr: Its standard error.
        difference: `second_half` minus that without metadata.
        difference_stderr: Standard error of the paired difference.
    """

    name: str
    prefix: str
    first_half: float
    second_half: float | None = None
    second_half_stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None


def sweep(
    score: Score,
    candidates: Sequence[Candidate],
    num_documents: int,
    *,
    num_reported: int = 5,
    seed: int = 0,
) -> list[Ranked]:
    """Rank candidates on one half of the documents, and measure the best on the other.

    Args:
        score: Scores documents under a prefix.
        candidates: Prefixes to rank.
        num_documents: Number of documents, 4 or more.
        num_reported: Number of best candidates to measure on the second half.
        seed: Seed of the split into halves.

    Returns:
        No metadata first, then the candidates in descending order of their first half.
    """
    order = list(range(num_documents))
    random.Random(seed).shuffle(order)
    first, second = sorted(order[: num_documents // 2]), sorted(order[num_documents // 2 :])
    plain = Candidate(name="no metadata", prefix="")
    on_first = {c: mean_and_error(score(c.prefix, first))[0] for c in [plain, *candidates]}
    ranked = sorted(candidates, key=lambda c: (-on_first[c], c.name))
    without = score("", second)
    results = []
    for place, candidate in enumerate([plain, *ranked]):
        result: dict[str, Any] = {**asdict(candidate), "first_half": on_first[candidate]}
        if place <= num_reported:
            scores = score(candidate.prefix, second) if place else without
            result["second_half"], result["second_half_stderr"] = mean_and_error(scores)
            if place:
                pairs = zip(scores, without, strict=True)
                difference, error = mean_and_error([one - other for one, other in pairs])
                result |= {"difference": difference, "difference_stderr": error}
        results.append(Ranked(**result))
    return results


# ---- Scores ----


class TaskScore:
    """The harness's metric for each document of a task.

    Args:
        evaluation: The harness, with one name looked up.
        model: A `MeCoLM`.
        num_fewshot: Examples before each question, or None for the task's own number.
        metric: The metric, or None for `acc_norm` if the task has it, else `acc`.

    Raises:
        FlagError: If it is not a single task.
    """

    def __init__(
        self, evaluation: Any, model: Any, num_fewshot: int | None, metric: str | None
    ) -> None:
        [name] = evaluation.names
        self._loaded = evaluation.load(name)
        if list(self._loaded["tasks"]) != [name]:
            raise FlagError(
                f"{name!r} stands for several tasks",
                where="--task",
                remedy=f"Name one of them: {', '.join(list(self._loaded['tasks'])[:5])}.",
            )
        self._evaluation, self._model, self._name = evaluation, model, name
        self._num_fewshot, self._metric = num_fewshot, metric
        self.num_documents = len(self._loaded["tasks"][name].eval_docs)

    def __call__(self, prefix: str, documents: list[int]) -> list[float]:
        """Score documents."""
        self._model.condition_on(prefix)
        results = self._evaluation.run(
            self._model,
            self._loaded,
            self._num_fewshot,
            None,
            samples={self._name: documents},
        )
        samples = results["samples"][self._name]
        known = samples[0]["metrics"]
        metric = self._metric or next((m for m in ("acc_norm", "acc") if m in known), known[0])
        try:
            scores = {s["doc_id"]: float(s[metric]) for s in reversed(samples)}
        except (KeyError, TypeError, ValueError):
            raise FlagError(
                f"{metric!r} gives no number for each document of {self._name!r}",
                where="--metric",
                remedy=f"The task has: {', '.join(known)}.",
            ) from None
        return [scores[number] for number in documents]


# ---- The command ----


def add_sweep_urls_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `meco sweep-urls` to its parser."""
    add_model_arguments(parser)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    add_candidates_argument(source.add_argument)
    source.add_argument(
        "--data-path", metavar="PREFIX", help="take what is most frequent in this corpus"
    )
    add("--top", **COUNT, default=20, metavar="N", help="how many of it; default: %(default)s")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--text", type=Path, metavar="FILE", help="a text in each line; .jsonl: the field `text`"
    )
    target.add_argument("--task", metavar="TASK", help="a task of lm-evaluation-harness")
    add_spelled(parser, "--num-fewshot", **SHOTS, metavar="N", help="default: as the task says")
    add_spelled(parser, "--include-path", type=Path, metavar="DIR", help=OWN_TASKS)
    add("--metric", metavar="M", help="of the task; default: acc_norm if it has that, else acc")
    add_spelled(
        parser,
        "--batch-size",
        type=int,
        action=InRange,
        low=1,
        high=MOST_AT_ONCE,
        default=1,
        metavar="N",
        help="of the task; default: 1",
    )
    add("--limit", **COUNT, metavar="N", help="use the first N documents only")
    add(
        "--report",
        **COUNT,
        default=5,
        metavar="N",
        help="how many of the best are measured on the second half; default: %(default)s",
    )
    add("--seed", **SEED, default=0, metavar="S", help="decides the halves; default: %(default)s")
    add("--output", type=Path, metavar="FILE", help="write everything as JSON")
    add("--json", action="store_true", help=JSON_HELP)


def run_sweep_urls(args: argparse.Namespace) -> int:
    """Run `meco sweep-urls`; returns the exit status, 0."""
    _check_flags(args)
    candidates = _candidates(args)
    target = _text_target(args, candidates) if args.task is None else _task_target(args)
    if target.num_documents < _FEWEST_DOCUMENTS:
        raise FlagError(
            f"{counted(target.num_documents, 'document')} cannot be split into two halves",
            where="--text" if args.task is None else "--task",
            remedy=f"Give {_FEWEST_DOCUMENTS} or more; some hundred tell something.",
        )
    with enough_memory("--device", "Give one with more memory, or a smaller --batch-size."):
        results = sweep(
            target.score,
            candidates,
            target.num_documents,
            num_reported=args.report,
            seed=args.seed,
        )
    settings = {"model": str(args.model), "documents": target.num_documents, "seed": args.seed}
    report = {**settings, "results": [asdict(result) for result in results]}
    if args.json:
        print(json_line(report))
    else:
        _print_results(results, target)
    if args.output is not None:
        write_json(args.output, report)
    return 0


@dataclass(frozen=True, kw_only=True)
class _Target:
    """What the candidates are scored on.

    Attributes:
        score: Scores documents under a prefix.
        num_documents: Number of documents.
        unit: Unit of the scores, for the table.
    """

    score: Score
    num_documents: int
    unit: str


def _check_flags(args: argparse.Namespace) -> None:
    for flag, value in (("--num-fewshot", args.num_fewshot), ("--metric", args.metric)):
        if args.task is None and value is not None:
            raise FlagError(
                "only valid with --task",
                where=flag,
                remedy="Leave it out, or give --task in place of --text.",
            )
    if args.output is not None:
        check_result_file(args.output)


def _candidates(args: argparse.Namespace) -> list[Candidate]:
    conditioning = conditioning_of(args)
    check_model(args.model)
    if args.candidates is not None:
        return read_candidates(args.candidates, conditioning)
    return most_frequent(count_prefixes(args.data_path, conditioning), args.top)


def _text_target(args: argparse.Namespace, candidates: Sequence[Candidate]) -> _Target:
    texts = read_texts(args.text)[: args.limit]
    loaded = load_model(args.model, args.device, args.template)
    longest = longest_prefix(loaded, (c.prefix for c in candidates))
    score = TextScore(loaded, texts, longest)
    return _Target(score=score, num_documents=len(texts), unit="nats/token")


def _task_target(args: argparse.Namespace) -> _Target:
    evaluation = open_evaluation([args.task], args.include_path)
    # Late, because lm-evaluation-harness is an extra.
    from megatron_meco.inference.harness_model import load_harness_model

    model = load_harness_model(args.model, args.device, args.template, args.batch_size)
    score = TaskScore(evaluation, model, args.num_fewshot, args.metric)
    num_documents = min(score.num_documents, args.limit or score.num_documents)
    return _Target(score=score, num_documents=num_documents, unit=args.task)


def _print_results(results: list[Ranked], target: _Target) -> None:
    half = target.num_documents // 2
    print(
        f"score: {target.unit}, higher is better; ranked on {half:,} documents, measured again on "
        f"the other {target.num_documents - half:,}"
    )
    width = max(len(result.name) for result in results)
    print(f"{'':{width}}  first half           second half       against no metadata")
    for result in results:
        line = f"{result.name:{width}}  {result.first_half:10.4f}"
        if result.second_half is not None:
            line += f"  {result.second_half:9.4f} ± {result.second_half_stderr:.4f}"
        if result.difference is not None:
            line += f"       {result.difference:+.4f} ± {result.difference_stderr:.4f}"
        print(line)
    print(
        f"Best on the first half: '{results[1].name}'. The second half is its held-out score; "
        "picking a candidate by the second half would bias that score."
    )
