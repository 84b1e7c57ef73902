"""The metadata side file `PREFIX.metadata.arrow`: row i belongs to document i.

An Arrow IPC *file* with one string column per field; null means that the document lacks the field.
Reading maps the file into memory. Arrow trusts what it maps, and an offset that points outside ends
the process, so opening reads and checks all of it (about 4 GB/s). The names of the fields and the
number of rows cost the footer only, some microseconds per 65,536 documents. Columns are not
compressed, because a compressed column cannot be mapped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from megatron_meco.corpus.manifest import note_checksum, read_manifest
from megatron_meco.errors import DataError
from megatron_meco.whole_file import whole_file

METADATA_SUFFIX = ".metadata.arrow"
"""The end of the file's name."""
_ROWS_PER_BATCH = 65_536
# String columns have int32 offsets, so batches of long values are cut well below 2 GiB.
_BYTES_PER_BATCH = 64 << 20
_REBUILD = (
    "Write it again with `meco prepare`, or attach metadata to existing files with `meco attach`."
)


def metadata_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the path of the metadata of the corpus at `prefix`."""
    return Path(f"{os.fspath(prefix)}{METADATA_SUFFIX}")


def open_metadata(prefix: str | os.PathLike[str]) -> pa.Table:
    """Open the metadata of a corpus and check every value, without copying any.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.

    Returns:
        A table over the mapped file, one row per document; every value is UTF-8.

    Raises:
        DataError: The file is missing or damaged; names the first damaged row.
    """
    table = _map_metadata(prefix)
    try:
        table.validate(full=True)
    except pa.ArrowException:
        name, row, reason = _first_damage(table)
        what = f"column {name!r} is damaged at row {row:,} ({reason})"
        raise DataError(what, where=str(metadata_path(prefix)), remedy=_REBUILD) from None
    return table


def describe_metadata(prefix: str | os.PathLike[str]) -> tuple[list[str], int]:
    """Return the names of the fields and the number of rows from the footer; no value is read.

    Raises:
        DataError: The file is missing or not such a file.
    """
    table = _map_metadata(prefix)
    return table.column_names, table.num_rows


def check_row_count(prefix: str | os.PathLike[str], num_documents: int) -> None:
    """Refuse metadata that does not have one row per document.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.
        num_documents: Number of documents in its index.

    Raises:
        DataError: The counts differ, or the metadata cannot be opened.
    """
    _, num_rows = describe_metadata(prefix)
    if num_rows != num_documents:
        what = f"{num_rows:,} rows of metadata for {num_documents:,} documents"
        raise DataError(what, where=str(metadata_path(prefix)), remedy=_REBUILD)


class MetadataWriter:
    """Writes a metadata file batch by batch.

    A context manager: leaving it normally publishes the file in place of an earlier one, leaving it
    by an exception removes what was written. Until then the file has a temporary name.

    Args:
        prefix: The corpus that the metadata belongs to.
        fields: The column names, in order.

    Raises:
        DataError: The file cannot be written, now or later.
    """

    def __init__(self, prefix: str | os.PathLike[str], fields: list[str]) -> None:
        self.path = metadata_path(prefix)
        self.num_rows = 0
        self._schema = pa.schema(
            [(name, pa.string()) for name in fields], metadata={"megatron_meco.format": "1"}
        )
        self._pending: list[pa.RecordBatch] = []
        with ExitStack() as stack:
            file = stack.enter_context(whole_file(self.path, self._cannot_write))
            self.temporary_path = Path(file.name)
            self._writer = pa.ipc.new_file(file, self._schema)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._flush()
            self._writer.close()

    def append(self, columns: list[list[str | None]]) -> None:
        """Append rows, given as one list of values per field."""
        arrays = [pa.array(values, pa.string()) for values in columns]
        self.append_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))

    def append_batch(self, batch: pa.RecordBatch) -> None:
        """Append a batch of string columns in the order of the fields."""
        self.num_rows += batch.num_rows
        self._pending.append(batch)
        if (
            sum(part.num_rows for part in self._pending) >= _ROWS_PER_BATCH
            or sum(part.nbytes for part in self._pending) >= _BYTES_PER_BATCH
        ):
            self._flush()

    def _cannot_write(self, reason: str) -> DataError:
        return DataError(
            f"cannot be written ({reason})",
            where=str(self.path),
            remedy="Free space in its folder, or make the folder one that can be written.",
        )

    def _flush(self) -> None:
        # Joined: every batch costs a footer entry, and a chunk in every later operation.
        if self._pending:
            self._writer.write_table(pa.Table.from_batches(self._pending).combine_chunks())
            self._pending = []


@contextmanager
def replace_metadata(prefix: str | os.PathLike[str], fields: list[str]) -> Iterator[MetadataWriter]:
    """Write the metadata of a complete corpus and note its checksum in the manifest.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.
        fields: The column names, in order.

    Yields:
        A writer. The file appears when the block ends without an error.

    Raises:
        DataError: The file or the manifest cannot be written, or the manifest is damaged.
    """
    with MetadataWriter(prefix, fields) as writer:
        yield writer
        read_manifest(prefix)  # a damaged one is refused while nothing has been replaced
    note_checksum(prefix, METADATA_SUFFIX)


def _map_metadata(prefix: str | os.PathLike[str]) -> pa.Table:
    """Return the table of a metadata file; types are checked, values are not."""
    path = metadata_path(prefix)

    def refuse(what: str) -> DataError:
        return DataError(what, where=str(path), remedy=_REBUILD)

    try:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            # Before a batch is read: other types may be compressed, nested or dictionaries.
            for field in reader.schema:
                if not _is_text(field.type):
                    raise refuse(f"column {field.name!r} holds {field.type}, not strings")
            names = reader.schema.names
            table = reader.read_all()
        table.validate()
    except FileNotFoundError:
        raise refuse("no metadata file") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise refuse(f"not a readable Arrow file ({reason})") from None
    if len(set(names)) < len(names):
        raise refuse(f"several columns of one name among {', '.join(names)}")
    return table


def _first_damage(table: pa.Table) -> tuple[str, int, str]:
    """Return column, row and reason of the first damage in a table that is not valid."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        row = 0
        for chunk in column.chunks:
            if reason := _damage(chunk):
                # By bisection, because Arrow names the row only for some kinds of damage.
                rows = chunk
                while len(rows) > 1:
                    half = len(rows) // 2
                    first = _damage(rows.slice(0, half))
                    rows = rows.slice(0, half) if first else rows.slice(half)
                    row += 0 if first else half
                    reason = first or reason
                return name, row, reason
            row += len(chunk)
    raise AssertionError("a table is damaged and its columns are not")


def _damage(array: pa.Array) -> str:
    try:
        array.validate(full=True)
    except pa.ArrowException as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
