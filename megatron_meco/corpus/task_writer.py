"""The last step of a preparation: a task's documents to tokens and metadata in files of its own.

`MegatronWriter` ends any datatrove pipeline; `merge_tasks` (in `merge`) joins what the tasks wrote.
A task is finished when its record `task-NNNNN.json` is there, which is written last: a killed task
leaves nothing that counts and runs again whole. Costs the tokenizer, an array copy to put EODs in,
and about three microseconds of Python per document. Memory is one batch (4 MiB of text, or the
longest document) and its ids. Given up: going on in the middle of a task.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megatron_meco.corpus.bulk import DocumentEncoder, EncodedDocuments, load_encoder
from megatron_meco.corpus.documents import RejectedRecords
from megatron_meco.corpus.metadata import MetadataWriter, metadata_path
from megatron_meco.corpus.records import Rejected, metadata_of
from megatron_meco.errors import DataError
from megatron_meco.whole_file import whole_file

_BATCH_DOCUMENTS = 2048
_BATCH_CHARACTERS = 4 << 20
_TASK_SUFFIXES = (".bin", ".lengths", ".sequences", ".rejected.jsonl")


@dataclass
class TaskRecord:
    """What a finished task says of itself."""

    documents: int = 0
    """Documents written."""

    tokens: int = 0
    """Tokens written, EODs included."""

    sequences: int = 0
    """Megatron sequences that the documents consist of."""

    text_bytes: int = 0
    """Bytes of their text in UTF-8."""

    missing_metadata: dict[str, int] = field(default_factory=dict)
    """Documents without a value, by metadata field."""

    rejected: dict[str, int] = field(default_factory=dict)
    """Rejected records by reason."""

    lines_of_parts: list[tuple[str, int, int]] = field(default_factory=list)
    """Path, first byte and number of lines of the parts read."""


def task_prefix(folder: Path, rank: int) -> Path:
    """Return the beginning of the names of a task's files."""
    return folder / f"task-{rank:05d}"


def record_path(folder: Path, rank: int) -> Path:
    """Return the file that says that a task is finished."""
    return folder / f"task-{rank:05d}.json"


