"""Killed, stopped, moved to another layout, branched: a run goes on as if nothing had happened."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import SEQ_LENGTH, Result, command, free_port, kill_at, launch, start, train

from megatron_meco.cli import main

# Ten iterations, the last three of them cooldown; checkpoints at 3, 6, 7 (the switch), 9, 10.
FLAGS = "--meco --meco-cooldown-fraction 0.3 --save-interval 3"
FLAGS += " --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --eval-interval 100"


def meco_flags(folder: Path, extra: str = "") -> list[str]:
    """A run that saves to, and goes on from, a folder of its own."""
    own = f"--load {folder}/ckpt --save {folder}/ckpt --data-cache-path {folder}/cache"
    return f"{FLAGS} {own} {extra}".split()


@pytest.fixture(scope="module")
def undisturbed(
    corpus: str, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result]:
    """Two data-parallel ranks, never stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = train(corpus, tokenizer_folder, *meco_flags(folder), ranks=2)
    assert result.status == 0, result.log[-3000:]
    return folder, result


def assert_equal_checkpoints(a: Path, b: Path) -> None:
    """Weights and optimizer state, bit by bit."""
    import torch

    from megatron_meco.inference.checkpoint import Checkpoint

    first, second = Checkpoint(a), Checkpoint(b)
    assert first.shapes == second.shapes
    assert any(name.startswith("optimizer.") for name in first.shapes)
    for name in first.shapes:
        assert torch.equal(first.read(name), second.read(name)), name


@pytest.mark.distributed
def test_sigkill_before_at_and_after_the_switch(
    corpus: str, tokenizer_folder: Path, undisturbed: tuple[Path, Result], tmp_path: Path
) -> None:
    """The model that died three times is the model that never did, bit by bit."""
    run = command(corpus, tokenizer_folder, *meco_flags(tmp_path))
    latest = tmp_path / "ckpt" / "latest_checkpointed_iteration.txt"
    restarts = []
    for text in ("iteration        5/", "> MeCo: switch after iteration 7", "iteration        9/"):
        assert kill_at(run, 2, text).status != 0
        restarts.append(int(latest.read_text()))
    assert restarts[0] == 3
    assert restarts[1] in (6, 7)  # the switch's checkpoint is written in the background of the line
    assert restarts[2] in (7, 9)
    result = launch(run, 2)
    assert result.status == 0, result.log[-3000:]
    reference, whole = undisturbed
    assert_equal_checkpoints(
        tmp_path / "ckpt" / "iter_0000010", reference / "ckpt" / "iter_0000010"
    )
    assert {i: whole.samples[i] for i in result.samples} == result.samples


@pytest.mark.distributed
@pytest.mark.slow
def test_checkpoints_that_are_saved_in_the_background(
    corpus: str, tokenizer_folder: Path, undisturbed: tuple[Path, Result], tmp_path: Path
) -> None:
    """Each holds the moment at which it was begun, although training goes on meanwhile."""
    background = "--async-save --async-strategy mcore --use-persistent-ckpt-worker"
    result = train(corpus, tokenizer_folder, *meco_flags(tmp_path, background), ranks=2)
    assert result.status == 0, result.log[-3000:]
    reference, whole = undisturbed
    assert result.losses == whole.losses
    for step in (3, 6, 7, 9, 10):
        assert f"scheduled an async checkpoint save at iteration {step:7d}" in result.log
        assert f"successfully saved checkpoint from iteration {step:7d}" in result.log
        name = f"ckpt/iter_{step:07d}"
        assert_equal_checkpoints(tmp_path / name, reference / name)
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "10"


@pytest.mark.distributed
def test_other_samples_are_refused_by_name(
    corpus: str, tokenizer_folder: Path, undisturbed: tuple[Path, Result], tmp_path: Path
) -> None:
    folder, _ = undisturbed
    other = "--meco-template {url.domain} --meco-packing best-fit --seed 8"
    result = train(corpus, tokenizer_folder, *meco_flags(folder, other), ranks=1)
    errors = [line for line in result.log.splitlines() if "meco: error" in line]
    assert len(errors) == 1
    for text in (
        "iteration 10 was",
        "template: 'URL: {url.host}",
        "packing: 'truncate' -> 'best-fit'",
        "seed: 7 -> 8",
        "--meco-allow-changes template packing seed",
    ):
        assert text in errors[0]
    assert "corpora" not in errors[0]
    allowed = f"{other} --meco-allow-changes template packing seed"
    result = train(corpus, tokenizer_folder, *meco_flags(folder, allowed), ranks=2)
    assert result.status == 0, result.log[-3000:]
    without = [f for f in meco_flags(folder) if f != "--meco" and not f.startswith("--meco-")]
    without.remove("0.3")
    result = train(corpus, tokenizer_folder, *without, ranks=1)
    assert "meco: True -> False" in result.log


