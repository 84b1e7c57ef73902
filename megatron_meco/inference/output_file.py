"""Files and folders of results that appear whole or not at all, and replace nothing else.

Whether a name may be written is checked before hours of work, not after. Costs one rename. What was
given up: results larger than memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_meco.errors import FlagError
from megatron_meco.whole_file import whole_file

_RESULTS = "results"


def check_result_file(path: Path, flag: str = "--output") -> None:
    """Refuse a file that could not be written at the end, or that holds something else.

    Args:
        path: The file. One that `write_json` wrote with `results` in it may be replaced.
        flag: The flag that named it, for the message.

    Raises:
        FlagError: When its folder does not exist or may not be written, or it is there already and
            is no earlier result.
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
    """Refuse a folder that is there already and holds anything.

    Raises:
        FlagError: When it is no empty and no new folder.
    """
    where = f"--output {output}"
    try:
        if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
            raise FlagError("exists", where=where, remedy="Name a new folder.")
    except OSError as error:
        raise _unwritable(where, error.strerror or str(error), "folder") from error


def write_json(path: Path, value: Any, flag: str = "--output") -> None:
    """Write an object as JSON, in place of any earlier file of that name.

    Args:
        path: The file.
        value: A JSON-serialisable object.
        flag: The flag that named the file, for the message.

    Raises:
        FlagError: When it cannot be written.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with whole_file(path, lambda reason: _unwritable(f"{flag} {path}", reason)) as file:
        file.write(text.encode())


@contextlib.contextmanager
def appearing_folder(output: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of `output` when all went well.

    Args:
        output: What `--output` named; of a link, the folder that it leads to.

    Yields:
        A folder beside it.

    Raises:
        FlagError: When it cannot be written.
    """
    output = Path(os.path.realpath(output))
    # Process numbers repeat between the nodes that share a folder.
    key = os.urandom(6).hex()
    partial = output.with_name(f".{output.name}.partial-{key}")
    earlier = output.with_name(f".{output.name}.earlier-{key}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if output.exists():
            output.rename(earlier)
        partial.rename(output)
    except OSError as error:
        raise _unwritable(f"--output {output}", str(error), "folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        # A folder that cannot be asked was not moved; one that cannot be moved back stays.
        with contextlib.suppress(OSError):
            if earlier.exists() and not output.exists():
                earlier.rename(output)
            shutil.rmtree(earlier, ignore_errors=True)


def _unwritable(where: str, reason: str, kind: str = "file") -> FlagError:
    return FlagError(
        f"cannot be written ({reason})",
        where=where,
        remedy=f"Name a {kind} with enough space that you may write.",
    )
