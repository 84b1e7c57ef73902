"""Kinds of models inside the real trainer, on one CPU rank: they train, switch and evaluate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from runs import command, launch, train

RUN = "--meco --meco-cooldown-fraction 0.5 --train-iters 6 --eval-interval 6 --lr 3e-2"
GROUPS = "--group-query-attention", "--num-query-groups 2"
# What is added to the Llama of `runs`, and what is taken away.
KINDS = {
    "experts": (
        "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 "
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
        "--moe-shared-expert-intermediate-size 32 --micro-batch-size 2",
        (),
    ),
    "latent attention, experts, further heads, as DeepSeek": (
        "--multi-latent-attention --kv-lora-rank 16 --q-lora-rank 16 --qk-head-dim 8 "
        "--qk-pos-emb-head-dim 4 --v-head-dim 8 --rope-type yarn --num-experts 4 "
        "--moe-router-topk 2 --moe-layer-freq [0,1] --mtp-num-layers 1 --micro-batch-size 2",
        GROUPS,
    ),
    "sliding window, yarn, norms of queries and keys, tied embeddings": (
        "--window-size 16,0 --window-attn-skip-freq 2 --position-embedding-type yarn "
        "--yarn-original-max-position-embeddings 32 --rotary-scaling-factor 4 --qk-layernorm "
        "--squared-relu --normalization LayerNorm",
        ("--swiglu", "--untie-embeddings-and-output-weights"),
    ),
    "further heads": ("--mtp-num-layers 2 --mtp-loss-scaling-factor 0.3", ()),
}


# These two hold most of what the others try one by one.
FAST = (
    "latent attention, experts, further heads, as DeepSeek",
    "sliding window, yarn, norms of queries and keys, tied embeddings",
)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind",
    [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_a_kind_trains_and_switches(kind: str, corpus: str, tokenizer_folder: Path) -> None:
    added, taken = KINDS[kind]
    line = " ".join(command(corpus, tokenizer_folder))
    for flag in taken:
        assert f" {flag} " in line
        line = line.replace(f" {flag} ", " ")
    result = launch([*line.split(), *RUN.split(), *added.split()], 1)
    assert result.status == 0, result.log[-3000:]
    losses = [float(loss) for loss in result.losses.values()]
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))
    assert losses[0] - losses[-1] > 0.5
    shares = [float(share) for share, _ in result.samples.values()]
    assert [share > 0 for share in shares] == [True] * 3 + [False] * 3
    (views,) = result.validation.values()
    assert math.isfinite(float(views["lm loss conditioned"]))


@pytest.mark.distributed
def test_flags_that_make_no_model_are_one_error(corpus: str, tokenizer_folder: Path) -> None:
    """Here --swiglu and --squared-relu, which Megatron finds when it builds the model."""
    result = train(corpus, tokenizer_folder, *RUN.split(), "--squared-relu")
    assert result.status == 1
    assert "meco: error: argument_utils.py, line" in result.log
    assert "[rank0]: Traceback" not in result.log
