"""Context parallelism by the real kernels; the CPU's twin is in tests/training."""

from __future__ import annotations

import json
import os

import pytest
import torch
from gpu.conftest import ON_GPU, REHEARSAL, needs_engine, needs_gpu
from runs import ROOT, launch

from megatron_meco.training import attention as attention_module
from megatron_meco.training.attention import varlen_serves
from megatron_meco.training.context_parallel import RankLayout, places_by_rank

SCRIPT = ROOT / "tests" / "training" / "context_parallel_ranks.py"
LAYERS = ["local", pytest.param("transformer_engine", marks=needs_engine)]

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="there is one GPU, not two")
@pytest.mark.parametrize("layers", LAYERS)
def test_a_model_on_two_gpus_is_the_model_on_one(
    layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if REHEARSAL:
        monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    result = launch([str(SCRIPT), layers], 2)
    assert result.status == 0, result.log[-3000:]
    reports = json.loads(result.log.splitlines()[-1])
    assert len(reports) == 2
    for report in reports:
        assert report["apart"]
        assert report["logits"] < 0.03
        assert report["gradients"] < 0.03


@needs_gpu
@pytest.mark.skipif(
    not varlen_serves(torch.bfloat16, 0.0), reason="this PyTorch has no varlen attention"
)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_varlen_kernel_computes_what_each_rank_should(num_ranks: int) -> None:
    """On one GPU: the parts of all ranks, put together, against the whole pack."""
    bounds = [2 * num_ranks * n for n in (0, 1, 20, 31, 50, 50)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    torch.manual_seed(1)
    q, k, v = (
        torch.randn(bounds[-1], heads, 64, device="cuda", dtype=torch.bfloat16)
        for heads in (4, 2, 2)
    )

    def attend(*states: torch.Tensor) -> torch.Tensor:
        return attention_module._varlen_attention(*states, longest=bounds[-1], scale=0.125)

    expected = attend(q, k, v, cu_seqlens, cu_seqlens)
    rows = places_by_rank(cu_seqlens, bounds[-1], num_ranks)
    gathered = rows.reshape(-1)
    for rank in range(num_ranks):
        layout = RankLayout.of(cu_seqlens, bounds[-1], num_ranks, rank)
        found = layout.attention(q[rows[rank]], k[gathered], v[gathered], attend)
        torch.testing.assert_close(found, expected[rows[rank]], rtol=0.02, atol=0.02)
