"""Real runs for the export tests: `logits_pretrain.py` under torchrun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runs import train

SCRIPT = Path(__file__).parent / "logits_pretrain.py"
NUM_ITERATIONS = 4


@dataclass(frozen=True)
class Trained:
    """A run of Megatron's trainer, and its export."""

    corpus: str
    checkpoint: Path
    logits: Path
    model: Path


def train_with_logits(
    corpus: str, tokenizer: Path, save: Path, logits: Path, *flags: str, ranks: int = 1
) -> None:
    """Train for some iterations, save, and write the logits of the final model."""
    run = f"""
        --meco --meco-cooldown-fraction 0.5 --train-iters {NUM_ITERATIONS} --eval-interval 100
        --eval-iters 1 --kv-channels 12 --rotary-base 50000 --norm-epsilon 1e-4
        --num-layers 4 --data-cache-path {corpus}-cache --save {save} --save-interval 100
        --logits-to {logits}
    """.split()
    result = train(corpus, tokenizer, *run, *flags, ranks=ranks, script=SCRIPT)
    assert result.status == 0, result.log[-3000:]
