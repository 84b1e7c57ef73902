"""The real kernels keep documents apart; the CPU's twin is tests/training/test_leakage.py."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from gpu.conftest import REHEARSAL, needs_engine
from runs import ROOT, report_of

SCRIPT = ROOT / "tests" / "training" / "leakage.py"
LAYERS = ["local", pytest.param("transformer_engine", marks=needs_engine)]

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    if REHEARSAL:
        monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize("layers", LAYERS)
def test_changing_one_document_leaves_the_logits_of_the_others_bit_identical(
    layers: str, tmp_path: Path
) -> None:
    rows = report_of(SCRIPT, tmp_path / "packed", "packed", layers)
    assert rows == [{"others_identical": True, "own_changed": True}] * 4


@pytest.mark.parametrize("layers", LAYERS)
def test_the_same_check_sees_a_leak_where_there_is_one(layers: str, tmp_path: Path) -> None:
    rows = report_of(SCRIPT, tmp_path / "causal", "causal", layers)
    assert not rows[0]["others_identical"]


def test_rotary_positions_restart_as_those_of_megatron_do(tmp_path: Path) -> None:
    assert report_of(SCRIPT, tmp_path / "rotary", "rotary", "local") == {"equal": True}


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="Transformer Engine is not installed",
)
def test_checkpoints_of_both_kinds_of_layers_hold_the_same_tensors(tmp_path: Path) -> None:
    """So that `meco export` reads both, and either loads the other's weights; needs no GPU."""
    from megatron_meco.inference.import_hf import state_names

    report = report_of(SCRIPT.with_name("checkpoint_names.py"), tmp_path / "store")
    assert report["transformer_engine"]["tensors"] == report["local"]["tensors"]
    assert len(report["local"]["tensors"]) == 8
    # What Transformer Engine wants to find beside them, `meco import` writes, empty.
    assert report["transformer_engine"]["state"]
    assert set(report["transformer_engine"]["state"]) <= set(state_names(num_layers=2))
    assert set(report["local"]["state"]) <= set(state_names(num_layers=2))
