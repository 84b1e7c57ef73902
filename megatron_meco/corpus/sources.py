"""What `meco prepare` reads: files and folders, anywhere fsspec reaches, cut into tasks.

A task is a run of consecutive files, or a byte range of one plain JSONL file, of about one size.
The cut depends on the input alone and never on the number of workers, so that the output does not
either; it grows with the input (16 MiB to 1 GiB), so that a laptop keeps all cores busy and a
cluster gets about a thousand tasks. Costs one look-up of size and date per file, and four bytes of
files that may be cut. Given up: cutting compressed files, and Parquet inside a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from megatron_meco.errors import DataError

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".warc": "warc",
    ".wet": "warc",
}
_COMPRESSIONS = (".gz", ".zst")
# Compressed by the reader of the format itself, or never.
FORMATS = tuple(dict.fromkeys(_SUFFIXES.values()))
# A Hugging Face data set saved to disk keeps its description beside its data.
_NOT_DATA = ("dataset_info.json", "state.json", "dataset_dict.json")
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_TASKS = 1024
_MIN_TASK_BYTES = 16 << 20
_MAX_TASK_BYTES = 1 << 30


@dataclass(frozen=True)
class SourceFile:
    """One file of the input."""

    path: str
    """A path, or a URL that fsspec opens."""

    format: str
    """One of `FORMATS`."""

    num_bytes: int
    """Its size as it is stored."""

    stamp: str
    """What changes when the file does: a date or an ETag; empty where there is none."""


@dataclass(frozen=True)
class Part:
    """A file, or the byte range of a plain JSONL file, that one task reads."""

    path: str
    """A path, or a URL that fsspec opens."""

    format: str
    """One of `FORMATS`."""

    begin: int
    """The first byte; lines that begin in the range belong to it."""

    end: int
    """One past the last byte."""

    is_whole: bool
    """Whether the part is the whole file."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL for fsspec."""
    return "://" in path


def open_source(path: str) -> BinaryIO:
    """Open a file for reading as it is stored.

    Args:
        path: A path or URL.

    Returns:
        The file, which can seek.

    Raises:
        OSError: It cannot be opened.
    """
    if not is_remote(path):
        return open(path, "rb")
    filesystem, name = _filesystem(path)
    return cast(BinaryIO, filesystem.open(name, "rb"))


def is_compressed(path: str, magic: bytes) -> bool:
    """Whether a file is gzip or Zstandard, by its name or its first four bytes."""
    return path.endswith(_COMPRESSIONS) or magic.startswith((_GZIP_MAGIC, _ZSTD_MAGIC))


def find_files(inputs: Iterable[str | os.PathLike[str]]) -> list[SourceFile]:
    """Return the files that the inputs name.

    Args:
        inputs: Files, folders (searched for data files, in the order of their names), patterns
            with `*`; local or `protocol://`.

    Returns:
        The files in the order of their documents.

    Raises:
        DataError: There is no such file, or nothing in a folder.
    """
    files: list[SourceFile] = []
    for given in inputs:
        name = os.fspath(given)
        try:
            files += _find(name)
        except (OSError, ImportError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            reason = str(error) or type(error).__name__
            raise DataError(
                f"cannot be read ({reason.splitlines()[0]})",
                where=name,
                remedy="Name files or folders that exist; for s3:// and others install the "
                "package that fsspec asks for.",
            ) from None
    return files


def plan_tasks(files: Sequence[SourceFile]) -> list[list[Part]]:
    """Cut the input into tasks.

    Args:
        files: The files in order.

    Returns:
        For each task its parts; all tasks one after the other are the input in order.
    """
    total = sum(file.num_bytes for file in files)
    size = min(max(total // _TASKS, _MIN_TASK_BYTES), _MAX_TASK_BYTES)
    tasks: list[list[Part]] = [[]]
    room = size
    for file in files:
        for part in _parts(file, size):
            num_bytes = part.end - part.begin
            if tasks[-1] and num_bytes > room:
                tasks.append([])
                room = size
            tasks[-1].append(part)
            room -= num_bytes
    return tasks


def _parts(file: SourceFile, size: int) -> list[Part]:
    begins = [0]
    if file.format == "jsonl" and file.num_bytes > 2 * size and not _is_stored_compressed(file):
        begins = list(range(0, file.num_bytes - size // 2, size))
    ends = [*begins[1:], file.num_bytes]
    whole = len(begins) == 1
    return [
        Part(file.path, file.format, begin, end, whole)
        for begin, end in zip(begins, ends, strict=True)
    ]


def _is_stored_compressed(file: SourceFile) -> bool:
    with open_source(file.path) as opened:
        return is_compressed(file.path, opened.read(4))


def _find(name: str) -> list[SourceFile]:
    filesystem, path = _filesystem(name)
    if filesystem.isdir(path):
        found = [p for p in sorted(filesystem.find(path)) if _is_data(p)]
        if not found:
            raise DataError(
                "no data files in this folder",
                where=name,
                remedy=f"Data files end in {', '.join(_SUFFIXES)}, with .gz or .zst where that "
                "is usual; name others one by one.",
            )
    elif filesystem.exists(path):
        found = [path]
    else:
        is_pattern = any(letter in path for letter in "*?[")
        found = sorted(filesystem.glob(path)) if is_pattern else []
        if not found:
            raise DataError("no such file", where=name, remedy="Name existing files or folders.")
    if not is_remote(name) and len(found) == 1 and not filesystem.isdir(path):
        # As the user named it: fsspec makes paths absolute.
        return [_source_file(filesystem, found[0], name if filesystem.exists(path) else found[0])]
    return [
        _source_file(filesystem, p, filesystem.unstrip_protocol(p) if is_remote(name) else p)
        for p in found
    ]


def _source_file(filesystem: Any, path: str, shown: str) -> SourceFile:
    info = filesystem.info(path)
    stamps = ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated")
    stamp = next((str(info[key]) for key in stamps if info.get(key)), "")
    return SourceFile(shown, _format(path), int(info.get("size") or 0), stamp)


def _stem_and_suffix(path: str) -> tuple[str, str]:
    stem, suffix = os.path.splitext(path.rsplit("/", 1)[-1].lower())
    return os.path.splitext(stem) if suffix in _COMPRESSIONS else (stem, suffix)


def _format(path: str) -> str:
    # Lines of JSON are what a name that says nothing most likely holds.
    return _SUFFIXES.get(_stem_and_suffix(path)[1], "jsonl")


def _is_data(path: str) -> bool:
    return _stem_and_suffix(path)[1] in _SUFFIXES and not path.endswith(_NOT_DATA)


def _filesystem(name: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(name)
    return filesystem, path
