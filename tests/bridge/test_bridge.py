"""MeCo's side of Megatron-Bridge's contract, against a stand-in with Bridge's signatures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from bridge import stand_in  # noqa: E402

from megatron_meco.config import MeCoConfig, View  # noqa: E402
from megatron_meco.corpus.tokenizer import build_tokenizer  # noqa: E402
from megatron_meco.errors import FlagError  # noqa: E402

LENGTH, STEP, SAMPLES = 64, 8, 80


@pytest.fixture(scope="module")
def bridge() -> Iterator[Any]:
    """`megatron_meco.bridge` over the stand-in, which goes away again."""
    before = dict(sys.modules)
    stand_in.install()
    from megatron_meco import bridge

    yield bridge
    for name in set(sys.modules) - set(before):
        if name.startswith(("megatron.bridge", "megatron_meco.bridge")):
            del sys.modules[name]


@pytest.fixture
def provider(bridge: Any, corpus: str, tmp_path: Path) -> Any:
    return bridge.MeCoDatasetProvider(
        data_path=[corpus],
        seq_length=LENGTH,
        global_batch_size=STEP,
        meco=MeCoConfig(cooldown_fraction=0.1),
        split="80,20,0",
        path_to_cache=str(tmp_path),
        num_workers=0,
    )


@pytest.fixture
def context(tokenizer_folder: Path) -> Any:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tokenizer_folder))
    return stand_in.DatasetBuildContext(SAMPLES, 6, 0, tokenizer)


def groups(stages: int = 1, parts: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        pp=SimpleNamespace(size=lambda: stages), cp=SimpleNamespace(size=lambda: parts)
    )


def test_batches_are_the_samples_in_bridges_keys(provider: Any, context: Any) -> None:
    provider.finalize()
    train, valid, test = provider.build_datasets(context)
    assert (len(train), test) == (SAMPLES, None) and len(valid) >= 6
    batches = list(stand_in.loader(train, 4))
    assert len(batches) == SAMPLES // 4
    shown = []
    for place, batch in enumerate(batches):
        samples = [train[i] for i in range(4 * place, 4 * place + 4)]
        shown.append(any(int(s["meco_prefix_tokens"]) for s in samples))
        for key in ("tokens", "labels", "loss_mask", "position_ids"):
            assert batch[key].shape == (1, 4 * LENGTH)
            assert torch.equal(batch[key][0], torch.cat([s[key] for s in samples]))
        bounds = batch["cu_seqlens_q"]
        assert bounds is batch["cu_seqlens_kv"] and bounds.shape[0] == 1
        assert bounds.dtype == torch.int32
        cuts = bounds[0].tolist()
        assert cuts[0] == 0 and cuts[-1] == 4 * LENGTH
        pieces = [(a, b) for a, b in pairwise(cuts) if a != b]
        assert all(a < b for a, b in pieces)
        assert {LENGTH, 2 * LENGTH, 3 * LENGTH} <= set(cuts)
        for begin, end in pieces:
            assert batch["position_ids"][0, begin:end].tolist() == list(range(end - begin))
        assert batch["attention_mask"] is None
        assert int(batch["max_seqlen_q"]) == int(batch["max_seqlen_kv"]) == LENGTH + 1
    # The last of ten steps is the cooldown.
    assert shown == [True] * 18 + [False] * 2


def test_views_of_validation_as_datasets_of_their_own(provider: Any, context: Any) -> None:
    provider.separate_views = True
    _, valid, _ = provider.build_datasets(context)
    assert len(valid) == len(View)
    by_view = {int(view): dataset for view, dataset in zip((1, 0, 2), valid, strict=False)}
    for dataset in valid:
        assert len(dataset) >= 6
    prefixed = [int(by_view[View.CONDITIONED][i]["meco_prefix_tokens"]) for i in range(6)]
    plain = [int(by_view[View.PLAIN][i]["meco_prefix_tokens"]) for i in range(6)]
    assert all(prefixed) and not any(plain)


def test_stages_in_the_middle_are_told_that_samples_are_packed(provider: Any) -> None:
    assert stand_in.middle_stage_needs_batch(provider)


def test_the_model_gets_the_loss_mask_that_bridges_own_step_keeps_back(
    bridge: Any, provider: Any, context: Any
) -> None:
    train, *_ = provider.build_datasets(context)
    state = stand_in.GlobalState(cfg=None)
    losses = []
    models = stand_in.Recorder(), stand_in.Recorder()
    for model, step in zip(models, (stand_in.forward_step, bridge.forward_step), strict=True):
        output, loss = step(state, stand_in.loader(train, 2), model)
        losses.append([float(x) for x in loss(output)[:2]])
    stock, ours = (model.calls[0] for model in models)
    assert "loss_mask" not in stock
    assert torch.equal(ours.pop("loss_mask")[0], torch.cat([train[i]["loss_mask"] for i in (0, 1)]))
    assert ours.keys() == stock.keys()
    packed = ours["packed_seq_params"]
    assert packed.qkv_format == "thd" and packed.cu_seqlens_q.dim() == 1
    assert int(packed.cu_seqlens_q[-1]) == 2 * LENGTH and int(packed.max_seqlen_q) == LENGTH + 1
    assert losses[0] == losses[1] and 0 < losses[0][1] < 2 * LENGTH


def test_the_switch_is_told_and_a_wrong_order_stops_the_run(
    bridge: Any, provider: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = bridge.MeCoCallback(provider)
    train = SimpleNamespace(train_samples=None, train_iters=10, global_batch_size=STEP)
    cfg = SimpleNamespace(train=train, checkpoint=SimpleNamespace(save="somewhere"))

    def begin(step: int, consumed: int) -> None:
        progress = SimpleNamespace(step=step, consumed_train_samples=consumed)
        callback.on_train_step_start(SimpleNamespace(state=stand_in.GlobalState(cfg, progress)))

    for step in range(7, 10):
        begin(step, step * STEP)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "iteration 8 begins in the conditioned phase" in said[0]
    assert "switch after iteration 9, at sample 72" in said[1]
    with pytest.raises(RuntimeError, match="step 9 begins at sample 64, not 72"):
        begin(9, 64)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dataloader_type", "cyclic"), ("enable_in_batch_packing", False), ("data_sharding", False)],
)
def test_settings_that_do_not_go(provider: Any, name: str, value: object) -> None:
    setattr(provider, name, value)
    with pytest.raises(FlagError, match=rf"dataset\.{name}: {value!r} does not go with MeCo"):
        provider.finalize()


def test_runs_that_do_not_go(provider: Any, context: Any) -> None:
    other = {"tokenizer": context.tokenizer, "valid_samples": 0, "test_samples": 0}
    ragged = stand_in.DatasetBuildContext(train_samples=SAMPLES + 1, **other)
    with pytest.raises(FlagError, match="81 training samples are no whole number of steps of 8"):
        provider.build_datasets(ragged)
    parted = stand_in.DatasetBuildContext(SAMPLES, pg_collection=groups(parts=2), **other)
    with pytest.raises(FlagError, match=r"context_parallel_size 2: not tested in Megatron-Bridge"):
        provider.build_datasets(parted)
    staged = stand_in.DatasetBuildContext(SAMPLES, pg_collection=groups(stages=2), **other)
    train, *_ = provider.build_datasets(staged)
    assert next(stand_in.loader(train, 1))["tokens"].shape == (1, LENGTH)
    with pytest.raises(FlagError, match=r"train\.micro_batch_size: 2 samples make one row"):
        next(stand_in.loader(train, 2))


def test_without_bridge_the_import_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import megatron_meco.bridge"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert "megatron.bridge: cannot be imported" in done.stderr
    assert "Install Megatron-Bridge" in done.stderr
