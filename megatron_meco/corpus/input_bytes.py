"""The bytes of input files: opened anywhere, decompressed to their end, cut into whole lines.

Paths may be URLs of fsspec. A compressed file that ends early is an error, whatever its reader
would make of it. Lines are cut in bulk at the byte 0x0A without a loop over lines, so reading runs
at the speed of the decompressor. A byte range of a plain file holds the lines that begin in it, so
ranges that cover a file give each line once. Memory is one chunk plus the longest line. One
compressed file is not read in parallel.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import zstandard

from megatron_meco.errors import DataError

COMPRESSIONS = (".gz", ".zst")
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 18
# Long-range archives use windows up to 2 GiB, above the library's default limit.
_ZSTD_MAX_WINDOW = 1 << 31
FORMAT_BY_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".warc": "warc",
    ".wet": "warc",
}
# First bytes of other formats: read as lines, these files would be rejected line by line.
_OTHER_FORMATS = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"\x04\x22\x4d\x18": "LZ4",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
    **{b"BZh%d\x17rE8P\x90" % level: "bzip2" for level in range(1, 10)},
}


def is_remote(path: str) -> bool:
    """Whether a path is a URL for fsspec."""
    return "://" in path


def filesystem_of(name: str) -> tuple[Any, str]:
    """Return fsspec's file system for a path or URL, and the name in it."""
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(name)
    return filesystem, path


def open_source(path: str) -> BinaryIO:
    """Open a path or URL for reading as it is stored; the file can seek.

    Raises:
        OSError: It cannot be opened.
    """
    if not is_remote(path):
        # Opening a pipe would block forever.
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(errno.EINVAL, "not a plain file", path)
        return open(path, "rb")
    filesystem, name = filesystem_of(path)
    return cast(BinaryIO, filesystem.open(name, "rb"))


def is_compressed(path: str, magic: bytes) -> bool:
    """Whether a file is gzip or Zstandard, by its name or its first four bytes."""
    return path.endswith(COMPRESSIONS) or magic.startswith((_GZIP_MAGIC, _ZSTD_MAGIC))


@dataclass(frozen=True)
class Part:
    """A file, or the byte range of a plain JSONL file, that one task reads.

    Attributes:
        path: A path, or a URL that fsspec opens.
        format: `jsonl`, `parquet`, `arrow`, `csv` or `warc`.
        begin: First byte; lines that begin in the range belong to it.
        end: One past the last byte.
        is_whole: Whether the part is the whole file.
        stamp: The file's `SourceFile.stamp`; empty: changes are not noticed.
    """

    path: str
    format: str
    begin: int
    end: int
    is_whole: bool
    stamp: str = ""


@dataclass(frozen=True)
class LineChunk:
    """Consecutive whole lines of one file.

    Attributes:
        path: The file, as the user named it.
        first_line: Number of the first line, counted from 1.
        data: The lines with their ends; the last line of a file may lack its end.
        source_bytes: Bytes of the stored file read so far.
    """

    path: str
    first_line: int
    data: bytes
    source_bytes: int


def read_chunks(
    path: str,
    begin: int = 0,
    end: int | None = None,
    chunk_bytes: int = _CHUNK_BYTES,
    num_bytes: int | None = None,
) -> Iterator[LineChunk]:
    """Yield lines of a file in order, in chunks of about `chunk_bytes`.

    Args:
        path: A JSONL file or its URL; gzip and Zstandard are recognised by name or first bytes.
        begin: First byte to look at; 0 for a compressed file.
        end: Lines that begin at this byte or later are left out; None: the end of the file.
        chunk_bytes: Size that a chunk reaches before it is cut.
        num_bytes: Expected size of the stored file; None: not compared.

    Yields:
        Chunks of whole lines; the lines of a range are counted from 1.

    Raises:
        DataError: The file cannot be read to its end.
    """
    first_line = 1
    for data, at, consumed in _whole_lines(path, begin, chunk_bytes, num_bytes):
        own = data if end is None else _begun_before(end - at, data)
        if own:
            yield LineChunk(path, first_line, own, consumed)
            first_line += own.count(b"\n")
        if end is not None and at + len(data) >= end:
            return


