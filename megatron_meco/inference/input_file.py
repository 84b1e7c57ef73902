"""Text and JSON that a user or a stranger wrote, read with one clear refusal.

JSON is read strictly: numbers that JSON does not have (NaN, Infinity, 1e999) and keys that are
there twice are refused, because what they mean differs from reader to reader. A pipe is read where
it is one of this process (`<(command)`, `/dev/stdin`); a named pipe without a writer would wait for
ever in silence. Costs nothing beside the read. What was given up: files larger than memory.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_meco.errors import FlagError, MeCoError

Refuse = Callable[[str], MeCoError]
"""Makes the error that is raised, from what is wrong."""


def read_text(path: Path, refuse: Refuse) -> str:
    """Read a UTF-8 text file, without the byte order mark that some editors write.

    Args:
        path: The file.
        refuse: Makes what is raised where it cannot be read.

    Raises:
        MeCoError: What `refuse` made.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISFIFO(mode) and not str(path).startswith(("/dev/", "/proc/")):
            raise refuse("is a named pipe, not a file")
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
            raise refuse("is a folder" if stat.S_ISDIR(mode) else "is no file")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refuse(f"cannot be read (byte {error.start:,} is not UTF-8)") from error
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror or error})") from error


def read_lines(path: Path, refuse: Refuse) -> list[str]:
    """Read the lines of a text file, as line feeds part them: no other character ends a line."""
    return [line.removesuffix("\r") for line in read_text(path, refuse).split("\n")]


def read_json(path: Path, refuse: Refuse) -> Any:
    """Read a JSON file strictly.

    Args:
        path: The file.
        refuse: Makes what is raised where it cannot be read.

    Raises:
        MeCoError: What `refuse` made.
    """
    return parse_json(read_text(path, refuse), refuse)


def parse_json(text: str, refuse: Refuse) -> Any:
    """Read JSON strictly, as `read_json` does."""
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_number,
            parse_float=_finite,
        )
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise refuse("holds a character that is no valid Unicode") from error
    except RecursionError as error:
        raise refuse("is nested too deeply") from error
    except ValueError as error:
        raise refuse(f"is no JSON ({error})") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in found if names.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is larger than any number")
    return value


def check_text(text: str, where: str) -> None:
    """Refuse a text with half characters, which no tokenizer and no file takes.

    They come from command lines that are not UTF-8, and from escapes in JSON.

    Raises:
        FlagError: Names the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FlagError(
            f"character {error.start + 1:,} is no valid Unicode", where=where, remedy="Write UTF-8."
        ) from error
