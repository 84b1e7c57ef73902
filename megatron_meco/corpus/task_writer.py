"""The last step of a preparation: a task's documents to tokens and metadata in its own files.

`MegatronWriter` ends any datatrove pipeline; `merge_tasks` (in `merge`) joins the tasks. A task is
finished when its record `task-NNNNN.json` exists, which is written last: a killed task leaves
nothing that counts and runs again from its beginning. Costs the tokenizer, an array copy to insert
EODs, and about three microseconds of Python per document. Memory is one batch (4 MiB of text, or
the longest document) and its ids.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import orjson
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megatron_meco.corpus.documents import (
    Rejected,
    RejectedRecords,
    batches,
    metadata_columns,
    place_of,
    text_bytes_of,
)
from megatron_meco.corpus.encoder import DocumentEncoder, EncodedDocuments
from megatron_meco.corpus.metadata import MetadataWriter, metadata_path
from megatron_meco.corpus.progress import tell_progress
from megatron_meco.corpus.work_folder import cannot_write_for, load_encoder, write_synced
from megatron_meco.errors import DataError
from megatron_meco.whole_file import whole_file

_TASK_SUFFIXES = (".bin", ".lengths", ".sequences", ".rejected.jsonl")


@dataclass
class TaskRecord:
    """What a finished task says about itself.

    Attributes:
        documents: Documents written.
        tokens: Tokens written, EODs included.
        sequences: Megatron sequences of the documents.
        text_bytes: UTF-8 bytes of their text.
        missing_metadata: Documents without a value, by metadata field.
        rejected: Rejected records by reason.
        lines_of_parts: Path, first byte and number of lines of the parts read.
    """

    documents: int = 0
    tokens: int = 0
    sequences: int = 0
    text_bytes: int = 0
    missing_metadata: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    lines_of_parts: list[tuple[str, int, int]] = field(default_factory=list)

    def is_possible(self) -> bool:
        """Whether all values have the types that are written."""
        told: dict[str, Any] = vars(self)
        numbers = [told[name] for name in ("documents", "tokens", "sequences", "text_bytes")]
        for name in ("missing_metadata", "rejected"):
            if not isinstance(told[name], dict):
                return False
            numbers += told[name].values()
        for part in told["lines_of_parts"]:
            if not isinstance(part, list) or len(part) != 3 or not isinstance(part[0], str):
                return False
            numbers += part[1:]
        return all(type(number) is int and number >= 0 for number in numbers)


def task_prefix(folder: Path, rank: int) -> Path:
    """Return the beginning of the names of a task's files."""
    return folder / f"task-{rank:05d}"


def record_path(folder: Path, rank: int) -> Path:
    """Return the file that marks a task as finished."""
    return folder / f"task-{rank:05d}.json"


def read_record(folder: Path, rank: int) -> TaskRecord | None:
    """Return the record of a finished task; None if the task has to run (again).

    The record must be well-formed, and the files of the task must have the sizes that it gives.
    """
    try:
        record = TaskRecord(**orjson.loads(record_path(folder, rank).read_bytes()))
        is_whole = record.is_possible() and _has_files(task_prefix(folder, rank), record)
    except (OSError, TypeError, ValueError):
        return None
    return record if is_whole else None


def _has_files(prefix: Path, record: TaskRecord) -> bool:
    """Whether the files of a task have the sizes that its record gives."""
    bins, lengths, sequences, _ = (
        os.path.getsize(f"{prefix}{suffix}") for suffix in _TASK_SUFFIXES
    )
    return (
        bins in [record.tokens * width for width in (1, 2, 4, 8)]
        and lengths == 4 * record.sequences
        and sequences == 4 * record.documents
        and (not record.missing_metadata or metadata_path(prefix).is_file())
    )


