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
    monkeypatch.setattr(batch.mpu, "get_context_parallel_world_size", lambda: 1)
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
        num_experts=None,
        sft=False,
        meco_validation_sets=None,
        meco_suffix_template="",
    )


def stock_batch(args: Namespace, loaded: Any) -> Any:
    """What a run without MeCo makes of Megatron's keys."""
    from megatron_meco.training import stock

    found = stock.get_batch(args, iter([loaded]), None)
    return {**found, "cu_seqlens": found["cu_seqlens"].squeeze(0)}


class TwoSamples(torch.utils.data.Dataset):
    """Samples of three documents and of one, with Megatron's keys."""

    split = "valid"

    def __init__(
        self, baseline: bool = False, bounds: tuple[int, int] = (3, 9), padded: bool = False
    ) -> None:
        self.baseline = baseline
        self.padded = padded
        self.bounds = bounds

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, idx: int) -> dict[str, Any]:
        bounds = torch.full((LENGTH + 1,), LENGTH, dtype=torch.int32)
        bounds[0] = 0
        if idx == 0:
            bounds[1:3] = torch.tensor(self.bounds)
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
        if self.padded:
            # Never in the loss.
            sample["meco_padding"] = torch.arange(LENGTH) % 4 == 2
        if self.baseline:
            return sample
        compared = sample["loss_mask"] * (torch.arange(LENGTH) > 4)
        return {**sample, "meco_view": torch.tensor(1 - idx), "meco_compared": compared}


def loaded(num_bounds: int, **options: Any) -> dict[str, Any]:
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
    for key in ("tokens", "position_ids", "labels", "loss_mask", "compared"):
        assert found[key].shape == (1, SIZE * LENGTH), key
    assert found["cu_seqlens"].shape == (SIZE * 4 + 1,)
    assert found["facts"].shape == (3, SIZE)
    assert all(x is None or x.device.type == "meta" for x in found.values())


def test_padding_reaches_every_stage_of_a_model_with_experts(
    one_rank: Any, args: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = next_batch(one_rank, args, 5)
    args.num_experts = 4
    monkeypatch.setattr(one_rank, "is_first_or_last_pipeline_stage", lambda _: False)
    assert next_batch(one_rank, args, 5, padded=True)["padding"].device.type == "meta"
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)
    found = next_batch(one_rank, args, 5, padded=True)
    assert found["padding"].tolist() == [[i % 4 == 2 for i in range(LENGTH)] * SIZE]
    args.num_experts = None
    monkeypatch.setattr(one_rank, "is_first_or_last_pipeline_stage", lambda _: True)
    without = next_batch(one_rank, args, 5)
    assert plain["padding"] is without["padding"] is None
    for key in ("loss_mask", "compared"):
        assert torch.equal(found[key], without[key]), key


