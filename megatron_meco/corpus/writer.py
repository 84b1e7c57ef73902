"""Write a corpus so that it exists completely or not at all.

`PREFIX.bin/.idx` come from Megatron's own builder; everything is written under temporary names in
the same folder, put on the disk, and renamed at the end, the index last: a corpus that has an index
is whole. Costs one small write per document. Memory grows by about 70 bytes per document, because
Megatron's builder keeps the lengths in lists. Given up: continuing after a kill.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from megatron_meco.corpus.encoding import EncodedChunk
from megatron_meco.corpus.metadata import MetadataWriter, metadata_path
from megatron_meco.errors import DataError


def output_paths(prefix: Path) -> list[Path]:
    """Return every file that a preparation may write, the index last."""
    names = (".bin", ".prepare.json", ".rejected.jsonl", ".idx")
    return [metadata_path(prefix), *(Path(f"{prefix}{name}") for name in names)]


class CorpusWriter:
    """Collects encoded chunks; `publish` makes the corpus appear.

    Use it as a context manager: whatever is not published when it ends is removed.

    Args:
        prefix: Where the corpus goes, as in Megatron's `--data-path`.
        dtype: The numpy type of tokens on disk.
        metadata_fields: The metadata columns; without any there is no metadata file.
    """

    def __init__(self, prefix: Path, dtype: type[Any], metadata_fields: list[str]) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._prefix = prefix
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._metadata = MetadataWriter(prefix, metadata_fields) if metadata_fields else None
        self._builder = IndexedDatasetBuilder(str(self._temporary(".bin")), dtype=dtype)
        self._rejected = self._temporary(".rejected.jsonl").open("w", encoding="utf-8")
        self._num_rejected = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._builder.data_file.close()
        self._rejected.close()
        if self._metadata is not None:
            self._metadata.abort()
        for path in output_paths(self._prefix):
            _temporary(path).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(
                f"cannot be written ({error.strerror or error})",
                where=str(error.filename or self._prefix),
                remedy="Free space, or choose another --output.",
            ) from error

    @property
    def document_lengths(self) -> np.ndarray[Any, Any]:
        """Tokens per document so far, EOD included."""
        return np.array(self._builder.sequence_lengths, dtype=np.int64)

    def append(self, chunk: EncodedChunk) -> None:
        """Add the documents and rejected lines of a chunk."""
        begin = 0
        for length in chunk.lengths:
            self._builder.add_document(chunk.tokens[begin : begin + length], [length])
            begin += length
        if self._metadata is not None and chunk.lengths:
            self._metadata.append(chunk.metadata)
        for rejected in chunk.rejected:
            self._rejected.write(json.dumps(asdict(rejected), ensure_ascii=False) + "\n")
        self._num_rejected += len(chunk.rejected)

    def publish(self, manifest: dict[str, Any]) -> list[Path]:
        """Complete all files and give them their names.

        Args:
            manifest: What `PREFIX.prepare.json` says.

        Returns:
            The files of the corpus.
        """
        self._builder.finalize(str(self._temporary(".idx")))
        self._rejected.close()
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        self._temporary(".prepare.json").write_text(text, encoding="utf-8")
        if self._num_rejected == 0:
            self._temporary(".rejected.jsonl").unlink()
        if self._metadata is not None:
            self._metadata.finish()
        return self._rename()

    def _rename(self) -> list[Path]:
        paths = output_paths(self._prefix)
        written = [path for path in paths if _temporary(path).exists()]
        for path in written:
            _sync(_temporary(path))
        # An older index goes first: it must never stand beside a newer .bin.
        for path in reversed(paths):
            path.unlink(missing_ok=True)
        for path in written:
            os.replace(_temporary(path), path)
        _sync(self._prefix.parent)
        return written

    def _temporary(self, suffix: str) -> Path:
        return _temporary(Path(f"{self._prefix}{suffix}"))


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
