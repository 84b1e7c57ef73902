"""The metadata side file: `PREFIX.metadata.arrow`, row i is what is known of document i.

An Arrow IPC *file* with one string column per field; a null means that the document lacks the
field. Reading maps the file into memory, so opening costs the footer (some microseconds per 65,536
documents) and a column costs nothing until it is used. Given up: compression, because a compressed
column cannot be mapped, and types other than strings, because a prefix is text.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from megatron_meco.errors import DataError
from megatron_meco.whole_file import whole_file

_SUFFIX = ".metadata.arrow"
_ROWS_PER_BATCH = 65_536
# String columns count their bytes in int32: batches of long values are cut well before that.
_BYTES_PER_BATCH = 64 << 20
_REBUILD = (
    "Write it again with `meco prepare`, or attach metadata to existing files with `meco attach`."
)


def metadata_path(prefix: str | os.PathLike[str]) -> Path:
    """Return where the metadata of the data at `prefix` lies."""
    return Path(f"{os.fspath(prefix)}{_SUFFIX}")


def open_metadata(prefix: str | os.PathLike[str]) -> pa.Table:
    """Open the metadata of a corpus without reading it.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.

    Returns:
        A table over the mapped file, one row per document.

    Raises:
        DataError: The file is missing, damaged, or not such a file.
    """
    path = metadata_path(prefix)
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        table.validate()
    except FileNotFoundError:
        raise DataError("no metadata file", where=str(path), remedy=_REBUILD) from None
    except (pa.ArrowException, OSError) as error:
        what = f"not a readable Arrow file ({str(error).splitlines()[0]})"
        raise DataError(what, where=str(path), remedy=_REBUILD) from None
    for field in table.schema:
        if not _is_text(field.type):
            what = f"column {field.name!r} holds {field.type}, not strings"
            raise DataError(what, where=str(path), remedy=_REBUILD)
    return table


def check_row_count(prefix: str | os.PathLike[str], num_documents: int) -> None:
    """Refuse metadata that does not have exactly one row per document.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.
        num_documents: How many documents its index holds.

    Raises:
        DataError: The counts differ, or the metadata cannot be opened.
    """
    num_rows = open_metadata(prefix).num_rows
    if num_rows != num_documents:
        what = f"{num_rows:,} rows of metadata for {num_documents:,} documents"
        raise DataError(what, where=str(metadata_path(prefix)), remedy=_REBUILD)


class MetadataWriter:
    """Writes a metadata file row by row group; it appears under its name only when complete.

    Use it as a context manager: leaving it normally publishes the file in place of an older one,
    leaving it by an exception removes what was written. The file is there from the construction on,
    under a temporary name.

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
        """Append rows, given as one list of values per field.

        Args:
            columns: The values, in the order of the fields and all of one length.
        """
        arrays = [pa.array(values, pa.string()) for values in columns]
        self.append_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))

    def append_batch(self, batch: pa.RecordBatch) -> None:
        """Append rows that are in Arrow's form already.

        Args:
            batch: String columns in the order of the fields.
        """
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
        # Joined first: every batch costs a footer entry and a chunk in every later operation.
        if self._pending:
            self._writer.write_table(pa.Table.from_batches(self._pending).combine_chunks())
            self._pending = []


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
