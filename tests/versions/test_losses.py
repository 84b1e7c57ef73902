"""Training from one checkpoint gives the losses that are written down, under every Megatron."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from inference.synthetic import FFN, GROUPS, HEAD_DIM, HEADS, HIDDEN, LAYERS
from runs import train

from megatron_meco.inference.import_hf import import_hf

EXPECTED = json.loads(Path(__file__).with_name("expected.json").read_text())["losses"]


@pytest.mark.distributed
def test_losses_from_one_checkpoint(
    corpus: str, tokenizer_folder: Path, exported: Path, tmp_path: Path
) -> None:
    """Eight steps on two ranks, the switch and validation among them; losses to five digits."""
    import_hf(exported, tmp_path / "imported")
    flags = f"""
        --meco --meco-cooldown-fraction 0.25 --num-layers {LAYERS} --hidden-size {HIDDEN}
        --ffn-hidden-size {FFN} --num-attention-heads {HEADS} --num-query-groups {GROUPS}
        --kv-channels {HEAD_DIM} --norm-epsilon 1e-6 --rotary-base 500000 --train-iters 8
        --load {tmp_path / "imported"} --finetune --eval-interval 8 --tensor-model-parallel-size 2
    """
    found = train(corpus, tokenizer_folder, *flags.split(), ranks=2)
    assert found.status == 0, found.log[-3000:]
    samples = {str(step): list(values) for step, values in found.samples.items()}
    assert samples == EXPECTED["samples"]
    losses = {str(step): float(loss) for step, loss in found.losses.items()}
    assert losses == {
        step: pytest.approx(loss, rel=1e-5) for step, loss in EXPECTED["training"].items()
    }
    validation = {name: float(found.validation[8][name]) for name in EXPECTED["validation"]}
    assert validation == {
        name: pytest.approx(loss, rel=1e-5) for name, loss in EXPECTED["validation"].items()
    }
