"""Finds the input of `meco prepare`, anywhere fsspec reaches, and cuts it into tasks.

A task is a run of consecutive files, or a byte range of one plain JSONL file, of about equal size.
The cut depends on the input alone, not on the number of workers, so the output does not either.
Task sizes grow with the input (16 MiB to 1 GiB): a laptop keeps all cores busy, and a cluster gets
about a thousand tasks. Costs one look-up of size and date per file, and four bytes of files that
may be cut. Compressed files and the other formats are not cut.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_meco.corpus.input_bytes import (
    COMPRESSIONS,
    FORMAT_BY_SUFFIX,
    Part,
    filesystem_of,
    is_compressed,
    is_remote,
    open_source,
)
from megatron_meco.corpus.outputs import (
    is_side_file,
    is_work_folder,
    logs_of,
    output_paths,
    work_folder_of,
)
from megatron_meco.errors import DataError
from megatron_meco.wording import counted, is_utf8

# Compressions and archives that are not supported.
_NOT_READ = (".7z", ".bz2", ".br", ".lz4", ".lzma", ".rar", ".sz", ".tar", ".tgz", ".xz", ".zip")
# A Hugging Face dataset on disk has its description beside its data.
_NOT_DATA = ("dataset_info.json", "state.json", "dataset_dict.json")
_TASKS = 1024
_MIN_TASK_BYTES = 16 << 20
_MAX_TASK_BYTES = 1 << 30


@dataclass(frozen=True)
class SourceFile:
    """One file of the input.

    Attributes:
        path: A path, or a URL that fsspec opens.
        format: `jsonl`, `parquet`, `arrow`, `csv` or `warc`.
        num_bytes: Its size as stored.
        stamp: A date or an ETag, which changes with the file; empty if there is none.
    """

    path: str
    format: str
    num_bytes: int
    stamp: str


def find_files(
    inputs: Iterable[str | os.PathLike[str]], own: Path | None = None
) -> list[SourceFile]:
    """Return the files that the inputs name, and warn about files that are passed over.

    Args:
        inputs: Files, folders (searched for data files in name order, links to folders followed
            once) or patterns with `*`; local or `protocol://`.
        own: The prefix of a corpus whose files and work folder are no inputs.

    Returns:
        The files in document order.

    Raises:
        DataError: There is no such file, a folder has no data, or a file cannot be an input.
    """
    search = _Search(own)
    files: list[SourceFile] = []
    for given in inputs:
        name = os.fspath(given)
        try:
            files += search.find(name)
        except DataError:
            raise
        # The libraries behind URLs raise exceptions of any type.
        except Exception as error:
            told = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
            where = str(getattr(error, "filename", None) or name)
            raise DataError(
                f"cannot be read ({told.splitlines()[0]})",
                where=where if is_utf8(where) else repr(where),
                remedy="Name files or folders that exist; for s3:// and others install the "
                "package that fsspec asks for.",
            ) from None
    if not files:
        raise DataError(
            "no file but those of the corpus itself",
            where="INPUT",
            remedy="Name the original files.",
        )
    search.tell(files)
    return files


def tell_repeated(paths: Iterable[str]) -> None:
    """Warn about files that are given more than once, under whatever names."""
    counts: Counter[Any] = Counter()
    repeated = []
    for path in paths:
        identity: Any = path
        if not is_remote(path):
            status = os.stat(path)
            identity = (status.st_dev, status.st_ino)
        counts[identity] += 1
        if counts[identity] == 2:
            repeated.append(path)
    if repeated:
        warn(
            f"{counted(len(repeated), 'file')} given more than once, first {repeated[0]}: the "
            "documents will be in the corpus as often"
        )


def warn(text: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def plan_tasks(files: Sequence[SourceFile]) -> list[list[Part]]:
    """Cut the input into tasks.

    Args:
        files: The files in order.

    Returns:
        The parts of each task; all tasks one after the other are the input in order.
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
        Part(file.path, file.format, begin, end, whole, file.stamp)
        for begin, end in zip(begins, ends, strict=True)
    ]


