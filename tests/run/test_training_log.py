"""What the log of a run tells, and what the end of a failed one means."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_meco import cli
from megatron_meco.run.endings import has_failed, last_lines, meaning_of, refusal_in
from megatron_meco.run.training_log import Message, Phases, Saved, Step, TrainingLog, Validation
from megatron_meco.run.watch import Follower, clock

# As Megatron-Core 0.19.2 prints it.
LOG = """\
/lib/megatron/core/extensions/spec.py:88: UserWarning: Only transformer-engine>=1.7.0 supports MoE
  encoder_seq_length .............................. 99
  seq_length ...................................... 512
WARNING: one_logger package is required to enable e2e metrics tracking.
WARNING:megatron.core.models.gpt.gpt_model:GPTModel IS DEPRECATED.
WARNING:megatron.core.utils:something that a person should read
WARNING:megatron.core.utils:something that a person should read
> MeCo: iterations 1 to 27 conditioned, 28 to 30 cooldown (switch at sample 108 of 120)
> MeCo: iteration 1 begins in the conditioned phase
 [2026-11-24 12:09:12.101877] iteration        1/      30 | consumed samples:            4 | \
elapsed time per iteration (ms): 279.5 | learning rate: 1.000000E-03 | global batch size:     4 | \
lm loss: 6.019644E+00 | prefix share: 3.076172E-01 | loss scale: 1.0 | grad norm: 7.785 | number \
of skipped iterations:   0 | number of nan iterations:   0 |
 [2026-11-24 12:09:12.266176] iteration        2/      30 | consumed samples:            8 | \
elapsed time per iteration (ms): 500.0 | learning rate: 2.000000E-03 | global batch size:     4 | \
loss scale: 1.0 | number of skipped iterations:   1 | number of nan iterations:   1 |
[2026-11-24 12:09:30.046592] saving checkpoint at iteration      10 to runs/a in torch_dist format
  [2026-11-24 12:09:34.800570] successfully saved checkpoint from iteration      10 to runs/a \
[ t 1/1 ]
> MeCo: switch after iteration 27, at sample 108: conditioned -> cooldown (checkpoint saved)
 validation loss at iteration 30 on validation set | lm loss conditioned value: 1.464667E+00 | lm \
loss conditioned PPL: 4.326102E+00 | lm loss plain value: 1.596032E+00 | lm loss plain PPL: 4.9 |
"""


def test_a_log_is_read_line_by_line() -> None:
    log = TrainingLog()
    events = [event for line in LOG.splitlines() if (event := log.feed(line)) is not None]
    warning, phases, first, second, saved, switch, validation = events
    assert warning == Message("something that a person should read", is_warning=True)
    assert phases == Phases(27, 30)
    assert phases.phase_of(27) == "conditioned" and phases.phase_of(28) == "cooldown"
    assert isinstance(first, Step) and (first.iteration, first.loss) == (1, 6.019644)
    assert isinstance(second, Step) and math.isnan(second.loss) and second.nan == 1
    assert saved == Saved(10, "runs/a")
    assert isinstance(switch, Message) and switch.text.startswith("switch after iteration 27")
    assert validation == Validation(30, {"conditioned": 1.464667, "plain": 1.596032})
    assert log.seq_length == 512
    assert log.tokens_per_second() == pytest.approx(4 * 512 / 0.5)
    assert log.seconds_left() == pytest.approx(28 * 0.5)


@pytest.mark.parametrize("end", range(0, 240, 7))
def test_a_line_that_is_cut_is_no_event_and_no_error(end: int) -> None:
    step = next(line for line in LOG.splitlines() if "iteration        1/" in line)
    event = TrainingLog().feed(step[:end])
    assert event is None or isinstance(event, Step)


def test_a_log_of_another_launcher_is_read_too() -> None:
    """torchrun and srun put the rank before each line."""
    step = next(line for line in LOG.splitlines() if "iteration        1/" in line)
    for prefix in ("[default3]:", "12: ", "7: [default0]:"):
        assert isinstance(TrainingLog().feed(prefix + step), Step)
        log = TrainingLog()
        log.feed(prefix + "  seq_length ...................................... 512")
        assert log.seq_length == 512


def test_what_a_person_sees(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text(LOG)
    shown = io.StringIO()
    follower = Follower(path, Console(file=shown, width=200))
    assert follower.conclude(follower.follow(lambda: 0)) == 0
    text = shown.getvalue()
    for told in (
        "warning: something that a person should read\n",
        "iterations 1 to 27 conditioned, 28 to 30 cooldown\n",
        "warning: up to iteration 2: loss nan, 1 steps skipped, 1 with a loss that is no number\n",
        "checkpoint of iteration 10 in runs/a\n",
        "iteration 30: validation loss 1.465 with metadata, 1.596 without\n",
        "so far: iteration 2 of 30; loss 6.020 -> nan",
    ):
        assert told in text
    assert "one_logger" not in text and "DEPRECATED" not in text


def test_a_plain_start_is_a_phase_of_the_progress(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    phases = "iterations 1 to 10 plain, 11 to 27 conditioned, 28 to 30 cooldown"
    text = LOG.replace("iterations 1 to 27 conditioned, 28 to 30 cooldown", phases)
    path.write_text(text.replace("iteration        1/", "iteration        3/"))
    path.write_text(path.read_text() + LOG.splitlines()[-1].replace("30 on", "10 on") + "\n")
    shown = io.StringIO()
    follower = Follower(path, Console(file=shown, width=200))
    assert follower.conclude(follower.follow(lambda: 0)) == 0
    assert f"{phases}\n" in shown.getvalue()
    assert re.search(r"^(?:meco: )?plain +3/30", shown.getvalue(), re.MULTILINE)
    assert "iteration 10 (at the switch): validation" in shown.getvalue()


def test_watch_needs_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in ((tmp_path, "holds no log"), (tmp_path / "no.txt", "is not a file")):
        assert cli.main(["watch", str(path)]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "log.txt").write_text(LOG)
    assert cli.main(["watch", str(tmp_path / "log.txt"), "--once"]) == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "log.txt is empty so far; waiting for the first step"),
        ("notes\n", "log.txt holds no training step so far; waiting for the first step"),
        (LOG.splitlines()[2], "holds no training step so far"),
        (LOG, ""),
    ],
)
def test_watch_says_at_once_what_it_waits_for(
    text: str,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "log.txt").write_text(text)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    # The first time that it would wait.
    monkeypatch.setattr("megatron_meco.run.watch.time.sleep", interrupt)
    assert cli.main(["watch", str(tmp_path / "log.txt")]) == 130
    said = capsys.readouterr().err
    assert told in said and ("waiting" in said) == bool(told)


def test_an_old_log_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.txt"
    path.write_text(LOG.replace("      2/      30", "     30/      30"))
    os.utime(path, (1e9, 1e9))
    assert cli.main(["watch", str(path)]) == 0
    assert "done: iteration 30 of 30" in capsys.readouterr().err
    path.write_text("nothing of a run\n")
    assert cli.main(["watch", str(path), "--once"]) == 0
    assert "no training step in" in capsys.readouterr().err


def test_a_crash_under_torchrun_is_told_in_its_own_lines(tmp_path: Path) -> None:
    script = tmp_path / "crash.py"
    script.write_text("def step():\n    raise OSError(28, 'No space left on device')\nstep()\n")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", str(script)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 1 and has_failed(text)
    lines = last_lines(text)
    assert lines[-1].endswith("OSError: [Errno 28] No space left on device")
    assert any("crash.py" in line for line in lines) and len(lines) <= 6
    assert (meaning_of(text) or "").startswith("a disk is full")


TORCHRUN = """\
E1124 12:10 4 torch/distributed/elastic/multiprocessing/api.py:1016] failed (exitcode: {code})
Traceback (most recent call last):
  File "/lib/torch/distributed/run.py", line 999, in main
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
  exitcode  : {code} (pid: 3)
  traceback : Signal {signal} received by PID 3
