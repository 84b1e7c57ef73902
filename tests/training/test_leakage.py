"""Attention does not leak: whole model, one document changed, all other logits bit-identical.

The GPU's twin of this file is tests/gpu/test_kernels.py.
"""

from __future__ import annotations

from pathlib import Path

from runs import report_of

SCRIPT = Path(__file__).parent / "leakage.py"


def test_changing_one_document_leaves_the_logits_of_the_others_bit_identical(
    tmp_path: Path,
) -> None:
    rows = report_of(SCRIPT, tmp_path / "packed", "packed", "local")
    assert rows == [{"others_identical": True, "own_changed": True}] * 4


def test_the_same_check_sees_a_leak_where_there_is_one(tmp_path: Path) -> None:
    """Plain causal attention over the pack: later documents see earlier ones."""
    rows = report_of(SCRIPT, tmp_path / "causal", "causal", "local")
    assert not rows[0]["others_identical"]


def test_rotary_positions_restart_as_those_of_megatron_do(tmp_path: Path) -> None:
    assert report_of(SCRIPT, tmp_path / "rotary", "rotary", "local") == {"equal": True}


MAMBA = Path(__file__).parent / "mamba_leakage.py"


def test_the_state_of_megatrons_mamba_mixer_restarts_at_each_document(tmp_path: Path) -> None:
    report = report_of(MAMBA, tmp_path / "meco", "meco")
    assert report["documents"] == [{"others_identical": True, "own_changed": True}] * 4
    assert report["difference_to_documents_alone"] < 1e-6


def test_the_same_check_sees_the_state_leak_without_document_numbers(tmp_path: Path) -> None:
    report = report_of(MAMBA, tmp_path / "borders", "borders")
    assert not report["documents"][0]["others_identical"]
    assert report["difference_to_documents_alone"] > 1e-3
