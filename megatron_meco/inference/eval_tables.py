"""The tables of `meco eval`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_meco.inference.paper import PAPER_TASKS
from megatron_meco.wording import aligned, counted

if TYPE_CHECKING:
    # Importing it loads torch, and this module only reads its results.
    from megatron_meco.inference.eval_pairs import Row
    from megatron_meco.inference.harness_tasks import TaskResult
    from megatron_meco.inference.paired import Paired

AVERAGE = "average of the paper's ten"


def of_paper[Item](
    entries: Iterable[tuple[str, int | None, str, Item]],
) -> dict[str, list[Item]]:
    """Choose one entry for each of the paper's ten tasks.

    Args:
        entries: Task, number of examples, metric, and the entry.

    Returns:
        The entries in the paper's metric, by number of examples, where all ten tasks have one.
    """
    metric_of = {task.name: task.metric for task in PAPER_TASKS}
    known = [entry for entry in entries if metric_of.get(entry[0]) == entry[2]]
    chosen = {}
    for shots in sorted({shots for _, shots, _, _ in known if shots is not None}):
        items = {}
        for task, number, _, item in known:
            # TruthfulQA has its examples in the question, and counts for both.
            if number == shots or (number == 0 and task not in items):
                items[task] = item
        if items.keys() == metric_of.keys():
            chosen[str(shots)] = list(items.values())
    return chosen


def print_results(
    results: Sequence[TaskResult], averages: Mapping[str, Mapping[str, float | None]]
) -> None:
    """Print each task without and with metadata, and notes on prefixes and cut requests."""
    rows = [["task", "shots", "metric", "documents", "plain", "conditioned", "difference"]]
    for result in results:
        for one in result.comparisons:
            documents = f"{one.num_documents:,}" if one.num_documents else "-"
            shots = _shots(result.num_fewshot)
            rows.append([result.task, shots, one.metric, documents, *_cells(asdict(one))])
    for shots, average in averages.items():
        rows.append([AVERAGE, shots, "", "", *_cells(average)])
    print("\n".join(aligned(rows, 3)))
    for task, prefix in dict.fromkeys((r.task, r.prefix) for r in results if r.prefix):
        print(f"{task} is conditioned on {prefix!r}")
    for result in results:
        for condition, count in result.num_cut.items():
            tell_cut(result.task, condition, count)


def tell_cut(task: str, condition: str, count: int) -> None:
    """Report requests that were too long, on stderr."""
    if count:
        what = "from the left" if condition == "plain" else "behind the prefix"
        print(
            f"{task}, {condition}: {counted(count, 'request')} too long for the model, cut {what}",
            file=sys.stderr,
        )


def print_pairs(
    title: str, first: str, second: str, rows: Sequence[Row], averages: Mapping[str, Paired]
) -> None:
    """Print a paired comparison.

    Args:
        title: Printed above the table.
        first: Title of the first side.
        second: Title of the second side.
        rows: Its rows; the condition and the number of dropped documents only if any has one.
        averages: Mean over the paper's tasks, by condition and number of examples.
    """
    with_condition = any(row.condition for row in rows)
    with_dropped = any(row.num_dropped for row in rows) or not with_condition
    header = ["task", "shots", *["condition"] * with_condition, "metric", "documents"]
    header += ["dropped"] * with_dropped
    table = [[*header, first, second, "difference", "95 % interval"]]
    for row in rows:
        pair = row.pair
        cells = [row.task, _shots(row.num_fewshot), *[row.condition] * with_condition, row.metric]
        cells += [f"{pair.num_documents:,}", *[f"{row.num_dropped:,}"] * with_dropped]
        table.append([*cells, *_pair_cells(pair)])
    for name, pair in averages.items():
        shots, _, condition = name.partition(" ")
        cells = [AVERAGE, shots, *[condition] * with_condition, "", ""]
        table.append([*cells, *[""] * with_dropped, *_pair_cells(pair)])
    print(f"\n{title}")
    print("\n".join(aligned(table, 3 + with_condition)))


def _pair_cells(pair: Paired) -> list[str]:
    interval = "-"
    if pair.low is not None and pair.high is not None:
        interval = f"[{pair.low:+.4f}, {pair.high:+.4f}]"
    return [
        _with_error(pair.first, None),
        _with_error(pair.second, None),
        _with_error(pair.difference, pair.stderr, sign="+"),
        interval,
    ]


def _shots(number: int | None) -> str:
    return "-" if number is None else str(number)


def _cells(row: Mapping[str, Any]) -> list[str]:
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
