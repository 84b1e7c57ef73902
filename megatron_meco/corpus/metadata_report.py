"""`meco metadata PREFIX`: what the metadata of a corpus holds.

For each field the share of documents that have it, the number of distinct values and the most
frequent ones. For URLs the most frequent hosts with their share of documents and of tokens, which
is what a template on `{url.host}` sees. One pass over each column; memory holds the distinct
values.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from megatron_meco.corpus.index_file import CorpusIndex, check_index
from megatron_meco.corpus.manifest import check_checksum
from megatron_meco.corpus.metadata import (
    METADATA_SUFFIX,
    check_row_count,
    metadata_path,
    open_metadata,
)
from megatron_meco.corpus.outputs import check_local
from megatron_meco.corpus.url import host
from megatron_meco.errors import DataError, FlagError
from megatron_meco.wording import counted

_SAMPLED_VALUES = 1000
_DOCUMENTS_AT_ONCE = 1 << 20
_EMPTY = {
    "value": pa.array([], pa.large_string()),
    "documents": pa.array([], pa.int64()),
    "tokens": pa.array([], pa.int64()),
}


@dataclass
class FieldReport:
    """The content of one field.

    Attributes:
        name: The field.
        present: Share of documents that have a value.
        distinct: Number of distinct values.
        most_frequent: Values and their share of all documents, the most frequent first.
        hosts: Distinct hosts, if the values are URLs.
        most_frequent_hosts: Hosts and their share of all documents; None if the values are no URLs.
        tokens_of_hosts: Share of all tokens in documents of these hosts; None without `.idx`.
    """

    name: str
    present: float
    distinct: int
    most_frequent: list[tuple[str, float]]
    hosts: int = 0
    most_frequent_hosts: list[tuple[str, float]] | None = None
    tokens_of_hosts: list[float] | None = None


def report_metadata(prefix: str, top: int = 10) -> tuple[int, list[FieldReport]]:
    """Report the number of documents and the content of each field.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.
        top: Number of values to name.

    Raises:
        DataError: There is no metadata, it cannot be read, or a file is damaged.
    """
    table = open_metadata(prefix)
    index = open_undamaged_index(prefix) if Path(f"{prefix}.idx").is_file() else None
    if index is not None:
        check_row_count(prefix, index.num_documents)
    check_checksum(prefix, METADATA_SUFFIX)
    reports = []
    for name in table.column_names:
        column = table[name]
        values = count_values(column, index).values
        report = FieldReport(
            name=name,
            present=1 - column.null_count / max(len(column), 1),
            distinct=len(values),
            most_frequent=_shares(values, top, len(column)),
        )
        if holds_urls(name, column):
            hosts = count_values(column, index, host).values
            report.hosts = len(hosts)
            report.most_frequent_hosts = _shares(hosts, top, len(column))
            if index is not None:
                total = max(1, len(index.tokens))
                report.tokens_of_hosts = [
                    number / total for number in hosts["tokens"][:top].to_pylist()
                ]
        reports.append(report)
    return table.num_rows, reports


def open_undamaged_index(prefix: str) -> CorpusIndex:
    """Open a corpus and refuse an index that is broken or another one than was prepared.

    An index with other document lengths can agree with itself, so its checksum is compared too.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.

    Raises:
        DataError: As `check_index` and `check_checksum`.
    """
    index = check_index(prefix)
    check_checksum(prefix, ".idx")
    return index


@dataclass(frozen=True)
class ValueCounts:
    """How often each value of a column occurs.

    Attributes:
        values: Columns `value`, `documents`, `tokens`; the most frequent first, equally frequent
            ones in alphabetical order.
        without: Documents without a value.
        is_exact: False if rare values were dropped while counting.
    """

    values: pa.Table
    without: int
    is_exact: bool


def count_values(
    column: pa.ChunkedArray,
    index: CorpusIndex | None,
    transform: Callable[[pa.ChunkedArray], pa.ChunkedArray] | None = None,
    most: int | None = None,
) -> ValueCounts:
    """Count the documents and tokens of each distinct value.

    Args:
        column: One text per document.
        index: The corpus; None: tokens are not counted.
        transform: Applied to the texts first, such as `url.host`.
        most: Approximate number of distinct values to hold in memory; beyond it, those with the
            fewest tokens are dropped.
    """
    total = pa.table(_EMPTY)
    waiting: list[pa.Table] = []
    without = 0
    is_exact = True
    for begin in range(0, len(column), _DOCUMENTS_AT_ONCE):
        texts = column.slice(begin, _DOCUMENTS_AT_ONCE)
        if transform is not None:
            texts = transform(texts)
        texts = texts.cast(pa.string()).cast(pa.large_string())
        without += texts.null_count
        tokens = np.zeros(len(texts), np.int64)
        if index is not None:
            tokens = np.diff(index.bounds(begin, begin + len(texts)))
        ones = np.ones(len(texts), np.int64)
        part = pa.table({"value": texts, "documents": ones, "tokens": tokens})
        waiting.append(_summed([part.filter(pc.is_valid(part["value"]))]))
        # Rarely, because each sum visits all distinct values so far.
        if sum(map(len, waiting)) > max(len(total), _DOCUMENTS_AT_ONCE):
            total, waiting = _summed([total, *waiting]), []
            if most is not None and len(total) > most:
                is_exact = False
                total = total.sort_by([("tokens", "descending")]).slice(0, most)
    total = _summed([total, *waiting])
    order = [("documents", "descending"), ("value", "ascending")]
    return ValueCounts(total.sort_by(order), without, is_exact)


def _summed(parts: list[pa.Table]) -> pa.Table:
    groups = pa.concat_tables(parts).group_by("value")
    sums = groups.aggregate([("documents", "sum"), ("tokens", "sum")])
    return sums.rename_columns(["value", "documents", "tokens"])


def _shares(counts: pa.Table, top: int, num_rows: int) -> list[tuple[str, float]]:
    first = counts.slice(0, top).to_pydict()
    pairs = zip(first["value"], first["documents"], strict=True)
    return [(value, count / num_rows) for value, count in pairs]


def holds_urls(name: str, column: pa.ChunkedArray) -> bool:
    """Whether a column holds URLs, by its name or by most of its first values."""
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
    """Run `meco metadata`; returns the exit status, 0."""
    check_local(args.prefix, "PREFIX")
    if args.top < 0:
        raise FlagError(f"{args.top} values", where="--top", remedy="Use 0 or a number above it.")
    path = metadata_path(args.prefix)
    if path.exists() and not path.is_file():
        # Opening a pipe would block forever.
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