def read_record(folder: Path, rank: int) -> TaskRecord | None:
    """Return the record of a finished task, None for one that is not finished."""
    try:
        return TaskRecord(**json.loads(record_path(folder, rank).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


# Told after every batch: source bytes, documents, tokens and text bytes of the task so far.
type ProgressCallback = Callable[[int, int, int, int, int], None]
_on_progress: ProgressCallback | None = None


def report_progress_to(callback: ProgressCallback | None) -> None:
    """Have every `MegatronWriter` of this process tell how far it is.

    Args:
        callback: Called with the task and, of that task so far, source bytes, documents, tokens,
            text bytes; None: nobody listens.
    """
    global _on_progress
    _on_progress = callback


def tell_progress(rank: int, source_bytes: int, text_bytes: int, record: TaskRecord) -> None:
    """Tell whoever listens in this process how far a task is.

    Args:
        rank: The task.
        source_bytes: Bytes of input read.
        text_bytes: Bytes of text read.
        record: What has been written.
    """
    if _on_progress is not None:
        _on_progress(rank, source_bytes, record.documents, record.tokens, text_bytes)


class MegatronWriter(PipelineStep):  # type: ignore[misc]
    """Writes the documents of a pipeline as tokens and metadata, one set of files for each task.

    Args:
        folder: A folder that `make_work_folder` made; all tasks must reach it.
        metadata_fields: Keys of the documents' metadata to keep; dots lead into nested values,
            and `file_path` is the input file.
        rejected: What the reader shares, when it is one of `documents`; None: only texts that the
            tokenizer refuses are told.
    """

    name = "MegatronWriter"
    type = "TOKENIZER"

    def __init__(
        self,
        folder: str | os.PathLike[str],
        metadata_fields: Iterable[str] = ("url",),
        rejected: RejectedRecords | None = None,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.metadata_fields = tuple(metadata_fields)
        self.rejected = rejected or RejectedRecords()

    def run(
        self, data: Iterator[Document] | None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Write the documents of a task, unless it is finished already.

        Args:
            data: The documents.
            rank: The task.
            world_size: The number of tasks.

        Yields:
            Nothing: this is the last step.

        Raises:
            DataError: The files cannot be written, or the tokenizer gave an id outside its
                vocabulary.
        """
        if record_path(self.folder, rank).exists():
            return
        self.rejected.reset()
        bulk_encoder, settings = load_encoder(self.folder)
        encoder = DocumentEncoder(bulk_encoder, settings.get("sentences"))
        with TaskFiles(self.folder, rank, settings, list(self.metadata_fields)) as files:
            for batch in batches(data or iter(())):
                self._write(files, encoder, batch)
                files.reject(self.rejected.drain())
                done, record = self.rejected.source_bytes, files.record
                tell_progress(rank, done, record.text_bytes, record)
            files.reject(self.rejected.drain())
            files.finish(self.rejected.lines_of_parts)
        self.stat_update("tokens", value=files.record.tokens, unit="task")
        yield from ()

    def _write(self, files: TaskFiles, encoder: DocumentEncoder, batch: list[Document]) -> None:
        encoded = encoder.encode([document.text for document in batch])
        lengths = encoded.lengths
        if lengths.min(initial=1) <= 0:
            for document, length in zip(batch, lengths.tolist(), strict=True):
                if length <= 0:
                    reason = "no tokens" if length == 0 else "refused by the tokenizer"
                    where, begin = _place(document)
                    rejected = Rejected(*where, reason, document.text[:200])
                    self.rejected.add(rejected, begin)
            batch = [d for d, n in zip(batch, lengths.tolist(), strict=True) if n > 0]
        files.write(encoded, metadata_columns(batch, self.metadata_fields))
        files.record.text_bytes += sum(
            len(d.text) if d.text.isascii() else len(d.text.encode("utf-8", "replace"))
            for d in batch
        )


def _place(document: Document) -> tuple[tuple[str, int], int]:
    """Return file and line of a document, and the byte that the line is counted from."""
    path = getattr(document, "path", "") or document.metadata.get("file_path", document.id)
    return (path, getattr(document, "line", 0)), getattr(document, "begin", 0)


def metadata_columns(documents: list[Document], fields: Iterable[str]) -> list[list[str | None]]:
    """Return the documents' values, one list for each field; `file_path` is the input file."""
    columns: list[list[str | None]] = []
    for name in fields:
        values = [metadata_of(document.metadata, name) for document in documents]
        if name == "file_path":
            pairs = zip(values, documents, strict=True)
            values = [value or _place(document)[0][0] for value, document in pairs]
        columns.append(values)
    return columns


def with_eod(
    ids: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], eod: int, dtype: np.dtype[Any]
) -> np.ndarray[Any, Any]:
    """Put an EOD behind each document.

    Args:
        ids: The documents' ids end to end, shape [ids].
        lengths: Ids per document, none zero, shape [documents].
        eod: The id to put in.
        dtype: The type of the result.

    Returns:
        Shape [ids + documents].
    """
    tokens = np.empty(len(ids) + len(lengths), dtype=dtype)
    ends = np.cumsum(lengths + 1) - 1
    is_text = np.ones(len(tokens), dtype=bool)
    is_text[ends] = False
    tokens[ends] = eod
    tokens[is_text] = ids
    return tokens


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


class TaskFiles:
    """The files of one task, under temporary names until `finish`; a context manager.

    Args:
        folder: The work folder.
        rank: The task.
        settings: The encoder's `eod`, `vocab_size` and `dtype`.
        metadata_fields: The columns of metadata; none: no metadata file.

    Raises:
        DataError: A file cannot be written.
    """

    def __init__(
        self, folder: Path, rank: int, settings: dict[str, Any], metadata_fields: list[str]
    ) -> None:
        self._prefix = task_prefix(folder, rank)
        self._record_path = record_path(folder, rank)
        self._eod, self._vocab_size = settings["eod"], settings["vocab_size"]
        self._dtype = np.dtype(settings["dtype"])
        self.record = TaskRecord(missing_metadata=dict.fromkeys(metadata_fields, 0))
        self._files: dict[str, Any] = {}
        self._metadata: MetadataWriter | None = None
        try:
            for suffix in _TASK_SUFFIXES:
                self._files[suffix] = self._temporary(suffix).open("wb")
            if metadata_fields:
                self._metadata = MetadataWriter(self._prefix, metadata_fields)
        except OSError as error:
            self.__exit__(type(error), error, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            # What cannot be flushed any more is thrown away below.
            with contextlib.suppress(OSError):
                file.close()
        if kind is not None and self._metadata is not None:
            self._metadata.abort()
        for suffix in _TASK_SUFFIXES:
            self._temporary(suffix).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(error, self._prefix) from error

    def write(self, encoded: EncodedDocuments, columns: list[list[str | None]]) -> None:
        """Add those of the documents that have ids, and an EOD behind each.

        Args:
            encoded: The documents.
            columns: Their metadata, one list of values for each field.

        Raises:
            DataError: An id is outside the vocabulary.
        """
        lengths = encoded.lengths[encoded.lengths > 0]
        if len(lengths) == 0:
            return
        self._check(encoded.ids)
        tokens = with_eod(encoded.ids, lengths, self._eod, self._dtype)
        num_sequences = encoded.num_sequences[encoded.num_sequences > 0]
        self._files[".bin"].write(tokens)
        self._files[".lengths"].write(encoded.sequence_lengths_with_eod().astype(np.int32))
        self._files[".sequences"].write(num_sequences.astype(np.int32))
        self.record.documents += len(lengths)
        self.record.tokens += len(tokens)
        self.record.sequences += int(num_sequences.sum())
        for name, values in zip(self.record.missing_metadata, columns, strict=True):
            self.record.missing_metadata[name] += values.count(None)
        if self._metadata is not None:
            self._metadata.append(columns)

    def reject(self, rejected: list[tuple[Rejected, int]]) -> None:
        """Set records aside, in the order of the input."""
        for record, begin in rejected:
            line = json.dumps({**asdict(record), "begin": begin}, ensure_ascii=False)
            self._files[".rejected.jsonl"].write(line.encode("utf-8", "replace") + b"\n")
            reasons = self.record.rejected
            reasons[record.reason] = reasons.get(record.reason, 0) + 1

    def finish(self, lines_of_parts: list[tuple[str, int, int]]) -> None:
        """Put everything on the disk, under its name; the record comes last."""
        self.record.lines_of_parts = lines_of_parts
        if self._metadata is not None:
            self._metadata.finish()
            self._metadata.publish()
        for suffix, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self._temporary(suffix), f"{self._prefix}{suffix}")
        write_synced(self._record_path, json.dumps(asdict(self.record)))

    def _check(self, ids: np.ndarray[Any, Any]) -> None:
        # The type on disk is chosen by the vocabulary: a larger id would wrap silently.
        if ids.max() >= self._vocab_size or ids.min() < 0:
            raise DataError(
                f"the tokenizer gave id {ids.max()}, its vocabulary ends at {self._vocab_size}",
                where=str(self._prefix),
                remedy="The tokenizer's files disagree with each other: fetch them again.",
            )

    def _temporary(self, suffix: str) -> Path:
        return Path(f"{self._prefix}{suffix}.tmp-{os.getpid()}")


def write_synced(path: Path, text: str) -> None:
    """Write a small file that is there whole or not at all.

    Args:
        path: The file.
        text: All that it holds.

    Raises:
        DataError: It cannot be written.
    """
    with whole_file(path, lambda reason: _refusal(reason, path)) as file:
        file.write(text.encode())


def cannot_write(error: OSError, path: Path) -> DataError:
    """Return what is told of a disk that is full or may not be written."""
    return _refusal(error.strerror or str(error), error.filename or path)


def _refusal(reason: str, path: str | Path) -> DataError:
    return DataError(
        f"cannot be written ({reason})",
        where=str(path),
        remedy="Free space, or choose another --output; finished work is kept.",
    )


def task_files(folder: Path, rank: int) -> list[Path]:
    """Return the files that a finished task has, its metadata included."""
    prefix = task_prefix(folder, rank)
    return [metadata_path(prefix), *(Path(f"{prefix}{suffix}") for suffix in _TASK_SUFFIXES)]
