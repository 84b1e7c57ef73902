"""Named numpy arrays in one memory-mapped file, written atomically.

The cache format of prefix tables and plans: a magic line, a JSON header with its own checksum, then
the arrays, aligned to 64 bytes. The header has the file's name and a checksum (XXH3) of the arrays.
Both are checked when a file is opened, so changed or missing bytes and renamed files are reported.
This reads the file once: 25 GB/s from the page cache (0.2 s for a plan of 10^9 documents). Several
writers produce equal files, and the last one wins. Damage after opening is not detected here; the
C++ code checks every number that it uses.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_meco.errors import DataError
from megatron_meco.whole_file import unfinished_files, whole_file

_MAGIC = b"MECO-ARRAYS 2\n"
_EARLIER_MAGIC = b"MECO-ARRAYS 1\n"  # without a checksum of the arrays: built again
_ALIGNMENT = 64
_HASHED_AT_ONCE = 1 << 26
_DTYPES = ("<i4", "<i8")
_ABANDONED_AFTER = 3600.0  # seconds without a write


class ArraySpool:
    """A one-dimensional array that grows on the disk and not in memory.

    It lies in a file without a name, so nothing of it remains after a killed process.

    Args:
        folder: On the disk that has the room.
        dtype: The type of its numbers.

    Raises:
        OSError: The file cannot be made or, later, written.
    """

    def __init__(self, folder: Path, dtype: type[np.generic]) -> None:
        # Closed when nothing refers to it any more.
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.dtype = np.dtype(dtype)
        self.size = 0

    @property
    def shape(self) -> tuple[int]:
        """As of an array."""
        return (self.size,)

    @property
    def nbytes(self) -> int:
        """As of an array."""
        return self.size * self.dtype.itemsize

    def append(self, values: NDArray[Any]) -> None:
        """Add numbers, converted to the type of the array."""
        if len(values):
            self._file.write(memoryview(np.ascontiguousarray(values, dtype=self.dtype)).cast("B"))
        self.size += len(values)

    def parts(self) -> Iterator[bytes]:
        """The bytes of the array, a stretch at a time."""
        self._file.seek(0)
        while part := self._file.read(_HASHED_AT_ONCE):
            yield part


@dataclass(frozen=True)
class ArrayFile:
    """An open file: the writer's `header`, and read-only maps of the `arrays`."""

    path: Path
    header: dict[str, Any]
    arrays: dict[str, NDArray[Any]]

    def check(self, **dtypes: type[np.generic]) -> None:
        """Check that the file has exactly these one-dimensional arrays.

        Args:
            **dtypes: Their types by name.

        Raises:
            DataError: It has others.
        """
        found = {name: (array.dtype, array.ndim) for name, array in self.arrays.items()}
        if found != {name: (np.dtype(dtype), 1) for name, dtype in dtypes.items()}:
            raise self.damaged(f"it holds {', '.join(self.arrays) or 'nothing'}")

    def damaged(self, what: str) -> DataError:
        """The error for invalid content."""
        return _damaged(self.path, what)


def load_or_build(
    path: Path,
    kind: str,
    build: Callable[[], tuple[dict[str, Any], Mapping[str, NDArray[Any] | ArraySpool]]],
) -> ArrayFile:
    """Open the file at `path`, building it first if it is not there.

    Processes that build in the same folder take turns (an advisory lock on the folder, which leaves
    no file), so each node builds once. Without working locks each process builds, and the last
    rename wins.

    Args:
        path: Where the file is or will be.
        kind: Its content; a file of another kind is refused.
        build: Makes the header (JSON-serializable) and the arrays.

    Raises:
        DataError: When the file is damaged, or the folder cannot be written.
    """
    if _is_there(path):
        return open_arrays(path, kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _folder_lock(path.parent):
            if not _is_there(path):
                _remove_abandoned(path)
                header, arrays = build()
                write_arrays(path, kind, header, arrays)
    except OSError as error:
        raise _cannot_write(path, kind, error.strerror or str(error)) from error
    return open_arrays(path, kind)


def check_once(path: Path, kind: str, check: Callable[[], None]) -> None:
    """Run a check unless a file records that it passed.

    Processes take turns as in `load_or_build`, so each node checks once. If the file cannot be
    written, the check runs each time.

    Args:
        path: The file; its name identifies everything that determines the outcome.
        kind: What it records.
        check: Raises an error if the check fails.

    Raises:
        Exception: What `check` raised.
    """
    if _is_whole(path, kind):
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_folder_lock(path.parent))
        if not _is_whole(path, kind):
            check()
            with contextlib.suppress(DataError):
                write_arrays(path, kind, {}, {})


