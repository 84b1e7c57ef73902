"""A run that is killed before the switch goes on across it."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu.conftest import BF16, LAYERS, REHEARSAL, SCHEDULE, SHAPE
from runs import command, kill_at, launch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("layers", LAYERS)
def test_a_killed_run_goes_on_across_the_switch(
    layers: str, gpu_corpus: str, gpu_tokenizer: Path, tmp_path: Path
) -> None:
    variables = {"CUDA_VISIBLE_DEVICES": ""} if REHEARSAL else {}

    def flags(folder: str) -> list[str]:
        saved = f"--save {tmp_path}/{folder} --load {tmp_path}/{folder} --save-interval 3"
        text = f"{SHAPE} {SCHEDULE} {layers} {BF16} {saved} --use-distributed-optimizer"
        text += f" --data-cache-path {tmp_path}/cache --ckpt-format torch_dist"
        return command(gpu_corpus, gpu_tokenizer, *text.split())

    whole = launch(flags("whole"), 1, **variables)
    assert whole.status == 0, whole.log[-4000:]
    # The checkpoint of iteration 3 is complete before iteration 4 is logged.
    killed = kill_at(flags("parts"), 1, "iteration        4/", **variables)
    assert killed.status != 0
    rest = launch(flags("parts"), 1, **variables)
    assert rest.status == 0, rest.log[-4000:]
    assert 3 in whole.losses
    assert min(rest.losses) in (4, 5)
    # In Megatron's log the second step after a restart is the average of the first two.
    kept = [step for step in rest.losses if step != min(rest.losses) + 1]
    assert {step: rest.samples[step] for step in kept} == {
        step: whole.samples[step] for step in kept
    }
    assert 6 in kept
    # Kernels may add up in any order.
    for step in kept:
        assert float(rest.losses[step]) == pytest.approx(float(whole.losses[step]), rel=1e-3)
    for name, loss in whole.validation[6].items():
        assert float(rest.validation[6][name]) == pytest.approx(float(loss), rel=1e-3)
