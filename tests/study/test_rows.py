"""From results to rows: signs, controls, seeds; and the list of runs that the recipe means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.study.execute import flags
from benchmarks.study.figure import draw
from benchmarks.study.recipe import HERE, Recipe, Run
from benchmarks.study.rows import (
    Results,
    best_rates,
    choice_rows,
    contradiction_rows,
    junk_rows,
    steering_rows,
)

SEEDS = [1, 2, 3]


def answer(useful: float, other: float, none: float) -> dict[str, dict[str, float]]:
    values = {"useful": useful, "other": other, "none": none}
    return {c: {"accuracy": value, "bits": 5 * (1 - value)} for c, value in values.items()}


def result(
    arm: str, seed: int, end: dict[str, Any], switch: dict[str, Any] | None = None, **run: Any
) -> dict[str, Any]:
    described = {"setting": "contradiction", "variant": "fixed", "iterations": 100, **run}
    return {
        "run": {**described, "arm": arm, "seed": seed},
        "checkpoints": {"end": end, "switch": switch or end},
    }


def contradiction(effect: float, control: float) -> list[dict[str, Any]]:
    found = []
    for seed in SEEDS:
        noise = 0.01 * (seed - 2)
        end = answer(0.2 + effect + noise, 0.2, 0.5)
        found.append(result("meco", seed, end, answer(0.9, 0.1, 0.1)))
        found.append(result("baseline", seed, answer(0.3 + control + noise, 0.3, 0.1)))
    return found


@pytest.mark.parametrize(
    ("effect", "control", "expected"),
    [
        (0.6, 0.0, "shown"),
        (0.0, 0.0, "not shown"),
        (0.6, 0.3, "not shown"),
        (-0.15, 0.0, "opposite"),
    ],
)
def test_the_primary_row(effect: float, control: float, expected: str) -> None:
    rows = contradiction_rows(Results(contradiction(effect, control)), SEEDS, ["fixed"])
    (primary,) = [row for row in rows if row.primary]
    assert primary.verdict == expected
    assert primary.effect.mean == pytest.approx(effect)
    assert primary.to_json()["control"] == pytest.approx(control)
    (bits,) = [row for row in rows if row.unit == "bits" and "after" in row.question]
    # Fewer bits under a reliable URL count for it.
    assert bits.effect.mean == pytest.approx(5 * effect)


def test_what_the_cooldown_does_and_the_row_without_url() -> None:
    rows = contradiction_rows(Results(contradiction(0.6, 0.0)), SEEDS, ["fixed"])
    by_question = {row.question: row for row in rows if row.unit == "accuracy"}
    weakened = by_question["reliable - unreliable URL: after - before the cooldown"]
    assert weakened.effect.mean == pytest.approx(0.6 - 0.8)
    assert weakened.verdict == "opposite"
    assert by_question["no URL"].effect.mean == pytest.approx(0.4)


def test_no_row_without_all_its_seeds() -> None:
    results = Results(contradiction(0.6, 0.0)[:-1])
    rows = contradiction_rows(results, SEEDS, ["fixed"])
    assert [row.arms for row in rows] == ["meco"]
    assert contradiction_rows(Results([]), SEEDS, ["fixed"]) == []


def test_budgets_are_rows_of_their_own() -> None:
    gains = {100: 0.5, 200: 0.1}
    results = [
        result(
            arm,
            seed,
            answer(0, 0, 0.2 + (gain + 0.01 * seed if arm == "meco" else 0)),
            setting="junk",
            variant="host",
            iterations=budget,
        )
        for budget, gain in gains.items()
        for seed in SEEDS
        for arm in ("meco", "baseline", "shuffled")
    ]
    rows = junk_rows(Results(results), "junk", list(gains), SEEDS)
    found = {(row.setting, row.arms): row for row in rows if row.unit == "accuracy"}
    assert found["junk, 100 steps", "meco - baseline"].effect.mean == pytest.approx(0.52)
    assert found["junk, 200 steps", "meco - shuffled"].effect.mean == pytest.approx(0.12)
    assert found["junk, 100 steps", "shuffled - baseline"].verdict == "not shown"
    bits = [row for row in rows if row.unit == "bits" and row.arms == "meco - baseline"]
    assert [row.effect.mean for row in bits] == pytest.approx([5 * 0.52, 5 * 0.12])


def test_each_arm_has_the_best_of_its_learning_rates() -> None:
    accuracies = {("meco", 1e-3): 0.5, ("meco", 2e-3): 0.4}
    accuracies |= {("baseline", 1e-3): 0.1, ("baseline", 2e-3): 0.2}
    results = [
        result(arm, 9, answer(0, 0, value), setting="junk", variant=f"rate-{rate:g}")
        for (arm, rate), value in accuracies.items()
    ]
    rates = best_rates(Results(results), [1e-3, 2e-3])
    assert rates == {"meco": 1e-3, "baseline": 2e-3, "shuffled": 1e-3}
    assert best_rates(Results(results[:-1]), [1e-3, 2e-3]) is None


def test_steering_is_measured_against_the_baseline_under_the_same_urls() -> None:
    found = {
        "cooled-down": {1: 0.9, 2: 0.92},
        "conditioned": {1: 0.3, 2: 0.2},
        "baseline": {1: 0.24, 2: 0.25},
    }
    after, before, baseline = steering_rows(found, [1, 2], 0.2)
    assert after.effect.values == pytest.approx((0.66, 0.67))
    assert [row.verdict for row in (after, before)] == ["shown", "not shown"]
    assert baseline.effect.values == pytest.approx((0.04, 0.05))
    assert steering_rows(found, [1, 2, 3], 0.2) == []


def names(runs: list[Run]) -> list[str]:
    return [run.name for run in runs]


def test_the_frozen_recipe() -> None:
    recipe = Recipe(HERE / "recipe.toml")
    runs = recipe.contradiction()
    assert len(runs) == 4 * 2 * 2
    assert {run.template for run in runs if run.arm == "baseline"} == {""}
    assert {run.template for run in runs if run.arm == "meco"} == {"{url.host}\\n\\n"}
    assert not any(run.shuffles for run in runs)
    # Arms of a seed differ in the template alone.
    assert len({(run.world, run.seed) for run in runs}) == 8
    rates = {"meco": 1e-3, "baseline": 2e-3, "shuffled": 1e-3}
    junk = recipe.junk(rates)
    assert {run.training.learning_rate for run in junk if run.arm == "baseline"} == {2e-3}
    everything = [*runs, *junk, *recipe.tuning(), *recipe.kinds()]
    everything += [*recipe.cooldowns("contradiction"), *recipe.cooldowns("junk", 1e-3)]
    assert len({run.digest for run in everything}) == len(everything)
    # Explorations used them to choose sizes.
    assert {0, 1, 2}.isdisjoint(run.seed for run in everything)


def test_other_seeds_and_shuffled_labels_are_other_runs() -> None:
    path = HERE / "recipe.toml"
    plain = {run.digest for run in Recipe(path).contradiction()}
    for other in (Recipe(path, [11, 12]), Recipe(path, shuffle_labels=True)):
        assert plain.isdisjoint(run.digest for run in other.contradiction())
    shuffled = Recipe(path, shuffle_labels=True).contradiction()
    assert all(run.shuffles for run in shuffled)
    assert {run.seed for run in Recipe(path, [11, 12]).contradiction()} == {11, 12}


def test_choices_are_compared_seed_by_seed() -> None:
    choices = {
        "half": {"asked": "url"},
        "tokens": {"asked": "prefix"},
        "missing": {"asked": "url"},
    }
    results = contradiction(0.6, 0.0)
    for seed in SEEDS:
        noise = 0.01 * (seed - 2)
        variants = {"half": answer(0.5 + noise, 0.2, 0.7), "tokens": answer(0.3, 0.3, 0.2 + noise)}
        for name, end in variants.items():
            results.append(result("meco", seed, end, variant=f"choice-{name}"))
    results.append(result("meco", 1, answer(1, 0, 1), variant="choice-missing"))
    rows = choice_rows(Results(results), choices, SEEDS)
    told = {(row.setting, row.question, row.arms): row.effect.mean for row in rows}
    assert told == pytest.approx(
        {
            ("choice: half", "no URL", "half - baseline"): 0.7 - 0.1,
            ("choice: half", "no URL", "half - meco"): 0.7 - 0.5,
            ("choice: half", "reliable - unreliable URL", "half - meco"): 0.3 - 0.6,
            ("choice: tokens", "no URL", "tokens - baseline"): 0.2 - 0.1,
            ("choice: tokens", "no URL", "tokens - meco"): 0.2 - 0.5,
            ("choice: tokens", "under its own prefix", "with - without, tokens"): 0.3 - 0.2,
        }
    )
    assert not any(row.primary for row in rows)


def test_the_choices_of_the_recipe(tmp_path: Path) -> None:
    """They differ from setting 1's MeCo by what they say, and leave its digests as they were."""
    recipe = Recipe(HERE / "recipe.toml")
    runs = {run.variant: run for run in recipe.choices() if run.seed == 101}
    assert len(recipe.choices()) == 4 * len(recipe.content["contradiction"]["choices"])
    reference = recipe.contradiction()[0]
    assert (reference.seed, reference.arm, reference.digest) == (101, "meco", "92a74b06e89e0de4")
    whole = flags(reference, tmp_path, tmp_path)
    late = flags(runs["choice-late-20"], tmp_path, tmp_path)
    assert late == [*whole, "--meco-start-fraction", "0.2"]
    half = flags(runs["choice-keep-half"], tmp_path, tmp_path)
    at = whole.index("--meco-template") + 1
    assert half == [*whole[:at], r"{url.host|keep=0.5}\n\n", *whole[at + 1 :]]
    heads = {name.removeprefix("choice-"): run.head_tokens for name, run in runs.items()}
    expected = {"keep-half": 0.45, "shuffled": 0.9, "late-20": 0.7, "late-60": 0.3}
    assert heads | expected == pytest.approx({**heads, **expected})
    assert heads["suffix"] == 0.9
    behind = flags(runs["choice-suffix"], tmp_path, tmp_path)
    assert behind == [*whole[:at], "", *whole[at + 1 :], "--meco-suffix-template", r"\n{url.host}"]
    assert heads["meta-tokens"] == 4.5 and reference.head_tokens == 0.9
    # The corpus of the study has no other tokenizer than it had.
    assert [run.variant for run in runs.values() if run.choice.tokens] == ["choice-meta-tokens"]


def test_a_figure_of_rows_with_and_without_intervals(tmp_path: Path) -> None:
    rows = contradiction_rows(Results(contradiction(0.6, 0.0)), SEEDS, ["fixed"])
    single = [r for r in contradiction(0.6, 0.0) if r["run"]["seed"] == 1]
    rows += contradiction_rows(Results(single), [1], ["fixed"])
    draw(rows, "a test", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