def _begun_before(limit: int, data: bytes) -> bytes:
    """Return the lines of `data` that begin before the byte `limit`."""
    if limit <= 0:
        return b""
    # The line that holds the byte before the limit is the last one.
    cut = data.find(b"\n", limit - 1) + 1
    return data[:cut] if cut else data


def count_lines(path: str, end: int) -> int:
    """Return how many lines of a plain file begin before the byte `end`, where a range begins."""
    return sum(chunk.data.count(b"\n") for chunk in read_chunks(path, 0, end)) if end else 0


def _whole_lines(
    path: str, begin: int, chunk_bytes: int, num_bytes: int | None
) -> Iterator[tuple[bytes, int, int]]:
    """Yield `(whole lines, where they begin, bytes consumed)`; the first begins after `begin`."""
    parts: list[bytes] = []
    size = 0
    # One byte early: a line begins at `begin` when the byte before it ends one.
    at = max(begin - 1, 0)
    is_inside_line = begin > 0
    consumed = 0
    for block, position in _blocks(path, at, num_bytes):
        consumed = position - begin
        if is_inside_line:
            found = block.find(b"\n") + 1
            at += found or len(block)
            if not found:
                continue
            is_inside_line = False
            rest = block[found:]
        else:
            rest = block
        cut = rest.rfind(b"\n") + 1
        if cut == 0 or size + len(rest) < chunk_bytes:
            parts.append(rest)
            size += len(rest)
            continue
        data = b"".join([*parts, rest[:cut]])
        yield data, at, consumed
        at += len(data)
        parts, size = [rest[cut:]], len(rest) - cut
    if size:
        yield b"".join(parts), at, consumed


def open_decompressed(path: str) -> BinaryIO:
    """Open a file (plain, gzip, Zstandard) for reading its content; the stream cannot seek.

    Reading raises a DataError if the file cannot be read to its end.
    """
    return io.BufferedReader(_BlockStream(_blocks(path, 0, None)), _BLOCK_BYTES)


class _BlockStream(io.RawIOBase):
    """Blocks of bytes as a stream."""

    def __init__(self, blocks: Iterator[tuple[bytes, int]]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block[0])
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _blocks(path: str, begin: int, num_bytes: int | None) -> Iterator[tuple[bytes, int]]:
    """Yield `(decompressed bytes, file position)`; foreign errors become DataErrors."""
    position = 0
    try:
        with open_source(path) as file:
            magic = file.read(16)
            other = next((n for start, n in _OTHER_FORMATS.items() if magic.startswith(start)), "")
            if other:
                raise DataError(
                    f"is {other}, not what its name says",
                    where=path,
                    remedy=f"Name the file by its format ({', '.join(FORMAT_BY_SUFFIX)}, with .gz "
                    "or .zst where that is usual), or convert it.",
                )
            file.seek(begin)
            if path.endswith(".gz") or magic.startswith(_GZIP_MAGIC):
                blocks = _gzip_blocks(file)
            elif path.endswith(".zst") or magic.startswith(_ZSTD_MAGIC):
                blocks = _zstd_blocks(file)
            else:
                blocks = _plain_blocks(file)
            for block in blocks:
                position = file.tell()
                yield block, position
            position = file.tell()
            if num_bytes is not None and position < num_bytes:
                raise EOFError
    except DataError:
        raise
    except EOFError:
        raise _unreadable(
            path, f"the file ends too early (truncated), after {position:,} bytes"
        ) from None
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise _unreadable(
            path, f"the compressed file is damaged after {position:,} bytes ({error})"
        ) from None
    # The libraries behind URLs raise exceptions of any type.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise _unreadable(
            path, f"cannot be read after {position:,} bytes ({reason.splitlines()[0]})"
        ) from error


def _plain_blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block


def _gzip_blocks(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block
    if file.tell() == 0:
        # GzipFile accepts a file of zero bytes.
        raise EOFError


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    # Not `stream_reader`: it ends at a truncated frame without an error.
    codec = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
    frame = codec.decompressobj()
    at_border = False
    while block := file.read(_BLOCK_BYTES):
        while block:
            at_border = False
            if out := frame.decompress(block):
                yield out
            block = b""
            if frame.eof:
                block, frame, at_border = frame.unused_data, codec.decompressobj(), True
    if not at_border:
        raise EOFError


def _unreadable(path: str, what: str) -> DataError:
    return DataError(what, where=path, remedy="Fetch the file again or leave it out.")