class MegatronWriter(PipelineStep):  # type: ignore[misc]
    """Writes the documents of a pipeline as tokens and metadata, one set of files per task.

    Args:
        folder: A folder from `make_work_folder`; all tasks must reach it.
        metadata_fields: Keys of the documents' metadata to keep; dots lead into nested values,
            and `file_path` is the input file.
        rejected: Shared with the reader, if that is one of `documents`; None: only texts that the
            tokenizer refuses are reported.
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
        """Write the documents of the task `rank`, unless it is finished; yields nothing.

        Raises:
            DataError: The files cannot be written, or the tokenizer gave an id outside its
                vocabulary.
        """
        if read_record(self.folder, rank) is not None:
            return
        self.rejected.reset()
        bulk_encoder, settings = load_encoder(self.folder)
        encoder = DocumentEncoder(bulk_encoder, settings.get("sentences"))
        with TaskFiles(self.folder, rank, settings, list(self.metadata_fields)) as files:
            for batch in batches(data or iter(())):
                self._write(files, encoder, batch)
                files.reject(self.rejected.drain())
                done, record = self.rejected.source_bytes, files.record
                tell_progress(rank, done, record.documents, record.tokens, record.text_bytes)
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
                    where, begin = place_of(document)
                    rejected = Rejected(*where, reason, document.text[:200])
                    self.rejected.add(rejected, begin)
            batch = [d for d, n in zip(batch, lengths.tolist(), strict=True) if n > 0]
        files.write(encoded, metadata_columns(batch, self.metadata_fields))
        files.record.text_bytes += text_bytes_of(batch)


def with_eod(
    ids: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], eod: int, dtype: np.dtype[Any]
) -> np.ndarray[Any, Any]:
    """Put an EOD behind each document.

    Args:
        ids: The documents' ids end to end, shape [ids].
        lengths: Ids per document, none zero, shape [documents].
        eod: The EOD.
        dtype: Type of the result.

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


class TaskFiles:
    """The files of one task, under temporary names until `finish`; a context manager.

    Args:
        folder: The work folder.
        rank: The task.
        settings: The encoder's `eod`, `vocab_size` and `dtype`.
        metadata_fields: The columns of metadata; empty: no metadata file.

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
        with ExitStack() as stack:
            for suffix in _TASK_SUFFIXES:
                path = Path(f"{self._prefix}{suffix}")
                file = whole_file(path, partial(cannot_write_for, path=path))
                self._files[suffix] = stack.enter_context(file)
            if metadata_fields:
                self._metadata = stack.enter_context(MetadataWriter(self._prefix, metadata_fields))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Without an error `finish` has closed everything.
        self._stack.__exit__(kind, error, trace)

    def write(self, encoded: EncodedDocuments, columns: list[list[str | None]]) -> None:
        """Add the documents that have ids, each with an EOD.

        Args:
            encoded: The documents.
            columns: The metadata of those that have ids, one list of values per field.

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
        """Write rejected records, in input order."""
        for record, begin in rejected:
            line = json.dumps({**asdict(record), "begin": begin}, ensure_ascii=False)
            self._files[".rejected.jsonl"].write(line.encode("utf-8", "replace") + b"\n")
            reasons = self.record.rejected
            reasons[record.reason] = reasons.get(record.reason, 0) + 1

    def finish(self, lines_of_parts: list[tuple[str, int, int]]) -> None:
        """Sync and publish all files; the record comes last."""
        self.record.lines_of_parts = lines_of_parts
        self._stack.close()
        write_synced(self._record_path, json.dumps(asdict(self.record)))

    def _check(self, ids: np.ndarray[Any, Any]) -> None:
        # The type on disk follows the vocabulary size: a larger id would silently wrap.
        if ids.max() >= self._vocab_size or ids.min() < 0:
            raise DataError(
                f"the tokenizer gave id {ids.max()}, its vocabulary ends at {self._vocab_size}",
                where=str(self._prefix),
                remedy="The tokenizer's files disagree with each other: fetch them again.",
            )