def _is_stored_compressed(file: SourceFile) -> bool:
    with open_source(file.path) as opened:
        return is_compressed(file.path, opened.read(4))


class _Search:
    """Finds input files and remembers what it passed over."""

    def __init__(self, own: Path | None) -> None:
        self._own_files: set[str] = set()
        self._own_folders: set[str] = set()
        if own is not None:
            self._own_files = {_real(path) for path in output_paths(own)}
            self._own_folders = {_real(work_folder_of(own)), _real(logs_of(own))}
        self._passed_over: list[str] = []

    def find(self, name: str) -> list[SourceFile]:
        """Return the files of one input."""
        if not name.strip():
            raise DataError(
                "is empty", where="INPUT", remedy="Name a file; an unset shell variable gives none."
            )
        filesystem, path = filesystem_of(name)
        is_local = _is_local(filesystem)
        if filesystem.isdir(path):
            found = self._in_folder(filesystem, path, name)
        elif filesystem.exists(path):
            found = [path]
        else:
            found = self._matching(filesystem, path)
            if not found:
                raise DataError(
                    "no such file", where=name, remedy="Name existing files or folders."
                )
        if not is_remote(name) and len(found) == 1 and not filesystem.isdir(path):
            # As the user named it: fsspec makes paths absolute.
            found = [name if filesystem.exists(path) else found[0]]
        for file in found:
            _check_name(file)
            if is_local:
                self._check_local(file)
        return [
            _source_file(filesystem, p, filesystem.unstrip_protocol(p) if is_remote(name) else p)
            for p in found
        ]

    def tell(self, files: list[SourceFile]) -> None:
        """Warn about files that are no input, and about empty inputs."""
        named = {file.path for file in files}
        passed_over = [file for file in self._passed_over if file not in named]
        if passed_over:
            warn(
                f"{counted(len(passed_over), 'file')} passed over, of no format that is read by "
                f"the name, first {passed_over[0]}"
            )
        empty = [file.path for file in files if file.num_bytes == 0]
        if empty:
            warn(f"{counted(len(empty), 'empty file')}, first {empty[0]}")

    def _in_folder(self, filesystem: Any, path: str, name: str) -> list[str]:
        if not _is_local(filesystem):
            everything = sorted(filesystem.find(path))
        elif _real(path) in self._own_folders:
            return []
        elif is_work_folder(path):
            raise DataError(
                "is the work folder of a preparation", where=name, remedy="Name the original files."
            )
        else:
            everything = sorted(self._walk(path))
        found = []
        for file in everything:
            if _is_data(file):
                found.append(file)
            elif file.rpartition("/")[2] not in _NOT_DATA:
                self._pass_over(file)
        if not found:
            raise DataError(
                "no data files in this folder",
                where=name,
                remedy=f"Data files end in {', '.join(FORMAT_BY_SUFFIX)}, with .gz or .zst where "
                "that is usual; name others one by one.",
            )
        return found

    def _pass_over(self, file: str) -> None:
        stem, suffix = os.path.splitext(file)
        if suffix.lower() in _NOT_READ and os.path.splitext(stem)[1].lower() in FORMAT_BY_SUFFIX:
            raise _not_read(file)
        self._passed_over.append(file)

    def _matching(self, filesystem: Any, path: str) -> list[str]:
        if not any(letter in path for letter in "*?["):
            return []
        found = set()
        for match in filesystem.glob(path):
            if not filesystem.isdir(match):
                if not (_is_local(filesystem) and self._is_own(match)):
                    found.add(match)
            elif not (_is_local(filesystem) and is_work_folder(match)):
                found.update(self._in_folder(filesystem, match, match))
        return sorted(found)

    def _walk(self, folder: str) -> Iterator[str]:
        for place, folders, names in walk_once(folder):
            if self._is_work(place):
                folders.clear()
                continue
            yield from (f for f in (f"{place}/{n}" for n in names) if not self._is_own(f))

    def _is_work(self, folder: str) -> bool:
        return _real(folder) in self._own_folders or is_work_folder(folder)

    def _is_own(self, file: str) -> bool:
        return _real(file) in self._own_files or is_side_file(file)

    def _check_local(self, path: str) -> None:
        """Refuse files that block, cannot be read, or belong to the work itself."""
        if any(os.path.commonpath([_real(path), folder]) == folder for folder in self._own_folders):
            raise DataError(
                "lies in the work folder or among the logs of this corpus",
                where=path,
                remedy="Name the original files, or choose another --output.",
            )
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            reason = "" if stat.S_ISREG(mode) else "not a plain file"
            if not reason and not os.access(path, os.R_OK):
                reason = os.strerror(errno.EACCES)
        if reason:
            raise DataError(
                f"cannot be read ({reason})",
                where=path,
                remedy="Leave it out, or write its content to a file first.",
            )


