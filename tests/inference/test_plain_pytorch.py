"""The example without Megatron's trainer: its losses are Megatron's, step by step."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from inference.synthetic import FFN, GROUPS, HEAD_DIM, HEADS, HIDDEN, LAYERS
from runs import ROOT, SEQ_LENGTH, train

from megatron_meco.inference.import_hf import import_hf

STEPS, BATCH, SEED, RATE = 6, 4, 7, 1e-2


@pytest.mark.distributed
def test_the_example_and_megatron_have_the_same_losses_from_the_same_weights(
    corpus: str, tokenizer_folder: Path, exported: Path, tmp_path: Path
) -> None:
    """Six AdamW steps with clipping, the last of them in the cooldown."""
    import_hf(exported, tmp_path / "imported")
    flags = f"""
        --meco --num-layers {LAYERS} --hidden-size {HIDDEN} --ffn-hidden-size {FFN}
        --num-attention-heads {HEADS} --num-query-groups {GROUPS} --kv-channels {HEAD_DIM}
        --norm-epsilon 1e-6 --rotary-base 500000 --load {tmp_path / "imported"} --finetune
        --train-iters {STEPS} --global-batch-size {BATCH} --seed {SEED} --split 1,0,0
        --eval-iters 0 --lr {RATE} --min-lr {RATE} --lr-decay-style constant --weight-decay 0
        --calculate-per-token-loss --make-vocab-size-divisible-by 1
    """
    theirs = train(corpus, tokenizer_folder, *flags.split())
    assert theirs.status == 0, theirs.log[-3000:]
    sizes = f"--steps {STEPS} --batch {BATCH} --length {SEQ_LENGTH} --seed {SEED} --lr {RATE}"
    script = str(ROOT / "examples/plain_pytorch.py")
    where = [corpus, str(tokenizer_folder), str(exported)]
    ours = subprocess.run(
        [sys.executable, "-W", "ignore", script, *where, *sizes.split()],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ours.returncode == 0, ours.stderr[-3000:]
    assert "cooldown (switch at sample 20 of 24)" in ours.stdout
    losses = dict(re.findall(r"step (\d+) loss (\S+)", ours.stdout))
    assert len(losses) == len(theirs.losses) == STEPS
    # Megatron logs the mean of the first two steps after a load at the second.
    mean = (float(losses["1"]) + float(losses["2"])) / 2
    assert float(theirs.losses.pop(2)) == pytest.approx(mean, rel=1e-5)
    for step, loss in theirs.losses.items():
        # Megatron prints seven digits.
        assert float(losses[str(step)]) == pytest.approx(float(loss), rel=1e-5), step
    assert float(losses["1"]) - float(losses["6"]) > 0.1, "nothing was trained"
