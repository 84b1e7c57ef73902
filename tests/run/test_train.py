"""`meco train` and `meco watch` on real runs: started, killed, started again, printed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import PYTHONPATH

from megatron_meco import cli
from megatron_meco.errors import MeCoError
from megatron_meco.run.check import Facts
from megatron_meco.run.flag_table import flag_table, schema_text
from megatron_meco.run.launch import batch_script
from megatron_meco.run.plain_yaml import parse
from megatron_meco.run.run_file import read_run
from megatron_meco.run.run_folder import begin, last_checkpoint, last_log, lock_of
from megatron_meco.run.train import _check_start

RUN = """\
# A model that a test can wait for.
model: laptop-3m
data-path: {corpus}
tokenizer-model: {tokenizer}
train-iters: 8
num-layers: 2
hidden-size: 32
ffn-hidden-size: 64
seq-length: 64
meco-cooldown-fraction: 0.25
split: 80,20,0
save-interval: 3
eval-interval: 4
eval-iters: 1
"""


@pytest.fixture
def run_file(tmp_path: Path, corpus: str, tokenizer_folder: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RUN.format(corpus=corpus, tokenizer=tokenizer_folder))
    return path


def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_meco", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, **variables},
    )


def kill_all(mark: str) -> None:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)


def numbers(log: str) -> dict[int, tuple[str, ...]]:
    """Learning rate and gradient norm of each step.

    Not the loss, nor the trained tokens: Megatron's second line after a start has the mean of the
    first two steps.
    """
    step = re.compile(r"iteration +(\d+)/ .*learning rate: (\S+) .*grad norm: (\S+) ")
    return {int(number): tuple(told) for number, *told in step.findall(log)}


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_run_is_killed_and_goes_on(run_file: Path) -> None:
    """With the numbers of the printed command, which nobody killed."""
    dry = start("train", run_file, "--set", "save=runs/whole", "--dry-run")
    command, _ = dry.communicate(timeout=280)
    assert dry.returncode == 0, command
    assert not (run_file.parent / "runs").exists()
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["cd", str(run_file.parent), "&&"] and "--module" in words
    whole = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=280)
    expected = numbers(whole.stdout)
    assert sorted(expected) == list(range(1, 9)), whole.stderr[-2000:]

    mark = f"MECO_TEST_RUN={os.getpid()}"
    first = start("train", run_file, **dict([mark.split("=")]))
    folder = run_file.parent / "runs" / "tiny"
    end = time.monotonic() + 280
    # The file rather than the progress on the terminal, which comes later than the next steps.
    while last_checkpoint(folder) is None:
        assert first.poll() is None and time.monotonic() < end, first.communicate()
        time.sleep(0.01)
    kill_all(mark)
    first.communicate()
    done = last_checkpoint(folder)
    assert done in (3, 6)
    again = start("train", run_file)
    text, _ = again.communicate(timeout=280)
    assert again.returncode == 0, text
    for told in (
        "iterations 1 to 6 conditioned, 7 to 8 cooldown",
        "validation loss",
        "tokens/s",
        "done: iteration 8 of 8",
        f"checkpoint of iteration {6 if done == 3 else 8} in runs/tiny",
        "last checkpoint 8 in runs/tiny",
    ):
        assert told in text
    assert "Traceback" not in text and len(text.splitlines()) < 40
    assert f"going on from the checkpoint of iteration {done}" in text

    log = last_log(folder)
    assert log == folder / "logs" / "002" / "log.txt"
    assert numbers(log.read_text()) == {n: told for n, told in expected.items() if n > done}
    # What was run is all there.
    names = {path.name for path in log.parent.iterdir()}
    assert names == {"run.yaml", "command.sh", "versions.txt", "log.txt"}
    assert (log.parent / "run.yaml").read_text().endswith(run_file.read_text())
    assert "megatron-core==" in (log.parent / "versions.txt").read_text()
    assert list((folder / "tensorboard").iterdir())
    watched = start("watch", folder)
    text, _ = watched.communicate(timeout=60)
    assert watched.returncode == 0 and "done: iteration 8 of 8" in text


@pytest.mark.distributed
def test_a_run_that_fails_says_why(run_file: Path) -> None:
    crash = run_file.parent / "crash.py"
    crash.write_text(
        "import torch\n"
        "def step():\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')\n"
        "step()\n"
    )
    failed = start("train", run_file, "--set", "launch.script=crash.py")
    text, _ = failed.communicate(timeout=120)
    assert failed.returncode == 1
    assert "the run failed before the first step. Its last lines:" in text
    assert "in step" in text and "CUDA out of memory. Tried to allocate 2 GiB" in text
    assert "What it means: a GPU's memory is too small" in text
    assert "torch/distributed" not in text and len(text.splitlines()) < 14


def test_megatrons_own_validation_is_asked_before_anything_starts(run_file: Path) -> None:
    bad = start("train", run_file, "--set", "micro-batch-size=3")
    text, _ = bad.communicate(timeout=120)
    assert bad.returncode == 1
    assert re.fullmatch(r"meco: error: --set micro-batch-size=3: --global-.*\n", text), text
    assert not (run_file.parent / "runs").exists()


@pytest.mark.parametrize(
    ("lines", "facts", "message"),
    [
        ("load: runs/other\n", {}, r":15: runs/tiny has the checkpoint of iteration 5, and load"),
        ("bf16: true\n", {"gpu_only": [["--bf16", "Drop it."]]}, ":15: --bf16: needs a GPU"),
        ("launch: {nproc-per-node: 4}\n", {"on_cpu": False}, "torch sees 2 GPUs here"),
        ("meco-packing: best_fit\n", {}, ""),
        ("launch: {slurm: true}\n", {"gpu_only": [["--bf16", ""]]}, ""),
    ],
)
def test_what_only_a_start_makes_wrong(
    lines: str, facts: dict[str, object], message: str, run_file: Path
) -> None:
    run_file.write_text(run_file.read_text() + lines)
    folder = run_file.parent / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    known = Facts(**{"on_cpu": True, "num_gpus": 2, **facts})  # type: ignore[arg-type]
    run = read_run(run_file)
    if not message:
        _check_start(run, known)
        return
    with pytest.raises(MeCoError, match=message):
        _check_start(run, known)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("load: other\n", "other holds no checkpoint, so there is nothing to start from"),
        ("launch: {script: gone.py}\n", "launch names the script gone.py, and there is no such"),
    ],
)
def test_what_a_start_needs_is_there(line: str, message: str, run_file: Path) -> None:
    run_file.write_text(run_file.read_text() + line)
    with pytest.raises(MeCoError, match=message):
        _check_start(read_run(run_file), Facts(on_cpu=True, num_gpus=0))
    (run_file.parent / "other").mkdir()
    (run_file.parent / "other" / "latest_checkpointed_iteration.txt").write_text("release")
    (run_file.parent / "gone.py").touch()
    _check_start(read_run(run_file), Facts(on_cpu=True, num_gpus=0))


def test_a_run_without_checkpoints_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data-path: a\ntrain-iters: 5\n")
    with pytest.raises(MeCoError, match="Give save-interval"):
        _check_start(read_run(path), Facts(on_cpu=True, num_gpus=0))


def test_starts_have_folders_of_their_own_and_a_lock(tmp_path: Path) -> None:
    first = begin(tmp_path, {"a": "1"})
    with pytest.raises(MeCoError, match="a run is still going in this folder"):
        begin(tmp_path, {})
    # Nodes share a folder.
    other = begin(tmp_path, {}, "node1")
    assert (first.folder.name, other.folder.name) == ("001", "001-node1")
    assert lock_of(first.log).exists() and lock_of(other.log) != lock_of(first.log)
    assert first.lock is not None and other.lock is not None
    os.close(first.lock)
    second = begin(tmp_path, {"a": "2"})
    assert second.folder.name == "002" and (first.folder / "a").read_text() == "1"
    assert second.lock is not None
    os.close(second.lock)
    os.close(other.lock)
    (tmp_path / "file").write_text("")
    with pytest.raises(MeCoError, match="cannot be written"):
        begin(tmp_path / "file", {})


def test_slurm_gets_one_launcher_on_each_node(run_file: Path) -> None:
    run = read_run(
        run_file,
        ["launch={nnodes: 2, nproc-per-node: 8, slurm: {partition: gpu, exclusive: true}}"],
    )
    text = batch_script(run.launch, "tiny", run.folder, Path("a.log"), {"A": "b c"}, run.flags())
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    for line in ("#SBATCH --nodes=2", "#SBATCH --partition=gpu", "#SBATCH --exclusive"):
        assert f"\n{line}\n" in text
    assert "export A='b c'\n" in text
    inner = shlex.split(shlex.split(text[text.index("exec srun") :])[-1].replace("\\\n", " "))
    assert inner[inner.index("--node-rank") + 1] == "$SLURM_NODEID"
    assert inner[inner.index("--nproc-per-node") + 1] == "8"
    assert inner[inner.index("--data-path") + 1] == run.value("data-path")


def test_the_schema_is_megatrons_parser() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_meco.run.read_flags"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == schema_text(), "python -m megatron_meco.run.read_flags > .../schema.json"


def test_the_schema_describes_run_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--schema"]) == 0
    text = capsys.readouterr().out
    assert text == schema_text()
    schema = json.loads(text)
    keys = {key.text for key, _ in parse(RUN, "run.yaml").entries}
    assert keys <= schema["properties"].keys()
    assert schema["definitions"]["launch"]["properties"].keys() == {
        *("nnodes", "nproc-per-node", "node-rank", "master-addr", "master-port", "rdzv-backend"),
        *("rdzv-endpoint", "rdzv-id", "max-restarts", "script", "env", "slurm", "srun"),
    }
    assert all(flag.schema() == schema["properties"][key] for key, flag in flag_table().items())
