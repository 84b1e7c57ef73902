"""Read JSONL files (plain, gzip, Zstandard) as chunks of whole lines.

Lines are cut in bulk at the byte 0x0A; nothing here looks at a single line, so reading runs at the
speed of the decompressor and parsing is left to the workers. Memory is one chunk plus the longest
line. Given up: reading compressed files in parallel, and other formats (a chunk of lines is the
interface that they would have to fill).
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from megatron_meco.errors import DataError

_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 18
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# Long-range archives use windows up to 2 GiB, above the library's default limit.
_ZSTD_MAX_WINDOW = 1 << 31


@dataclass(frozen=True)
class LineChunk:
    """Consecutive whole lines of one file."""

    path: str
    """The file, as the user named it."""

    first_line: int
    """The number of the first line, counted from 1."""

    data: bytes
    """The lines with their ends; the last line of a file may lack its end."""

    source_bytes: int
    """How far into the file (compressed) reading had come."""


def read_chunks(path: Path, chunk_bytes: int = _CHUNK_BYTES) -> Iterator[LineChunk]:
    """Yield the lines of a file in order, in chunks of about `chunk_bytes`.

    Args:
        path: A JSONL file; `.gz` and `.zst` are recognised by their first bytes.
        chunk_bytes: The size that a chunk reaches before it is cut.

    Yields:
        Chunks of whole lines.

    Raises:
        DataError: The file cannot be read to its end.
    """
    first_line, parts, size = 1, [], 0
    consumed = 0
    for block, consumed in _blocks(path):
        cut = block.rfind(b"\n") + 1
        if cut == 0 or size + len(block) < chunk_bytes:
            parts.append(block)
            size += len(block)
            continue
        data = b"".join([*parts, block[:cut]])
        yield LineChunk(str(path), first_line, data, consumed)
        first_line += data.count(b"\n")
        parts, size = [block[cut:]], len(block) - cut
    if size:
        yield LineChunk(str(path), first_line, b"".join(parts), consumed)


def _blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield `(decompressed bytes, file position)`, foreign errors turned into ours."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            if path.suffix == ".gz" or magic.startswith(_GZIP_MAGIC):
                yield from _gzip_blocks(file)
            elif path.suffix == ".zst" or magic == _ZSTD_MAGIC:
                yield from _zstd_blocks(file)
            else:
                while block := file.read(_BLOCK_BYTES):
                    yield block, file.tell()
    except EOFError:
        raise _unreadable(path, "the compressed file ends too early (truncated)") from None
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise _unreadable(path, f"the compressed file is damaged ({error})") from None
    except OSError as error:
        raise _unreadable(path, f"cannot be read ({error.strerror or error})") from None


def _gzip_blocks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    with gzip.GzipFile(fileobj=file) as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block, file.tell()


def _zstd_blocks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    # Not `stream_reader`: at a truncated frame it ends without an error, and documents are lost.
    codec = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
    frame = codec.decompressobj()
    at_border = False
    while block := file.read(_BLOCK_BYTES):
        while block:
            at_border = False
            if out := frame.decompress(block):
                yield out, file.tell()
            block = b""
            if frame.eof:
                block, frame, at_border = frame.unused_data, codec.decompressobj(), True
    if not at_border:
        raise EOFError


def _unreadable(path: Path, what: str) -> DataError:
    return DataError(what, where=str(path), remedy="Fetch the file again or leave it out.")
