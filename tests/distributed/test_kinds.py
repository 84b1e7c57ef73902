"""Kinds of models over Gloo: the same samples and losses in all layouts, padding among them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed.conftest import BASE, vocabulary
from distributed.test_layouts import TOLERANCE, difference
from runs import Result, train

MODELS = {
    # All that counts tokens: two auxiliary losses, the load of experts, their bias.
    "experts": """
        --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-aux-loss-coeff 0.02
        --moe-z-loss-coeff 0.001 --moe-router-score-function sigmoid
        --moe-router-enable-expert-bias --moe-shared-expert-intermediate-size 32
        --meco-pad-documents-to 8
    """,
    "further heads": "--mtp-num-layers 2 --mtp-loss-scaling-factor 0.3",
}
# What is logged beside the loss, where the last stage logs it.
LOGGED = {
    "experts": r"load_balancing_loss: (\S+) \| z_loss: (\S+) ",
    "further heads": r"mtp_1 loss: (\S+) \| mtp_2 loss: (\S+) ",
}
ALL_TO_ALL = "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"
TENSOR_2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PIPELINE_2 = "--pipeline-model-parallel-size 2"
LAYOUTS = [
    ("experts", 2, ALL_TO_ALL),
    ("experts", 2, "--expert-model-parallel-size 2"),
    ("experts", 2, PIPELINE_2),
    ("experts", 2, TENSOR_2),
    ("experts", 4, f"{TENSOR_2} {PIPELINE_2} {ALL_TO_ALL} --expert-tensor-parallel-size 1"),
    ("further heads", 2, PIPELINE_2),
    ("further heads", 2, TENSOR_2),
]

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def run(corpus: str, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six iterations of a kind from common weights: `run(kind, flags, ranks)`, each made once."""
    folder = tmp_path_factory.mktemp("kinds")
    made: dict[tuple[str, str, int], Result] = {}

    def start(kind: str, flags: str, ranks: int) -> Result:
        line = f"{BASE} --calculate-per-token-loss --data-cache-path {folder}/cache "
        line += f"{MODELS[kind]} {vocabulary(flags)} {flags}"
        result = train(corpus, tokenizer_folder, *line.split(), ranks=ranks)
        assert result.status == 0, result.log[-4000:]
        return result

    def from_weights(kind: str, flags: str, ranks: int) -> Result:
        weights = folder / kind.replace(" ", "-")
        if not weights.exists():
            start(kind, f"--train-iters 1 --save-interval 1 --save {weights}", 1)
        if (kind, flags, ranks) not in made:
            load = f"--load {weights} --finetune --no-load-optim --no-load-rng"
            made[kind, flags, ranks] = start(kind, f"{load} {flags}", ranks)
        return made[kind, flags, ranks]

    return from_weights


def logged(kind: str, result: Result) -> list[float]:
    found = re.findall(LOGGED[kind], result.log)
    assert len(found) == 6
    return [float(value) for values in found for value in values]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks", "flags"), LAYOUTS)
def test_a_kind_in_a_layout_gives_the_losses_of_one_rank(
    kind: str, ranks: int, flags: str, run: Run
) -> None:
    result, reference = run(kind, flags, ranks), run(kind, "", 1)
    found = difference(result, reference)
    print(f"largest difference: {found:.1e}")  # shown by -rP
    assert len(result.samples) == 6
    assert result.samples == reference.samples
    assert found < TOLERANCE
    if kind == "further heads" or "pipeline" not in flags:
        assert logged(kind, result) == pytest.approx(logged(kind, reference), rel=1e-3)
