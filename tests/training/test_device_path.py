"""What happens on a GPU up to the kernel launch, on a host without one.

Tensors that have no values stand for those on the device: to look at one, as everything does that
waits for the device, is an error. Each check is shown to fail where something does look.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from runs import report_of  # noqa: E402

SCRIPT = Path(__file__).parent / "fake_gpu.py"
LENGTH, SIZE = 16, 2


def test_local_layers_run_on_cuda_without_a_wait_for_the_device(tmp_path: Path) -> None:
    report = report_of(SCRIPT, tmp_path / "store", "local")
    assert report["logits"] == [1, 256, 128]
    assert report["device"] == "cuda"
    # One call for all documents of the pack in each layer, with the fixed number of borders.
    from megatron_meco.training import attention

    # A PyTorch whose kernel knows no query groups gets the keys repeated.
    groups = 2 if "enable_gqa" in attention._VARLEN_PARAMETERS else 4
    call = {"q": [256, 4, 16], "k": [256, groups, 16], "bounds": [12]}
    assert report["attention"] == [{**call, "device": "cuda", "dtype": "torch.bfloat16"}] * 2


def test_the_same_check_sees_the_wait_in_megatrons_own_rope(tmp_path: Path) -> None:
    report = report_of(SCRIPT, tmp_path / "store", "stock-rope")
    assert report["looked_at"] == "aten._local_scalar_dense.default"


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Megatron's parallel state for one rank, and a device whose tensors have no values."""
    from megatron_meco.training import batch, stock

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self.to("meta"))
    # Megatron's own function broadcasts within a group of one, too.
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "meta")
    for name in ("tensor", "pipeline"):
        monkeypatch.setattr(batch.mpu, f"get_{name}_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(batch.mpu, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(batch.mpu, "get_tensor_model_parallel_src_rank", lambda: 0)
    monkeypatch.setattr(batch.mpu, "get_tensor_model_parallel_group", lambda: None)
    for name in ("first", "last"):
        monkeypatch.setattr(batch.mpu, f"is_pipeline_{name}_stage", lambda: True)
    for module in (batch, stock):
        monkeypatch.setattr(module, "is_first_or_last_pipeline_stage", lambda _: True)
    monkeypatch.setattr(stock.parallel_state, "get_context_parallel_group", lambda: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_, **__: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_, **__: 1)
    return batch


@pytest.fixture
def args() -> Namespace:
    return Namespace(
        micro_batch_size=SIZE,
        eval_micro_batch_size=SIZE,
        seq_length=LENGTH,
        dataloader_inter_document_masking=True,
        create_attention_mask_in_dataloader=False,
        pipeline_model_parallel_size=1,
        check_for_nan_in_loss_and_grad=False,
        check_for_spiky_loss=False,
        context_parallel_size=1,
        hybrid_context_parallel=False,
        mtp_num_layers=None,
        sft=False,
    )


def stock_batch(args: Namespace, loaded: Any) -> Any:
    """What a run without MeCo makes of Megatron's keys."""
    from megatron_meco.training import stock

    found = stock.get_batch(args, iter([loaded]), None)
    return {**found, "cu_seqlens": found["cu_seqlens"].squeeze(0)}


class TwoSamples(torch.utils.data.Dataset):
    """Samples of three documents and of one, with Megatron's keys."""

    split = "valid"

    def __init__(self, baseline: bool = False) -> None:
        self.baseline = baseline

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, idx: int) -> dict[str, Any]:
        bounds = torch.full((LENGTH + 1,), LENGTH, dtype=torch.int32)
        bounds[0] = 0
        if idx == 0:
            bounds[1:3] = torch.tensor([3, 9])
        ids = torch.arange(LENGTH + 1) + 1000 * idx
        sample = {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": torch.arange(LENGTH) % 2 + 0.0,
            "position_ids": torch.arange(LENGTH) % 5,
            "cu_seqlens": bounds,
            "max_seqlen": torch.tensor(7, dtype=torch.int32),
            "meco_prefix_tokens": torch.tensor(4 if idx == 0 else 0),
        }
        return sample if self.baseline else {**sample, "meco_view": torch.tensor(1 - idx)}


