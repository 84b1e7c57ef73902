"""Schedules: where a run switches, under every way to give its length."""

from __future__ import annotations

import pytest

from megatron_meco.config import CONDITIONED, COOLDOWN, MeCoConfig
from megatron_meco.data.phases import BatchSize, make_schedule
from megatron_meco.errors import FlagError


def test_the_papers_run() -> None:
    schedule = make_schedule(MeCoConfig(), BatchSize.constant(512), train_iterations=40_000)
    assert (schedule.switch_iteration, schedule.switch_sample) == (36_000, 18_432_000)
    assert schedule.phase_of_sample(18_431_999) == CONDITIONED
    assert schedule.phase_of_sample(18_432_000) == COOLDOWN
    assert schedule.phase_of_iteration(35_999) == CONDITIONED
    assert schedule.phase_of_iteration(36_000) == COOLDOWN


@pytest.mark.parametrize(
    ("fraction", "iterations", "switch"),
    [(0.1, 30, 27), (0.125, 80, 70), (0.1, 15, 13), (0.0, 10, 10), (1.0, 10, 0), (0.3, 10, 7)],
)
def test_fractions_are_decimal(fraction: float, iterations: int, switch: int) -> None:
    config = MeCoConfig(cooldown_fraction=fraction)
    schedule = make_schedule(config, BatchSize.constant(4), train_iterations=iterations)
    assert schedule.switch_iteration == switch


def test_an_iteration_takes_the_place_of_the_fraction() -> None:
    config = MeCoConfig(cooldown_start_iteration=3)
    assert make_schedule(config, BatchSize.constant(4), train_iterations=10).switch_sample == 12
    with pytest.raises(FlagError, match=r"iteration 3, after the run's last one \(2\)"):
        make_schedule(config, BatchSize.constant(4), train_iterations=2)


def test_the_length_in_samples() -> None:
    schedule = make_schedule(MeCoConfig(), BatchSize.constant(4), train_samples=403)
    assert (schedule.num_iterations, schedule.num_samples) == (100, 400)
    assert schedule.switch_sample == 360


@pytest.mark.parametrize("lengths", [{}, {"train_iterations": 1, "train_samples": 1}])
def test_the_length_must_be_given_once(lengths: dict[str, int]) -> None:
    with pytest.raises(FlagError, match="given once"):
        make_schedule(MeCoConfig(), BatchSize.constant(4), **lengths)


STEPS = "0:3 64:4 200:8"


def test_a_growing_batch_against_a_walk() -> None:
    batch_size = BatchSize.parse(STEPS, sequence_length=1)
    consumed = 0
    for iteration in range(200):
        assert batch_size.samples_after(iteration) == consumed
        assert batch_size.iterations_for(consumed) == iteration
        assert batch_size.iterations_for(consumed + 1) == iteration + 1
        consumed += 3 if consumed < 64 else 4 if consumed < 200 else 8
    schedule = make_schedule(MeCoConfig(), batch_size, train_iterations=100)
    assert schedule.switch_sample == batch_size.samples_after(90)


def test_a_growing_batch_against_megatrons_own_calculator() -> None:
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    text = "0:2 1K:4 3K:8"
    theirs = StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, text, seq_length=16)
    ours = BatchSize.parse(text, sequence_length=16)
    consumed = 0
    for iteration in range(100):
        theirs.update(consumed, consistency_check=True)
        assert ours.samples_after(iteration) == consumed
        consumed += theirs.get_current_global_batch_size()


@pytest.mark.parametrize("text", ["", "5:2", "0:2 0:4", "0:0", "0-2", "x:1"])
def test_unreadable_batch_schedules(text: str) -> None:
    with pytest.raises(FlagError, match="--step-batch-size-schedule"):
        BatchSize.parse(text, sequence_length=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("packing", "first-fit"),
        ("cooldown_fraction", 1.5),
        ("plain_fraction", -0.1),
        ("cooldown_start_iteration", -1),
        ("max_documents_per_pack", -1),
        ("max_prefix_tokens", 0),
    ],
)
def test_values_out_of_range_name_their_flag(field: str, value: object) -> None:
    with pytest.raises(FlagError, match="--meco-" + field.replace("_", "-")):
        MeCoConfig(**{field: value})


@pytest.mark.parametrize("field", [{"train_on_prefix": True}, {"plain_fraction": 0.5}])
def test_settings_without_effect_are_refused(field: dict[str, object]) -> None:
    with pytest.raises(FlagError, match="template"):
        MeCoConfig(template="", **field)


@pytest.mark.parametrize(
    ("given", "length", "cap"),
    [(None, 64, 64), (None, 2048, 127), (None, 32768, 511), (0, 2048, 2048), (7, 2048, 7)],
)
def test_cap_on_documents_per_pack(given: int | None, length: int, cap: int) -> None:
    assert MeCoConfig(max_documents_per_pack=given).documents_cap(length) == cap
