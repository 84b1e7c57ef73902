"""Paired comparisons of two conditions on the same documents, and wrong metadata as a control.

"With metadata minus without" is confounded: before its cooldown, a model has never seen documents
without a prefix, so any prefix helps. The control gives each document the metadata of another one;
only right minus wrong is an effect of what the metadata says.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NORMAL = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two conditions on the same documents, compared document by document.

    Attributes:
        num_documents: Number of documents that both conditions answered.
        first: Mean over them under the first condition, or None without documents.
        second: The same under the second condition.
        difference: `first - second`.
        stderr: Standard error of the paired difference, or None with fewer than 2 documents.
        low: Lower end of its 95 % confidence interval (Student's t), or None like `stderr`.
        high: Upper end.
    """

    num_documents: int
    first: float | None = None
    second: float | None = None
    difference: float | None = None
    stderr: float | None = None
    low: float | None = None
    high: float | None = None


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is NaN for fewer than two values."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def paired[Key: Hashable](first: Mapping[Key, float], second: Mapping[Key, float]) -> Paired:
    """Compare two conditions.

    Args:
        first: A value for each document.
        second: The same under the other condition; documents in one of them only do not count.

    Returns:
        The comparison over the documents that both have.
    """
    # Late: scipy comes with lm-evaluation-harness, which is an extra.
    from scipy.stats import t as student

    keys = [key for key in first if key in second]
    if not keys:
        return Paired(num_documents=0)
    difference, stderr = mean_and_error([first[key] - second[key] for key in keys])
    found = {
        "first": mean_and_error([first[key] for key in keys])[0],
        "second": mean_and_error([second[key] for key in keys])[0],
        "difference": difference,
    }
    if len(keys) > 1:
        half = float(student.ppf(0.975, len(keys) - 1)) * stderr
        found |= {"stderr": stderr, "low": difference - half, "high": difference + half}
    return Paired(num_documents=len(keys), **found)


def deal_wrong(
    own: Sequence[str], seed: int, others: Sequence[str] | None = None
) -> list[str | None]:
    """Give each document a value that is not its own.

    A seeded permutation of the pool, in which equal values are swapped away as far as possible, so
    each value is dealt as often as the pool has it.

    Args:
        own: The value of each document.
        seed: Seed of the permutation.
        others: The pool to deal from, repeated as often as needed, or None to permute `own`.

    Returns:
        Another value for each document, or None where only an equal one was left.
    """
    number: dict[str, int] = {}
    codes = np.array([number.setdefault(value, len(number)) for value in own])
    pool = codes
    if others is not None:
        pool = np.array([number.setdefault(value, len(number)) for value in others])
    values = list(number)
    draw = np.random.default_rng(seed)
    # Repeated before it is permuted, so that counts differ by one at most.
    dealt = draw.permutation(np.resize(draw.permutation(pool), len(codes)))
    for at in draw.permutation(np.flatnonzero(dealt == codes)):
        if dealt[at] == codes[at]:
            partners = np.flatnonzero((dealt != codes[at]) & (codes != dealt[at]))
            if len(partners):
                other = draw.choice(partners)
                dealt[[at, other]] = dealt[[other, at]]
    return [
        None if wrong == right else values[wrong] for wrong, right in zip(dealt, codes, strict=True)
    ]
