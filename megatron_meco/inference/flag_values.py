"""The range of each kind of number on the command line.

NaN is outside of every range, and so is what no machine could do. Costs nothing. What was given up:
ranges that depend on the model; those are checked where it is known.
"""

from __future__ import annotations

from megatron_meco.errors import FlagError

# Generators take 64 bits.
MOST_SEED = 2**64 - 1
# More requests, samples or documents than fit a file of results.
MOST = 10**9
MOST_AT_ONCE = 65_536
MOST_SHOTS = 1000
# Colder than this a float32 overflows; the likeliest token alone is left long before.
COLDEST, HOTTEST = 1e-6, 1e6
MOST_GUIDANCE = 1000.0
_SMALLEST = 5e-324


def check_range(flag: str, value: float | None, low: float, high: float, remedy: str = "") -> None:
    """Refuse a number outside of a range.

    Args:
        flag: The flag, for the message.
        value: Its value; None: not given.
        low: Smallest value.
        high: Largest value.
        remedy: What to say instead of the range.

    Raises:
        FlagError: Names the flag, its value and the range.
    """
    if value is None or low <= value <= high:
        return
    shown = f"{value:g}" if isinstance(value, float) else f"{value}"
    if len(shown) > 24:
        shown = f"a number of {len(shown):,} digits"
    raise FlagError(
        f"cannot be {shown}",
        where=flag,
        remedy=remedy or f"Give a number from {_spelled(low)} to {_spelled(high)}.",
    )


def check_seed(value: int, flag: str = "--seed") -> None:
    """Refuse a seed that a generator does not take."""
    check_range(flag, value, 0, MOST_SEED, "Give a whole number from 0 to 2^64 - 1.")


def check_temperature(value: float, *, zero: bool) -> None:
    """Refuse a temperature that gives no distribution.

    Args:
        value: The temperature.
        zero: Whether 0 is allowed, for the likeliest token.

    Raises:
        FlagError: Names the range.
    """
    if zero and value == 0:
        return
    allowed = "0 for the likeliest token, or " if zero else ""
    remedy = f"Give {allowed}a number from {COLDEST:g} to {HOTTEST:,.0f}."
    check_range("--temperature", value, COLDEST, HOTTEST, remedy)


def check_top_p(value: float) -> None:
    """Refuse a share that nothing can be sampled from."""
    check_range("--top-p", value, _SMALLEST, 1, "Give a share above 0, up to 1.")


def _spelled(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"
