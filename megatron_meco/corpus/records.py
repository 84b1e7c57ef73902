"""Read the records of JSONL, Parquet, Arrow, CSV and WARC files, each file to its end.

A record is a dictionary of values by field, or a `BadRecord` that says why it cannot be used. A
file that ends early is a `DataError`. The libraries behind the formats take many such files for
whole ones, so the end is checked here: the last line of JSONL, the marker of an Arrow stream, the
line end of the last CSV row, the length and the empty lines of a WARC record. A file that was cut
between two records is not noticed: it is whole by its own account.

JSON costs about one microsecond per kilobyte (orjson). What orjson refuses is parsed again by the
standard library, which accepts `NaN` and lone surrogates. Of duplicate keys the last one wins, and
integers beyond 64 bits become floating point. Of tables only the requested columns are read. The
offsets of Arrow batches are validated before use.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_meco.corpus.input_bytes import (
    Part,
    count_lines,
    open_decompressed,
    open_source,
    read_chunks,
)
from megatron_meco.errors import DataError
from megatron_meco.wording import counted, first_line, is_utf8

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Texts may have megabytes each, and a thousand of them gigabytes.
_PARQUET_ROWS = 100
_FIELD_CHARACTERS = 1 << 30
_ARROW_MAGIC = b"ARROW1"
# Most bytes between the last batch and the footer: an end marker and alignment.
_ARROW_SLACK = 256
# The end of a stream, and what it was before Arrow 0.15.
_ARROW_ENDS = (b"\xff\xff\xff\xff\x00\x00\x00\x00", b"\x00\x00\x00\x00")
# WARC records that are no pages.
_WARC_NO_PAGES = ("warcinfo", "request", "metadata", "revisit", "arc_header")
# The reason for a line of valid JSON that is no record.
_NO_OBJECT = "not a JSON object"


class BadRecord(Exception):
    """A record that is no document.

    Args:
        reason: One of a small set, so that reasons can be counted.
        excerpt: The beginning of the record, if the one who rejects it does not have it.
    """

    def __init__(self, reason: str, excerpt: str = "") -> None:
        super().__init__(reason)
        self.excerpt = excerpt


class BrokenFile(ValueError):
    """A file that is not complete, or not of its format."""


type Record = dict[str, Any] | BadRecord


def read_records(
    part: Part,
    names: Sequence[str] | None = None,
    *,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
    parquet_rows: int = _PARQUET_ROWS,
    newline: str | None = None,
) -> Iterator[tuple[int, Record | None, bytes]]:
    """Yield the records of a file, or of a byte range of a JSONL file.

    Args:
        part: What to read.
        names: The fields to read, dots leading into nested ones; None: all. JSONL and WARC give
            all.
        on_bytes: Called after each chunk of JSONL with the bytes of the part read so far.
        parquet_rows: Rows of Parquet to read at once.
        newline: As for `open`: None makes each line end inside a field of CSV a line feed.

    Yields:
        The number of the line, row or record in the part, counted from 1; its values by field, or
        why it cannot be used, or None for a blank line of JSONL; the line of JSONL, else nothing.

    Raises:
        DataError: The file cannot be read to its end.
    """
    if part.format == "jsonl":
        yield from _json_records(part, on_bytes)
        return
    records = _file_records(part, names, parquet_rows, newline)
    number = 0
    while True:
        try:
            number, record = next(records)
        except StopIteration:
            return
        # The libraries behind the formats raise exceptions of any type.
        except Exception as error:
            raise _unreadable(part, number, error) from error
        yield number, record, b""


def column_names(part: Part) -> list[str]:
    """Return the columns of a table in order.

    Args:
        part: A Parquet, Arrow or CSV file.

    Raises:
        DataError: It cannot be read.
    """
    try:
        if part.format == "csv":
            with open_decompressed(part.path) as stream:
                return next(filter(None, csv.reader(_CsvLines(stream, None))), [])
        with open_source(part.path) as file:
            if part.format == "parquet":
                return list(pq.ParquetFile(file).schema_arrow.names)
            return list(_open_arrow(file, _is_stream(file)).schema.names)
    except Exception as error:
        raise _unreadable(part, 0, error) from error


def _unreadable(part: Part, number: int, error: Exception) -> DataError:
    reason = error.what if isinstance(error, DataError) else first_line(error)
    after = counted(number, "record" if part.format == "warc" else "row")
    is_missing = isinstance(error, ImportError)
    return DataError(
        f"cannot be read to its end as {part.format}, after {after} ({reason[:300]})",
        where=part.path,
        remedy="Install what is missing."
        if is_missing
        else "Fetch the file again or leave it out.",
    )


def _file_records(
    part: Part, names: Sequence[str] | None, parquet_rows: int, newline: str | None
) -> Iterator[tuple[int, Record]]:
    if part.format == "warc":
        with open_decompressed(part.path) as stream:
            yield from _warc_records(stream)
    elif part.format == "csv":
        with open_decompressed(part.path) as stream:
            yield from _csv_records(stream, names, newline)
    else:
        with open_source(part.path) as file:
            parquet = _parquet_batches(file, names, parquet_rows)
            batches = parquet if part.format == "parquet" else _arrow_batches(file, names)
            yield from enumerate(chain.from_iterable(map(_rows, batches)), start=1)


def _json_records(
    part: Part, on_bytes: Callable[[int], None]
) -> Iterator[tuple[int, Record | None, bytes]]:
    end = None if part.is_whole else part.end
    # 0: `JsonLinesReader` does not know the size.
    num_bytes = part.end if part.is_whole and part.end else None
    for chunk in read_chunks(part.path, part.begin, end, num_bytes=num_bytes):
        lines = chunk.data.split(b"\n")
        # Number of the text behind the last line end; only a file's last line has none.
        last = chunk.first_line + len(lines) - 1
        if not lines[-1]:
            lines.pop()
        if chunk.first_line == 1 and part.begin == 0:
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        for number, line in enumerate(lines, start=chunk.first_line):
            record = parse_record(line) if line and not line.isspace() else None
            if number == last and isinstance(record, BadRecord) and str(record) != _NO_OBJECT:
                raise DataError(
                    f"the file ends inside a line ({record})",
                    where=f"{part.path}, line {number + count_lines(part.path, part.begin):,}",
                    remedy="Fetch the file again; if it is whole, add a line end, and the "
                    "line is set aside.",
                )
            yield number, record, line
        on_bytes(chunk.source_bytes)


def parse_record(line: bytes) -> Record:
    """Return the JSON object in a line, or why there is none."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = _parse_slowly(line)
    return record if isinstance(record, dict | BadRecord) else BadRecord(_NO_OBJECT)


