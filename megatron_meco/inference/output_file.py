"""Files and folders of results that appear whole or not at all.

Costs one rename. What was given up: results larger than memory.
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


def check_writable(path: Path, flag: str = "--output") -> None:
    """Refuse a file that could not be written at the end of hours of work.

    Raises:
        FlagError: When its folder does not exist or may not be written, or it is a folder.
    """
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "is a folder" if path.is_dir() else f"{folder} is no folder that can be written"
        raise FlagError(reason, where=f"{flag} {path}", remedy="Name a file in a folder of yours.")


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

    def refuse(reason: str) -> FlagError:
        return FlagError(
            f"cannot be written ({reason})",
            where=f"{flag} {path}",
            remedy="Name a file with enough space that you may write.",
        )

    with whole_file(path, refuse) as file:
        file.write(text.encode())


@contextlib.contextmanager
def appearing_folder(output: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of `output` when all went well.

    Args:
        output: What `--output` named.

    Yields:
        A folder beside it.

    Raises:
        FlagError: When it cannot be written.
    """
    output = output.absolute()
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    earlier = output.with_name(f".{output.name}.earlier-{os.getpid()}")
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
        raise FlagError(
            f"cannot be written ({error})",
            where=f"--output {output}",
            remedy="Name a folder with enough space that you may write.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if earlier.exists() and not output.exists():
            earlier.rename(output)
        shutil.rmtree(earlier, ignore_errors=True)
