"""Schedules: where a run switches, under every way to give its length."""

from __future__ import annotations

import pytest

from megatron_meco.config import CONDITIONED, COOLDOWN, PHASES, PLAIN, MeCoConfig
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


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ({"start_iteration": 4}, (4, 16)),
        ({"start_fraction": 0.15}, (5, 20)),  # 4.5 of 30, rounded half up
        ({"start_fraction": 0.6}, (18, 72)),
        ({"start_fraction": 0.0}, (0, 0)),
        ({"start_iteration": 0}, (0, 0)),
        ({"start_fraction": 0.01}, (0, 0)),
    ],
)
def test_plain_conditioned_cooldown(start: dict[str, float], expected: tuple[int, int]) -> None:
    schedule = make_schedule(MeCoConfig(**start), BatchSize.constant(4), train_iterations=30)
    assert (schedule.start_iteration, schedule.start_sample) == expected
    assert (schedule.switch_iteration, schedule.switch_sample) == (27, 108)
    steps, samples = expected
    assert [len(schedule.samples_of(phase)) for phase in PHASES] == [samples, 108 - samples, 12]
    for i in range(120):
        phase = PLAIN if i < samples else CONDITIONED if i < 108 else COOLDOWN
        assert schedule.phase_of_sample(i) == schedule.phase_of_iteration(i // 4) == phase
        assert i in schedule.samples_of(phase)
    if steps:
        assert schedule.describe() == (
            f"iterations 1 to {steps} plain, {steps + 1} to 27 conditioned, 28 to 30 cooldown "
            f"(switches at samples {samples} and 108 of 120)"
        )
    else:
        without = make_schedule(MeCoConfig(), BatchSize.constant(4), train_iterations=30)
        assert schedule == without


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_iteration": 27}, "--meco-start-iteration 27: leaves no iteration with metadata"),
        ({"start_fraction": 0.9}, "--meco-start-fraction 0.9: leaves no iteration"),
        ({"start_fraction": 1.0}, "--meco-start-fraction 1.0: leaves no iteration"),
        ({"start_iteration": 1, "cooldown_fraction": 1.0}, "starts after iteration 0 of 30"),
        ({"start_iteration": 5, "cooldown_start_iteration": 5}, "after iteration 5 of 30"),
    ],
)
def test_a_start_without_a_conditioned_phase(options: dict[str, float], message: str) -> None:
    with pytest.raises(FlagError, match=message):
        make_schedule(MeCoConfig(**options), BatchSize.constant(4), train_iterations=30)


@pytest.mark.parametrize(
    ("options", "own_cooldown", "shares"),
    [
        # As they were before runs could start plain: they name caches, and 0.0 is another name.
        ({}, False, "[(0, 0.0), (0, 0.9), (0.9, 1)]"),
        ({}, True, "[(0, 0.0), (0, 1.0), (0, 1)]"),
        ({"cooldown_documents": 0.25}, False, "[(0, 0.0), (0, 0.75), (0.75, 1)]"),
        ({"start_iteration": 45}, False, "[(0, 0.45), (0.45, 0.9), (0.9, 1)]"),
        ({"start_iteration": 45}, True, "[(0, 0.5), (0.5, 1.0), (0, 1)]"),
        (
            {"start_iteration": 45, "cooldown_documents": 0.5, "start_documents": 0.1},
            False,
            "[(0, 0.1), (0.1, 0.5), (0.5, 1)]",
        ),
    ],
)
def test_documents_of_the_phases(
    options: dict[str, float], own_cooldown: bool, shares: str
) -> None:
    config = MeCoConfig(**options)
    schedule = make_schedule(config, BatchSize.constant(4), train_iterations=100)
    found = schedule.document_shares(config, own_cooldown=own_cooldown)
    assert list(found) == list(PHASES)
    assert repr(list(found.values())) == shares


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.0, "0.0 leaves no document to the plain phase. Give a larger"),
        (1.0, "1.0 leaves no document to the conditioned phase, after the cooldown's share 0.1"),
        (0.9, "0.9 leaves no document to the conditioned phase"),
    ],
)
def test_a_share_that_leaves_a_phase_without_documents(share: float, message: str) -> None:
    config = MeCoConfig(start_fraction=0.5, start_documents=share)
    schedule = make_schedule(config, BatchSize.constant(4), train_iterations=100)
    with pytest.raises(FlagError, match=f"--meco-start-documents: {message}"):
        schedule.document_shares(config, own_cooldown=False)


@pytest.mark.parametrize(
    "options",
    [{}, {"start_fraction": 0.0}, {"start_iteration": 0}],
)
def test_runs_that_start_conditioned_keep_the_names_of_their_caches(
    options: dict[str, float],
) -> None:
    names = MeCoConfig(**options).unique_identifiers
    assert names == MeCoConfig().unique_identifiers
    assert not [name for name in names if name.startswith("start")]
    late = MeCoConfig(start_iteration=3).unique_identifiers
    assert late == {**names, "start_iteration": 3}


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
    late = make_schedule(MeCoConfig(start_iteration=30), batch_size, train_iterations=100)
    assert late.start_sample == batch_size.samples_after(30)


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
        ("start_iteration", -1),
        ("start_iteration", 2**60),
        ("start_fraction", -0.1),
        ("start_fraction", float("nan")),
        ("start_documents", 2.0),
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
