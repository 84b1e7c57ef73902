"""Means, intervals and verdicts."""

from __future__ import annotations

import math

import pytest

from benchmarks.study.intervals import NOT_SHOWN, OPPOSITE, SHOWN, Mean, mean_of, paired, verdict


def mean(low: float, high: float) -> Mean:
    return Mean((low + high) / 2, low, high, ())


def test_the_interval_is_students() -> None:
    """Three values: t(0.975, 2) = 4.3027."""
    found = mean_of([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half))


def test_differences_are_taken_seed_by_seed() -> None:
    found = paired({2: 5.0, 1: 1.0}, {1: 0.5, 2: 4.5})
    assert found.values == (0.5, 0.5)
    assert (found.low, found.high) == (0.5, 0.5)
    with pytest.raises(ValueError, match="not the same"):
        paired({1: 1.0}, {2: 1.0})


def test_one_seed_shows_nothing() -> None:
    found = mean_of([9.0])
    assert verdict(found) == NOT_SHOWN
    assert "one seed" in str(found)


def test_a_run_that_diverged_is_not_left_out() -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_of([1.0, math.nan])


@pytest.mark.parametrize(
    ("effect", "control", "expected"),
    [
        (mean(0.1, 0.9), None, SHOWN),
        (mean(0.1, 0.9), mean(-0.1, 0.1), SHOWN),
        (mean(0.1, 0.9), mean(0.01, 0.1), NOT_SHOWN),
        (mean(0.1, 0.9), mean(-0.2, -0.1), NOT_SHOWN),
        (mean(-0.1, 0.9), mean(-0.1, 0.1), NOT_SHOWN),
        (mean(0.0, 0.9), None, NOT_SHOWN),
        (mean(-0.9, -0.1), mean(-0.1, 0.1), OPPOSITE),
        (mean(-0.9, -0.1), None, OPPOSITE),
    ],
)
def test_the_verdict(effect: Mean, control: Mean | None, expected: str) -> None:
    assert verdict(effect, control) == expected
