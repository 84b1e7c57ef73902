"""Where a corpus goes, and what may be replaced there.

A preparation replaces an earlier corpus only if told to, and only files that match its
`PREFIX.prepare.json`: the size of the `.bin`, the header of the `.idx`, and so on. Costs a few
look-ups and the first bytes of each file.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import orjson

from megatron_meco.corpus.index_file import TYPE_CODES, header
from megatron_meco.corpus.manifest import manifest_path, read_manifest
from megatron_meco.corpus.metadata import metadata_path
from megatron_meco.errors import DataError, FlagError
from megatron_meco.wording import is_utf8

PUBLISHING = "publishing"
"""The file in a work folder that says that files of this preparation have got their names."""
MARKER = "meco-work-folder.json"
"""The file that marks a folder as a work folder of this package."""

_HEAD_BYTES = 1 << 20
_SUFFIX_BYTES = len("..metadata.arrow.0123456789ab")
# One letter would be a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:/")


def output_paths(prefix: Path) -> list[Path]:
    """Return every file that a preparation may write, the index last."""
    names = (".bin", ".prepare.json", ".rejected.jsonl", ".idx")
    return [metadata_path(prefix), *(Path(f"{prefix}{name}") for name in names)]


def work_folder_of(prefix: Path) -> Path:
    """Return the work folder of the corpus at `prefix`."""
    return Path(f"{prefix}.unfinished")


def is_work_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder carries the marker of a work folder."""
    return os.path.isfile(os.path.join(path, MARKER)) and not os.path.islink(path)


def logs_of(prefix: Path) -> Path:
    """Return the folder of Slurm's logs for the corpus at `prefix`."""
    return Path(f"{prefix}.logs")


def check_local(given: str | os.PathLike[str], where: str) -> None:
    """Refuse what cannot be a local path: nothing, a URL, a name that is not UTF-8 or too long.

    Args:
        given: The path as given.
        where: The flag or argument, for the message.

    Raises:
        FlagError: With the reason.
    """
    text = os.fspath(given)
    if not text.strip():
        raise FlagError(
            "is empty", where=where, remedy="Name a path; an unset shell variable gives none."
        )
    if "\0" in text or not is_utf8(text):
        raise FlagError(
            f"{text!r} is not UTF-8 or holds a NUL", where=where, remedy="Use another name."
        )
    try:
        # With the longest suffix that is written, that of a temporary file.
        os.lstat(f"{text}{'x' * _SUFFIX_BYTES}")
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            told = f"{text[:40]!r}... is too long a name"
            raise FlagError(told, where=where, remedy="Use a shorter one.") from None
    if _URL.match(text):
        raise FlagError(
            f"{text!r} is a URL",
            where=where,
            remedy="Name a local path; copy the files afterwards.",
        )


def check_prefix(given: str | os.PathLike[str], where: str = "--output") -> Path:
    """Refuse what cannot be the prefix of the files to write; returns the prefix.

    Args:
        given: The prefix as given.
        where: The flag, for the message.

    Raises:
        FlagError: It is empty, a URL, a folder, or the name of one of the files.
    """
    check_local(given, where)
    text, prefix = os.fspath(given), Path(given)
    if text.endswith(os.sep) or prefix.name in ("", "..") or os.path.isdir(prefix):
        raise FlagError(
            f"{text!r} is a folder",
            where=where,
            remedy="Add the beginning of the file names, for example `data/corpus`.",
        )
    for path in [*output_paths(Path("x")), work_folder_of(Path("x"))]:
        suffix = path.name[1:]
        if prefix.name.endswith(suffix):
            raise FlagError(
                f"{text!r} ends in {suffix}",
                where=where,
                remedy=f"Give the prefix alone: {text.removesuffix(suffix)!r}.",
            )
    return prefix


def check_fields(names: Sequence[str], where: str = "--metadata-fields") -> None:
    """Refuse names of fields that are empty, repeated or not UTF-8.

    Raises:
        FlagError: Names the flag `where`.
    """
    if len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise FlagError(
            f"empty or repeated names in {','.join(names)!r}",
            where=where,
            remedy="Name every field once, with commas between.",
        )
    for name in names:
        if not is_utf8(name):
            raise FlagError(f"{name!r} is not UTF-8", where=where, remedy="Use another name.")