def _real(path: str | os.PathLike[str]) -> str:
    """Return where a name really lies; the last part may be a link, which is its own name."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def walk_once(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk like `os.walk`, following links to folders, each folder once.

    Yields:
        A folder, its folders (which may be removed from the list), and its files, both sorted.

    Raises:
        OSError: A folder cannot be listed.
    """
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        for place, folders, names in os.walk(waiting.pop(0), onerror=_raise):
            if os.path.realpath(place) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(place))
            folders.sort()
            yield place, folders, sorted(names)
            # After all real folders, so that these keep their names; without links to a parent.
            links = [f"{place}/{one}" for one in folders if os.path.islink(f"{place}/{one}")]
            waiting += [link for link in links if not _leads_back(link)]


def _leads_back(link: str) -> bool:
    target = os.path.realpath(link)
    return os.path.commonpath([target, _real(link)]) == target


def _raise(error: OSError) -> None:
    # By default `os.walk` silently skips a folder that it cannot list.
    raise error


def _check_name(path: str) -> None:
    if not is_utf8(path):
        raise DataError(
            "its name is not UTF-8",
            where=repr(path),
            remedy="Rename it, or name a link to it.",
        )
    if path.lower().endswith(_NOT_READ):
        raise _not_read(path)


def _not_read(path: str) -> DataError:
    return DataError(
        f"{os.path.splitext(path)[1]} is not read",
        where=path,
        remedy="Unpack it, or compress it with gzip or Zstandard.",
    )


def _is_local(filesystem: Any) -> bool:
    protocols = filesystem.protocol
    return "file" in ([protocols] if isinstance(protocols, str) else protocols)


def check_unchanged(part: Part) -> None:
    """Refuse a local file whose date or size has changed since the preparation began.

    Raises:
        DataError: It has changed.
    """
    if not part.stamp or is_remote(part.path):
        return
    filesystem, path = filesystem_of(part.path)
    try:
        now = _source_file(filesystem, path, part.path)
        is_same = now.stamp == part.stamp and (not part.is_whole or now.num_bytes == part.end)
    except OSError:
        is_same = False
    if not is_same:
        raise DataError(
            "has changed while it was read",
            where=part.path,
            remedy="Wait until it is complete, and prepare again.",
        )


def _source_file(filesystem: Any, path: str, shown: str) -> SourceFile:
    info = filesystem.info(path)
    stamps = ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated")
    stamp = next((str(info[key]) for key in stamps if info.get(key)), "")
    return SourceFile(shown, _format(path), int(info.get("size") or 0), stamp)


def _stem_and_suffix(path: str) -> tuple[str, str]:
    stem, suffix = os.path.splitext(path.rsplit("/", 1)[-1].lower())
    return os.path.splitext(stem) if suffix in COMPRESSIONS else (stem, suffix)


def _format(path: str) -> str:
    # A file with an unknown suffix most likely holds JSON lines.
    return FORMAT_BY_SUFFIX.get(_stem_and_suffix(path)[1], "jsonl")


def _is_data(path: str) -> bool:
    is_described = path.rpartition("/")[2] in _NOT_DATA
    return _stem_and_suffix(path)[1] in FORMAT_BY_SUFFIX and not is_described
