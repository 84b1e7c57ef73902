"""Readers for datatrove pipelines that account for every record.

`TaskReader` reads what a task of `meco prepare` consists of: JSONL by lines, because datatrove's
reader drops a bad line without saying which; Parquet, Arrow, CSV and WARC by `formats`, because
datatrove's readers take files that end early for whole ones. `JsonLinesReader` is the same for
one's own pipeline. What is rejected goes into a `RejectedRecords` that reader and writer of one
pipeline share. Costs about three microseconds per document beyond JSON. Given up: datatrove's
`limit`, `skip` and statistics per document in `TaskReader`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers.base import BaseDiskReader

from megatron_meco.corpus.formats import Record, column_names, read_records
from megatron_meco.corpus.readers import count_lines, read_chunks
from megatron_meco.corpus.records import (
    NO_OBJECT,
    BadRecord,
    Rejected,
    excerpt_of,
    parse_record,
    text_of,
)
from megatron_meco.corpus.sources import Part, check_unchanged
from megatron_meco.errors import DataError
from megatron_meco.wording import counted

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(slots=True)
class SourceDocument(Document):  # type: ignore[misc]
    """A document that knows where it came from."""

    path: str = ""
    """The input file."""

    line: int = 0
    """Its line, row or record there, counted from 1 from the beginning of the part."""

    begin: int = 0
    """The first byte of the part of the file."""


class RejectedRecords:
    """What did not become a document: given to the reader and to the writer of one pipeline.

    Args:
        strict: Whether the first one is an error.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.reset()

    def reset(self) -> None:
        """Begin a task: one process may run several with the same steps."""
        self.pending: list[tuple[Rejected, int]] = []
        """Rejected records and the first byte of the part that their lines are counted from."""
        self.lines_of_parts: list[tuple[str, int, int]] = []
        """Path, first byte and number of lines of the parts read."""
        self.source_bytes = 0
        """How much of its input the task has read."""

    def add(self, rejected: Rejected, begin: int) -> None:
        """Take note of a rejected record.

        Args:
            rejected: The record.
            begin: The first byte of its part.

        Raises:
            DataError: With `strict`.
        """
        if self.strict:
            line = rejected.line + count_lines(rejected.path, begin)
            raise DataError(
                rejected.reason,
                where=f"{rejected.path}, line {line}",
                remedy="Mend the line, or leave --strict out to set such lines aside.",
            )
        self.pending.append((rejected, begin))

    def drain(self) -> list[tuple[Rejected, int]]:
        """Return what was added since the last call, in the order of the input."""
        pending, self.pending = self.pending, []
        # The writer refuses texts later than the reader lines; the part being read is the last.
        order = {part[:2]: i for i, part in enumerate(self.lines_of_parts)} if pending else {}
        last = len(order)
        return sorted(pending, key=lambda p: (order.get((p[0].path, p[1]), last), p[0].line))


class JsonLinesReader(BaseDiskReader):  # type: ignore[misc]
    """Reads JSONL (plain, gzip, Zstandard) and accounts for every line.

    Args:
        data_folder: Where the files are, as for every reader of datatrove.
        rejected: Where bad lines go; the writer at the end of the pipeline takes the same.
        **settings: Further settings of datatrove's `BaseDiskReader`.
    """

    name = "JSON lines"

    def __init__(self, data_folder: Any, rejected: RejectedRecords, **settings: Any) -> None:
        super().__init__(data_folder, **settings)
        self.rejected = rejected

    def read_file(self, filepath: str) -> Iterator[Document]:
        """Yield the documents of one file."""
        path = self.data_folder.resolve_paths(filepath)
        yield from read_lines(Part(path, "jsonl", 0, 0, True), self.text_key, self.rejected)


