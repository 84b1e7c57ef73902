"""Kinds of models inside the real trainer, on one CPU rank: they train, switch and evaluate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from runs import train

RUN = "--meco --meco-cooldown-fraction 0.5 --train-iters 6 --eval-interval 6 --lr 3e-2"
KINDS = {
    "experts": (
        "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 "
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
        "--moe-shared-expert-intermediate-size 32 --micro-batch-size 2"
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_trains_and_switches(kind: str, corpus: str, tokenizer_folder: Path) -> None:
    result = train(corpus, tokenizer_folder, *RUN.split(), *KINDS[kind].split())
    assert result.status == 0, result.log[-3000:]
    losses = [float(loss) for loss in result.losses.values()]
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))
    assert losses[0] - losses[-1] > 0.5
    shares = [float(share) for share, _ in result.samples.values()]
    assert [share > 0 for share in shares] == [True] * 3 + [False] * 3
    (views,) = result.validation.values()
    assert math.isfinite(float(views["lm loss conditioned"]))
