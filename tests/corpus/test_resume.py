"""`prepare` under SIGKILL gives the same bytes as without it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TASKS = 40

# The whole command but for Megatron's import, which would take longer than everything else.
SCRIPT = """
import sys
from pathlib import Path
from megatron_meco.corpus import encoder, input_files, prepare
from megatron_meco.corpus.tokenizer import HuggingFaceEncoder

def build(tokenizer_type, model, *_):
    serialized = Path(model, "tokenizer.json").read_text()
    chosen = encoder.choose_encoder(HuggingFaceEncoder(serialized), [])
    return {**chosen, "eod": 1, "eod_text": "", "vocab_size": 300, "dtype": "uint16"}

if __name__ == "__main__":
    source, prefix, model = sys.argv[1:]
    prepare.build_encoder = build
    input_files._MIN_TASK_BYTES = input_files._MAX_TASK_BYTES = Path(source).stat().st_size // 40
    prepare.prepare(prepare.PrepareConfig(
        inputs=(source,), output=Path(prefix), workers=2,
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model,
    ))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "prepare_here.py"
    path.write_text(SCRIPT)
    return path


def _source(tmp_path: Path) -> Path:
    path = tmp_path / "pages.jsonl"
    with path.open("w") as file:
        for i in range(20_000):
            file.write(json.dumps({"text": f"page {i} " * (1 + i % 60), "url": f"u{i}"}) + "\n")
            if i % 1000 == 7:
                file.write("{broken\n")
    return path


def _start(script: Path, source: Path, prefix: Path, model: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(script), str(source), str(prefix), str(model)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def _finished(prefix: Path) -> int:
    return len(list(prefix.parent.glob(f"{prefix.name}.unfinished/task-?????.json")))


def _content(prefix: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(prefix.parent.iterdir())}


def test_killed_again_and_again_and_of_a_lost_worker(
    script: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    source = _source(tmp_path)
    whole, killed = tmp_path / "whole" / "corpus", tmp_path / "killed" / "corpus"
    undisturbed = _start(script, source, whole, tokenizer_folder)
    assert undisturbed.wait(120) == 0, undisturbed.communicate()[1]

    dice = random.Random(0)
    for target in (3, 14, 24):
        process = _start(script, source, killed, tokenizer_folder)
        while _finished(killed) < target and process.poll() is None:
            time.sleep(0.005)
        time.sleep(dice.random() * 0.05)
        if target == 14:
            # One worker alone: the rest has to notice.
            _kill_one_worker(process.pid)
            told = process.communicate(timeout=60)[1]
            assert process.returncode == 1
            assert "a worker process died" in told and "the same command continues" in told
        else:
            # The parent alone: its workers have to end as well.
            process.kill()
            process.communicate(timeout=60)
            _wait_for_end_of_group(process.pid)
        assert not killed.with_name("corpus.idx").exists()
        assert target <= _finished(killed) < TASKS + 2
    last = _start(script, source, killed, tokenizer_folder)
    told = last.communicate(timeout=120)[1]
    assert last.returncode == 0 and "going on: 2" in told, told
    assert _content(killed) == _content(whole)


def _kill_one_worker(parent: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for name in os.listdir("/proc"):
            try:
                status = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
                command = Path("/proc", name, "cmdline").read_text()
            except OSError:
                continue
            if status[1] == str(parent) and "spawn_main" in command:
                os.kill(int(name), signal.SIGKILL)
                return
    raise AssertionError("no worker found")


def _wait_for_end_of_group(group: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError("workers outlive their parent")
