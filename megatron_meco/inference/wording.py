"""Numbers, foreign texts and foreign errors inside of our own sentences.

Costs nothing. What was given up: nouns with an irregular plural.
"""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 document`, `2,000 documents`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def shown(text: str, longest: int | None = None) -> str:
    """A text on one line: line ends and control characters are spelled out, as in Python.

    Args:
        text: The text.
        longest: Characters after which it is cut; None: not at all.
    """
    line = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    return line if longest is None or len(line) <= longest else f"{line[:longest]}..."


def first_line(error: BaseException) -> str:
    """What an error says, in its first line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException, longest: int = 200) -> str:
    """What an error says, on one line and cut; its kind where it says nothing."""
    kind = type(error).__name__
    # The text of a KeyError is a name alone.
    text = f"{kind}: {error}" if isinstance(error, KeyError) else str(error)
    return shown(" ".join(text.split()) or kind, longest)
