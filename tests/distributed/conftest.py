"""One set of initial weights for all layouts, and the one-rank run to compare them with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Result, train

# Four layers, so that four pipeline stages (or two of two chunks) have one each.
BASE = "--meco --meco-cooldown-fraction 0.34 --num-layers 4 --eval-interval 3 --train-iters 6"
# Packs of several hosts, so that the views of evaluation can be compared.
BASE += " --split 70,30,0 --seq-length 256 --max-position-embeddings 256"

Train = Callable[..., Result]


def vocabulary(flags: str) -> str:
    """Megatron pads the vocabulary by the tensor-parallel size; here always to 512."""
    tensor_parallel = 2 if "--tensor-model-parallel-size 2" in flags else 1
    return f"--make-vocab-size-divisible-by {256 // tensor_parallel}"


@pytest.fixture(scope="session")
def weights(corpus: str, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to start from: with one seed, layouts differ in their initial weights."""
    folder = tmp_path_factory.mktemp("weights")
    flags = [
        *BASE.split(),
        *vocabulary("").split(),
        "--train-iters",
        "1",
        "--save-interval",
        "1",
        "--save",
        str(folder),
    ]
    result = train(corpus, tokenizer_folder, *flags, "--data-cache-path", f"{folder}/cache")
    assert result.status == 0, result.log[-3000:]
    return folder


@pytest.fixture(scope="session")
def run_from_weights(
    corpus: str, tokenizer_folder: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Train:
    """Six iterations from the common weights: `run(flags, ranks)`."""
    cache = tmp_path_factory.mktemp("cache")

    def run(flags: str, ranks: int) -> Result:
        start = f"--load {weights} --finetune --no-load-optim --no-load-rng"
        everything = f"{BASE} {start} --data-cache-path {cache} {vocabulary(flags)} {flags}"
        result = train(corpus, tokenizer_folder, *everything.split(), ranks=ranks)
        assert result.status == 0, result.log[-4000:]
        assert len(result.losses) == 6
        return result

    return run


@pytest.fixture(scope="session")
def one_rank(run_from_weights: Train) -> Result:
    """Every trained token weighs the same, so micro-batches may be of any size."""
    return run_from_weights("--calculate-per-token-loss", 1)
