"""`make gpu-check` on a host without a GPU: its refusals, a rehearsal, and its arithmetic."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT

FOLDER = ROOT / "benchmarks" / "gpu"


@pytest.fixture(autouse=True)
def _scripts_import_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def module(name: str) -> Any:
    return importlib.import_module(name)


def check(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(FOLDER / "check.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=280,
    )


def launcher(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(FOLDER / "run.sh"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables},
        timeout=280,
    )


def test_without_a_gpu_one_line_says_so() -> None:
    done = launcher()
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "error: no GPU that torch can see" in done.stderr
    assert "--rehearse" in done.stderr
    inside = check(CUDA_VISIBLE_DEVICES="")
    assert inside.returncode == 1
    assert [line for line in inside.stderr.splitlines() if line.startswith("gpu-check: error")]


def test_without_torch_or_wheels_the_remedy_is_named(tmp_path: Path) -> None:
    # A Python with a torch that is nothing more, and one that is no Python at all.
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: True)")
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.base_prefix}/bin/python3" -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    bare = {"PYTHON": str(tmp_path / "python"), "PYTHONPATH": str(tmp_path)}
    done = launcher(WHEELS=str(tmp_path / "none"), **bare)
    assert done.returncode == 1
    assert "lacks: megatron.core" in done.stderr
    assert f"WHEELS={tmp_path}/none" in done.stderr


def test_a_rehearsal_trains_all_lanes_and_is_not_run_twice(tmp_path: Path) -> None:
    folders = ("--output", tmp_path / "out", "--state", tmp_path / "state")
    options = ("--rehearse", "--stages", "speed-600m", *folders)
    unknown = check("--rehearse", "--stages", "speed-7b", *folders)
    assert unknown.returncode == 1
    assert "--stages speed-7b: unknown here" in unknown.stderr

    done = check(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "out").glob("*.json")
    results = json.loads(path.read_text())
    assert results["rehearsal"] is True
    assert results["machine"]["commit"]
    lanes = results["stages"]["speed-600m"]["result"]["lanes"]
    assert list(lanes) == module("check").ALL_LANES
    for name, lane in lanes.items():
        shown = lane["prefix_share"] > 0
        assert shown == (name in ("conditioned", "split", "best-fit")), name
        assert lane["step_ms"] > 0
        assert 0 < lane["trained_tokens_per_second"] < lane["tokens_per_second"]
    for name in ("one-document", "no-documents"):
        assert lanes[name]["documents_per_sequence"] == 1
    assert lanes["baseline"]["documents_per_sequence"] > 2
    table = path.with_suffix(".md").read_text()
    assert "no figure below says anything" in table
    assert "| conditioned / cooldown |" in table

    begun = time.monotonic()
    again = check(*options)
    assert "speed-600m: done before" in again.stdout
    assert time.monotonic() - begun < 60
    late = check("--rehearse", "--minutes", "0", "--stages", "speed-600m", "speed-1.6b", *folders)
    assert late.returncode == module("check").LEFT_OVER
    assert "left over: speed-1.6b" in late.stdout


def test_a_stage_that_fails_is_told_and_not_kept(tmp_path: Path) -> None:
    folders = ("--output", tmp_path / "out", "--state", tmp_path / "state")
    # Of a launcher's own checks, the first that a variable of the environment can break.
    done = check("--rehearse", "--stages", "speed-600m", *folders, MECO_LR="fast")
    assert done.returncode == 1
    assert "speed-600m: failed: training ended with status 1" in done.stderr
    assert "MECO_LR=fast: not a number" in done.stderr
    assert not list((tmp_path / "state").rglob("speed-600m.json"))


def test_a_stage_leaves_no_rank_behind(tmp_path: Path) -> None:
    """torchrun puts its ranks into sessions of their own."""
    stages = module("check")
    mark, script = tmp_path / "pid", tmp_path / "rank.py"
    script.write_text(
        f"import os, pathlib, time\npathlib.Path({str(mark)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command += ["--master-port", str(stages.free_port()), str(script)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not mark.exists() or not mark.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert os.getsid(int(mark.read_text())) != os.getsid(process.pid)
    stages.end_group(process)
    assert not Path(f"/proc/{mark.read_text()}").exists()


def test_a_stage_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(module("check").StageFailed, match="not done after 1 seconds"):
        module("check").run_process(["sleep", "600"], tmp_path / "log", 1)


class TestFlops:
    shape: dict[str, int] = {  # noqa: RUF012
        "num_layers": 3,
        "hidden_size": 32,
        "ffn_hidden_size": 80,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 8,
        "vocab_size": 50,
    }

    def counted(self, lengths: list[int]) -> int:
        """One multiplication and one addition at a time, for the forward pass."""
        s, flops = self.shape, 0
        for length in lengths:
            for position in range(length):
                for _ in range(s["num_layers"]):
                    heads = s["num_attention_heads"] + 2 * s["num_query_groups"]
                    flops += 2 * s["hidden_size"] * heads * s["head_dim"]  # query, key, value
                    # Scores with itself and all before, and the sum of their values.
                    for _ in range(position + 1):
                        flops += 2 * (2 * s["num_attention_heads"] * s["head_dim"])
                    flops += 2 * s["num_attention_heads"] * s["head_dim"] * s["hidden_size"]
                    flops += 3 * (2 * s["hidden_size"] * s["ffn_hidden_size"])  # gate, up, down
                flops += 2 * s["hidden_size"] * s["vocab_size"]
        return flops

    def test_they_equal_a_count_token_by_token(self) -> None:
        flops = module("flops")
        draw = random.Random(1)
        for _ in range(5):
            lengths = [draw.randrange(1, 30) for _ in range(draw.randrange(1, 8))]
            found = flops.training_flops(
                flops.ModelShape(**self.shape), sum(lengths), flops.num_pairs(lengths)
            )
            assert found == 3 * self.counted(lengths)

    @pytest.mark.parametrize(
        ("size", "parameters"),
        # The paper's table 7: layers, width, MLP, heads, groups, size of a head; weights of the
        # body and of the output layer.
        [((24, 1024, 4096, 16, 16, 64), 403e6 + 131e6), ((24, 2048, 5504, 16, 8, 128), 1.377e9)],
    )
    def test_the_papers_models_have_their_weights(
        self, size: tuple[int, ...], parameters: float
    ) -> None:
        shape = dict(zip(self.shape, [*size, 128_256], strict=True))
        weights = module("flops").ModelShape(**shape).matrix_weights
        assert weights == pytest.approx(parameters, rel=0.01)

    def test_peaks_are_of_the_right_chip(self) -> None:
        peak = module("flops").peak_flops
        assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == 989.4e12
        assert peak("NVIDIA H100 PCIe") == 756e12
        assert peak("NVIDIA A100-SXM4-80GB") == 312e12
        assert peak("Some other card") is None


class FakeLane:
    """Samples that say where they are from."""

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, idx: int) -> tuple[str, int]:
        return self.name, idx


def test_lanes_take_turns_and_each_shows_its_own_samples_in_order() -> None:
    alternating = module("alternating")
    rounds, batch_size, names = 4, 2, ["a", "b", "c"]
    lanes = {name: FakeLane(name, rounds * batch_size) for name in names}
    dataset = alternating.AlternatingDataset(lanes, batch_size)
    assert len(dataset) == rounds * batch_size * 3
    seen = [dataset[i] for i in range(len(dataset))]
    for name in names:
        assert [place for lane, place in seen if lane == name] == list(range(rounds * batch_size))
    for step, batch in enumerate(itertools.batched(seen, batch_size)):
        assert {lane for lane, _ in batch} == {dataset.lane_of(step)}
    orders = [[dataset.lane_of(3 * r + i) for i in range(3)] for r in range(rounds)]
    assert all(sorted(order) == names for order in orders)
    assert [order[0] for order in orders] == ["a", "b", "c", "a"]


def test_ratios_are_taken_within_a_round_and_the_warm_up_is_left_out() -> None:
    report = module("report")
    steps = []
    for number in range(report.WARM_UP + 4):
        # A machine that becomes slower and slower, and one lane that takes 2 % longer.
        speed = 1000 if number < report.WARM_UP else 100 * 2**number
        for lane, share in (("conditioned", 1.02), ("cooldown", 1.0)):
            steps.append(
                {
                    "lane": lane,
                    "ms": speed * share,
                    "loader_ms": [1.0, 3.0],
                    "tokens": 100,
                    "trained_tokens": 80,
                    "prefix_tokens": 10 if lane == "conditioned" else 0,
                    "documents": 6,
                    "pairs": 900,
                }
            )
    result = {"shape": TestFlops.shape, "steps": steps}
    found = report.summarise(result, "NVIDIA H100 80GB HBM3")
    (ratio,) = found["ratios"]
    assert ratio["time"] == pytest.approx(1.02)
    assert ratio["met"] is False
    assert found["rounds"] == 4
    lane = found["lanes"]["conditioned"]
    assert lane["prefix_share"] == 0.1
    assert lane["documents_per_sequence"] == 3
    assert lane["loader_wait_ms_longest"] == 3
    flops = module("flops")
    per_step = flops.training_flops(flops.ModelShape(**TestFlops.shape), 100, 900)
    # Of four steps, each half as fast as the one before, the median is between the middle two.
    middle = (1 / (100 * 2**4 * 1.02) + 1 / (100 * 2**5 * 1.02)) / 2
    assert lane["flops_per_second"] == pytest.approx(1000 * per_step * middle)
    assert lane["share_of_peak"] == pytest.approx(lane["flops_per_second"] / 989.4e12)