@pytest.fixture
def two_context_parallel_ranks(one_rank: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The second of two ranks; the samples' documents are multiples of four tokens then."""
    monkeypatch.setattr(one_rank.mpu, "get_context_parallel_world_size", lambda: 2)
    monkeypatch.setattr(one_rank.mpu, "get_context_parallel_rank", lambda: 1)
    return one_rank


def test_a_context_parallel_rank_takes_its_part_without_a_wait(
    two_context_parallel_ranks: Any, args: Namespace
) -> None:
    found = next_batch(two_context_parallel_ranks, args, 5, bounds=(4, 12))
    for key in ("tokens", "position_ids", "labels", "loss_mask", "compared"):
        assert found[key].shape == (1, SIZE * LENGTH // 2), key
    assert found["cu_seqlens"].shape == (SIZE * 4 + 1,)
    assert all(x is None or x.device.type == "meta" for x in found.values())
    from megatron_meco.training.context_parallel import RankLayout

    layout = RankLayout.of(found["cu_seqlens"], SIZE * LENGTH, 2, 1)
    assert [x.shape for x in layout.keys] == [(SIZE * LENGTH // 2,), (SIZE * LENGTH // 4 * 3,)]


def test_context_parallel_ranks_share_the_samples(
    two_context_parallel_ranks: Any, args: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)
    mpu = two_context_parallel_ranks.mpu
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(mpu, "get_context_parallel_rank", lambda rank=rank: rank)
        parts.append(next_batch(two_context_parallel_ranks, args, 5, bounds=(4, 12)))
    monkeypatch.setattr(mpu, "get_context_parallel_world_size", lambda: 1)
    whole = next_batch(two_context_parallel_ranks, args, 5, bounds=(4, 12))
    # Chunks 0 and 3 of each document, of 4, 8, 4 and 16 tokens; then chunks 1 and 2.
    first = [0, 3, 4, 5, 10, 11, 12, 15, *range(16, 20), *range(28, 32)]
    second = [1, 2, 6, 7, 8, 9, 13, 14, *range(20, 28)]
    for part, places in zip(parts, (first, second), strict=True):
        for key in ("tokens", "labels", "position_ids", "loss_mask", "compared"):
            assert torch.equal(part[key], whole[key][:, places]), key
        for key in ("cu_seqlens", "facts"):
            assert torch.equal(part[key], whole[key]), key


def test_documents_that_do_not_divide_among_ranks_stop_the_run(
    two_context_parallel_ranks: Any, args: Namespace
) -> None:
    with pytest.raises(RuntimeError, match="no multiple of 4 tokens"):
        next_batch(two_context_parallel_ranks, args, 5)


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
    args.eval_iters, args.eval_global_batch_size = 3, SIZE
    monkeypatch.setattr(provider, "get_args", lambda: args)
    monkeypatch.setattr(provider.stock, "get_args", lambda: args)
    monkeypatch.setattr(provider, "get_num_microbatches", lambda: 1)
    monkeypatch.setattr(provider.mpu, "get_data_parallel_world_size", lambda: 1)
    found = next_batch(one_rank, args, 5)
    losses = torch.empty(SIZE * LENGTH, device="meta")
    _, _, report = provider.loss_func(
        found["loss_mask"],
        losses,
        facts=found["facts"],
        compared=found["compared"],
        training=training,
    )
    expected = {"lm loss", "prefix share", "trained tokens"}
    views = {"lm loss conditioned", "lm loss plain", "lm loss shuffled"}
    views |= {"lm loss shuffled minus conditioned", "compared share"}
    assert set(report) == (expected if training else views)


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
    assert found["facts"].tolist() == [[4, 0], [1, 0], [0, 0]]
    compared = torch.stack([TwoSamples()[i]["meco_compared"] for i in range(SIZE)])
    assert torch.equal(found["compared"], compared.view(1, -1).bool())
    baseline = next_batch(one_rank, args, 5, baseline=True)
    assert baseline["facts"].tolist() == [[4, 0], [0, 0], [0, 0]]


def test_a_stage_in_the_middle_gets_the_borders_alone(
    one_rank: Any, args: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)
    sent = []
    monkeypatch.setattr(one_rank.mpu, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda x, *_, **__: sent.append(x.shape))
    monkeypatch.setattr(one_rank, "is_first_or_last_pipeline_stage", lambda _: False)
    found = next_batch(one_rank, args, 5)
    assert sent == [(SIZE, 8)]
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


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize(
    ("template", "bos", "train_on_prefix"),
    [(r"U:{url.host}\n", 0, False), (r"U:{url.host}\n", None, True), ("", 0, False)],
)
def test_validation_losses_are_those_of_the_tokens(
    one_rank: Any,
    args: Namespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    micro_batch: int,
    template: str,
    bos: int | None,
    train_on_prefix: bool,
) -> None:
    """An evaluation of 8 samples in micro-batches of any size, summed up as Megatron does."""
    from small_corpus import LetterTokenizer, random_bodies, write_corpus

    from megatron_meco.config import MeCoConfig
    from megatron_meco.data.dataset import MeCoGPTDatasetConfig
    from megatron_meco.data.evaluation import EvaluationBlocks
    from megatron_meco.data.phases import BatchSize, make_schedule
    from megatron_meco.data.run_datasets import build_datasets
    from megatron_meco.training import provider
    from megatron_meco.training.batch import CompactSamples

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)
    monkeypatch.setattr(provider, "get_args", lambda: args)
    monkeypatch.setattr(provider.stock, "get_args", lambda: args)
    args.seq_length, args.eval_micro_batch_size = 48, micro_batch
    args.eval_iters, args.eval_global_batch_size, args.meco_template = 1, 8, template
    hosts = ["http://a.org", "http://bb.com", "http://www.c.net"]
    path = write_corpus(
        tmp_path / "c", random_bodies(200), {"url": [hosts[i % 3] for i in range(200)]}
    )
    config = MeCoGPTDatasetConfig(
        **{"random_seed": 7, "sequence_length": 48, "blend": ([path], None), "split": "50,50,0"},
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=LetterTokenizer(bos),
        meco=MeCoConfig(template=template, train_on_prefix=train_on_prefix),
    )
    schedule = make_schedule(config.meco, BatchSize.constant(4), train_iterations=1)
    _, valid, _ = build_datasets(
        [4, 8, 0], lambda: True, config, schedule, evaluation=EvaluationBlocks(8)
    )
    num_bounds = len(valid[0]["cu_seqlens"])
    samples = CompactSamples(valid, 48, num_bounds)
    loader = torch.utils.data.DataLoader(samples, batch_size=micro_batch)
    totals: dict[str, Any] = {}
    loss_of = torch.rand(8, 48, generator=torch.Generator().manual_seed(1)) + 1
    for i, loaded in enumerate(loader):
        batch = one_rank.meco_batch(
            args,
            iter([loaded]),
            None,
            training=False,
            num_bounds=num_bounds,
            check=lambda _: None,
        )
        losses = loss_of[i * micro_batch : (i + 1) * micro_batch].reshape(-1)
        _, _, report = provider.loss_func(
            batch["loss_mask"],
            losses,
            facts=batch["facts"],
            compared=batch["compared"],
            training=False,
        )
        for name, pair in report.items():
            totals[name] = totals.get(name, 0) + pair
    found = {name: float(total[0] / total[1]) for name, total in totals.items()}

    views = ("plain",) if not template else ("conditioned", "plain", "shuffled")
    sums = {f"lm loss {view}": [0.0, 0.0] for view in views}
    right, wrong, number, all_shuffled = 0.0, 0.0, 0, 0
    for i in range(8):
        view, sample = views[i % len(views)], valid[i]
        for t in range(48):
            if sample["loss_mask"][t] == 0:
                continue
            sums[f"lm loss {view}"][0] += float(loss_of[i, t])
            sums[f"lm loss {view}"][1] += 1
            all_shuffled += view == "shuffled"
            if template and sample["meco_compared"][t] == 1:
                right += float(loss_of[i, t]) * (view == "conditioned")
                wrong += float(loss_of[i, t]) * (view == "shuffled")
                number += view == "shuffled"
    expected = {name: total / count for name, (total, count) in sums.items()}
    if template:
        assert number > 10
        expected["lm loss shuffled minus conditioned"] = (wrong - right) / number
        expected["compared share"] = number / all_shuffled
    assert found == pytest.approx(expected, rel=1e-4)


def test_an_evaluation_of_two_samples_reports_no_third_view(args: Namespace) -> None:
    """Megatron would divide nothing by nothing."""
    from megatron_meco.training import provider

    args.meco_template, args.eval_global_batch_size = "U:{url.host}", 1
    names = {}
    for args.eval_iters in (1, 2, 3):
        names[args.eval_iters] = [view.name for view in provider._views_shown(args)]
    assert names[1] == ["CONDITIONED"]
    assert names[2] == ["CONDITIONED", "PLAIN"]
    assert names[3] == ["CONDITIONED", "PLAIN", "SHUFFLED"]


def test_losses_of_validation_sets_are_reported_apart(
    args: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven samples of four labels: two sets in three views, and one that fills up the batch."""
    from megatron_meco.config import View
    from megatron_meco.training import provider

    monkeypatch.setattr(provider, "get_args", lambda: args)
    monkeypatch.setattr(provider.stock, "get_args", lambda: args)
    args.meco_template, args.meco_validation_sets = "URL: {url.host}", ["wiki", "code"]
    args.eval_iters, args.eval_global_batch_size = 1, 7
    views = torch.tensor([View.CONDITIONED, View.PLAIN, View.SHUFFLED] * 2 + [View.SHUFFLED])
    sets = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    mask = torch.ones(7, 4)
    mask[3:, 0] = 0
    mask[6] = 0
    compared = (mask * (torch.arange(4) > 1)).bool()
    losses = torch.arange(28.0).view(7, 4)
    facts = torch.stack([torch.zeros_like(views), views, sets])
    _, _, report = provider.loss_func(mask, losses, facts=facts, compared=compared, training=False)
    found = {name: (pair / pair[1])[0].item() for name, pair in report.items()}
    mean = [losses[i][mask[i] > 0].mean().item() for i in range(6)]
    expected = {"compared share-wiki": 2 / 4, "compared share-code": 2 / 3, "compared share": 4 / 7}
    for i, view in enumerate(("conditioned", "plain", "shuffled")):
        expected[f"lm loss {view}-wiki"], expected[f"lm loss {view}-code"] = mean[i], mean[i + 3]
        # Four labels of one set, three of the other.
        expected[f"lm loss {view}"] = (4 * mean[i] + 3 * mean[i + 3]) / 7
    for suffix in ("", "-wiki", "-code"):
        # Each sample's losses are four above those of the one before.
        expected[f"lm loss shuffled minus conditioned{suffix}"] = 8
    assert found == pytest.approx(expected)
    args.meco_validation_sets = None
    _, _, whole = provider.loss_func(mask, losses, facts=facts, compared=compared, training=False)
    assert {name: pair.tolist() for name, pair in whole.items()} == {
        name: pair.tolist() for name, pair in report.items() if "-" not in name
    }
