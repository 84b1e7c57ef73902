"""Side files joined to a corpus by key: each document gets the values of the row with its key.

Both sides are spread over temporary files by the 128-bit hash of the key, joined file by file, and
brought back into document order. Memory depends on the size of a part, not on the number of rows.
The disk of the corpus holds the joined columns twice for a while, besides 24 bytes per row and
document. The temporary files have no names, so nothing remains of them after a kill. Keys are equal
if they are the same text. Reading rows costs some microseconds of Python each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megatron_meco.corpus.documents import metadata_of
from megatron_meco.corpus.metadata import metadata_path, open_metadata, replace_metadata
from megatron_meco.corpus.progress import DocumentProgress
from megatron_meco.corpus.text_arrays import hash_halves
from megatron_meco.errors import DataError, FlagError
from megatron_meco.wording import counted

Duplicates = Literal["refuse", "first", "last"]
DUPLICATES: tuple[Duplicates, ...] = ("refuse", "first", "last")
Tables = Iterable[tuple[str, Iterator[list[dict[str, Any]]]]]

_ROWS_AT_ONCE = 1 << 20
_ROWS_PER_BATCH = 1 << 16
# Three sets of files are open at once, and 1,024 is a common limit.
_MOST_PARTS = 200


@dataclass(kw_only=True)
class JoinCounts:
    """What matched and what did not.

    Attributes:
        matched: Documents with a row of their key.
        without_key: Documents whose metadata lacks the key.
        rows_doubled: Rows whose key another row has, beyond the one that is used.
        rows_unused: Rows, of different keys, that match no document.
    """

    documents: int = 0
    matched: int = 0
    without_key: int = 0
    rows: int = 0
    rows_without_key: int = 0
    rows_doubled: int = 0
    rows_unused: int = 0

    def __str__(self) -> str:
        missing = self.documents - self.matched - self.without_key
        return (
            f"{counted(self.matched, 'document')} with a row of the same key, {missing:,} without, "
            f"{self.without_key:,} lack the key; of {counted(self.rows, 'row')} "
            f"{self.rows_unused:,} match no document, {self.rows_doubled:,} are doubled, "
            f"{self.rows_without_key:,} lack the key"
        )


def join_metadata(
    prefix: Path,
    tables: Tables,
    key: str,
    fields: list[str],
    *,
    duplicates: Duplicates = "refuse",
    overwrite: bool = False,
) -> JoinCounts:
    """Add columns to the metadata of a corpus.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.
        tables: For each file its name and its rows, a list at a time.
        key: The field that both sides have.
        fields: The fields of the rows to add.
        duplicates: Which of several rows with the same key counts.
        overwrite: Whether to replace existing columns.

    Raises:
        DataError: The metadata is damaged or lacks the key, keys are doubled, nothing matches, or
            the disk is full. The earlier metadata stays.
        FlagError: A field exists already.
    """
    metadata = open_metadata(prefix)
    where = str(metadata_path(prefix))
    _check_names(metadata.column_names, key, fields, where, overwrite)
    counts = JoinCounts(documents=metadata.num_rows)
    num_parts = min(_MOST_PARTS, 1 + metadata.num_rows // _ROWS_AT_ONCE)
    rows_per_part = max(1, -(-metadata.num_rows // num_parts))
    try:
        with ExitStack() as stack:
            progress = stack.enter_context(DocumentProgress("join", metadata.num_rows))
            values = [(name, pa.large_string()) for name in fields]
            rows = _Parts(prefix.parent, num_parts, [*_KEY, *values], stack)
            documents = _Parts(prefix.parent, num_parts, _KEY, stack)
            joined = _Parts(prefix.parent, num_parts, [("row", pa.int64()), *values], stack)
            files = _spread_rows(tables, key, fields, rows, counts)
            _spread_documents(metadata.column(key), documents, counts)
            doubled: list[int] = []
            for part in range(num_parts):
                table = _read(rows, part, duplicates, counts, doubled)
                if not doubled or duplicates != "refuse":
                    _match(table, documents.read(part), joined, rows_per_part, counts)
            if doubled and duplicates == "refuse":
                raise _refuse_doubled(doubled, counts, key, files)
            if not counts.matched:
                raise DataError(
                    f"no document of {where} has a key of its {counted(counts.rows, 'row')}",
                    where=f"--join {files[0][0]}",
                    remedy=f"Name a field that is the same text in both with --key, not {key!r}.",
                )
            _write(prefix, metadata, fields, joined, rows_per_part, progress)
    except OSError as error:
        raise DataError(
            f"cannot write temporary files ({error.strerror or error})",
            where=str(prefix.parent),
            remedy="Free space in this folder, or make it one that can be written.",
        ) from error
    return counts


_KEY = [("first", pa.uint64()), ("second", pa.uint64()), ("row", pa.int64())]


class _Parts:
    """Rows spread over temporary files by a part number; each part is read once."""

    def __init__(
        self, folder: Path, number: int, fields: list[tuple[str, pa.DataType]], stack: ExitStack
    ) -> None:
        self.number = number
        self._schema = pa.schema(fields)
        self._files = []
        for _ in range(number):
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            self._files.append(stack.enter_context(file))
        self._writers = [pa.ipc.new_stream(file, self._schema) for file in self._files]

    def add(self, parts: NDArray[np.int64], columns: list[pa.Array]) -> None:
        batch = pa.RecordBatch.from_arrays(columns, schema=self._schema)
        order = np.argsort(parts, kind="stable")
        batch = batch.take(pa.array(order))
        borders = np.searchsorted(parts[order], np.arange(self.number + 1))
        for part in np.unique(parts):
            begin, end = borders[part : part + 2]
            self._writers[part].write_batch(batch.slice(begin, end - begin))

    def read(self, part: int) -> Iterator[pa.RecordBatch]:
        self._writers[part].close()
        file = self._files[part]
        file.seek(0)
        yield from pa.ipc.open_stream(file)
        file.truncate(0)

    def table(self, part: int) -> pa.Table:
        return pa.Table.from_batches(self.read(part), self._schema).combine_chunks()


def _check_names(
    there: list[str], key: str, fields: list[str], where: str, overwrite: bool
) -> None:
    if key not in there:
        raise DataError(
            f"no field {key!r} to join by; it holds: {', '.join(there) or 'no fields'}",
            where=where,
            remedy="Name one of these with --key, or attach that field first.",
        )
    if key in fields:
        raise FlagError(
            f"{key!r} is the key already", where="--metadata-fields", remedy="Name other fields."
        )
    replaced = [name for name in fields if name in there]
    if replaced and not overwrite:
        raise FlagError(
            f"{where} has a field {replaced[0]!r} already",
            where="--metadata-fields",
            remedy="Add --overwrite to replace it.",
        )


def _spread_rows(
    tables: Tables, key: str, fields: list[str], rows: _Parts, counts: JoinCounts
) -> list[tuple[str, int]]:
    """Spread the rows of the tables; return each file and the number of its first row."""
    files = []
    keys: list[str | None] = []
    columns: list[list[str | None]] = [[] for _ in fields]

    def flush() -> None:
        first = counts.rows
        counts.rows += len(keys)
        texts = pa.array(keys, pa.string())
        is_key = pc.fill_null(pc.not_equal(texts, ""), False)
        counts.rows_without_key += len(keys) - pc.sum(is_key).as_py() if keys else 0
        numbers = pa.array(np.arange(first, counts.rows))
        values = [pa.array(column, pa.large_string()) for column in columns]
        parts, hashes = _hashed(texts.filter(is_key), rows.number)
        rows.add(parts, [*hashes, *(a.filter(is_key) for a in [numbers, *values])])
        keys.clear()
        for column in columns:
            column.clear()

    for path, lists in tables:
        files.append((path, counts.rows + len(keys)))
        for given in lists:
            keys += [metadata_of(row, key) for row in given]
            for column, name in zip(columns, fields, strict=True):
                column += [metadata_of(row, name) for row in given]
            if len(keys) >= _ROWS_PER_BATCH:
                flush()
    flush()
    return files


def _spread_documents(column: pa.ChunkedArray, documents: _Parts, counts: JoinCounts) -> None:
    begin = 0
    for chunk in column.chunks:
        texts = chunk.cast(pa.string())
        is_key = pc.fill_null(pc.not_equal(texts, ""), False)
        numbers = np.arange(begin, begin + len(texts))[is_key.to_numpy(zero_copy_only=False)]
        parts, hashes = _hashed(texts.filter(is_key), documents.number)
        documents.add(parts, [*hashes, pa.array(numbers)])
        counts.without_key += len(texts) - len(numbers)
        begin += len(texts)


def _hashed(keys: pa.Array, num_parts: int) -> tuple[NDArray[np.int64], list[pa.Array]]:
    """The part of each key, and the two halves of its hash."""
    first, second = hash_halves(keys)
    return (first % np.uint64(num_parts)).astype(np.int64), [pa.array(first), pa.array(second)]


def _numbers(table: pa.Table | pa.RecordBatch, name: str) -> NDArray[Any]:
    return np.asarray(table.column(name).to_numpy())


def _read(
    rows: _Parts, part: int, duplicates: Duplicates, counts: JoinCounts, doubled: list[int]
) -> pa.Table:
    """Return the rows of a part in hash order, each key once."""
    table = rows.table(part)
    keys = [_numbers(table, name) for name in ("first", "second", "row")]
    order = np.lexsort(keys[::-1])
    first, second, number = (values[order] for values in keys)
    same = (first[1:] == first[:-1]) & (second[1:] == second[:-1])
    if same.any():
        counts.rows_doubled += int(same.sum())
        earlier = number[:-1][same]
        least = int(earlier.argmin())
        pair = [int(earlier[least]), int(number[1:][same][least])]
        if not doubled or pair < doubled:
            doubled[:] = pair
        edge = [True] if len(order) else []
        is_kept = np.append(~same, edge) if duplicates == "last" else np.append(edge, ~same)
        order = order[is_kept.astype(bool)]
    return table.take(pa.array(order))


def _match(
    table: pa.Table,
    documents: Iterator[pa.RecordBatch],
    joined: _Parts,
    rows_per_part: int,
    counts: JoinCounts,
) -> None:
    first, second = _numbers(table, "first"), _numbers(table, "second")
    values = table.combine_chunks().drop_columns(["first", "second", "row"])
    is_used = np.zeros(len(first) + 1, dtype=bool)
    # One more row at the end, so that every result of searchsorted is a valid index.
    first, second = np.append(first, np.uint64(0)), np.append(second, np.uint64(0))
    for batch in documents:
        wanted, other = _numbers(batch, "first"), _numbers(batch, "second")
        places = np.searchsorted(first[:-1], wanted)
        while True:
            is_near = (places < len(values)) & (first[places] == wanted)
            is_next = is_near & (second[places] != other)
            if not is_next.any():
                break
            places[is_next] += 1
        places = places[is_near]
        is_used[places] = True
        numbers = _numbers(batch, "row")[is_near]
        counts.matched += len(numbers)
        found = values.take(pa.array(places)).combine_chunks()
        columns = [
            column.chunk(0) if column.num_chunks else pa.array([], pa.large_string())
            for column in found.columns
        ]
        joined.add(numbers // rows_per_part, [pa.array(numbers), *columns])
    counts.rows_unused += len(values) - int(is_used.sum())


def _refuse_doubled(
    doubled: list[int], counts: JoinCounts, key: str, files: list[tuple[str, int]]
) -> DataError:
    def place(number: int) -> str:
        path, first = next((p, f) for p, f in reversed(files) if f <= number)
        return f"{path}, row {number - first + 1:,}"

    return DataError(
        f"has the {key!r} of {place(doubled[0])}; {counted(counts.rows_doubled, 'row')} in all "
        "repeat the key of another",
        where=place(doubled[1]),
        remedy="Fix the table, or choose a row with --duplicates first or last.",
    )


def _write(
    prefix: Path,
    metadata: pa.Table,
    fields: list[str],
    joined: _Parts,
    rows_per_part: int,
    progress: DocumentProgress,
) -> None:
    names = [*metadata.column_names, *(f for f in fields if f not in metadata.column_names)]
    with replace_metadata(prefix, names) as writer:
        for part in range(joined.number):
            old = metadata.slice(part * rows_per_part, rows_per_part)
            new = joined.table(part)
            places = np.full(len(old), -1, dtype=np.int64)
            places[_numbers(new, "row") - part * rows_per_part] = np.arange(len(new))
            for begin in range(0, len(old), _ROWS_PER_BATCH):
                rows = old.slice(begin, _ROWS_PER_BATCH)
                these = places[begin : begin + _ROWS_PER_BATCH]
                found = new.take(pa.array(these, mask=these < 0))
                columns = [
                    (found if name in fields else rows).column(name).combine_chunks()
                    for name in names
                ]
                writer.append_batch(
                    pa.RecordBatch.from_arrays(
                        [column.cast(pa.string()) for column in columns], names=names
                    )
                )
                progress.update(writer.num_rows, writer.num_rows)
