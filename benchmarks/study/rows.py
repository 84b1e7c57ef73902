"""Turn results into rows: setting, arms, seeds, mean, interval, verdict.

A row compares conditions or arms seed by seed. `shown` and `opposite` need a 95 % t-interval that
excludes 0; rows that have a control need one that includes 0 as well (`intervals.verdict`). A row
of which a seed is missing is not made: no seed is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.study.intervals import Mean, mean_of, paired, verdict
from benchmarks.study.recipe import BASELINE, MECO, SHUFFLED, choice_variant

Result = dict[str, Any]
Metric = Callable[[Result], float]


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        setting: As in "contradiction, fixed lies".
        question: What is compared.
        arms: The arms that are compared, or the arm in which conditions are.
        unit: "accuracy" or "bits"; differences, in which more is in favour of the first.
        effect: The mean over seeds with its interval.
        control: The same in the baseline; None: the row has no control.
        seeds: The seeds.
        primary: Whether the recipe names it so.
    """

    setting: str
    question: str
    arms: str
    unit: str
    effect: Mean
    control: Mean | None
    seeds: tuple[int, ...]
    primary: bool = False

    @property
    def verdict(self) -> str:
        """`shown`, `not shown` or `opposite`."""
        return verdict(self.effect, self.control)

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON; infinite ends (one seed) are null."""
        return {
            "setting": self.setting,
            "question": self.question,
            "arms": self.arms,
            "unit": self.unit,
            "primary": self.primary,
            "seeds": list(self.seeds),
            **_json_of("effect", self.effect),
            **(_json_of("control", self.control) if self.control else {}),
            "verdict": self.verdict,
        }


def _json_of(name: str, mean: Mean) -> dict[str, Any]:
    finite = mean.low > float("-inf")
    interval = [mean.low, mean.high] if finite else None
    return {name: mean.mean, f"{name}_interval": interval, f"{name}_values": list(mean.values)}


class Results:
    """Results of runs, to pick from.

    Args:
        results: What `Executor.execute` returned.
    """

    def __init__(self, results: Iterable[Result]) -> None:
        self._results = list(results)

    def pick(self, metric: Metric, **run: Any) -> dict[int, float]:
        """Return the metric by seed of the runs with these attributes."""
        found = [r for r in self._results if all(r["run"][k] == v for k, v in run.items())]
        values = {r["run"]["seed"]: metric(r) for r in found}
        assert len(values) == len(found), f"several runs of a seed: {run}"
        return values


def value(at: str, condition: str, unit: str) -> Metric:
    """Return the metric that is a value of a checkpoint under a condition."""
    return lambda result: result["checkpoints"][at][condition][unit]


def steering(at: str, unit: str) -> Metric:
    """Return the metric of setting 1: the truth under a reliable and under an unreliable URL."""
    sign = 1 if unit == "accuracy" else -1

    def metric(result: Result) -> float:
        found = result["checkpoints"][at]
        return sign * float(found["useful"][unit] - found["other"][unit])

    return metric


def contradiction_rows(results: Results, seeds: list[int], lies: list[str]) -> list[Row]:
    """Return the rows of setting 1.

    Args:
        results: The results.
        seeds: The seeds; rows need all of them.
        lies: The variants.
    """
    rows = []
    for variant in lies:
        setting = f"contradiction, {variant} lies"
        runs = {"setting": "contradiction", "variant": variant}
        for at, when in (("end", "after the cooldown"), ("switch", "before the cooldown")):
            for unit in ("accuracy", "bits"):
                effect = results.pick(steering(at, unit), **runs, arm=MECO)
                control = results.pick(steering(at, unit), **runs, arm=BASELINE)
                if not _complete(seeds, effect, control):
                    continue
                rows.append(
                    Row(
                        setting=setting,
                        question=f"reliable - unreliable URL, {when}",
                        arms="meco; control: baseline",
                        unit=unit,
                        effect=_mean(effect),
                        control=_mean(control),
                        seeds=tuple(seeds),
                        primary=(variant, at, unit) == (lies[0], "end", "accuracy"),
                    )
                )
        kept = [
            results.pick(steering(at, "accuracy"), **runs, arm=MECO) for at in ("end", "switch")
        ]
        if _complete(seeds, *kept):
            question = "reliable - unreliable URL: after - before the cooldown"
            rows.append(_difference(setting, question, MECO, "accuracy", *kept))
        arms = [
            results.pick(value("end", "none", "accuracy"), **runs, arm=arm)
            for arm in (MECO, BASELINE)
        ]
        if _complete(seeds, *arms):
            rows.append(_difference(setting, "no URL", "meco - baseline", "accuracy", *arms))
    return rows


def variant_rows(
    results: Results,
    setting: str,
    variants: list[str],
    metric: Metric,
    question: str,
    seeds: list[int],
) -> list[Row]:
    """Return a row for each variant: the metric itself, without a control.

    Args:
        results: The results.
        setting: The setting.
        variants: Its variants.
        metric: What is measured.
        question: Its description.
        seeds: The seeds; rows need all of them.
    """
    rows = []
    for variant in variants:
        found = results.pick(metric, setting=setting, variant=variant)
        found = {seed: found[seed] for seed in seeds if seed in found}
        if _complete(seeds, found):
            rows.append(
                Row(
                    setting=f"{setting}, {variant}",
                    question=question,
                    arms=SHUFFLED if variant.endswith(SHUFFLED) else MECO,
                    unit="accuracy",
                    effect=_mean(found),
                    control=None,
                    seeds=tuple(seeds),
                )
            )
    return rows


def choice_rows(
    results: Results, choices: dict[str, dict[str, Any]], seeds: list[int]
) -> list[Row]:
    """Return the rows of the choices: each against setting 1's MeCo and baseline, seed by seed.

    Args:
        results: The results.
        choices: Of the recipe, by name.
        seeds: The seeds; rows need all of them.
    """
    none, fixed = value("end", "none", "accuracy"), {"setting": "contradiction", "variant": "fixed"}
    baseline = results.pick(none, **fixed, arm=BASELINE)
    meco = results.pick(none, **fixed, arm=MECO)
    steered = results.pick(steering("end", "accuracy"), **fixed, arm=MECO)
    rows = []
    for name, changes in choices.items():
        runs = {"setting": "contradiction", "variant": choice_variant(name)}
        found = results.pick(none, **runs)
        if not _complete(seeds, found, baseline, meco):
            continue
        title = f"choice: {name}"
        for other, values in ((BASELINE, baseline), (MECO, meco)):
            arms = f"{name} - {other}"
            rows.append(_difference(title, "no URL", arms, "accuracy", found, values))
        if changes["asked"] == "url":
            own = results.pick(steering("end", "accuracy"), **runs)
            question, arms = "reliable - unreliable URL", f"{name} - {MECO}"
            rows.append(_difference(title, question, arms, "accuracy", own, steered))
        elif changes["asked"] == "prefix":
            # The same prefix in both conditions.
            own = results.pick(value("end", "useful", "accuracy"), **runs)
            question, arms = "under its own prefix", f"with - without, {name}"
            rows.append(_difference(title, question, arms, "accuracy", own, found))
    return rows


def junk_rows(results: Results, setting: str, budgets: list[int], seeds: list[int]) -> list[Row]:
    """Return the rows of setting 2, or of the same without junk.

    Args:
        results: The results.
        setting: "junk" or "clean".
        budgets: Iterations.
        seeds: The seeds; rows need all of them.
    """
    rows = []
    for budget in budgets:
        for unit in ("accuracy", "bits"):
            runs = {"setting": setting, "variant": "host", "iterations": budget}
            found = {
                arm: results.pick(value("end", "none", unit), **runs, arm=arm)
                for arm in (MECO, BASELINE, SHUFFLED)
            }
            for first, second in ((MECO, BASELINE), (MECO, SHUFFLED), (SHUFFLED, BASELINE)):
                pair = [found[first], found[second]]
                if unit == "bits":
                    pair.reverse()
                if _complete(seeds, *pair):
                    row = _difference(
                        f"{setting}, {budget:,} steps", "no URL", f"{first} - {second}", unit, *pair
                    )
                    rows.append(row)
    return rows


def best_rates(results: Results, rates: list[float]) -> dict[str, float] | None:
    """Return the learning rate of each arm: that of the best mean accuracy of the tuning runs.

    Args:
        results: The results of the tuning runs.
        rates: The learning rates.

    Returns:
        By arm; the shuffled arm has MeCo's. None: a run is missing.
    """
    chosen = {}
    for arm in (MECO, BASELINE):
        means = {}
        for rate in rates:
            metric = value("end", "none", "accuracy")
            found = results.pick(metric, setting="junk", variant=f"rate-{rate:g}", arm=arm)
            if not found:
                return None
            means[rate] = sum(found.values()) / len(found)
        chosen[arm] = max(means, key=means.__getitem__)
    return {**chosen, SHUFFLED: chosen[MECO]}


def steering_rows(
    accuracies: dict[str, dict[int, float]], seeds: list[int], chance: float
) -> list[Row]:
    """Return the rows of setting 3.

    Args:
        accuracies: "conditioned", "cooled-down", "baseline" -> seed -> steering accuracy.
        seeds: The seeds; rows need all of them.
        chance: One over the number of sources.
    """
    baseline = accuracies.get("baseline", {})
    if not _complete(seeds, baseline):
        return []
    setting, rows = "steering on real text", []
    for name, when in (("cooled-down", "after"), ("conditioned", "before")):
        found = accuracies.get(name, {})
        if _complete(seeds, found):
            question = f"texts under the URL look like its source, {when} the cooldown"
            rows.append(
                _difference(setting, question, "meco - baseline", "accuracy", found, baseline)
            )
    # The text of a URL may steer a model that was trained without any.
    question = f"texts under the URL look like its source, minus chance ({chance:.3f})"
    by_chance = dict.fromkeys(baseline, chance)
    rows.append(_difference(setting, question, BASELINE, "accuracy", baseline, by_chance))
    return rows


def _difference(
    setting: str,
    question: str,
    arms: str,
    unit: str,
    first: dict[int, float],
    second: dict[int, float],
) -> Row:
    effect = paired(first, second)
    return Row(setting, question, arms, unit, effect, None, tuple(sorted(first)))


def _mean(values: dict[int, float]) -> Mean:
    return mean_of([values[seed] for seed in sorted(values)])


def _complete(seeds: list[int], *groups: dict[int, float]) -> bool:
    return all(group.keys() == set(seeds) for group in groups)
