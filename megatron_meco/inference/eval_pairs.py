"""What `meco eval` compares document by document: right and wrong metadata, and two models.

Both comparisons use the answers to the same documents, so their errors are paired. Documents that
could only get their own metadata as the wrong one count on neither side.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.inference.harness_tasks import (
    Document,
    Evaluation,
    Run,
    Scores,
    TaskResult,
    evaluate_shuffled,
)
from megatron_meco.inference.model_folder import check_model, read_config
from megatron_meco.inference.paired import NORMAL, Paired, deal_wrong, paired
from megatron_meco.wording import one_line

Wrong = dict[str, dict[Document, str]]
"""The wrong prefixes of documents, by the name that was evaluated; dropped ones have none."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """All answers of one model.

    Attributes:
        results: Without and with metadata.
        shuffled: Values per document under wrong metadata, by run and task.
        num_cut: Number of requests that were cut under wrong metadata, by run and task.
    """

    results: list[TaskResult]
    shuffled: dict[tuple[Run, str], Scores] = field(default_factory=dict)
    num_cut: dict[tuple[Run, str], int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of one task, compared.

    Attributes:
        task: The task.
        num_fewshot: Examples before each question; None for a group whose tasks differ.
        metric: The metric.
        pair: The comparison.
        condition: What is compared between two models; empty for right and wrong metadata.
        num_dropped: Documents that could only get their own metadata as the wrong one.
    """

    task: str
    num_fewshot: int | None
    metric: str
    pair: Paired
    condition: str = ""
    num_dropped: int = 0

    def report(self, first: str, second: str) -> dict[str, Any]:
        """Return the row for a JSON file, with these names for the two sides."""
        row = asdict(self)
        pair = row.pop("pair")
        row |= {first: pair.pop("first"), second: pair.pop("second"), **pair}
        return row


# ---- Wrong metadata ----


def deal_prefixes(
    results: Sequence[TaskResult], seed: int, others: Sequence[str] | None = None
) -> Wrong:
    """Deal a wrong prefix to each document that was evaluated with metadata.

    Args:
        results: The results with the right prefixes.
        seed: Seed of the dealing.
        others: Prefixes to deal, or None for those of the other documents of all tasks.
    """
    own = {
        (result.run.name, document): result.prefix
        for result in results
        if result.run is not None and result.prefix
        for values in result.scores["conditioned"].values()
        for document in values
    }
    wrong: Wrong = {name: {} for name, _ in own}
    for (name, document), prefix in zip(
        own, deal_wrong(list(own.values()), seed, others), strict=True
    ):
        if prefix is not None:
            wrong[name][document] = prefix
    return wrong


def evaluate_wrong(evaluation: Evaluation, model: Any, arm: Arm, wrong: Wrong) -> Arm:
    """Evaluate every task that has metadata under wrong metadata; return the arm with the answers.

    Args:
        evaluation: Holds the tasks.
        model: A `MeCoLM`, that of `arm`.
        arm: The answers with the right metadata.
        wrong: From `deal_prefixes`.
    """
    runs = {result.run for result in arm.results if result.run is not None and result.prefix}
    shuffled, num_cut = {}, {}
    for run in sorted(runs, key=lambda run: (run.name, run.num_fewshot or 0)):
        dealt = wrong.get(run.name, {})
        scores, cut = evaluate_shuffled(evaluation, model, run, dealt)
        for task, metrics in scores.items():
            shuffled[run, task] = {
                metric: {key: value for key, value in values.items() if key in dealt}
                for metric, values in metrics.items()
            }
            num_cut[run, task] = cut
    return Arm(results=arm.results, shuffled=shuffled, num_cut=num_cut)


def right_and_wrong(arm: Arm) -> list[Row]:
    """Compare right with wrong metadata, per task and metric."""
    rows = []
    for result in arm.results:
        wrong = {} if result.run is None else arm.shuffled.get((result.run, result.task), {})
        for metric, values in wrong.items():
            rows.append(_row(result, metric, result.scores["conditioned"][metric], values))
    return rows


def _row(
    result: TaskResult,
    metric: str,
    values: Mapping[Document, float],
    others: Mapping[Document, float],
    condition: str = "",
) -> Row:
    pair = paired(values, others)
    return Row(
        task=result.task,
        num_fewshot=result.num_fewshot,
        metric=metric,
        pair=pair,
        condition=condition,
        num_dropped=len(values) - pair.num_documents,
    )


