"""Megatron's `.idx` and `.bin` as mapped arrays, without Megatron or torch.

Opening reads the whole index once, on all cores (about 15 ms for 10^7 documents), and checks that
no length is negative, every sequence begins where the one before it ends, documents cover the
sequences in order, and both files have the size that follows. So no later read leaves the files.
Multimodal indices (a mode per sequence) and remote files are not supported.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_meco import _core
from megatron_meco.errors import DataError

INDEX_MAGIC = b"MMIDIDX\x00\x00"
# Megatron's DType.
# Not those that hold no ids: int8, float64, float32.
TYPE_CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
_HEADER = struct.Struct("<QBQQ")
_REMEDY = "Prepare the corpus again, or copy both files again from where they are whole."
_VERIFY = f"{_REMEDY} `meco verify` looks at all of it."


@dataclass(frozen=True)
class CorpusIndex:
    """A corpus on disk; all arrays are mapped and read-only.

    Attributes:
        tokens: All tokens, shape [tokens], in the type on disk.
        lengths: Tokens per sequence, int32, shape [sequences].
        pointers: First byte of each sequence in the `.bin`, int64, shape [sequences].
        first_sequences: First sequence of each document and one past the last, int64, shape
            [documents + 1].
        broken: What is wrong with the structure; empty if nothing is.
    """

    tokens: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]
    pointers: np.ndarray[Any, Any]
    first_sequences: np.ndarray[Any, Any]
    broken: str

    @property
    def num_documents(self) -> int:
        """The number of documents."""
        return len(self.first_sequences) - 1

    def bounds(self, begin: int, end: int) -> np.ndarray[Any, Any]:
        """Return where documents `begin` to `end - 1` begin in `tokens`, and where the last ends.

        Returns:
            int64, shape [end - begin + 1].
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
    """Open a corpus; a broken structure is noted in `broken`.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.

    Raises:
        DataError: A file is missing, has another format, or another size than its header promises.
    """
    index, data = Path(f"{os.fspath(prefix)}.idx"), Path(f"{os.fspath(prefix)}.bin")
    for path in (index, data):
        if not path.is_file():
            raise DataError(
                "no such file",
                where=str(path),
                remedy="Give the path without .bin or .idx.",
            )
    try:
        dtype, lengths, pointers, bounds = _map_index(index)
        scan = _scan(lengths, pointers, bounds, dtype.itemsize)
        broken = _told(scan, lengths, pointers, bounds, dtype.itemsize)
        size, expected = data.stat().st_size, scan["num_tokens"] * dtype.itemsize
        # A negative length makes the sum meaningless.
        if scan["bad_length"] < 0 and size != expected:
            what = f"{size:,} bytes, the index promises {expected:,}"
            raise DataError(what, where=str(data), remedy=_REMEDY)
        tokens = _mapped(data, dtype, 0, size // dtype.itemsize)
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror or error})",
            where=str(error.filename or index),
            remedy=_REMEDY,
        ) from None
    return CorpusIndex(tokens, lengths, pointers, bounds, broken)


def check_index(prefix: str | os.PathLike[str]) -> CorpusIndex:
    """Open a corpus and refuse one with a broken structure.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.

    Raises:
        DataError: As `open_index`; or the numbers of the index contradict each other.
    """
    index = open_index(prefix)
    if index.broken:
        raise DataError(index.broken, where=f"{os.fspath(prefix)}.idx", remedy=_VERIFY)
    return index


def check_arrays(
    lengths: np.ndarray[Any, Any],
    pointers: np.ndarray[Any, Any],
    first_sequences: np.ndarray[Any, Any],
    token_bytes: int,
    where: str,
) -> bool:
    """Check the arrays of an index that Megatron opened.

    Args:
        lengths: Tokens per sequence, int32, shape [sequences].
        pointers: First byte of each sequence, int64, shape [sequences].
        first_sequences: First sequence of each document and one past the last, int64, shape
            [documents + 1].
        token_bytes: Bytes of a token.
        where: Names the index in messages.

    Returns:
        Whether document `i` is sequence `i`.

    Raises:
        DataError: Names the first number that is wrong.
    """
    scan = _scan(lengths, pointers, first_sequences, token_bytes)
    if broken := _told(scan, lengths, pointers, first_sequences, token_bytes):
        raise DataError(broken, where=where, remedy=_VERIFY)
    return bool(scan["one_sequence_each"])