@pytest.mark.distributed
@pytest.mark.parametrize("rate", ["decay", pytest.param("continue", marks=pytest.mark.slow)])
def test_a_cooldown_branched_off(
    rate: str, corpus: str, tokenizer_folder: Path, undisturbed: tuple[Path, Result], tmp_path: Path
) -> None:
    """Four iterations of cooldown after the third of a longer run, whose documents it never saw."""
    folder, whole = undisturbed
    branch = f"--meco-branch-from {folder}/ckpt/iter_0000003 --meco-branch-iters 4"
    run = command(
        corpus,
        tokenizer_folder,
        *meco_flags(tmp_path, f"{branch} --meco-branch-lr {rate} --train-iters 99"),
    )
    killed = kill_at(run, 2, "iteration        7/")  # after the checkpoint at iteration 6
    result = launch(run, 2)
    assert result.status == 0, result.log[-3000:]
    assert "iterations 1 to 3 conditioned, 4 to 7 cooldown" in result.log
    assert "iteration 7 begins in the cooldown phase" in result.log
    assert sorted(killed.losses)[0] == 4
    shares = {i: share for i, (share, _) in {**killed.samples, **result.samples}.items()}
    assert shares == dict.fromkeys(range(4, 8), "0.000000E+00")
    rates = learning_rates(killed.log) | learning_rates(result.log)
    if rate == "decay":
        steps = [rates[i] - rates[i + 1] for i in (4, 5, 6)]
        assert steps == pytest.approx([steps[0]] * 3, rel=1e-3)
        assert rates[7] == pytest.approx(1e-3)
    else:
        expected = learning_rates(whole.log)
        assert rates == {i: expected[i] for i in range(4, 8)}


def late_flags(folder: Path, name: str) -> list[str]:
    """Four plain, four conditioned, two cooldown iterations."""
    phases = "--meco --meco-start-fraction 0.4 --meco-cooldown-fraction 0.2 --eval-interval 100"
    own = f"--load {folder}/{name} --save {folder}/{name} --data-cache-path {folder}/cache"
    return f"{phases} --save-interval 3 {own}".split()


@pytest.fixture(scope="module")
def late(
    corpus: str, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result]:
    """A run that starts plain, never stopped."""
    folder = tmp_path_factory.mktemp("late")
    result = train(corpus, tokenizer_folder, *late_flags(folder, "whole"))
    assert result.status == 0, result.log[-3000:]
    return folder, result


