"""Without `--meco` the script's own functions run, or those that stand in for them."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch

LENGTH = 16


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-ins, on rank 1 of two context-parallel ranks."""
    from megatron_meco.training import stock

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_, **__: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_, **__: 2)
    for name in ("tensor", "pipeline"):
        monkeypatch.setattr(stock.mpu, f"get_{name}_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(stock.mpu, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(stock.mpu, "get_tensor_model_parallel_src_rank", lambda: 0)
    monkeypatch.setattr(stock.mpu, "get_tensor_model_parallel_group", lambda: None)
    for name in ("first", "last"):
        monkeypatch.setattr(stock.mpu, f"is_pipeline_{name}_stage", lambda: True)
    monkeypatch.setattr(stock, "is_first_or_last_pipeline_stage", lambda _: True)
    monkeypatch.setattr(stock.parallel_state, "get_context_parallel_group", lambda: None)
    return stock


def test_context_parallel_ranks_get_their_chunks(stock: Any) -> None:
    args = Namespace(
        sft=False,
        dataloader_inter_document_masking=False,
        mtp_num_layers=None,
        hybrid_context_parallel=False,
        create_attention_mask_in_dataloader=False,
        context_parallel_size=2,
        micro_batch_size=1,
        seq_length=LENGTH,
        pipeline_model_parallel_size=1,
    )
    tokens = torch.arange(LENGTH)[None]
    sample = {
        "tokens": tokens,
        "labels": tokens + 1,
        "loss_mask": torch.ones(1, LENGTH),
        "position_ids": tokens,
    }
    found = stock.get_batch(args, iter([sample]), None)
    # Rank r of two holds the chunks r and 3 - r of four.
    assert found["tokens"].tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]
    assert found["labels"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]


def test_a_scripts_own_functions_run_without_meco(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_meco.training import provider

    def own_provider(sizes: Any, vp_stage: int | None = None) -> Any:
        return "own datasets", sizes, vp_stage

    def own_step(data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
        return "own step", data_iterator, model, return_schedule_plan

    provide, step = provider.with_meco(own_provider, own_step)
    assert provide.is_distributed
    monkeypatch.setattr(provider, "get_args", lambda: Namespace(meco=False))
    assert provide([1, 2, 3]) == ("own datasets", [1, 2, 3], None)
    assert provide([1], vp_stage=1) == ("own datasets", [1], 1)
    assert step(1, 2, return_schedule_plan=True) == ("own step", 1, 2, True)
    monkeypatch.setattr(provider, "get_args", lambda: Namespace(meco=True))
    monkeypatch.setattr(provider, "forward_step", lambda *_: "MeCo's step")
    monkeypatch.setattr(provider, "train_valid_test_datasets_provider", lambda *_: "MeCo's data")
    assert provide([1]) == "MeCo's data"
    assert step(1, 2) == "MeCo's step"


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ([0, 3, 3, 5, 8], [0, 0, 0, 2, 2, 3, 3, 3]),
        ([0, 8], [0] * 8),
        ([0, 1, 8, 8, 8], [0, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_document_numbers(bounds: list[int], expected: list[int]) -> None:
    from megatron_meco.training.provider import document_numbers

    found = document_numbers(torch.tensor(bounds, dtype=torch.int32), 8)
    assert found.dtype == torch.int32
    # As Megatron's own numbers, but for those of empty documents, which no token has.
    assert found.tolist() == [expected]
