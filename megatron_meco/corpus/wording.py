"""Words that several messages share."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return `1 document`, `2,000 documents`.

    Args:
        number: How many.
        noun: What, in the singular; its plural ends in s.
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