# ---- Two models ----


def check_pair(model: Path, against: Path) -> None:
    """Refuse two models whose difference would not be one of the models.

    Raises:
        FlagError: If they are one folder, or read texts as different tokens.
    """
    where = f"--against {against}"
    with about_against(against):
        check_model(against)
    if os.path.samefile(model, against):
        raise FlagError("is the same folder as --model", where=where, remedy="Name another one.")
    folders = {"--model": model, "--against": against}
    bos = {flag: _begin_token(folder) for flag, folder in folders.items()}
    if len(set(bos.values())) > 1:
        raise FlagError(
            f"begins documents with token {bos['--against']}, and --model with {bos['--model']}",
            where=where,
            remedy="Compare models whose documents begin alike.",
        )
    if _tokenizer(model, "--model") != _tokenizer(against, "--against"):
        raise FlagError(
            "has another tokenizer than --model",
            where=where,
            remedy="Compare models with the same tokenizer: with two, prefixes and requests are "
            "different tokens, and the difference is not one of the models.",
        )


def _begin_token(folder: Path) -> Any:
    return read_config(folder, MeCoError).get("bos_token_id")


def _tokenizer(folder: Path, flag: str) -> Any:
    """Return all that decides the tokens of a text."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    # A library may raise anything for files that it did not write.
    except Exception as error:
        raise FlagError(
            f"its tokenizer cannot be read ({one_line(error)})",
            where=f"{flag} {folder}",
            remedy="Name a folder of `meco export`.",
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    content = json.loads(backend.to_str())
    # The other parts add tokens around a text or turn tokens into text.
    return [content.get(part) for part in ("added_tokens", "normalizer", "pre_tokenizer", "model")]


@contextlib.contextmanager
def about_against(folder: Path) -> Iterator[None]:
    """Have errors about the folder of `--model` inside the block name `--against` instead."""
    try:
        yield
    except MeCoError as error:
        if error.where not in ("--model", f"--model {folder}"):
            raise
        raise type(error)(
            error.what,
            where=f"--against {folder}",
            remedy=error.remedy.replace("--model", "--against"),
        ) from error


def one_and_other(one: Arm, other: Arm) -> list[Row]:
    """Compare two models, per task, metric and condition.

    Returns:
        Rows for `plain`, `conditioned` and, with wrong metadata, `right - shuffled`: there the
        value of a document is its difference between right and wrong metadata.
    """
    theirs = {(result.run, result.task): result for result in other.results}
    rows = []
    for result in one.results:
        key = (result.run, result.task)
        if result.run is None or key not in theirs:
            continue
        mine, yours = dict(result.scores), dict(theirs[key].scores)
        if result.prefix and one.shuffled:
            mine["right - shuffled"] = _differences(mine, one.shuffled[result.run, result.task])
            yours["right - shuffled"] = _differences(yours, other.shuffled[result.run, result.task])
        for condition, metrics in mine.items():
            for metric, values in metrics.items():
                others = yours.get(condition, {}).get(metric, {})
                rows.append(_row(result, metric, values, others, condition))
    return rows


def _differences(scores: Mapping[str, Scores], wrong: Scores) -> Scores:
    right = scores["conditioned"]
    return {
        metric: {key: right[metric][key] - value for key, value in values.items()}
        for metric, values in wrong.items()
    }


def mean_of_pairs(pairs: Sequence[Paired]) -> Paired:
    """Return the mean over tasks, each with the same weight; the tasks share no documents.

    The interval is that of a normal distribution.
    """
    parts: dict[str, float] = {}
    for name in ("first", "second", "difference"):
        values = [getattr(pair, name) for pair in pairs]
        if None not in values:
            parts[name] = math.fsum(values) / len(pairs)
    errors = [pair.stderr for pair in pairs if pair.stderr is not None]
    if len(errors) == len(pairs) and "difference" in parts:
        error = math.hypot(*errors) / len(pairs)
        low, high = (parts["difference"] + sign * NORMAL * error for sign in (-1, 1))
        parts |= {"stderr": error, "low": low, "high": high}
    return Paired(num_documents=sum(pair.num_documents for pair in pairs), **parts)
