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


HYBRID = Path(__file__).parent / "hybrid_leakage.py"
APART = [{"others_identical": True, "own_changed": True}] * 4


def test_a_hybrid_model_keeps_documents_apart(tmp_path: Path) -> None:
    """Mamba, attention and MLP layers in turn."""
    assert report_of(HYBRID, tmp_path / "meco", "M*-M*-", "meco") == APART


def test_a_hybrid_model_with_gated_delta_nets_keeps_documents_apart(tmp_path: Path) -> None:
    assert report_of(HYBRID, tmp_path / "delta", "G-G*", "meco") == APART


def test_a_hybrid_model_with_experts_keeps_documents_apart(tmp_path: Path) -> None:
    assert report_of(HYBRID, tmp_path / "experts", "M*EM*E", "meco") == APART


def test_the_same_check_sees_a_hybrid_model_leak_without_document_numbers(tmp_path: Path) -> None:
    rows = report_of(HYBRID, tmp_path / "borders", "M*-M*-", "borders")
    assert not rows[0]["others_identical"]


def test_other_kinds_of_llama_keep_documents_apart(tmp_path: Path) -> None:
    kinds = report_of(SCRIPT, tmp_path / "kinds", "kinds", "local")
    assert len(kinds) == 14
    for kind, report in kinds.items():
        assert report["documents"] == APART, kind
        assert report["difference"] < 1e-5, kind


def test_further_heads_keep_documents_apart_and_do_not_train_on_prefixes(tmp_path: Path) -> None:
    """Megatron's multi-token prediction, given the loss mask as MeCo's training step gives it."""
    report = report_of(Path(__file__).parent / "mtp_leakage.py", tmp_path / "mtp")
    assert report["documents"] == APART
    assert report["same_gradients_with_mask"]
    assert not report["same_gradients_without_mask"], "the check sees nothing"
    # Documents of 13, 1, 16 and 10 tokens and 8 of padding; each head looks one token further.
    assert report["counted"] == [40, 40, 12 + 0 + 15 + 9, 11 + 0 + 14 + 8]


def test_experts_keep_documents_apart_and_do_not_count_padding(tmp_path: Path) -> None:
    """Megatron's experts, given the padding mask as MeCo's training step gives it."""
    kinds = report_of(Path(__file__).parent / "moe_leakage.py", tmp_path / "moe")
    # Why --moe-expert-capacity-factor is refused.
    dropped = kinds.pop("tokens dropped")["documents"]
    assert not any(row["others_identical"] for row in dropped)
    assert len(kinds) == 6
    for kind, report in kinds.items():
        assert report["documents"] == APART, kind
        # In float64. The order of sums depends on the padding.
        assert report["difference_with_mask"] < 1e-14, kind
        assert report["difference_without_mask"] > 0.1, "the check sees nothing"
    # Two experts for each token that is no padding, in both layers.
    assert kinds["expert bias, shared experts"]["counted"] == [2 * 36] * 2