def read_lines(part: Part, text_field: str, rejected: RejectedRecords) -> Iterator[SourceDocument]:
    """Yield the documents of a JSONL file or of a byte range of one.

    Args:
        part: What to read.
        text_field: Where the text is.
        rejected: Where bad lines go.

    Yields:
        Documents; their metadata is all of the record but the text.

    Raises:
        DataError: The file cannot be read to its end.
    """
    num_lines = 0
    read_before = rejected.source_bytes
    path, begin = part.path, part.begin
    end = None if part.is_whole else part.end
    # A reader of one's own pipeline does not know the size.
    num_bytes = part.end if part.is_whole and part.end else None
    for chunk in read_chunks(path, begin, end, num_bytes=num_bytes):
        lines = chunk.data.split(b"\n")
        if chunk.first_line == 1 and begin == 0:
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        for number, raw in enumerate(lines, start=chunk.first_line):
            if not raw or raw.isspace():
                continue
            try:
                record = parse_record(raw)
            except BadRecord as bad:
                if number == chunk.first_line + len(lines) - 1 and str(bad) != NO_OBJECT:
                    # Without a line end, as only the last line of a file can be.
                    raise DataError(
                        f"the file ends inside a line ({bad})",
                        where=f"{path}, line {number + count_lines(path, begin):,}",
                        remedy="Fetch the file again; if it is whole, add a line end, and the "
                        "line is set aside.",
                    ) from None
                rejected.add(Rejected(path, number, str(bad), excerpt_of(raw)), begin)
                continue
            try:
                text = text_of(record, text_field)
            except BadRecord as bad:
                rejected.add(Rejected(path, number, str(bad), excerpt_of(raw)), begin)
                continue
            record.pop(text_field, None)
            yield SourceDocument(text, "", [], record, path, number, begin)
        num_lines = chunk.first_line + len(lines) - 2
        rejected.source_bytes = read_before + chunk.source_bytes
    rejected.source_bytes = read_before + part.end - part.begin
    rejected.lines_of_parts.append((path, begin, num_lines))


class TaskReader(PipelineStep):  # type: ignore[misc]
    """Reads what each task of a preparation consists of.

    Args:
        tasks: The parts of each task, as `plan_tasks` gives them.
        text_field: Where the text is; dots lead into nested values.
        rejected: Where bad records go.
        metadata_fields: The fields that are wanted beside the text; None: all.
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
        """Yield the documents of a task.

        Args:
            data: Nothing: this is the first step.
            rank: The task.
            world_size: The number of tasks.

        Yields:
            The documents in the order of the input.

        Raises:
            DataError: A file cannot be read to its end.
        """
        for part in self.tasks[rank]:
            if part.format == "jsonl":
                yield from read_lines(part, self.text_field, self.rejected)
            else:
                yield from self._read_records(part)
            check_unchanged(part)

    def _read_records(self, part: Part) -> Iterator[Document]:
        path, rejected = part.path, self.rejected
        before, number = rejected.source_bytes, 0
        for number, record in told_records(part, self.fields):
            try:
                if isinstance(record, BadRecord):
                    raise record
                text = text_of(record, self.text_field)
                if part.format == "warc" and _is_html(text):
                    raise BadRecord("HTML, not text")
            except BadRecord as bad:
                known = {} if isinstance(record, BadRecord) else record
                excerpt = bad.excerpt or str(known.get(self.text_field, ""))[:200]
                rejected.add(Rejected(path, number, str(bad), excerpt), 0)
                continue
            record.pop(self.text_field, None)
            yield SourceDocument(text, "", [], record, path, number)
        rejected.source_bytes = before + part.end - part.begin
        rejected.lines_of_parts.append((path, 0, number))


def told_records(
    part: Part, names: Sequence[str] | None, **settings: Any
) -> Iterator[tuple[int, Record]]:
    """Yield what `read_records` does, with one clear error where the file cannot be read.

    Args:
        part: A whole file.
        names: The fields to read; None: all.
        **settings: Further settings of `read_records`.

    Yields:
        The number of each record, and the record.

    Raises:
        DataError: The file cannot be read to its end.
    """
    records = read_records(part.path, part.format, names, **settings)
    number = 0
    while True:
        try:
            number, record = next(records)
        except StopIteration:
            return
        # The libraries behind the formats raise what they like over a damaged file.
        except Exception as error:
            raise _unreadable(part, number, error) from error
        yield number, record


def told_columns(part: Part) -> list[str]:
    """Return what `column_names` does, with one clear error where the file cannot be read.

    Args:
        part: A table.

    Returns:
        The names.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return column_names(part.path, part.format)
    except Exception as error:
        raise _unreadable(part, 0, error) from error


def _unreadable(part: Part, number: int, error: Exception) -> DataError:
    reason = error.what if isinstance(error, DataError) else str(error).strip()
    reason = (reason or type(error).__name__).splitlines()[0]
    after = counted(number, "record" if part.format == "warc" else "row")
    is_missing = isinstance(error, ImportError)
    return DataError(
        f"cannot be read to its end as {part.format}, after {after} ({reason[:300]})",
        where=part.path,
        remedy="Install what is missing."
        if is_missing
        else "Fetch the file again or leave it out.",
    )


def _is_html(text: str) -> bool:
    beginning = text[:2000].lower()
    return "<html" in beginning or "<!doctype html" in beginning
