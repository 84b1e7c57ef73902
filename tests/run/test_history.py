"""The losses of a run, from log lines as Megatron 0.19.2 prints them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_meco.config import MeCoConfig
from megatron_meco.data.phases import BatchSize, make_schedule
from megatron_meco.run.training_log import History, Phases, Step, Validation

STEP = (
    " [2026-11-22 14:05:26.501542] iteration        9/      20 | consumed samples:           36 | "
    "elapsed time per iteration (ms): 584.2 | learning rate: 6.604685E-04 | global batch size:     "
    "4 | lm loss: 8.639625E+00 | loss scale: 1.0 | grad norm: 1.046 | number of skipped iterations:"
    "   0 | number of nan iterations:   0 |\n"
)
AT_ITERATION = (
    " validation loss at iteration 10 | lm loss conditioned value: 8.667645E+00 | lm loss "
    "conditioned PPL: 5.811799E+03 | lm loss plain value: 8.667905E+00 | lm loss plain PPL: "
    "5.813307E+03 | \n"
)
AT_THE_END = (
    " validation loss at iteration 20 on validation set | lm loss conditioned value: 8.502378E+00 "
    "| lm loss conditioned PPL: 4.926472E+03 | lm loss plain value: 8.502438E+00 | lm loss plain "
    "PPL: 4.926764E+03 | \n"
)
PHASES = "> MeCo: iterations 1 to 18 conditioned, 19 to 20 cooldown (switch at sample 72 of 80)\n"
# Lines that talk of iterations and tell nothing.
NOISE = [
    "[2026-11-22 14:05:33.342562] saving checkpoint at iteration      15 to ckpt in torch_dist\n",
    "  [2026-11-22 14:05:45.812133] successfully saved checkpoint from iteration      15 to ckpt\n",
    "> MeCo: switch after iteration 18, at sample 72: conditioned -> cooldown (checkpoint saved)\n",
    "> MeCo: iteration 1 begins in the conditioned phase\n",
    "[Rank 0] (before save_checkpoint for iteration 18) memory (MB) | allocated: 0.00 | reserved\n",
    "  train_iters ..................................... 20\n",
    "Evaluating iter 1/2\n",
    "-" * 80 + "\n",
    "\n",
]


def test_a_training_step() -> None:
    log = History()
    step = log.feed(STEP)
    assert step == Step(
        iteration=9,
        num_iterations=20,
        loss=8.639625,
        learning_rate=6.604685e-4,
        seconds=pytest.approx(0.5842),
        batch_size=4,
        skipped=0,
        nan=0,
    )
    assert log.steps == [step]


def test_a_step_without_a_loss_is_passed_over() -> None:
    """Megatron leaves the loss out when it skipped the step."""
    skipped = STEP.replace("lm loss: 8.639625E+00 | ", "")
    assert History().feed(skipped) is None


@pytest.mark.parametrize("value", ["nan", "inf", "1.5E+01", "-2.0e-3"])
def test_any_number_that_python_prints(value: str) -> None:
    step = History().feed(STEP.replace("8.639625E+00", value))
    assert isinstance(step, Step)
    assert str(step.loss) == str(float(value))


def test_both_validation_losses_during_training_and_at_the_end() -> None:
    log = History.of([AT_ITERATION, AT_THE_END])
    assert log.validations[10].losses == {"conditioned": 8.667645, "plain": 8.667905}
    assert log.validations[20].losses == {"conditioned": 8.502378, "plain": 8.502438}


def test_validation_of_a_run_without_meco() -> None:
    line = " validation loss at iteration 5 | lm loss value: 7.5E+00 | lm loss PPL: 1.8E+03 | \n"
    assert History().feed(line) == Validation(iteration=5, losses={"": 7.5})


def test_of_two_evaluations_at_one_iteration_the_later_counts() -> None:
    later = AT_ITERATION.replace("8.667905E+00", "8.5E+00")
    assert History.of([AT_ITERATION, later]).validations[10].losses["plain"] == 8.5


def test_the_switch() -> None:
    phases = History().feed(PHASES)
    assert phases == Phases(switch_iteration=18, num_iterations=20)
    assert [phases.phase_of(i) for i in (1, 18, 19)] == ["conditioned", "conditioned", "cooldown"]


def test_three_phases_as_a_run_prints_them() -> None:
    schedule = make_schedule(
        MeCoConfig(start_iteration=4), BatchSize.constant(4), train_iterations=2000
    )
    phases = History().feed(f"> MeCo: {schedule.describe()}\n")
    assert phases == Phases(switch_iteration=1800, num_iterations=2000, start_iteration=4)
    assert [phases.phase_of(i) for i in (1, 4, 5, 1800, 1801)] == [
        *("plain", "plain", "conditioned", "conditioned", "cooldown")
    ]
    told = "iterations 1 to 4 plain, 5 to 1,800 conditioned, 1,801 to 2,000 cooldown"
    assert phases.describe() == told


@pytest.mark.parametrize("line", NOISE)
def test_other_lines_tell_nothing(line: str) -> None:
    log = History()
    assert log.feed(line) is None
    assert log == History()


def test_a_whole_file(tmp_path: Path) -> None:
    """Bytes that are no text must not end the reading: third parties write what they like."""
    path = tmp_path / "log"
    lines = [*NOISE, PHASES, STEP, AT_ITERATION, AT_THE_END]
    path.write_bytes(b"\xff\xfe warning\n" + "".join(lines).encode())
    log = History.read(path)
    assert (len(log.steps), sorted(log.validations)) == (1, [10, 20])
    assert log.phases is not None
