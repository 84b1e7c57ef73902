"""Megatron's `.idx` and `.bin` as mapped arrays, without Megatron or torch.

Opening checks what the header promises against the size of both files and costs microseconds;
nothing else is read. Given up: multimodal indices with a mode per sequence, and remote files.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_meco.errors import DataError

INDEX_MAGIC = b"MMIDIDX\x00\x00"
# Megatron's DType.
TYPE_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
_HEADER = struct.Struct("<QBQQ")
_BLOCK = 1 << 20
_REMEDY = "Prepare the corpus again, or copy both files again from where they are whole."


@dataclass(frozen=True)
class CorpusIndex:
    """A corpus on disk; all arrays are mapped and read-only."""

    tokens: np.ndarray[Any, Any]
    """All tokens, shape [tokens], in the type on disk."""

    lengths: np.ndarray[Any, Any]
    """Tokens per sequence, int32, shape [sequences]."""

    pointers: np.ndarray[Any, Any]
    """First byte of each sequence in the `.bin`, int64, shape [sequences]."""

    first_sequences: np.ndarray[Any, Any]
    """First sequence of each document and one past the last, int64, shape [documents + 1]."""

    @property
    def num_documents(self) -> int:
        """The number of documents."""
        return len(self.first_sequences) - 1

    def bounds(self, begin: int, end: int) -> np.ndarray[Any, Any]:
        """Return the places of tokens where documents begin.

        Args:
            begin: The first document.
            end: One past the last.

        Returns:
            int64, shape [end - begin + 1]; the last one is where the last document ends.
        """
        first = np.asarray(self.first_sequences[begin : end + 1])
        lengths = np.asarray(self.lengths[first[0] : first[-1]], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        start = 0
        if first[0] < len(self.pointers):
            start = int(self.pointers[first[0]]) // self.tokens.itemsize
        bounds: np.ndarray[Any, Any] = start + offsets[first - first[0]]
        return bounds


def header(dtype: np.dtype[Any], num_sequences: int, num_documents: int) -> bytes:
    """Return the beginning of an index file."""
    counts = _HEADER.pack(1, TYPE_CODES[dtype.name], num_sequences, num_documents + 1)
    return INDEX_MAGIC + counts


def open_index(prefix: str | os.PathLike[str]) -> CorpusIndex:
    """Open a corpus.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.

    Returns:
        Its arrays.

    Raises:
        DataError: A file is missing, is no such file, or has another size than it should.
    """
    index, data = Path(f"{os.fspath(prefix)}.idx"), Path(f"{os.fspath(prefix)}.bin")
    for path in (index, data):
        if not path.is_file():
            raise DataError(
                "no such file",
                where=str(path),
                remedy="Give the path without .bin or .idx.",
            )
    with index.open("rb") as file:
        head = file.read(len(INDEX_MAGIC) + _HEADER.size)
    names = {code: name for name, code in TYPE_CODES.items()}
    if len(head) < len(INDEX_MAGIC) + _HEADER.size or not head.startswith(INDEX_MAGIC):
        raise DataError("not an index of Megatron's", where=str(index), remedy=_REMEDY)
    version, code, num_sequences, num_bounds = _HEADER.unpack(head[len(INDEX_MAGIC) :])
    if version != 1 or code not in names:
        what = f"version {version} with token type {code}, which this cannot read"
        raise DataError(what, where=str(index), remedy=_REMEDY)
    expected = len(head) + 12 * num_sequences + 8 * num_bounds
    if index.stat().st_size != expected:
        what = f"{index.stat().st_size:,} bytes, its header promises {expected:,}"
        raise DataError(what, where=str(index), remedy=_REMEDY)
    begin = len(head)
    lengths = _mapped(index, np.dtype(np.int32), begin, num_sequences)
    pointers = _mapped(index, np.dtype(np.int64), begin + 4 * num_sequences, num_sequences)
    bounds = _mapped(index, np.dtype(np.int64), begin + 12 * num_sequences, num_bounds)
    dtype = np.dtype(names[code])
    num_tokens = int(lengths.sum(dtype=np.int64))
    if data.stat().st_size != num_tokens * dtype.itemsize:
        what = f"{data.stat().st_size:,} bytes, the index promises {num_tokens * dtype.itemsize:,}"
        raise DataError(what, where=str(data), remedy=_REMEDY)
    return CorpusIndex(_mapped(data, dtype, 0, num_tokens), lengths, pointers, bounds)


def broken_structure(index: CorpusIndex) -> str:
    """Return what is wrong inside an index, empty when nothing is; reads all of it.

    Args:
        index: The corpus.

    Returns:
        A few words.
    """
    bounds = index.first_sequences
    if bounds[0] != 0 or bounds[-1] != len(index.lengths) or (np.diff(bounds) < 0).any():
        return "documents do not cover the sequences in order"
    expected = 0
    for begin in range(0, len(index.lengths), _BLOCK):
        sizes = index.lengths[begin : begin + _BLOCK].astype(np.int64) * index.tokens.itemsize
        ends = expected + np.cumsum(sizes)
        if (sizes < 0).any() or (index.pointers[begin : begin + _BLOCK] != ends - sizes).any():
            return "sequences do not lie one after the other"
        expected = int(ends[-1])
    return ""


def _mapped(path: Path, dtype: np.dtype[Any], begin: int, count: int) -> np.ndarray[Any, Any]:
    if count == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=begin, shape=(count,))