@pytest.mark.distributed
def test_a_run_that_starts_plain_is_killed_before_and_after_its_start(
    corpus: str, tokenizer_folder: Path, late: tuple[Path, Result], tmp_path: Path
) -> None:
    folder, whole = late
    lines = [line for line in whole.log.splitlines() if line.startswith("> MeCo")]
    for told in (
        "iterations 1 to 4 plain, 5 to 8 conditioned, 9 to 10 cooldown (switches at samples 16",
        "iteration 1 begins in the plain phase",
        "switch after iteration 4, at sample 16: plain -> conditioned (checkpoint saved)",
        "switch after iteration 8, at sample 32: conditioned -> cooldown (checkpoint saved)",
    ):
        assert sum(told in line for line in lines) == 1, told
    assert [i for i, (share, _) in whole.samples.items() if float(share)] == [5, 6, 7, 8]
    saved = sorted(path.name for path in (folder / "whole").glob("iter_*"))
    assert saved == [f"iter_{i:07d}" for i in (3, 4, 6, 8, 9, 10)]
    run = command(corpus, tokenizer_folder, *late_flags(tmp_path, "killed"))
    latest = tmp_path / "killed" / "latest_checkpointed_iteration.txt"
    for text, iterations in (("iteration        4/", (3,)), ("iteration        7/", (4, 6))):
        assert kill_at(run, 1, text).status != 0
        assert int(latest.read_text()) in iterations
    result = launch(run, 1)
    assert result.status == 0, result.log[-3000:]
    checkpoints = [parent / "iter_0000010" for parent in (tmp_path / "killed", folder / "whole")]
    assert_equal_checkpoints(*checkpoints)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_branch_off_a_run_that_started_plain(
    corpus: str,
    tokenizer_folder: Path,
    late: tuple[Path, Result],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It trains on the documents that the parent holds out, and shows what the parent did."""
    folder, _ = late

    def ask(name: str, flags: list[str], *more: str) -> dict[str, Any]:
        words = command(corpus, tokenizer_folder, *flags, *more)[1:]
        assert main([name, *(word for word in words if word != "--meco"), "--json"]) == 0
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        return report

    own = late_flags(tmp_path, "branch")
    branch = [*own, "--meco-branch-iters", "2", "--meco-branch-from"]
    branch += [f"{folder}/whole/iter_0000006"]
    report = ask("plan", branch)
    ends = ("start_sample", "switch_sample", "num_samples")
    assert [report[end] for end in ends] == [16, 24, 32]
    for at, there in ((5, 5), (16, 16), (23, 23), (24, 32)):
        samples = [
            ask("inspect", flags, "--sample", str(index))["tokens"]
            for flags, index in ((branch, at), (late_flags(folder, "whole"), there))
        ]
        assert samples[0] == samples[1], f"sample {at}"
    words = command(corpus, tokenizer_folder, *branch)[1:]
    words[-1] = f"{folder}/whole/iter_0000004"
    assert main(["plan", *(word for word in words if word != "--meco")]) == 1
    assert "iteration 4 lies before that run's conditioned phase" in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_start_plain_as_one_does(
    corpus: str, tokenizer_folder: Path, late: tuple[Path, Result], tmp_path: Path
) -> None:
    flags = [*late_flags(tmp_path, "two"), "--exit-interval", "6"]
    two = train(corpus, tokenizer_folder, *flags, ranks=2)
    assert two.status == 0, two.log[-3000:]
    assert two.samples == {i: late[1].samples[i] for i in range(1, 7)}
    other = [*late_flags(tmp_path, "two"), "--meco-start-fraction", "0.3"]
    refused = train(corpus, tokenizer_folder, *other)
    assert "what differs is schedule:" in refused.log
    assert "'start_sample': 16" in refused.log and "'start_sample': 12" in refused.log


def learning_rates(log: str) -> dict[int, float]:
    """As printed, by iteration."""
    found = re.finditer(r"iteration +(\d+)/.*?learning rate: (\S+) ", log)
    return {int(match[1]): float(match[2]) for match in found}


@pytest.mark.distributed
@pytest.mark.slow
def test_the_layout_may_change_at_a_resume(
    corpus: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """DP 2, then TP 2, then PP 2, against one rank all along."""
    flags = "--meco --meco-cooldown-fraction 0.3 --save-interval 3 --eval-interval 100"
    flags += " --calculate-per-token-loss --make-vocab-size-divisible-by"

    def run(name: str, vocabulary: int, ranks: int, extra: str) -> Result:
        own = f"--load {tmp_path}/{name} --save {tmp_path}/{name} --data-cache-path {tmp_path}/c"
        result = train(
            corpus, tokenizer_folder, *f"{flags} {vocabulary} {own} {extra}".split(), ranks=ranks
        )
        assert result.status == 0, result.log[-3000:]
        return result

    alone = run("alone", 256, 1, "")
    moved = [
        run("moved", 256, 2, "--exit-interval 3"),
        run("moved", 128, 2, "--tensor-model-parallel-size 2 --exit-interval 6"),
        run("moved", 256, 2, "--pipeline-model-parallel-size 2"),
    ]
    samples = {i: s for part in moved for i, s in part.samples.items()}
    # Megatron logs the second step after a resume as the mean of two; 1, 4, 7 and 10 are exact.
    assert [samples[i] for i in (1, 4, 7, 10)] == [alone.samples[i] for i in (1, 4, 7, 10)]
    losses = {i: float(x) for part in moved for i, x in part.losses.items()}
    for i in (1, 4, 7, 10):
        assert losses[i] == pytest.approx(float(alone.losses[i]), rel=3e-6)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_nodes_without_a_shared_file_system(
    corpus: str, tokenizer_folder: Path, undisturbed: tuple[Path, Result], tmp_path: Path
) -> None:
    """Each node has a --data-cache-path of its own."""
    port = free_port()
    processes = []
    for node in range(2):
        flags = [*FLAGS.split(), "--data-cache-path", f"{tmp_path}/node{node}"]
        flags = [f for f in flags if f not in ("--save-interval", "3")]
        processes.append(start(command(corpus, tokenizer_folder, *flags), 1, (2, node, port)))
    logs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs[0][-2000:]
    results = [Result.read(0, log) for log in logs]
    assert results[1].losses == undisturbed[1].losses  # the last rank logs
    built = [sorted(p.name for p in (tmp_path / f"node{n}").rglob("*.meco")) for n in range(2)]
    assert built[0] == built[1]
    assert len(built[0]) > 2


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3])
def test_a_cache_builder_killed_at_any_time(
    delay: float, corpus: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Whatever a SIGKILL leaves is never taken for a cache, and the next build is whole."""
    script = Path(__file__).with_name("build_cache.py")
    build = [sys.executable, str(script), str(tmp_path)]
    process = subprocess.Popen(build, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=delay)
    process.kill()
    process.wait()
    assert list(tmp_path.glob("*.meco")) == []
    done = subprocess.run(build, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == ["whole"]


@pytest.mark.distributed
@pytest.mark.slow
def test_the_switch_in_samples_with_a_growing_batch(
    corpus: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """5 steps of 4, then 5 of 8 samples: the tenth step alone is cooldown, from sample 52 on."""
    flags = "--meco --train-samples 60 --save-interval 100 --eval-interval 100"
    flags += f" --save {tmp_path}/ckpt --data-cache-path {tmp_path}/cache"
    run = command(corpus, tokenizer_folder, *flags.split())
    run += ["--step-batch-size-schedule", f"0:4 {18 * SEQ_LENGTH}:8"]
    for name in ("--train-iters", "--global-batch-size"):
        del run[run.index(name) : run.index(name) + 2]
    result = launch(run, 2)
    assert result.status == 0, result.log[-3000:]
    assert "switch after iteration 9, at sample 52: conditioned -> cooldown" in result.log
    assert [i for i, (share, _) in result.samples.items() if float(share) == 0] == [10]
    assert (tmp_path / "ckpt" / "iter_0000009").is_dir()
