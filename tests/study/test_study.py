"""The study's processes train as torchrun does, and the whole study runs, with a tiny recipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import runs

from benchmarks.study import execute, trainer
from benchmarks.study.recipe import Recipe

ROOT = Path(__file__).parents[2]
SMOKE = Path(__file__).with_name("smoke.toml")
_LOSS = re.compile(r"iteration +(\d+)/ .*?lm loss: (\S+) \|")


def study(*arguments: str, status: int = 0) -> str:
    command = [sys.executable, "-m", "benchmarks.study.run", "--recipe", str(SMOKE), *arguments]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == status, found.stdout + found.stderr
    return found.stdout + found.stderr


def test_wrong_arguments_are_told() -> None:
    assert "give different numbers" in study("--seeds", "3", "3", status=2)
    assert "give 1 or more" in study("--jobs", "0", status=2)


def test_a_run_that_fails_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(trainer.RunFailed, match=r"exit status 1.*(?s:.)*--load") as failure:
        missing = str(tmp_path / "missing")
        trainer.meco(["export", "--load", missing, "--output", missing], tmp_path / "log")
    assert "Traceback" not in str(failure.value)


def test_an_interrupt_ends_what_runs_and_starts_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_interrupted", threading.Event())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(trainer.call, time.sleep, (600,), tmp_path / "log")
        # The log is opened once the process is ready.
        while not (tmp_path / "log").is_file() and not waiting.done():
            time.sleep(0.1)
        trainer.interrupt()
        with pytest.raises(trainer.RunFailed, match="exit status"):
            waiting.result(timeout=60)
    with pytest.raises(trainer.RunFailed, match="interrupted"):
        trainer.meco(["--version"], tmp_path / "log")


@pytest.mark.timeout(900)
def test_the_whole_default_study(tmp_path: Path) -> None:
    """Runs, writes rows and a figure, and uses at the second call what the first one made."""
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    told = study(*places)
    assert "contradicting sources: 2 runs, 0 of them there already" in told
    content = json.loads((tmp_path / "results" / "default.json").read_text())
    assert content["recipe_sha256"] == Recipe(SMOKE).digest
    assert {row["verdict"] for row in content["rows"]} == {"not shown"}
    meco, baseline = sorted(content["runs"], key=lambda run: run["run"]["arm"], reverse=True)
    assert (meco["run"]["arm"], baseline["run"]["arm"]) == ("meco", "baseline")
    assert meco["tokens"] == baseline["tokens"] == 20 * 64
    # A prefix takes room.
    assert 0 < meco["documents_per_person"] < baseline["documents_per_person"]
    conditions = meco["checkpoints"]["end"]
    assert conditions.keys() == {"useful", "other", "none"}
    assert all(0 <= c["accuracy"] <= 1 and 0 < c["bits"] < 12 for c in conditions.values())
    assert (tmp_path / "results" / "default.png").is_file()
    assert "2 of them there already" in study(*places)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_choices_of_the_study(tmp_path: Path) -> None:
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    study("--choices", *places)
    content = json.loads((tmp_path / "results" / "default-choices.json").read_text())
    choices = Recipe(SMOKE).content["contradiction"]["choices"]
    told = {row["setting"] for row in content["rows"]}
    assert {f"choice: {name}" for name in choices} <= told
    for run in content["runs"]:
        end = run["checkpoints"]["end"]
        is_same = end["useful"] == end["other"]
        assert is_same == (run["run"]["variant"] == "choice-meta-tokens")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_losses_are_those_of_torchrun(tmp_path: Path) -> None:
    run = Recipe(SMOKE).contradiction()[0]
    data, _ = execute.Executor(tmp_path)._prepared(run)
    losses = []
    for name, train in (("forked", trainer.train), ("torchrun", torchrun)):
        flags = execute.flags(run, data, tmp_path / name / "checkpoints")
        (tmp_path / name).mkdir()
        train([*flags, "--log-interval", "1"], tmp_path / name / "log")
        losses.append(_LOSS.findall((tmp_path / name / "log").read_text()))
    assert losses[0] == losses[1]
    assert len(losses[0]) == run.iterations


def torchrun(flags: list[str], log: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command += ["--master-port", str(runs.free_port()), trainer.SCRIPT, *flags]
    environment = {**os.environ, "PYTHONPATH": runs.PYTHONPATH, **trainer.ENVIRONMENT}
    with log.open("w") as out:
        subprocess.run(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, check=True
        )
