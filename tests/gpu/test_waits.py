"""Nothing of MeCo's makes the host wait for the device in a training step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gpu.conftest import BF16, LAYERS, LOCAL, Run, needs_gpu
from runs import Result

pytestmark = [pytest.mark.gpu, needs_gpu]
SCRIPT = Path(__file__).parent / "count_waits.py"


def waits_of(result: Result) -> dict[str, Any]:
    lines = [line for line in result.log.splitlines() if line.startswith("waits:")]
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("waits:"))
    assert found["counted"]["forward"] >= 4
    assert found["counted"]["loss"] >= 4
    print(found["waits"])  # shown by -rP: whose the others are
    return found


@pytest.mark.parametrize("layers", LAYERS)
def test_no_wait_comes_from_here(run: Run, layers: str) -> None:
    flags = f"{layers} {BF16} --no-check-for-nan-in-loss-and-grad"
    waits = waits_of(run(flags, script=SCRIPT))["waits"]
    assert not [place for place in waits if "megatron_meco" in place]


def test_the_same_count_sees_megatrons_check_for_nan(run: Run) -> None:
    """Which is on by default, asked for by our loss function, and one for each micro-batch."""
    found = waits_of(run(f"{LOCAL} {BF16}", script=SCRIPT))
    assert sum(found["waits"].values()) >= found["counted"]["loss"]