def _is_there(path: Path) -> bool:
    """Whether a file of this version exists, damaged or not."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) != _EARLIER_MAGIC
    except FileNotFoundError:
        return False
    except OSError:
        return path.exists()


def _is_whole(path: Path, kind: str) -> bool:
    try:
        open_arrays(path, kind)
    except DataError:
        return False
    return True


def _cannot_write(path: Path, kind: str, reason: str) -> DataError:
    return DataError(
        f"cannot write the {kind} to {path} ({reason})",
        where="--data-cache-path",
        remedy="Give a folder that this user can write to, with room enough.",
    )


def _remove_abandoned(path: Path) -> None:
    """Delete temporary files of killed builders, but not those that may still be written."""
    for temporary in unfinished_files(path):
        with contextlib.suppress(OSError):
            if time.time() - temporary.stat().st_mtime > _ABANDONED_AFTER:
                temporary.unlink()


def write_arrays(
    path: Path, kind: str, header: dict[str, Any], arrays: Mapping[str, NDArray[Any] | ArraySpool]
) -> None:
    """Write arrays to a file, atomically.

    Args:
        path: The file.
        kind: Its content.
        header: Further values; JSON-serializable.
        arrays: The arrays by name.

    Raises:
        DataError: It cannot be written.
    """
    table = {}
    offset = 0
    for name, array in arrays.items():
        assert array.dtype.str in _DTYPES, array.dtype
        table[name] = {"dtype": array.dtype.str, "shape": array.shape, "offset": offset}
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    content: dict[str, Any] = {"kind": kind, "name": path.name, "header": header, "arrays": table}
    hasher = xxhash.xxh3_128()
    with whole_file(path, lambda reason: _cannot_write(path, kind, reason)) as file:
        # The checksum is known at the end, the length of the head from the beginning.
        content |= {"bytes": offset, "xxh3": hasher.hexdigest()}
        file.write(_head(content))
        for part in _body(arrays):
            hasher.update(part)
            file.write(part)
        file.seek(0)
        file.write(_head({**content, "xxh3": hasher.hexdigest()}))


def _head(content: dict[str, Any]) -> bytes:
    body = json.dumps(content).encode()
    checksum = hashlib.blake2b(body, digest_size=16).hexdigest().encode()
    head = _MAGIC + checksum + b" " + str(len(body)).encode() + b"\n" + body
    return head + b" " * (-len(head) % _ALIGNMENT)


def _body(arrays: Mapping[str, NDArray[Any] | ArraySpool]) -> Iterator[memoryview | bytes]:
    """The bytes after the header."""
    for array in arrays.values():
        if isinstance(array, ArraySpool):
            yield from array.parts()
        elif array.size:
            yield memoryview(np.ascontiguousarray(array)).cast("B")
        yield b"\0" * (-array.nbytes % _ALIGNMENT)


def open_arrays(path: Path, kind: str) -> ArrayFile:
    """Map a file written by `write_arrays`, and check its checksum.

    Raises:
        DataError: It is missing, damaged, truncated, or of another kind, name or version.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(len(_MAGIC)) != _MAGIC:
                raise _damaged(path, "it does not start as a file of this version does")
            checksum, _, length = file.readline(128).partition(b" ")
            if not length.strip().isdigit() or int(length) > size:
                raise _damaged(path, "its header is unreadable")
            body = file.read(int(length))
            start = file.tell() + -file.tell() % _ALIGNMENT
    except OSError as error:
        raise _damaged(path, f"cannot be opened ({error.strerror})") from error
    if hashlib.blake2b(body, digest_size=16).hexdigest().encode() != checksum:
        raise _damaged(path, "its header does not match its checksum")
    try:
        content = json.loads(body)
        if content["kind"] != kind:
            raise _damaged(path, f"it holds a {content['kind']}, not a {kind}")
        if content["name"] != path.name:
            raise _damaged(path, f"it belongs under the name {content['name']}")
        if size != start + content["bytes"]:
            raise _damaged(path, f"it has {size} bytes, its header says {start + content['bytes']}")
        if _hash(path, start, content["bytes"]) != content["xxh3"]:
            raise _damaged(path, "its arrays do not match their checksum")
        arrays = {
            name: _map(path, start, content["bytes"], entry)
            for name, entry in content["arrays"].items()
        }
        return ArrayFile(path, dict(content["header"]), arrays)
    except DataError:
        raise
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise _damaged(path, "its header makes no sense") from error


def _hash(path: Path, start: int, num_bytes: int) -> str:
    hasher = xxhash.xxh3_128()
    for begin in range(0, num_bytes, _HASHED_AT_ONCE):
        # A map for each part: what is mapped counts as memory of this process.
        size = min(_HASHED_AT_ONCE, num_bytes - begin)
        hasher.update(np.memmap(path, np.uint8, mode="r", offset=start + begin, shape=(size,)))
    return hasher.hexdigest()


def _map(path: Path, start: int, num_bytes: int, entry: dict[str, Any]) -> NDArray[Any]:
    """One array of a file. No header makes this read outside the file."""
    shape, offset = entry["shape"], entry["offset"]
    if entry["dtype"] not in _DTYPES:
        raise _damaged(path, f"it holds numbers of type {entry['dtype']!r}")
    dtype = np.dtype(entry["dtype"])
    # bool is an int to isinstance, and would do no harm.
    if not all(isinstance(n, int) and n >= 0 for n in [*shape, offset]):
        raise _damaged(path, "its header makes no sense")
    if offset % _ALIGNMENT or offset + math.prod(shape) * dtype.itemsize > num_bytes:
        raise _damaged(path, "an array lies outside of it")
    if 0 in shape:  # an empty range cannot be mapped
        return np.empty(shape, dtype)
    mapped = np.memmap(path, dtype=dtype, mode="r", offset=start + offset, shape=tuple(shape))
    return mapped.view(np.ndarray)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(
        f"the cached file is damaged or foreign: {what}",
        where=str(path),
        remedy="Delete it; it is built again at the next start.",
    )


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