def _parse_slowly(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRecord("invalid UTF-8")
    except (ValueError, RecursionError):
        return BadRecord("broken JSON")


def _parquet_batches(
    file: BinaryIO, names: Sequence[str] | None, num_rows: int
) -> Iterator[pa.RecordBatch]:
    found = 0
    with pq.ParquetFile(file) as parquet:
        columns = None if names is None else list(names)
        for batch in parquet.iter_batches(batch_size=num_rows, columns=columns):
            found += batch.num_rows
            yield batch
        if found != parquet.metadata.num_rows:
            raise BrokenFile(f"{found:,} rows, its footer promises {parquet.metadata.num_rows:,}")


def _is_stream(file: BinaryIO) -> bool:
    magic = file.read(len(_ARROW_MAGIC))
    file.seek(0)
    return magic != _ARROW_MAGIC


def _open_arrow(file: Any, is_stream: bool, columns: list[int] | None = None) -> Any:
    options = pa.ipc.IpcReadOptions(included_fields=columns)
    file.seek(0)
    return (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(file, options=options)


def _arrow_batches(file: BinaryIO, names: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    is_stream = _is_stream(file)
    schema = _open_arrow(file, is_stream).schema
    wanted = set(schema.names) if names is None else set(names)
    # A column `a.b` and the `b` inside a column `a`.
    tops = wanted | {name.partition(".")[0] for name in wanted}
    columns = [i for i, name in enumerate(schema.names) if name in tops]
    reader = _open_arrow(file, is_stream, columns)
    for batch in _stream_batches(file, reader) if is_stream else _file_batches(file, reader):
        yield _checked(batch, wanted)


def _stream_batches(file: BinaryIO, reader: Any) -> Iterator[pa.RecordBatch]:
    while True:
        before = file.tell()
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            break
        yield batch
    end = file.tell()
    file.seek(before)
    if file.read(end - before) not in _ARROW_ENDS:
        raise BrokenFile("the stream has no end marker: it is cut short")
    if file.read(1):
        raise BrokenFile("data after the end of the stream: several streams in one file")


def _file_batches(file: BinaryIO, reader: Any) -> Iterator[pa.RecordBatch]:
    count = reader.num_record_batches
    for i in range(count):
        yield reader.get_batch(i)
    # A damaged footer, or that of a second file appended to the first, names other batches.
    # So the last batch has to end where the footer begins.
    size = file.seek(0, io.SEEK_END)
    file.seek(size - len(_ARROW_MAGIC) - 4)
    footer_bytes = int.from_bytes(file.read(4), "little")
    footer = size - len(_ARROW_MAGIC) - 4 - footer_bytes
    if count:
        watched = _WatchedFile(file)
        again = _open_arrow(watched, False)
        watched.end = 0
        again.get_batch(count - 1)
        unread = footer - watched.end
    else:
        # Only the schema, which the footer repeats.
        unread = footer - footer_bytes
    if unread >= _ARROW_SLACK:
        raise BrokenFile(f"{unread:,} bytes that its footer does not name")


class _WatchedFile:
    """A file that knows how far it was read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.end = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(count)
        self.end = max(self.end, self._file.tell())
        return data


def _checked(batch: pa.RecordBatch, wanted: set[str]) -> pa.RecordBatch:
    """Return the wanted parts of a batch after validating them."""
    columns: dict[int, pa.Array] = {}
    for i, (name, column) in enumerate(zip(batch.schema.names, batch.columns, strict=True)):
        paths = [tuple(other.split(".")) for other in wanted]
        inside = [path[1:] for path in paths if path[0] == name and len(path) > 1]
        if name not in wanted and not inside:
            continue
        # Text that is not UTF-8 rejects its row, not the file.
        kinds = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
        (column.view(kinds[column.type]) if column.type in kinds else column).validate(full=True)
        part = column if name in wanted else _inside(column, inside)
        if part is not None:
            columns[i] = part
    if not columns:
        return batch.select([])
    names = [batch.schema.names[i] for i in columns]
    return pa.RecordBatch.from_arrays(list(columns.values()), names=names)


def _inside(column: pa.Array, paths: list[tuple[str, ...]]) -> pa.Array | None:
    """Return a struct with those of its fields that the paths lead to, None without any."""
    if not pa.types.is_struct(column.type):
        return None
    fields = {}
    for name in dict.fromkeys(path[0] for path in paths):
        # A repeated name cannot be selected.
        if column.type.get_field_index(name) >= 0:
            field = pc.struct_field(column, name)
            deeper = [path[1:] for path in paths if path[0] == name]
            part = field if () in deeper else _inside(field, deeper)
            if part is not None:
                fields[name] = part
    if not fields:
        return None
    return pa.StructArray.from_arrays(
        list(fields.values()), names=list(fields), mask=column.is_null()
    )


def _rows(batch: pa.RecordBatch) -> Iterator[Record]:
    names = batch.schema.names
    columns = [_values(column, name) for name, column in zip(names, batch.columns, strict=True)]
    for row in zip(*columns, strict=True) if columns else [()] * batch.num_rows:
        bad = next((value for value in row if isinstance(value, BadRecord)), None)
        # Of columns with the same name the last one counts.
        yield bad or dict(zip(names, row, strict=True))


def _values(column: pa.Array, name: str) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    # A date beyond the year 9999 raises OverflowError, ValueError or an Arrow error.
    except Exception:
        values = [_value(scalar, name) for scalar in column]
    return values


def _value(scalar: Any, name: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return BadRecord("invalid UTF-8")
    except Exception:
        return BadRecord(f"{name!r} cannot be read")


class _CsvLines:
    """The lines of a CSV file, and whether and how they have ended."""

    def __init__(self, stream: BinaryIO, newline: str | None) -> None:
        # Invalid UTF-8 becomes lone surrogates, which reject their rows.
        self._lines = io.TextIOWrapper(
            stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline
        )
        self.has_ended = False
        self.is_last_cut = False

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.is_last_cut = not line.endswith(("\n", "\r"))
            yield line
        self.has_ended = True


def _csv_records(
    stream: BinaryIO, names: Sequence[str] | None, newline: str | None
) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(_FIELD_CHARACTERS)
    lines = _CsvLines(stream, newline)
    # Strict: otherwise a stray quote would silently join rows into one field.
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        row: list[str] | None = None
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.has_ended:
                raise BrokenFile(f"row {number + 1:,} ends inside quotes") from None
            if header is None or "limit" in str(error):
                raise
        if lines.is_last_cut:
            what = "the header" if header is None else f"row {number + 1:,}"
            raise BrokenFile(
                f"{what} has no line end and may be cut short; if it is whole, add a line end"
            )
        if row == []:
            continue
        if header is None:
            header = row
            continue
        number += 1
        if row is None:
            yield number, BadRecord("quotes in the wrong place")
        elif len(row) != len(header):
            yield number, BadRecord("not as many fields as the header", ",".join(row)[:200])
        else:
            record = dict(zip(header, row, strict=True))
            wanted = record if names is None else {n: record[n] for n in names if n in record}
            is_text = all(map(is_utf8, wanted.values()))
            yield number, wanted if is_text else BadRecord("invalid UTF-8")


def _warc_records(stream: BinaryIO) -> Iterator[tuple[int, Record]]:
    # Late: the import takes seconds, and other formats do not need it.
    from datatrove.pipeline.readers.warc import process_record
    from warcio.bufferedreaders import BufferedReader
    from warcio.recordloader import ArcWarcRecordLoader

    loader = ArcWarcRecordLoader(verify_http=False, arc2warc=False)
    reader = BufferedReader(stream)
    line = _next_line(reader)
    kind: str | None = None
    number = 0
    while line:
        number += 1
        record = loader.parse_record_stream(reader, line, kind)
        kind = record.format
        name = "length" if kind == "arc" else "Content-Length"
        length = record.rec_headers.get_header(name)
        if length is None or not length.strip().isdecimal():
            raise BrokenFile(f"record {number:,} has the {name} {length!r}")
        found: Record | None
        try:
            found = process_record(record)
        except KeyError:
            found = BadRecord("no address or no date")
        # The headers of an HTTP response have been read, and its body perhaps in part.
        while record.raw_stream.read(1 << 16):
            pass
        if record.raw_stream.limit > 0:
            missing = counted(record.raw_stream.limit, "byte")
            raise BrokenFile(f"record {number:,} ends {missing} before its {name}")
        if found is not None:
            yield number, found
        elif record.rec_type not in _WARC_NO_PAGES:
            is_page = record.rec_type in ("response", "conversion")
            reason = "no text by its type or encoding" if is_page else "of a type that no page has"
            address = record.rec_headers.get_header("WARC-Target-URI")
            yield number, BadRecord(reason, (address or "")[:200])
        line = _between(reader, number, kind)


def _between(reader: Any, number: int, kind: str | None) -> bytes:
    """Read the empty lines behind a record, and return the first line of the next one."""
    first = reader.readline()
    if first.strip():
        if kind == "warc":
            raise BrokenFile(
                f"record {number:,} is not followed by an empty line: its length is wrong"
            )
        return bytes(first)
    second = reader.readline()
    if kind == "warc" and not (first.endswith(b"\n") and second.endswith(b"\n")):
        raise BrokenFile(
            f"record {number:,} is not followed by two line ends and may not be the last; if it "
            "is, add them"
        )
    return bytes(second) if second.strip() else _next_line(reader)


def _next_line(reader: Any) -> bytes:
    """Return the first line that is not empty; empty at the end."""
    while (line := reader.readline()) and not line.strip():
        pass
    return bytes(line)
