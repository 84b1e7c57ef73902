"""Means over seeds with their intervals, and the rule that turns an interval into a verdict.

Each seed is a world of its own (people, facts, documents, initial weights), so the values of the
seeds are independent and the interval is Student's t. Two arms of one seed share the world: their
difference is taken seed by seed. Given up: corrections for the number of rows; the primary row is
named in the recipe before any run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

SHOWN, NOT_SHOWN, OPPOSITE = "shown", "not shown", "opposite"


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its two-sided t-interval.

    Attributes:
        mean: The mean; NaN without any value.
        low: Lower end; minus infinity where there are fewer than two values.
        high: Upper end; infinity likewise.
        values: The values, one for each seed.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    def __str__(self) -> str:
        if not self.values:
            return "no run"
        if not math.isfinite(self.low):
            return f"{self.mean:+.3f} (one seed, no interval)"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def mean_of(values: Sequence[float], level: float = 0.95) -> Mean:
    """Return the mean of independent values and its t-interval.

    Args:
        values: One for each seed; finite.
        level: Of the interval.

    Raises:
        ValueError: A value is not finite: a mean without it would leave a seed out.
    """
    found = np.asarray(values, dtype=np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"not all of {list(values)} are finite")
    number = len(found)
    if number < 2:
        mean = float(found[0]) if number else math.nan
        return Mean(mean, -math.inf, math.inf, tuple(map(float, found)))
    mean = float(found.mean())
    quantile = float(stats.t.ppf(0.5 + level / 2, number - 1))
    half = quantile * float(found.std(ddof=1)) / math.sqrt(number)
    return Mean(mean, mean - half, mean + half, tuple(map(float, found)))


def paired(first: Mapping[int, float], second: Mapping[int, float], level: float = 0.95) -> Mean:
    """Return the mean of the differences first - second, seed by seed.

    Args:
        first: Seed -> value.
        second: Seed -> value.
        level: Of the interval.

    Raises:
        ValueError: The seeds are not the same.
    """
    if first.keys() != second.keys():
        raise ValueError(f"seeds {sorted(first)} and {sorted(second)} are not the same")
    return mean_of([first[seed] - second[seed] for seed in sorted(first)], level)


def share(hits: int, number: int, level: float = 0.95) -> tuple[float, float, float]:
    """Return a share of independent trials and its Wilson interval.

    Args:
        hits: Trials that succeeded.
        number: Trials; at least one.
        level: Of the interval.
    """
    found = stats.binomtest(hits, number).proportion_ci(level, method="wilson")
    return hits / number, float(found.low), float(found.high)


def verdict(effect: Mean, control: Mean | None = None) -> str:
    """Return what an effect's interval says.

    Args:
        effect: What is claimed to be above 0.
        control: The same without what is claimed to cause it, which must include 0; None: none.

    Returns:
        `shown`: the effect's interval lies above 0 and the control's includes 0. `opposite`: the
        effect's interval lies below 0 and the control's includes 0. Else `not shown`.
    """
    if control is not None and not (control.low <= 0 <= control.high):
        return NOT_SHOWN
    if effect.low > 0:
        return SHOWN
    return OPPOSITE if effect.high < 0 else NOT_SHOWN