def check_output(
    prefix: Path, work: Path, inputs: Iterable[str | os.PathLike[str]], *, overwrite: bool
) -> None:
    """Refuse to write over an input, or over files of another origin.

    Args:
        prefix: Where the corpus goes.
        work: The work folder.
        inputs: The files that are read; URLs are ignored.
        overwrite: Whether an earlier corpus is to be replaced.

    Raises:
        DataError: Names a file that must stay.
    """
    paths = output_paths(prefix)
    existing = [path for path in paths if _status(path) is not None]
    check_no_input(existing, inputs)
    if is_work_folder(work) and (work / PUBLISHING).exists():
        # Killed while renaming: the files are this preparation's own.
        return
    if existing and not overwrite:
        raise DataError(
            "already there", where=str(existing[0]), remedy="Add --overwrite to replace it."
        )
    for path in existing:
        why = _why_foreign(path, prefix)
        if why:
            raise DataError(
                f"{why}; --overwrite replaces only what `meco prepare` wrote",
                where=str(path),
                remedy="Move or remove it yourself, or choose another --output.",
            )


def check_no_input(outputs: Iterable[Path], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse to write over a file that is read, under whatever name it was given.

    Raises:
        DataError: One of the `outputs` is also one of the `inputs`.
    """
    identities = {}
    for path in outputs:
        for status in (_status(path), _status(path, follow=True)):
            if status is not None:
                identities[status.st_dev, status.st_ino] = path
    for given in inputs if identities else ():
        status = _status(Path(given), follow=True)
        if status is not None and (status.st_dev, status.st_ino) in identities:
            raise DataError(
                f"is also an input ({os.fspath(given)})",
                where=str(identities[status.st_dev, status.st_ino]),
                remedy="Write elsewhere, or give the input another name.",
            )


def is_metadata_file(path: Path) -> bool:
    """Whether a file begins like metadata that this package wrote."""
    head = _head(path)
    return head.startswith(b"ARROW1") and b"megatron_meco.format" in head


def _status(path: Path, *, follow: bool = False) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=follow)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if follow:
            # A dangling link; the link itself is checked separately.
            return None
        raise DataError(
            f"cannot be used ({error.strerror or error})",
            where=str(path),
            remedy="Choose another --output.",
        ) from None


def _why_foreign(path: Path, prefix: Path) -> str:
    """Return why a file may not be replaced; empty if it belongs to the corpus there."""
    status = _status(path, follow=True)
    if status is None or not stat.S_ISREG(status.st_mode):
        return "is no plain file"
    try:
        manifest = read_manifest(prefix)
    except DataError as error:
        return f"{manifest_path(prefix).name}: {error.what}"
    if not manifest:
        return f"there is no {manifest_path(prefix).name} that describes it"
    suffix = str(path).removeprefix(str(prefix))
    is_own = True
    if suffix in (".bin", ".idx"):
        told = manifest.get("token_dtype")
        dtypes = [np.dtype(name) for name in ([told] if told else TYPE_CODES)]
        if suffix == ".bin":
            sizes = [manifest["tokens"] * dtype.itemsize for dtype in dtypes]
            is_own = status.st_size in sizes
        else:
            sequences, documents = manifest.get("sequences"), manifest["documents"]
            begins = [] if sequences is None else [header(d, sequences, documents) for d in dtypes]
            is_own = any(_head(path, len(begin)) == begin for begin in begins)
    elif suffix == ".metadata.arrow":
        is_own = is_metadata_file(path)
    elif suffix == ".rejected.jsonl":
        is_own = bool(manifest.get("rejected")) and _holds_rejected(path)
    return "" if is_own else f"is not the file that {manifest_path(prefix).name} describes"


def _head(path: Path, num_bytes: int = _HEAD_BYTES) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return b""
        with path.open("rb") as file:
            return file.read(num_bytes)
    except OSError:
        return b""


def _holds_rejected(path: Path) -> bool:
    try:
        told = orjson.loads(_head(path).partition(b"\n")[0])
    except orjson.JSONDecodeError:
        return False
    return isinstance(told, dict) and {"path", "line", "reason", "excerpt"} <= told.keys()


def is_side_file(path: str) -> bool:
    """Whether a file belongs to a corpus of this package beside it, and is no input."""
    for suffix in (".metadata.arrow", ".prepare.json", ".rejected.jsonl"):
        if path.endswith(suffix):
            return os.path.isfile(f"{path.removesuffix(suffix)}.idx")
    return False
