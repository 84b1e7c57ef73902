"""A run on the GPU against the same run on the CPU: the same samples, losses within rounding."""

from __future__ import annotations

import math

import pytest
from gpu.conftest import BF16, ENGINE, LOCAL, Run, difference, needs_engine
from runs import Result

pytestmark = pytest.mark.gpu

# Relative, of losses near 6. Float32 differs by the order of sums alone; bf16 has eight bits, and
# each device rounds in places of its own.
FLOAT32, HALF = 1e-4, 5e-3


@pytest.fixture(scope="module")
def on_cpu(run: Run) -> Result:
    return run(LOCAL, on_cpu=True)


@pytest.fixture(scope="module")
def in_half_precision(run: Run) -> Result:
    return run(f"{LOCAL} {BF16}")


def test_losses_of_the_gpu_are_those_of_the_cpu(run: Run, on_cpu: Result) -> None:
    result = run(LOCAL)
    assert result.samples == on_cpu.samples
    assert difference(result, on_cpu) < FLOAT32


def test_in_half_precision_too(in_half_precision: Result, on_cpu: Result) -> None:
    """On the GPU this is PyTorch's varlen kernel."""
    assert in_half_precision.samples == on_cpu.samples
    assert difference(in_half_precision, on_cpu) < HALF


@needs_engine
def test_transformer_engine_gives_the_losses_of_the_torch_path(
    run: Run, in_half_precision: Result
) -> None:
    result = run(f"{ENGINE} {BF16}")
    assert "attention: Transformer Engine over packed sequences (THD)" in result.log
    assert result.samples == in_half_precision.samples
    assert difference(result, in_half_precision) < HALF


@needs_engine
def test_fp8_trains(run: Run, in_half_precision: Result) -> None:
    result = run(f"{ENGINE} {BF16} --fp8-format hybrid --fp8-recipe tensorwise")
    assert result.samples == in_half_precision.samples
    assert all(math.isfinite(float(loss)) for loss in result.losses.values())
    assert difference(result, in_half_precision) < 0.05


def test_the_switch_and_the_mask_are_in_the_log(in_half_precision: Result) -> None:
    result = in_half_precision
    assert "> MeCo: switch after iteration 4" in result.log
    shares = {step: float(share) for step, (share, _) in result.samples.items()}
    assert all(shares[step] > 0 for step in (1, 2, 3, 4))
    assert all(shares[step] == 0 for step in (5, 6))
    trained = {step: float(count) for step, (_, count) in result.samples.items()}
    # Of four sequences of 256: all but BOS, prefixes, borders and padding.
    assert all(0 < count < 4 * 256 for count in trained.values())
    assert min(trained[5], trained[6]) > max(trained[step] for step in (1, 2, 3, 4))
    assert set(result.validation[3]) == {
        f"lm loss {name}"
        for name in ("conditioned", "plain", "shuffled", "shuffled minus conditioned")
    }


def test_a_baseline_of_the_same_plan_trains(run: Run) -> None:
    result = run(f"{LOCAL} {BF16} --meco-template=")
    assert {share for share, _ in result.samples.values()} == {"0.000000E+00"}