"""


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        (TORCHRUN.format(code=-9, signal="9 (SIGKILL)"), "a process was killed from outside"),
        (TORCHRUN.format(code=-15, signal="15 (SIGTERM)"), "the run was ended from outside"),
        (TORCHRUN.format(code=-11, signal="11 (SIGSEGV)"), "a process crashed inside"),
        (TORCHRUN.format(code=-7, signal="7 (SIGBUS)"), "shared memory is full"),
        ("[rank0]: torch.OutOfMemoryError: CUDA out of memory.", "a GPU's memory is too small"),
        ("slurmstepd: error: *** JOB 1 CANCELLED AT 2026 DUE TO TIME LIMIT ***", "the run was end"),
        ("RuntimeError: Rank 0: found NaN in local forward loss", "the loss or a gradient"),
        ("Watchdog caught collective operation timeout: WorkNCCL(", "a rank waited in vain"),
        ("torch.distributed.DistNetworkError: EADDRINUSE", "another program listens"),
        ("ModuleNotFoundError: No module named 'x'", "something is not installed"),
        ("ZeroDivisionError: division by zero", None),
    ],
)
def test_what_an_ending_means(text: str, meaning: str | None) -> None:
    found = meaning_of(text)
    assert found is None if meaning is None else (found or "").startswith(meaning)


def test_the_cause_is_told_and_not_what_torchrun_did_then() -> None:
    cause = (
        "[rank1]: Traceback (most recent call last):\n"
        '[rank1]:   File "train.py", line 3, in step\n'
        "[rank1]: torch.OutOfMemoryError: CUDA out of memory.\n"
        "W1124 Sending process 7 closing signal SIGTERM\n"
    )
    text = cause + TORCHRUN.format(code=1, signal="15 (SIGTERM)")
    assert (meaning_of(text) or "").startswith("a GPU's memory")
    assert last_lines(text)[-1] == "torch.OutOfMemoryError: CUDA out of memory."


def test_a_refusal_stands_for_itself() -> None:
    text = "meco: error: --seq-length 3: too small. Raise it.\n" + TORCHRUN.format(code=1, signal=0)
    assert refusal_in(text) == "--seq-length 3: too small. Raise it."
    assert refusal_in("nothing") is None


def test_clock() -> None:
    assert [clock(s) for s in (5, 65, 3665, 200_000)] == ["0:05", "1:05", "1:01:05", "2 d 7:33:20"]
