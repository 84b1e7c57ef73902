"""Readers for datatrove pipelines that account for every record.

`TaskReader` reads what a task of `meco prepare` consists of: JSONL by lines of our own, because
datatrove's reader drops a bad line without saying which; Parquet, Arrow, CSV and WARC by
datatrove's readers, with records counted and rejected by name. `JsonLinesReader` is the same for
one's own pipeline. What is rejected goes into a `RejectedRecords` that reader and writer of one
pipeline share. Costs about three microseconds per document beyond JSON. Given up: datatrove's
`limit`, `skip` and statistics per document in `TaskReader`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import CSVReader, IpcReader, ParquetReader, WarcReader
from datatrove.pipeline.readers.base import BaseDiskReader

from megatron_meco.corpus.readers import count_lines, read_chunks
from megatron_meco.corpus.records import BadRecord, Rejected, excerpt_of, parse_record, text_of
from megatron_meco.corpus.sources import Part, open_source
from megatron_meco.errors import DataError

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
    for chunk in read_chunks(path, begin, None if part.is_whole else part.end):
        lines = chunk.data.split(b"\n")
        if chunk.first_line == 1 and begin == 0:
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        for number, raw in enumerate(lines, start=chunk.first_line):
            if not raw or raw.isspace():
                continue
            try:
                record = parse_record(raw)
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
    """

    name = "TaskReader"
    type = "READER"

    def __init__(self, tasks: list[list[Part]], text_field: str, rejected: RejectedRecords) -> None:
        super().__init__()
        self.tasks = tasks
        self.text_field = text_field
        self.rejected = rejected

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

    def _read_records(self, part: Part) -> Iterator[Document]:
        before = self.rejected.source_bytes
        kind, settings = _READERS[part.format]
        if part.format == "arrow":
            settings = {"stream": is_arrow_stream(part.path)}
        folder, _, name = part.path.rpartition("/")
        adapter = _Adapter(part.path, self.text_field, self.rejected)
        reader = kind(folder or ".", adapter=adapter.adapt, **settings)
        try:
            for document in reader.read_file(name):
                location = document.metadata.pop(_LOCATION)
                yield SourceDocument(
                    document.text, "", [], document.metadata[_RECORD], part.path, location
                )
        except DataError:
            raise
        except _READ_ERRORS as error:
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"cannot be read to its end as {part.format} ({what})",
                where=part.path,
                remedy="Fetch the file again or leave it out.",
            ) from None
        self.rejected.source_bytes = before + part.end - part.begin
        self.rejected.lines_of_parts.append((part.path, 0, adapter.num_records))


_LOCATION, _RECORD = "meco_location", "meco_record"
_READ_ERRORS = (pa.ArrowException, csv.Error, EOFError, KeyError, OSError, UnicodeError, ValueError)
_READERS: dict[str, tuple[Any, dict[str, Any]]] = {
    # Row groups may hold texts of megabytes: a batch of a thousand would be gigabytes.
    "parquet": (ParquetReader, {"batch_size": 100}),
    "arrow": (IpcReader, {}),
    "csv": (CSVReader, {}),
    "warc": (WarcReader, {}),
}


@dataclass
class _Adapter:
    """Counts the records that a reader of datatrove finds and rejects those without text."""

    path: str
    text_field: str
    rejected: RejectedRecords
    num_records: int = field(default=0)

    def adapt(self, reader: Any, data: dict[str, Any], path: str, number: int) -> dict[str, Any]:
        """Return what datatrove makes a document of; without text it makes none."""
        self.num_records += 1
        # A WARC file has records that are no pages; its own count includes them.
        place = number + 1 if isinstance(reader, WarcReader) else self.num_records
        try:
            text = text_of(data, self.text_field)
            if isinstance(reader, WarcReader) and _is_html(text):
                raise BadRecord("HTML, not text")
        except BadRecord as bad:
            shown = str(data.get(self.text_field, ""))[:200]
            self.rejected.add(Rejected(self.path, place, str(bad), shown), 0)
            # A name that is no text: datatrove warns once about documents without one.
            return {"text": ""}
        data.pop(self.text_field, None)
        return {"text": text, "id": "", "metadata": {_LOCATION: place, _RECORD: data}}


def _is_html(text: str) -> bool:
    beginning = text[:2000].lower()
    return "<html" in beginning or "<!doctype html" in beginning


def is_arrow_stream(path: str) -> bool:
    """Whether an Arrow file is of the streaming kind, as Hugging Face's data sets are."""
    with open_source(path) as file:
        return file.read(6) != b"ARROW1"