def loaded(num_bounds: int, **options: bool) -> dict[str, Any]:
    """A micro-batch of both, as a loader hands it over."""
    from megatron_meco.training.batch import CompactSamples

    samples = CompactSamples(TwoSamples(**options), LENGTH, num_bounds)
    (batch,) = torch.utils.data.DataLoader(samples, batch_size=SIZE)
    assert set(batch) == {"meco_sample"}
    return batch


def next_batch(batch: Any, args: Namespace, num_bounds: int, **options: Any) -> Any:
    return batch.meco_batch(
        args,
        iter([loaded(num_bounds, **options)]),
        None,
        training=False,
        num_bounds=num_bounds,
        check=lambda _: None,
    )


def test_a_batch_reaches_the_device_without_a_wait(one_rank: Any, args: Namespace) -> None:
    found = next_batch(one_rank, args, 5)
    for key in ("tokens", "position_ids", "labels", "loss_mask"):
        assert found[key].shape == (1, SIZE * LENGTH), key
    assert found["cu_seqlens"].shape == (SIZE * 4 + 1,)
    assert found["facts"].shape == (2, SIZE)
    assert all(x is None or x.device.type == "meta" for x in found.values())


def test_the_same_check_sees_the_wait_in_megatrons_own_batches(
    one_rank: Any, args: Namespace
) -> None:
    (batch,) = torch.utils.data.DataLoader(TwoSamples(), batch_size=SIZE)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        stock_batch(args, batch)


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_reported_without_a_wait(
    one_rank: Any, args: Namespace, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    from megatron_meco.training import provider

    args.meco_template = "URL: {url.host}\n\n"
    monkeypatch.setattr(provider, "get_args", lambda: args)
    monkeypatch.setattr(provider.stock, "get_args", lambda: args)
    monkeypatch.setattr(provider, "get_num_microbatches", lambda: 1)
    monkeypatch.setattr(provider.mpu, "get_data_parallel_world_size", lambda: 1)
    found = next_batch(one_rank, args, 5)
    losses = torch.empty(SIZE * LENGTH, device="meta")
    _, _, report = provider.loss_func(
        found["loss_mask"], losses, facts=found["facts"], training=training
    )
    expected = {"lm loss", "prefix share", "trained tokens"}
    assert set(report) == (expected if training else {"lm loss conditioned", "lm loss plain"})


def test_a_batch_is_what_megatrons_own_functions_make_of_the_samples(
    one_rank: Any, args: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    found = next_batch(one_rank, args, 5)
    (batch,) = torch.utils.data.DataLoader(TwoSamples(), batch_size=SIZE)
    stock = stock_batch(args, batch)
    for key in ("tokens", "labels", "position_ids", "loss_mask"):
        assert torch.equal(found[key], stock[key]), key
        assert found[key].dtype == stock[key].dtype
    # The same borders, and empty documents.
    assert found["cu_seqlens"].tolist() == [0, 3, 9, 16, 16, 32, 32, 32, 32]
    assert stock["cu_seqlens"].tolist() == [0, 3, 9, 16, 32]
    assert found["facts"].tolist() == [[4, 0], [1, 0]]
    assert next_batch(one_rank, args, 5, baseline=True)["facts"].tolist() == [[4, 0], [0, 0]]


def test_a_stage_in_the_middle_gets_the_borders_alone(
    one_rank: Any, args: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)
    sent = []
    monkeypatch.setattr(one_rank.mpu, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda x, *_, **__: sent.append(x.shape))
    monkeypatch.setattr(one_rank, "is_first_or_last_pipeline_stage", lambda _: False)
    found = next_batch(one_rank, args, 5)
    assert sent == [(SIZE, 7)]
    assert found["cu_seqlens"].tolist() == [0, 3, 9, 16, 16, 32, 32, 32, 32]
    assert found["tokens"] is None


def test_samples_of_another_run_stop_the_run(one_rank: Any, args: Namespace) -> None:
    """Else tokens and mask would be shifted against each other in silence."""
    batches = iter([loaded(6)])
    with pytest.raises(AssertionError, match="other samples"):
        one_rank.meco_batch(args, batches, None, training=False, num_bounds=5, check=lambda _: None)


def test_a_pack_that_no_plan_holds_stops_the_run() -> None:
    assert loaded(4)["meco_sample"][:, :4].tolist() == [[0, 3, 9, 16], [0, 16, 16, 16]]
    with pytest.raises(RuntimeError, match="more documents than the 1 of the largest pack"):
        loaded(3)
