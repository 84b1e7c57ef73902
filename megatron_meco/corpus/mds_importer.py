"""The rows of MDS shards to tokens and metadata: the step that `meco import-mds` runs.

A BOS before and an EOD behind the ids of a row are taken off, an EOD is put behind all of them, and
ids that cannot be one document's are refused with file and row. Costs a few microseconds per row
and the memory of one shard and of a batch of 4 M ids. Given up: going on in the middle of a task.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megatron_meco.corpus.bulk import EncodedDocuments
from megatron_meco.corpus.mds import (
    INTEGER_ENCODINGS,
    Shard,
    ids_decoder,
    read_shard,
    rows_of,
    text_decoder,
)
from megatron_meco.corpus.records import Rejected
from megatron_meco.corpus.task_writer import TaskFiles, read_record, tell_progress
from megatron_meco.errors import DataError

_BATCH_IDS = 4 << 20
_LENGTH = "length"


class MdsImporter(PipelineStep):  # type: ignore[misc]
    """Writes the rows of shards as tokens and metadata; the only step of its pipeline.

    Args:
        folder: The work folder.
        tasks: The shards of each task.
        settings: `eod`, `bos`, `vocab_size` and `dtype` of the tokenizer.
        ids_column: The column of token ids.
        token_dtype: The type of the ids where the column is `bytes`.
        metadata_fields: The columns to keep as metadata.
    """

    name = "MdsImporter"
    type = "TOKENIZER"

    def __init__(
        self,
        folder: Path,
        tasks: list[list[Shard]],
        settings: dict[str, Any],
        ids_column: str,
        token_dtype: str | None,
        metadata_fields: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.folder, self.tasks, self.settings = folder, tasks, settings
        self.ids_column, self.token_dtype = ids_column, token_dtype
        self.metadata_fields = metadata_fields

    def run(
        self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Write the rows of a task's shards, unless it is finished already.

        Args:
            data: Nothing: this is the first step.
            rank: The task.
            world_size: The number of tasks.

        Yields:
            Nothing: this is also the last step.

        Raises:
            DataError: A shard is damaged, or the files cannot be written.
        """
        if read_record(self.folder, rank) is not None:
            return
        fields = list(self.metadata_fields)
        done = 0
        with TaskFiles(self.folder, rank, self.settings, fields) as files:
            for shard in self.tasks[rank]:
                self._write_shard(files, shard)
                done += shard.stored_bytes
                tell_progress(rank, done, done, files.record)
            files.finish([])
        yield from ()

    def _write_shard(self, files: TaskFiles, shard: Shard) -> None:
        columns = shard.columns
        decode_ids = ids_decoder(columns[self.ids_column], self.token_dtype)
        decode_texts = [text_decoder(columns[name], name) for name in self.metadata_fields]
        names = [self.ids_column, *self.metadata_fields]
        has_length = _LENGTH in columns and columns[_LENGTH] in INTEGER_ENCODINGS
        if has_length:
            names.append(_LENGTH)
            decode_length = text_decoder(columns[_LENGTH], _LENGTH)
        batch = _Batch(files, shard, self.settings, len(decode_texts))
        for row, values in enumerate(rows_of(shard, read_shard(shard), names)):
            try:
                ids = decode_ids(values[0])
                texts = [f(value) for f, value in zip(decode_texts, values[1:], strict=False)]
                length = decode_length(values[-1]) if has_length else str(len(ids))
            except ValueError as error:
                raise _bad_row(shard, row, f"cannot be read ({error})") from None
            if int(length) != len(ids):
                raise _bad_row(shard, row, f"{len(ids)} ids, not the {length} of its length")
            batch.add(row, ids, texts)
        batch.write()


class _Batch:
    """Rows of a shard that are written together."""

    def __init__(
        self, files: TaskFiles, shard: Shard, settings: dict[str, Any], num_fields: int
    ) -> None:
        self._files, self._shard = files, shard
        self._bos, self._eod = settings["bos"], settings["eod"]
        self._vocab_size = settings["vocab_size"]
        self._num_fields = num_fields
        self._clear()

    def _clear(self) -> None:
        self._rows: list[int] = []
        self._ids: list[np.ndarray[Any, Any]] = []
        self._columns: list[list[str | None]] = [[] for _ in range(self._num_fields)]
        self._room = _BATCH_IDS

    def add(self, row: int, ids: np.ndarray[Any, Any], texts: list[str]) -> None:
        """Add a row, without the BOS and EOD that it may have around it."""
        if len(ids) and self._bos is not None and ids[0] == self._bos:
            ids = ids[1:]
        if len(ids) and ids[-1] == self._eod:
            ids = ids[:-1]
        if len(ids) == 0:
            self._files.reject([(Rejected(self._shard.path, row + 1, "no tokens", ""), 0)])
            return
        self._rows.append(row)
        self._ids.append(ids)
        for column, text in zip(self._columns, texts, strict=True):
            column.append(text)
        self._room -= len(ids)
        if self._room <= 0:
            self.write()

    def write(self) -> None:
        """Write what was added."""
        if not self._rows:
            return
        ids = np.concatenate(self._ids)
        lengths = np.array([len(one) for one in self._ids], dtype=np.int64)
        self._check(ids, lengths)
        ones = np.ones(len(lengths), dtype=np.int64)
        self._files.write(EncodedDocuments(ids, lengths, lengths, ones), self._columns)
        self._clear()

    def _check(self, ids: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> None:
        is_outside = (ids < 0) | (ids >= self._vocab_size)
        is_special = np.isin(ids, [i for i in (self._bos, self._eod) if i is not None])
        if not (is_outside.any() or is_special.any()):
            return
        place = int(np.argmax(is_outside | is_special))
        row = self._rows[int(np.searchsorted(np.cumsum(lengths), place, side="right"))]
        if is_outside[place]:
            raise DataError(
                f"id {ids[place]}, the vocabulary ends at {self._vocab_size}",
                where=f"{self._shard.path}, row {row + 1}",
                remedy="Name the tokenizer that made the ids.",
            )
        raise DataError(
            f"{'EOD' if ids[place] == self._eod else 'BOS'} {ids[place]} inside: not one document",
            where=f"{self._shard.path}, row {row + 1}",
            remedy="Import the unpacked data, and name the tokenizer that made the ids.",
        )


def _bad_row(shard: Shard, row: int, what: str) -> DataError:
    return DataError(what, where=f"{shard.path}, row {row + 1}", remedy="Fetch the shard again.")
