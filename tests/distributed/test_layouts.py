"""Parallel layouts against one rank: the same samples at each step, the same losses."""

from __future__ import annotations

import math

import pytest
from distributed.conftest import Train
from runs import ROOT, Result

# Float32 sums in another order; the log shows seven digits of losses near 5.
TOLERANCE = 3e-6

# Names and ranks as in the table of docs/parallelism.md.
FAST = {
    "TP 2 x PP 2, sequence parallel, micro-batch 2": (
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel "
        "--micro-batch-size 2",
    ),
    "DP 2, distributed optimizer, both overlaps": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
}
SLOW = {
    "TP 2": (2, "--tensor-model-parallel-size 2"),
    "TP 2, sequence parallel": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP 2": (2, "--pipeline-model-parallel-size 2"),
    "PP 2, micro-batch 4": (2, "--pipeline-model-parallel-size 2 --micro-batch-size 4"),
    "PP 2, micro-batch 2 in evaluation": (
        2,
        "--pipeline-model-parallel-size 2 --eval-micro-batch-size 2",
    ),
    "PP 2, VPP 2": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "PP 2, VPP 2, micro-batch 2": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--micro-batch-size 2",
    ),
    "PP 4": (4, "--pipeline-model-parallel-size 4"),
    "TP 2 x PP 2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "TP 2 x DP 2, sequence parallel, distributed optimizer": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer",
    ),
    "PP 2 x DP 2, distributed optimizer": (
        4,
        "--pipeline-model-parallel-size 2 --use-distributed-optimizer",
    ),
    "DP 2": (2, ""),
    "DP 2, micro-batch 2": (2, "--micro-batch-size 2"),
    "DP 4": (4, ""),
    "one rank, micro-batch 2": (1, "--micro-batch-size 2"),
    "one rank, micro-batch 4": (1, "--micro-batch-size 4"),
    "DP 2, `best-fit`": (2, "--meco-packing best-fit"),
    "TP 2 x PP 2, `split`, `--meco-plain-fraction 0.5`": (
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --meco-packing split "
        "--meco-plain-fraction 0.5",
    ),
    "DP 2, another template": (2, "--meco-template URL:{url.domain}"),
}


def test_every_layout_of_the_documentation_is_here() -> None:
    text = (ROOT / "docs" / "parallelism.md").read_text()
    table = text.split("| Layout | Ranks |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")] for row in table.splitlines()[2:]]
    documented = {name: int(ranks) for _, name, ranks, *_ in rows}
    assert documented == {name: ranks for name, (ranks, _) in (FAST | SLOW).items()}
    assert len(rows) == len(documented) >= 21


COMMON = "--calculate-per-token-loss"


def difference(a: Result, b: Result) -> float:
    """Largest difference of a training or validation loss, relative."""
    errors = [relative_error(a.losses[i], b.losses[i], b.losses[i]) for i in a.losses]
    for step, losses in a.validation.items():
        others = b.validation[step]
        assert losses.keys() == others.keys()
        for name, loss in losses.items():
            # A difference of two losses has their error.
            scale = others["lm loss plain"] if "minus" in name else others[name]
            errors.append(relative_error(loss, others[name], scale))
    assert len(a.validation) == 2
    assert all(math.isfinite(error) for error in errors)
    return max(errors)


def relative_error(a: str, b: str, scale: str) -> float:
    return abs(float(a) - float(b)) / float(scale)


def check(run: Result, reference: Result) -> None:
    found = difference(run, reference)
    print(f"largest difference: {found:.1e}")  # shown by -rP
    assert len(reference.samples) == 6
    assert run.samples == reference.samples
    assert found < TOLERANCE


def check_layout(train: Train, common: str, layout: tuple[int, str], one_rank: Result) -> None:
    """Run a layout and compare it with one rank that makes the same samples."""
    ranks, flags = layout
    reference = one_rank
    meco = flags[flags.index("--meco-") :] if "--meco-" in flags else ""
    if meco:
        reference = train(f"{common} {meco}", 1)
        assert reference.losses != one_rank.losses
    check(train(f"{common} {flags}", ranks), reference)


@pytest.mark.distributed
@pytest.mark.parametrize("name", FAST)
def test_a_layout_gives_the_losses_of_one_rank(
    name: str, run_from_weights: Train, one_rank: Result
) -> None:
    check_layout(run_from_weights, COMMON, FAST[name], one_rank)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_layouts(name: str, run_from_weights: Train, one_rank: Result) -> None:
    check_layout(run_from_weights, COMMON, SLOW[name], one_rank)


@pytest.mark.distributed
@pytest.mark.slow
def test_without_per_token_loss_micro_batches_weigh_differently(run_from_weights: Train) -> None:
    """What the flag is for: micro-batches hold different numbers of trained tokens."""
    one, four = (run_from_weights(f"--micro-batch-size {n}", 1) for n in (1, 4))
    assert one.samples == four.samples
    assert difference(one, four) > 10 * TOLERANCE