def header_of(path: Path) -> tuple[np.dtype[Any], int, int]:
    """Read the header of an `.idx` file and compare the file's size with it.

    Returns:
        The type of the tokens, the number of sequences, and the number of document bounds.

    Raises:
        DataError: It is no index, or has another size than its header promises.
    """
    length = len(INDEX_MAGIC) + _HEADER.size
    with path.open("rb") as file:
        head = file.read(length)
        size = os.fstat(file.fileno()).st_size
    if len(head) < length or not head.startswith(INDEX_MAGIC):
        raise DataError("not an index of Megatron's", where=str(path), remedy=_REMEDY)
    version, code, num_sequences, num_bounds = _HEADER.unpack(head[len(INDEX_MAGIC) :])
    names = {code: name for name, code in TYPE_CODES.items()}
    if version != 1 or code not in names:
        what = f"version {version} with token type {code}, which this cannot read"
        raise DataError(what, where=str(path), remedy=_REMEDY)
    if num_bounds < 1:
        raise DataError("no entry for the first document", where=str(path), remedy=_REMEDY)
    expected = length + 12 * num_sequences + 8 * num_bounds
    if size == expected + num_sequences and num_sequences:
        raise DataError(
            "a multimodal index, with a mode for each sequence",
            where=str(path),
            remedy="Give a text-only corpus.",
        )
    if size != expected:
        what = f"{size:,} bytes, its header promises {expected:,}"
        raise DataError(what, where=str(path), remedy=_REMEDY)
    return np.dtype(names[code]), num_sequences, num_bounds


def _map_index(
    path: Path,
) -> tuple[np.dtype[Any], np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Type of the tokens, lengths, pointers and first sequences."""
    dtype, num_sequences, num_bounds = header_of(path)
    begin = len(INDEX_MAGIC) + _HEADER.size
    lengths = _mapped(path, np.dtype(np.int32), begin, num_sequences)
    pointers = _mapped(path, np.dtype(np.int64), begin + 4 * num_sequences, num_sequences)
    bounds = _mapped(path, np.dtype(np.int64), begin + 12 * num_sequences, num_bounds)
    return dtype, lengths, pointers, bounds


def _scan(
    lengths: np.ndarray[Any, Any],
    pointers: np.ndarray[Any, Any],
    bounds: np.ndarray[Any, Any],
    token_bytes: int,
) -> dict[str, int]:
    threads = len(os.sched_getaffinity(0))
    return _core.scan_index(lengths, pointers, bounds, token_bytes=token_bytes, num_threads=threads)


def _told(
    scan: dict[str, int],
    lengths: np.ndarray[Any, Any],
    pointers: np.ndarray[Any, Any],
    bounds: np.ndarray[Any, Any],
    token_bytes: int,
) -> str:
    """Describe what a scan found; empty if nothing."""
    if (i := scan["bad_length"]) >= 0:
        return f"sequence {i:,} has {lengths[i]:,} tokens"
    if (i := scan["bad_pointer"]) >= 0:
        end = int(pointers[i - 1]) + int(lengths[i - 1]) * token_bytes if i else 0
        return (
            f"sequences do not lie one after the other: number {i:,} begins at byte "
            f"{pointers[i]:,}, not {end:,}"
        )
    if (i := scan["bad_bound"]) >= 0:
        before = f" after {bounds[i - 1]:,}" if i else ""
        return (
            f"documents do not cover the sequences in order: entry {i:,} of {len(bounds):,} is "
            f"{bounds[i]:,}{before}, of {len(lengths):,} sequences"
        )
    return ""


def _mapped(path: Path, dtype: np.dtype[Any], begin: int, count: int) -> np.ndarray[Any, Any]:
    if count == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=begin, shape=(count,))
