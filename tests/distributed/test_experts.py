"""A mixture of experts over Gloo: the same samples and losses in all layouts, with padding."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from distributed.conftest import BASE, Train, vocabulary
from distributed.test_layouts import TOLERANCE, difference
from runs import Result, train

# All that counts tokens: two auxiliary losses, the load of experts, their bias.
EXPERTS = """
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-aux-loss-coeff 0.02
    --moe-z-loss-coeff 0.001 --moe-router-score-function sigmoid --moe-router-enable-expert-bias
    --moe-shared-expert-intermediate-size 32 --calculate-per-token-loss --meco-pad-documents-to 8
"""
TENSOR_2 = "--tensor-model-parallel-size 2 --sequence-parallel"
LAYOUTS = {
    "EP 2": (2, "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"),
    "EP 2, allgather": (2, "--expert-model-parallel-size 2"),
    "PP 2": (2, "--pipeline-model-parallel-size 2"),
    "TP 2, sequence parallel": (2, TENSOR_2),
    "TP 2 x PP 2 x EP 2, sequence parallel": (
        4,
        f"{TENSOR_2} --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 1 --moe-token-dispatcher-type alltoall",
    ),
}


@pytest.fixture(scope="module")
def run(corpus: str, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Six iterations from common weights: `run(flags, ranks)`."""
    folder = tmp_path_factory.mktemp("experts")
    model = f"{BASE} {' '.join(EXPERTS.split())} --data-cache-path {folder}/cache"

    def start(flags: str, ranks: int) -> Result:
        line = f"{model} {vocabulary(flags)} {flags}"
        result = train(corpus, tokenizer_folder, *line.split(), ranks=ranks)
        assert result.status == 0, result.log[-4000:]
        return result

    start(f"--train-iters 1 --save-interval 1 --save {folder}/weights", 1)
    load = f"--load {folder}/weights --finetune --no-load-optim --no-load-rng"
    return lambda flags, ranks: start(f"{load} {flags}", ranks)


@pytest.fixture(scope="module")
def one_rank(run: Train) -> Result:
    return run("", 1)


def auxiliary(result: Result) -> list[tuple[float, float]]:
    found = re.findall(r"load_balancing_loss: (\S+) \| z_loss: (\S+) ", result.log)
    assert len(found) == 6
    return [(float(balance), float(size)) for balance, size in found]


def check(name: str, run: Train, reference: Result) -> None:
    ranks, flags = LAYOUTS[name]
    result = run(flags, ranks)
    found = difference(result, reference)
    print(f"largest difference: {found:.1e}")  # shown by -rP
    assert result.samples == reference.samples
    assert len(result.samples) == 6
    assert found < TOLERANCE
    if "pipeline" not in flags:
        for own, other in zip(auxiliary(result), auxiliary(reference), strict=True):
            assert own == pytest.approx(other, rel=1e-3)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_in_a_layout_give_the_losses_of_one_rank(
    name: str, run: Train, one_rank: Result
) -> None:
    check(name, run, one_rank)
