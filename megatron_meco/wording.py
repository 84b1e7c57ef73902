"""Numbers, text from outside and foreign errors, as they appear in our own messages."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 document`, `2,000 documents`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def shown(text: str, longest: int | None = None) -> str:
    r"""A text on one line, with line ends and control characters escaped as in Python (`\n`).

    Args:
        text: The text.
        longest: Number of characters to keep; None keeps all.
    """
    line = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    return line if longest is None or len(line) <= longest else f"{line[:longest]}..."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException, longest: int = 200) -> str:
    """An error's message on one line, cut to `longest` characters; its type without a message."""
    kind = type(error).__name__
    # The message of a KeyError is the key alone.
    text = f"{kind}: {error}" if isinstance(error, KeyError) else str(error)
    return shown(" ".join(text.split()) or kind, longest)


def print_progress(done: int, total: int, noun: str) -> None:
    """Print a count of finished things on stderr, on a line that the next call overwrites."""
    end = "" if done < total else "\n"
    print(f"\r{done:,} of {counted(total, noun)}", end=end, file=sys.stderr)


def aligned(rows: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """Lay out a table in columns two blanks apart.

    Args:
        rows: The cells; every row has the same length.
        num_left: Number of leading columns that are flush left; the others are flush right.

    Returns:
        One line per row, without trailing blanks.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place < num_left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# The one help text of `--json`.
JSON_HELP = "print one JSON object instead of a table"


def json_line(value: Any) -> str:
    """Return an object as one line of JSON.

    Args:
        value: Mappings, sequences, dataclasses, texts, numbers and paths.

    Returns:
        Standard JSON: numbers that are not finite become null, paths become texts.
    """
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool):
        return value
    return int(value) if isinstance(value, Integral) else str(value)
