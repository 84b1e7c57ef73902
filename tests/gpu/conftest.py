"""Runs on the GPU and on the CPU of one host, from the same weights and samples.

With MECO_REHEARSE=1 the CPU takes the GPU's place, without Transformer Engine: that shows that the
tests themselves work, on a host without a GPU. `make gpu-check ARGS=--rehearse` does so.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import Result, command, launch, write_tokenizer
from small_corpus import write_corpus

from megatron_meco.training.kernels import try_transformer_engine

REHEARSAL = os.environ.get("MECO_REHEARSE") == "1"
ON_GPU = torch.cuda.is_available() and not REHEARSAL
LENGTH = 256

# Heads of 64: flash kernels have no smaller ones in every version.
SHAPE = f"""
    --hidden-size 256 --ffn-hidden-size 512 --seq-length {LENGTH}
    --max-position-embeddings {LENGTH} --make-vocab-size-divisible-by 512
"""
SCHEDULE = """
    --meco --meco-cooldown-fraction 0.34 --train-iters 6 --eval-interval 3 --split 70,30,0
    --calculate-per-token-loss --lr 1e-3 --min-lr 1e-4
"""
LOCAL = """
    --transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-masked-softmax-fusion
"""
ENGINE = "--transformer-impl transformer_engine"
BF16 = "--bf16"

Run = Callable[..., Result]


def engine_is_installed() -> bool:
    """Whether Transformer Engine can be used on this run's device."""
    return ON_GPU and not try_transformer_engine().reason


needs_engine = pytest.mark.skipif(
    not engine_is_installed(), reason="Transformer Engine is not installed, or there is no GPU"
)
LAYERS = [
    pytest.param(LOCAL, id="local"),
    pytest.param(ENGINE, id="transformer_engine", marks=needs_engine),
]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="there is no GPU, or this is a rehearsal")


@pytest.fixture(scope="session", autouse=True)
def _a_device() -> None:
    if not ON_GPU and not REHEARSAL:
        pytest.skip("there is no GPU (MECO_REHEARSE=1 takes the CPU in its place)")


@pytest.fixture(scope="module")
def gpu_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("gpu") / "tokenizer")


@pytest.fixture(scope="module")
def gpu_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """400 documents from three hosts, each with words of its own, without `meco prepare`."""
    draw = random.Random(5)
    bodies, urls = [], []
    for i in range(400):
        host = draw.randrange(3)
        length = min(max(3, int(draw.lognormvariate(3.5, 1))), 2000)
        bodies.append([draw.randrange(20 + 40 * host, 60 + 40 * host) for _ in range(length)])
        bodies[-1].append(1)  # EOS
        urls.append(f"https://host{host}.example.org/{i}")
    folder = tmp_path_factory.mktemp("gpu-corpus")
    return write_corpus(folder / "corpus", bodies, {"url": urls})


@pytest.fixture(scope="module")
def run(gpu_corpus: str, gpu_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run(flags, on_cpu=False)`: six steps from common weights, the switch after the fourth."""
    cache = tmp_path_factory.mktemp("cache")
    weights = tmp_path_factory.mktemp("weights")

    def start(flags: str, *, on_cpu: bool = False, script: Path | None = None) -> Result:
        options = {} if script is None else {"script": script}
        everything = f"{SHAPE} {SCHEDULE} --data-cache-path {cache} {flags}"
        variables = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu or REHEARSAL else {}
        result = launch(
            command(gpu_corpus, gpu_tokenizer, *everything.split(), **options), 1, **variables
        )
        assert result.status == 0, result.log[-4000:]
        return result

    start(
        f"--train-iters 1 --save {weights} --save-interval 1 --ckpt-format torch_dist", on_cpu=True
    )

    def from_weights(flags: str, **options: object) -> Result:
        # Layers of Transformer Engine ask for state beside the weights that local ones do not save.
        begin = f"--load {weights} --finetune --no-load-optim --no-load-rng"
        begin += " --dist-ckpt-strictness log_unexpected"
        result = start(f"{begin} {flags}", **options)
        assert len(result.losses) == 6
        return result

    return from_weights


def difference(a: Result, b: Result) -> float:
    """Largest relative difference of the training and validation losses of two runs."""
    assert set(a.losses) == set(b.losses)
    assert set(a.validation) == set(b.validation)
    pairs = [(a.losses[i], b.losses[i]) for i in a.losses]
    for step, losses in a.validation.items():
        pairs += [(losses[name], b.validation[step][name]) for name in losses]
    found = max(abs(float(x) - float(y)) / float(y) for x, y in pairs)
    print(f"largest difference: {found:.1e}")  # shown by -rP
    return found
