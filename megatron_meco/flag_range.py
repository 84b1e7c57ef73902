"""The range of a number on the command line, stated where its flag is added.

    parser.add_argument("--top-p", type=float, action=InRange, low=0, high=1)
    parser.add_argument("--limit", **COUNT, help="use the first N documents")

A value outside the range is one `FlagError` with the flag, the value and the range. NaN is outside
every range. Ranges that depend on the model or on other flags are checked with `check_range`.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_meco.errors import FlagError

MOST = 10**9
"""More requests, samples or documents than a file of results can hold."""


def check_range(flag: str, value: float | None, low: float, high: float, remedy: str = "") -> None:
    """Refuse a number outside a range.

    Args:
        flag: The flag, for the message.
        value: Its value; None if it was not given.
        low: Smallest value.
        high: Largest value.
        remedy: Replaces the sentence that gives the range.

    Raises:
        FlagError: With the flag, its value and the range.
    """
    if value is None or low <= value <= high:
        return
    raise FlagError(
        f"invalid value {_spelled(value)}",
        where=flag,
        remedy=remedy or f"Give a number from {_spelled(low, ',')} to {_spelled(high, ',')}.",
    )


def _spelled(value: float, separator: str = "") -> str:
    text = f"{value:g}" if isinstance(value, float) else f"{value:{separator}}"
    return text if len(text) <= 24 else f"with {len(text):,} digits"


class InRange(argparse.Action):
    """Stores a number, or each number of a list, after checking its range.

    Args:
        low: Smallest value.
        high: Largest value.
        also: One more value that is allowed.
        remedy: Replaces the sentence that gives the range.
        options: Arguments of `argparse.Action`.
    """

    def __init__(
        self,
        *,
        low: float,
        high: float,
        also: float | None = None,
        remedy: str = "",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._low, self._high, self._also, self._remedy = low, high, also, remedy

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Check and store, as argparse asks for it.

        Raises:
            FlagError: With the flag, its value and the range.
        """
        # By its name: some flags have a second, hidden spelling.
        flag = "--" + self.dest.replace("_", "-")
        for value in values if isinstance(values, list) else [values]:
            if value != self._also:
                check_range(flag, value, self._low, self._high, self._remedy)
        setattr(namespace, self.dest, values)


COUNT: dict[str, Any] = {"type": int, "action": InRange, "low": 1, "high": MOST}
"""Options of a flag for a number of things, 1 or more."""

SEED: dict[str, Any] = {
    "type": int,
    "action": InRange,
    "low": 0,
    # Random generators take 64 bits.
    "high": 2**64 - 1,
    "remedy": "Give a whole number from 0 to 2^64 - 1.",
}
"""Options of a flag for the seed of a random generator."""
