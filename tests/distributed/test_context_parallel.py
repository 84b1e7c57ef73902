"""Context parallelism against one rank with the same alignment: the same samples and losses."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed.conftest import Train
from distributed.test_layouts import check_layout
from runs import Result, train

# Enough for every layout here: twice four ranks, or twice two with two of sequence parallelism.
ALIGNED = "--meco-pad-documents-to 8 --calculate-per-token-loss"
# The log shows seven digits.
TOLERANCE = 1e-6

FAST = {
    "CP 2, micro-batch 2": (2, "--context-parallel-size 2 --micro-batch-size 2"),
    "CP 2 x TP 2, SP": (
        4,
        "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
    ),
}
SLOW = {
    "CP 2": (2, "--context-parallel-size 2 --cp-comm-type all_gather"),
    "CP 4": (4, "--context-parallel-size 4"),
    "CP 2 x PP 2": (4, "--context-parallel-size 2 --pipeline-model-parallel-size 2"),
    "CP 2 x PP 2, VPP 2, micro-batch 2": (
        4,
        "--context-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1 --micro-batch-size 2",
    ),
    "CP 2 x DP 2, distributed optimizer": (
        4,
        "--context-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather",
    ),
    "CP 2, best-fit": (2, "--context-parallel-size 2 --meco-packing best-fit"),
    # `split` has fewer documents in a pack: a longer evaluation finds some to compare.
    "CP 2, split": (2, "--context-parallel-size 2 --meco-packing split --eval-iters 4"),
}


@pytest.fixture(scope="session")
def aligned_rank(run_from_weights: Train) -> Result:
    return run_from_weights(ALIGNED, 1)


@pytest.mark.distributed
@pytest.mark.parametrize("name", FAST)
def test_context_parallel_ranks_give_the_losses_of_one(
    name: str, run_from_weights: Train, aligned_rank: Result
) -> None:
    check_layout(run_from_weights, ALIGNED, FAST[name], aligned_rank)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_layouts(name: str, run_from_weights: Train, aligned_rank: Result) -> None:
    check_layout(run_from_weights, ALIGNED, SLOW[name], aligned_rank)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_moves_from_one_rank_to_two_and_to_four(
    corpus: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """The same samples and losses all along; without the alignment the restart is refused."""
    flags = "--meco --meco-cooldown-fraction 0.3 --save-interval 3 --eval-interval 100"
    flags += " --calculate-per-token-loss"

    def run(name: str, ranks: int, extra: str) -> Result:
        own = f"--load {tmp_path}/{name} --save {tmp_path}/{name} --data-cache-path {tmp_path}/c"
        context = f"--context-parallel-size {ranks}"
        return train(
            corpus, tokenizer_folder, *f"{flags} {context} {own} {extra}".split(), ranks=ranks
        )

    aligned = "--meco-pad-documents-to 8"
    alone = run("alone", 1, aligned)
    moved = [
        run("moved", 1, f"{aligned} --exit-interval 3"),
        run("moved", 2, f"{aligned} --exit-interval 6"),
    ]
    refused = run("moved", 2, "")
    assert refused.status == 1
    assert "pad_documents_to: 8 -> 4" in refused.log
    moved.append(run("moved", 4, aligned))
    for result in (alone, *moved):
        assert result.status == 0, result.log[-3000:]
    samples = {i: s for part in moved for i, s in part.samples.items()}
    # Megatron logs the second step after a resume as the mean of two; 1, 4, 7 and 10 are exact.
    assert [samples[i] for i in (1, 4, 7, 10)] == [alone.samples[i] for i in (1, 4, 7, 10)]
    losses = {i: float(x) for part in moved for i, x in part.losses.items()}
    for i in (1, 4, 7, 10):
        assert losses[i] == pytest.approx(float(alone.losses[i]), rel=TOLERANCE)
