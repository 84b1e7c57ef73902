"""Text and JSON from a user or a stranger, read strictly, with one clear error.

JSON numbers that JSON does not have (NaN, Infinity, 1e999) and repeated keys are errors, because
readers disagree on what they mean. A FIFO is read only if it belongs to this process (`<(command)`,
`/dev/stdin`); any other would wait forever for a writer. Files are read whole.
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
"""Makes the error to raise from the reason."""


def read_text(path: Path, refuse: Refuse) -> str:
    """Read a UTF-8 text file, without its byte order mark.

    Raises:
        MeCoError: From `refuse`, if the file cannot be read.
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
    """Read the lines of a text file. Only a line feed ends a line; other Unicode breaks do not."""
    return [line.removesuffix("\r") for line in read_text(path, refuse).split("\n")]


def read_json(path: Path, refuse: Refuse) -> Any:
    """Read a JSON file strictly.

    Raises:
        MeCoError: From `refuse`, if the file cannot be read.
    """
    return parse_json(read_text(path, refuse), refuse)


def parse_json(text: str, refuse: Refuse) -> Any:
    """Parse JSON strictly, as `read_json` does."""
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite
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


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is larger than any number")
    return value


def check_text(text: str, where: str) -> None:
    """Refuse text with lone surrogates, which no tokenizer and no file accepts.

    They come from command lines that are not UTF-8, and from escapes in JSON.

    Raises:
        FlagError: With `where` as its place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FlagError(
            f"character {error.start + 1:,} is no valid Unicode", where=where, remedy="Write UTF-8."
        ) from error
