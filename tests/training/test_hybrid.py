"""The hybrid example inside the real trainer, on two tensor-parallel CPU ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import ROOT, command, launch, train

SCRIPT = Path(__file__).parent / "hybrid_pretrain.py"
PATTERN = "M*-M*-"
FLAGS = f"""
    --meco --hybrid-layer-pattern {PATTERN} --mamba-head-dim 8 --mamba-state-dim 8
    --mamba-num-groups 2 --meco-cooldown-fraction 0.5
"""


def without_depth(words: list[str]) -> list[str]:
    """The pattern says how many layers there are."""
    place = words.index("--num-layers")
    return words[:place] + words[place + 2 :]


@pytest.mark.distributed
def test_a_hybrid_model_trains_switches_and_resumes(
    corpus: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Ten steps at once, and the last five again from the checkpoint at the switch."""
    flags = FLAGS.split() + f"--tensor-model-parallel-size 2 --save {tmp_path}/ckpt".split()
    line = without_depth(
        command(corpus, tokenizer_folder, *flags, "--save-interval", "100", script=SCRIPT)
    )
    whole = launch(line, 2)
    assert whole.status == 0, whole.log[-3000:]
    assert len(whole.losses) == 10
    assert float(whole.losses[1]) - float(whole.losses[10]) > 0.5
    assert [share == "0.000000E+00" for share, _ in whole.samples.values()] == [False] * 5 + [
        True
    ] * 5
    again = launch([*line, "--load", f"{tmp_path}/ckpt", "--ckpt-step", "5"], 2)
    assert again.status == 0, again.log[-3000:]
    # Megatron logs the mean of the first two steps after a restart at the second.
    assert sorted(again.losses) == [6, 7, 8, 9, 10]
    assert {i: again.losses[i] for i in (6, 8, 9, 10)} == {
        i: whole.losses[i] for i in (6, 8, 9, 10)
    }


@pytest.mark.distributed
def test_mamba_layers_without_their_kernels_are_refused(
    corpus: str, tokenizer_folder: Path
) -> None:
    script = ROOT / "examples/pretrain_hybrid.py"
    result = train(corpus, tokenizer_folder, *FLAGS.split(), script=script)
    assert result.status == 1
    assert "--hybrid-layer-pattern: Mamba layers need the Python package mamba_ssm" in result.log
    assert "[rank0]: Traceback" not in result.log
