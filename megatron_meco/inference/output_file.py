"""Atomic files and folders of results, which replace only earlier results.

Whether a name can be written is checked before hours of work, not after. Results are held in
memory.
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megatron_meco.errors import FlagError
from megatron_meco.whole_file import whole_file, whole_folder

_RESULTS = "results"


def check_result_file(path: Path, flag: str = "--output") -> None:
    """Refuse a file that cannot be written, or that holds something other than an earlier result.

    An earlier result is JSON with `results` in it.

    Raises:
        FlagError: Names `flag`.
    """
    where = f"{flag} {path}"
    folder = path.absolute().parent
    try:
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            what = "is a folder" if path.is_dir() else f"{folder} is no folder that can be written"
            raise FlagError(what, where=where, remedy="Name a file in a folder of yours.")
        if os.path.lexists(path) and not _is_result(path):
            what = "exists and is no earlier result"
            raise FlagError(what, where=where, remedy="Name a new file.")
    except OSError as error:
        raise _unwritable(where, error.strerror or str(error)) from error


def _is_result(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and _RESULTS in content


def check_new_folder(output: Path) -> None:
    """Refuse a folder that exists and is not empty.

    Raises:
        FlagError: If it is.
    """
    where = f"--output {output}"
    try:
        if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
            raise FlagError("exists", where=where, remedy="Name a new folder.")
    except OSError as error:
        raise _unwritable(where, error.strerror or str(error), "folder") from error


def write_json(path: Path, value: Any, flag: str = "--output") -> None:
    """Write an object as JSON, atomically.

    Raises:
        FlagError: Names `flag`.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with whole_file(path, lambda reason: _unwritable(f"{flag} {path}", reason)) as file:
        file.write(text.encode())


def output_folder(output: Path) -> AbstractContextManager[Path]:
    """Make a folder that replaces `output` when the block ends without an error.

    Raises:
        FlagError: If it cannot be written.
    """
    return whole_folder(
        output, lambda reason: _unwritable(f"--output {output}", reason, "folder"), replace=True
    )


def _unwritable(where: str, reason: str, kind: str = "file") -> FlagError:
    return FlagError(
        f"cannot be written ({reason})",
        where=where,
        remedy=f"Name a {kind} with enough space that you may write.",
    )
