"""Documents of raw files, every record accounted for.

`TaskReader` is the datatrove step that reads a task of `meco prepare`. datatrove's own readers drop
bad lines without naming them and accept files that end early. `JsonLinesReader` does the same for
other datatrove pipelines. Rejected records go into a `RejectedRecords`, which the reader and the
writer of a pipeline share. Costs about three microseconds per document beyond JSON. `TaskReader`
has neither datatrove's `limit` and `skip` nor its statistics per document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers.base import BaseDiskReader

from megatron_meco.corpus.input_bytes import Part, count_lines
from megatron_meco.corpus.input_files import SourceFile, check_unchanged, plan_tasks
from megatron_meco.corpus.records import BadRecord, Record, read_records
from megatron_meco.errors import DataError
from megatron_meco.wording import is_utf8

_BATCH_DOCUMENTS = 2048
_BATCH_CHARACTERS = 4 << 20
_EXCERPT = 200


@dataclass(slots=True)
class SourceDocument(Document):  # type: ignore[misc]
    """A document that knows where it came from.

    Attributes:
        path: The input file.
        line: Its line, row or record, counted from 1 from the beginning of the part.
        begin: First byte of the part in the file.
    """

    path: str = ""
    line: int = 0
    begin: int = 0


@dataclass(frozen=True)
class Rejected:
    """A line, row or record that did not become a document.

    Attributes:
        path: The input file, as the user named it.
        line: Its number, counted from 1.
        reason: One of a small set, so that reasons can be counted.
        excerpt: The beginning of the line.
    """

    path: str
    line: int
    reason: str
    excerpt: str


class RejectedRecords:
    """Rejected records and progress of a task, shared by the reader and the writer of a pipeline.

    Args:
        strict: Whether the first rejected record is an error.

    Attributes:
        pending: Rejected records, each with the first byte of its part.
        lines_of_parts: Path, first byte and number of lines of the parts read.
        source_bytes: Bytes of input that the task has read.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.reset()

    def reset(self) -> None:
        """Begin a task; a process may run several with the same steps."""
        self.pending: list[tuple[Rejected, int]] = []
        self.lines_of_parts: list[tuple[str, int, int]] = []
        self.source_bytes = 0

    def add(self, rejected: Rejected, begin: int) -> None:
        """Note a rejected record of the part that begins at the byte `begin`.

        Raises:
            DataError: With `strict`.
        """
        if self.strict:
            line = rejected.line + count_lines(rejected.path, begin)
            raise DataError(
                rejected.reason,
                where=f"{rejected.path}, line {line}",
                remedy="Fix the line, or leave --strict out to set such lines aside.",
            )
        self.pending.append((rejected, begin))

    def drain(self) -> list[tuple[Rejected, int]]:
        """Return the records added since the last call, in input order."""
        pending, self.pending = self.pending, []
        # The writer rejects texts later than the reader does lines; the current part is the last.
        order = {part[:2]: i for i, part in enumerate(self.lines_of_parts)} if pending else {}
        last = len(order)
        return sorted(pending, key=lambda p: (order.get((p[0].path, p[1]), last), p[0].line))


class JsonLinesReader(BaseDiskReader):  # type: ignore[misc]
    """Reads JSONL (plain, gzip, Zstandard) and accounts for every line.

    Args:
        data_folder: Where the files are, as for every reader of datatrove.
        rejected: Receives bad lines; also given to the writer at the end of the pipeline.
        **settings: Further settings of datatrove's `BaseDiskReader`.
    """

    name = "JSON lines"

    def __init__(self, data_folder: Any, rejected: RejectedRecords, **settings: Any) -> None:
        super().__init__(data_folder, **settings)
        self.rejected = rejected

    def read_file(self, filepath: str) -> Iterator[Document]:
        """Yield the documents of one file."""
        path = self.data_folder.resolve_paths(filepath)
        yield from read_documents(Part(path, "jsonl", 0, 0, True), self.text_key, self.rejected)


def read_documents(
    part: Part, text_field: str, rejected: RejectedRecords, fields: Sequence[str] | None = None
) -> Iterator[SourceDocument]:
    """Yield the documents of a file, or of a byte range of a JSONL file.

    Args:
        part: What to read.
        text_field: Field of the text; dots lead into nested values.
        rejected: Receives bad records.
        fields: The fields to read; None: all.

    Yields:
        Documents; their metadata is the record without its text.

    Raises:
        DataError: The file cannot be read to its end.
    """
    path, begin, before = part.path, part.begin, rejected.source_bytes

    def note(num_bytes: int) -> None:
        rejected.source_bytes = before + num_bytes

    number = 0
    for number, record, line in read_records(part, fields, on_bytes=note):
        if record is None:
            continue
        try:
            text = _text_of(record, text_field, part.format)
        except BadRecord as bad:
            excerpt = bad.excerpt or _excerpt(record, line, text_field)
            rejected.add(Rejected(path, number, str(bad), excerpt), begin)
            continue
        metadata = cast(dict[str, Any], record)
        metadata.pop(text_field, None)
        yield SourceDocument(text, "", [], metadata, path, number, begin)
    note(part.end - begin)
    rejected.lines_of_parts.append((path, begin, number))


