"""Atomic file and folder writes.

A file is written under a hidden temporary name in the same folder, synced and renamed, so a reader
sees the earlier file or the new one. Of several writers, also on several nodes, the last one wins.
Permissions follow the umask. The rename itself is not synced, so a power cut may bring the earlier
file back, complete. A killed writer leaves its temporary file, which `unfinished_files` finds.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_meco.errors import MeCoError


@contextlib.contextmanager
def whole_file(path: Path, refuse: Callable[[str], MeCoError]) -> Iterator[BinaryIO]:
    """Open a file that gets its name when the block ends, and is removed if the block raises.

    Args:
        path: The file, in an existing folder; an earlier file is replaced.
        refuse: Makes the error to raise from the reason that the file system gives.

    Yields:
        The file under its temporary name, for bytes. The block only writes: every OSError in it
        counts as one of this file.

    Raises:
        MeCoError: From `refuse`.
    """
    temporary = _temporary_name(path)
    try:
        # Not `tempfile`, whose files only their owner can read, whatever the umask.
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise refuse(error.strerror or str(error)) from error
        raise


@contextlib.contextmanager
def whole_folder(
    path: Path, refuse: Callable[[str], MeCoError], *, replace: bool = False
) -> Iterator[Path]:
    """Make a folder that gets its name when the block ends, and is removed if the block raises.

    Args:
        path: The folder; its parents are made.
        refuse: Makes the error to raise from the reason that the file system gives.
        replace: Whether the new folder replaces an existing one. The old one stays until the new
            one is complete. A link is followed.

    Yields:
        The folder under its temporary name. The block only writes: every OSError in it counts as
        one of this folder.

    Raises:
        MeCoError: From `refuse`, also if the folder exists and is not to be replaced.
    """
    if replace:
        path = Path(os.path.realpath(path))
    temporary, earlier = _temporary_name(path), _temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        if os.path.lexists(path):
            # A rename would silently replace an empty folder.
            if not replace:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            path.rename(earlier)
        temporary.rename(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise refuse(error.strerror or str(error)) from error
        raise
    finally:
        # A folder whose state cannot be read was not moved; one that cannot be moved back stays.
        with contextlib.suppress(OSError):
            if earlier.exists() and not path.exists():
                earlier.rename(path)
            shutil.rmtree(earlier, ignore_errors=True)


def _sync(path: Path) -> None:
    """Sync a plain file to disk."""
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _temporary_name(path: Path) -> Path:
    # Not the process number, which repeats between nodes that share a folder.
    return path.with_name(f".{path.name}.{os.urandom(6).hex()}")


def unfinished_files(path: Path) -> list[Path]:
    """Return the temporary files of writers of `path`, busy or killed.

    Args:
        path: The path given to `whole_file`.
    """
    return list(path.parent.glob(f".{glob.escape(path.name)}.*"))
