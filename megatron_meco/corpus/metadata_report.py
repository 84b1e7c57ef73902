"""`meco metadata PREFIX`: what the metadata of a corpus holds.

For each field the share of documents that have it, the number of distinct values and the most
frequent ones; for URLs the most frequent hosts with their share of documents and of tokens, which
is what a template on `{url.host}` sees. One pass over each column; memory holds the distinct
values.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from megatron_meco.corpus.index_file import check_index
from megatron_meco.corpus.metadata import check_row_count, metadata_path, open_metadata
from megatron_meco.corpus.outputs import check_local
from megatron_meco.corpus.url import host
from megatron_meco.corpus.wording import counted
from megatron_meco.errors import DataError, FlagError

_SAMPLED_VALUES = 1000


@dataclass
class FieldReport:
    """What one field holds."""

    name: str
    """The field."""

    present: float
    """The share of documents that have a value."""

    distinct: int
    """The number of distinct values."""

    most_frequent: list[tuple[str, float]]
    """Values and their share of all documents, the most frequent first."""

    hosts: int = 0
    """Distinct hosts, where the values are URLs."""

    most_frequent_hosts: list[tuple[str, float]] | None = None
    """Hosts and their share of all documents; None where the values are no URLs."""

    tokens_of_hosts: list[float] | None = None
    """The share of all tokens that documents of these hosts have; None without `.idx`."""


def report_metadata(prefix: str, top: int = 10) -> tuple[int, list[FieldReport]]:
    """Look through the metadata of a corpus.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.
        top: How many values to name.

    Returns:
        The number of documents, and what each field holds.

    Raises:
        DataError: There is no metadata, or it cannot be read.
    """
    table = open_metadata(prefix)
    tokens = _tokens(prefix)
    reports = []
    for name in table.column_names:
        column = table[name]
        values = _counts([pc.value_counts(chunk) for chunk in column.chunks])
        report = FieldReport(
            name=name,
            present=1 - column.null_count / max(len(column), 1),
            distinct=len(values),
            most_frequent=_shares(values, top, len(column)),
        )
        if holds_urls(name, column):
            hosts = _counts([pc.value_counts(host(chunk)) for chunk in column.chunks])
            report.hosts = len(hosts)
            report.most_frequent_hosts = _shares(hosts, top, len(column))
            if tokens is not None:
                sums = _tokens_of_hosts(column, tokens)
                total = max(1, int(tokens.sum()))
                report.tokens_of_hosts = [
                    sums[name] / total for name, _ in report.most_frequent_hosts
                ]
        reports.append(report)
    return table.num_rows, reports


def _tokens(prefix: str) -> np.ndarray[Any, Any] | None:
    """Tokens of each document, EOD included; None without an index."""
    if not Path(f"{prefix}.idx").is_file():
        return None
    index = check_index(prefix)
    check_row_count(prefix, index.num_documents)
    return np.diff(index.bounds(0, index.num_documents))


def _tokens_of_hosts(column: pa.ChunkedArray, tokens: np.ndarray[Any, Any]) -> Counter[str]:
    sums: Counter[str] = Counter()
    row = 0
    for chunk in column.chunks:
        part = pa.table({"host": host(chunk), "tokens": tokens[row : row + len(chunk)]})
        row += len(chunk)
        found = part.group_by("host").aggregate([("tokens", "sum")]).to_pydict()
        pairs = zip(found["host"], found["tokens_sum"], strict=True)
        sums.update({name: number for name, number in pairs if name is not None})
    return sums


def _counts(parts: list[Any]) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        values, counts = part.field("values").to_pylist(), part.field("counts").to_pylist()
        total.update({v: n for v, n in zip(values, counts, strict=True) if v is not None})
    return total


def _shares(counts: Counter[str], top: int, num_rows: int) -> list[tuple[str, float]]:
    # By name among equals: a counter keeps them in the order of the file.
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(value, count / num_rows) for value, count in ordered[:top]]


def holds_urls(name: str, column: pa.ChunkedArray) -> bool:
    """Whether a column counts as one of URLs: by its name, or by most of its first values."""
    sample = column.drop_null().slice(0, _SAMPLED_VALUES)
    if len(sample) == 0:
        return False
    if name.rsplit(".", 1)[-1].lower() in ("url", "uri"):
        return True
    return bool(pc.mean(pc.match_substring_regex(sample, r"^https?://")).as_py() > 0.5)


def add_metadata_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco metadata` to its parser."""
    parser.add_argument("prefix", metavar="PREFIX", help="as in --data-path")
    parser.add_argument("--top", type=int, default=10, help="values to name; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run_metadata(args: argparse.Namespace) -> int:
    """Run `meco metadata`.

    Args:
        args: The parsed arguments of `add_metadata_arguments`.

    Returns:
        The exit status, 0.

    Raises:
        DataError: There is no metadata, or it cannot be read.
    """
    check_local(args.prefix, "PREFIX")
    if args.top < 0:
        raise FlagError(f"{args.top} values", where="--top", remedy="Use 0 or a number above it.")
    path = metadata_path(args.prefix)
    if path.exists() and not path.is_file():
        # A pipe would be waited for, for ever.
        raise DataError("no plain file", where=str(path), remedy="Remove it.")
    num_documents, reports = report_metadata(args.prefix, args.top)
    if args.json:
        fields = [asdict(report) for report in reports]
        print(json.dumps({"documents": num_documents, "fields": fields}, ensure_ascii=False))
        return 0
    console = Console(highlight=False, markup=False)
    console.print(counted(num_documents, "document"))
    for report in reports:
        console.print(
            f"\n{report.name}: {100 * report.present:.2f} % of documents, "
            f"{counted(report.distinct, 'distinct value')}"
        )
        if report.most_frequent_hosts is None:
            _print_shares(console, report.most_frequent)
        else:
            console.print(counted(report.hosts, "distinct host"))
            _print_shares(console, report.most_frequent_hosts, report.tokens_of_hosts)
    return 0


def _print_shares(
    console: Console, shares: list[tuple[str, float]], tokens: list[float] | None = None
) -> None:
    table = Table(show_header=tokens is not None, box=None, pad_edge=False, header_style="")
    table.add_column("documents", justify="right", no_wrap=True)
    if tokens is not None:
        table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("host", overflow="ellipsis", no_wrap=True)
    for i, (value, share) in enumerate(shares):
        more = [] if tokens is None else [f"{100 * tokens[i]:.3f} %"]
        table.add_row(f"{100 * share:.3f} %", *more, value.replace("\n", " ")[:200])
    console.print(table)