class TaskReader(PipelineStep):  # type: ignore[misc]
    """Reads the parts of each task of a preparation.

    Args:
        tasks: The parts of each task, from `plan_tasks`.
        text_field: Field of the text; dots lead into nested values.
        rejected: Receives bad records.
        metadata_fields: The fields to read beside the text; None: all.
    """

    name = "TaskReader"
    type = "READER"

    def __init__(
        self,
        tasks: list[list[Part]],
        text_field: str,
        rejected: RejectedRecords,
        metadata_fields: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.tasks = tasks
        self.text_field = text_field
        self.rejected = rejected
        self.fields = None if metadata_fields is None else [text_field, *metadata_fields]

    def run(
        self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yield the documents of the task `rank` in input order.

        Raises:
            DataError: A file cannot be read to its end.
        """
        for part in self.tasks[rank]:
            yield from read_documents(part, self.text_field, self.rejected, self.fields)
            check_unchanged(part)


def _excerpt(record: Record, line: bytes, text_field: str) -> str:
    if line:
        return line[:_EXCERPT].decode("utf-8", "replace")
    return "" if isinstance(record, BadRecord) else str(record.get(text_field, ""))[:_EXCERPT]


def _text_of(record: Record, name: str, kind: str) -> str:
    """Return a record's text, which is not blank and can be written as UTF-8.

    Args:
        record: The record.
        name: The text field; dots lead into nested objects.
        kind: The format of the file.

    Raises:
        BadRecord: There is no usable text.
    """
    if isinstance(record, BadRecord):
        raise record
    missing = object()
    text = _lookup(record, name, missing)
    if text is missing:
        raise BadRecord(f"{name!r} missing")
    if text is None:
        raise BadRecord(f"{name!r} null")
    if not isinstance(text, str):
        raise BadRecord(f"{name!r} not a string")
    if not text or text.isspace():
        raise BadRecord(f"{name!r} empty")
    # An escaped half of a surrogate pair is legal JSON but no text.
    if not is_utf8(text):
        raise BadRecord("invalid UTF-8")
    if kind == "warc" and _is_html(text):
        raise BadRecord("HTML, not text")
    return text


def _is_html(text: str) -> bool:
    beginning = text[:2000].lower()
    return "<html" in beginning or "<!doctype html" in beginning


def metadata_of(record: dict[str, Any], name: str) -> str | None:
    """Return a metadata field as a string, or None if the record lacks it.

    Numbers, truth values and dates are written as Python writes them, lists and objects as JSON.
    Dots in the name lead into nested objects.
    """
    value = record.get(name) if name in record else _lookup(record, name, None)
    if value is None:
        return None
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    value = str(value)
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


def _lookup(record: dict[str, Any], name: str, default: Any) -> Any:
    """Return `record["a.b"]` if there is such a key, else `record["a"]["b"]`, else the default."""
    if name in record:
        return record[name]
    value: Any = record
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            return default
        value = value[key]
    return value


def text_bytes_of(documents: list[Document]) -> int:
    """Return the UTF-8 bytes of the documents' texts."""
    return sum(
        len(d.text) if d.text.isascii() else len(d.text.encode("utf-8", "replace"))
        for d in documents
    )


def place_of(document: Document) -> tuple[tuple[str, int], int]:
    """Return (file, line) of a document, and the byte that the line is counted from."""
    path = getattr(document, "path", "") or document.metadata.get("file_path", document.id)
    return (path, getattr(document, "line", 0)), getattr(document, "begin", 0)


def metadata_columns(documents: list[Document], fields: Iterable[str]) -> list[list[str | None]]:
    """Return the documents' values, one list per field; `file_path` is the input file."""
    columns: list[list[str | None]] = []
    for name in fields:
        values = [metadata_of(document.metadata, name) for document in documents]
        if name == "file_path":
            pairs = zip(values, documents, strict=True)
            values = [value or place_of(document)[0][0] for value, document in pairs]
        columns.append(values)
    return columns


def line_of(document: Document) -> str:
    """Return file and line of a document that was read from a file, for messages."""
    path, line, begin = document.path, document.line, document.begin
    return f"{path}, line {line + count_lines(path, begin)}"


def read_batches(
    files: Sequence[SourceFile], text_field: str, fields: Sequence[str]
) -> Iterator[list[Document]]:
    """Yield the documents of files in order, in lists of bounded size; bad records are dropped.

    Args:
        files: The files.
        text_field: Field of the text; dots lead into nested values.
        fields: The fields to read beside the text.

    Raises:
        DataError: A file cannot be read to its end.
    """
    tasks = plan_tasks(files)
    rejected = RejectedRecords()
    reader = TaskReader(tasks, text_field, rejected, fields)
    for rank in range(len(tasks)):
        yield from batches(reader.run(rank=rank))
        rejected.reset()


def batches(data: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents in lists of bounded size: 4 MiB of text, or one longer document."""
    batch: list[Document] = []
    room = _BATCH_CHARACTERS
    for document in data:
        batch.append(document)
        room -= len(document.text)
        if room <= 0 or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, room = [], _BATCH_CHARACTERS
    if batch:
        yield batch
