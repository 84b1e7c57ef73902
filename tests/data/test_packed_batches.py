"""Batches for trainers that are not Megatron's: order, targets, borders, and what is refused."""

from __future__ import annotations

import gc
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from torch.utils.data import DataLoader, DistributedSampler  # noqa: E402

from megatron_meco.config import MeCoConfig  # noqa: E402
from megatron_meco.data.packed_batches import (  # noqa: E402
    IGNORED_TARGET,
    PackedBatch,
    PlainRun,
)
from megatron_meco.errors import MeCoError  # noqa: E402

LENGTH = 64


@pytest.fixture(scope="module")
def run(corpus: str, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PlainRun:
    """Ten steps of eight samples, the last one plain, and five samples of validation."""
    return make_run(corpus, tokenizer_folder, tmp_path_factory.mktemp("cache"))


def make_run(corpus: Any, tokenizer: Path, cache: Path, **changes: Any) -> PlainRun:
    values: dict[str, Any] = {
        "sequence_length": LENGTH,
        "num_steps": 10,
        "global_batch_size": 8,
        "num_valid_samples": 5,
        "split": "80,20,0",
        "meco": MeCoConfig(cooldown_fraction=0.1),
    }
    return PlainRun(corpus, tokenizer=tokenizer, cache_folder=cache, **(values | changes))


def tokens_of(batches: Any, num_workers: int = 0) -> list[list[int]]:
    loader = DataLoader(batches, batch_size=None, num_workers=num_workers)
    return [row.tolist() for b in loader for row in b["tokens"] if b["document_ids"] is not None]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_samples_come_in_order_whatever_the_workers(run: PlainRun, num_workers: int) -> None:
    batches = run.training_batches(micro_batch_size=4, borders="document_ids")
    assert len(batches) == 20
    expected = [run.train[i]["tokens"].tolist() for i in range(80)]
    assert tokens_of(batches, num_workers) == expected


def test_ranks_share_a_step_as_megatrons_do_and_a_resumed_run_goes_on(run: PlainRun) -> None:
    ranks = [
        tokens_of(
            run.training_batches(
                micro_batch_size=2, borders="document_ids", rank=rank, world_size=2, first_step=4
            )
        )
        for rank in range(2)
    ]
    samples = range(4 * 8, 80)
    for rank, rows in enumerate(ranks):
        # Megatron's sampler: micro-batches go to the ranks in turn.
        mine = [i for i in samples if i // 2 % 2 == rank]
        assert rows == [run.train[i]["tokens"].tolist() for i in mine]


def test_targets_are_the_labels_inside_the_mask_and_nothing_else(run: PlainRun) -> None:
    (first, *_, last) = run.training_batches(micro_batch_size=8, borders="document_ids")
    for batch, begin in ((first, 0), (last, 72)):
        for row in range(8):
            sample = run.train[begin + row]
            trained = sample["loss_mask"] > 0
            targets = batch["targets"][row]
            assert (targets[trained] == sample["labels"][trained]).all()
            assert (targets[~trained] == IGNORED_TARGET).all()
            assert 0 < int(trained.sum()) < LENGTH
    assert first["view"].tolist() == [1] * 8 and last["view"].tolist() == [0] * 8


def test_both_kinds_of_borders_tell_the_same_documents(run: PlainRun) -> None:
    by_number = run.training_batches(micro_batch_size=4, borders="document_ids")
    by_bounds = run.training_batches(micro_batch_size=4, borders="cu_seqlens")
    for numbers, bounds in zip(by_number, by_bounds, strict=True):
        flat = numbers["document_ids"].flatten()
        rows = torch.arange(4).repeat_interleave(LENGTH)
        assert bounds["tokens"].shape == (1, 4 * LENGTH)
        cuts = bounds["cu_seqlens"].tolist()
        assert (cuts[0], cuts[-1]) == (0, 4 * LENGTH) and bounds["max_seqlen"] == LENGTH
        pieces = [(a, b) for a, b in pairwise(cuts) if a < b]
        assert len(pieces) >= 4
        for begin, end in pieces:
            # One document of one sample, positions from 0.
            assert len({*zip(rows[begin:end].tolist(), flat[begin:end].tolist(), strict=True)}) == 1
            assert bounds["position_ids"][0, begin:end].tolist() == list(range(end - begin))
        names = zip(rows.tolist(), flat.tolist(), strict=True)
        assert len(dict.fromkeys(names)) == len(pieces)
        for key in ("tokens", "targets", "position_ids"):
            assert (numbers[key].view(1, -1) == bounds[key]).all()


def test_validation_shows_all_views_and_completes_the_last_batch(run: PlainRun) -> None:
    batches = list(run.validation_batches(micro_batch_size=2, borders="document_ids"))
    shown = [view for batch in batches for view in batch["view"].tolist()]
    assert shown[:5] == [1, 0, 2, 1, 0] and len(shown) == 6
    assert (batches[-1]["targets"][1] == IGNORED_TARGET).all()
    assert (batches[-1]["targets"][0] != IGNORED_TARGET).any()


def test_a_blend_of_weights_and_corpora(
    corpus: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    run = make_run([0.3, corpus, 0.7, corpus], tokenizer_folder, tmp_path, num_valid_samples=0)
    assert len(tokens_of(run.training_batches(micro_batch_size=8, borders="document_ids"))) == 80
    with pytest.raises(MeCoError, match="no validation samples"):
        run.validation_batches(micro_batch_size=1, borders="none")


def test_a_loader_cannot_change_the_order(run: PlainRun) -> None:
    batches = run.training_batches(micro_batch_size=4, borders="document_ids")
    with pytest.raises(ValueError, match="shuffle"):
        DataLoader(batches, batch_size=None, shuffle=True)
    sampler: Any = DistributedSampler(batches, num_replicas=2, rank=0)
    with pytest.raises(ValueError, match="sampler"):
        DataLoader(batches, batch_size=None, sampler=sampler)
    for num_workers in (0, 1):
        with pytest.raises(MeCoError, match="batch_size=None"):
            next(iter(DataLoader(batches, batch_size=2, num_workers=num_workers)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"borders": "documents"}, "borders: 'documents' is none of document_ids, cu_seqlens"),
        ({"micro_batch_size": 3}, "micro_batch_size: 3 x 1 ranks does not divide"),
        ({"micro_batch_size": 0}, "micro_batch_size: 0. Give 1 or more"),
        ({"rank": 2, "world_size": 2}, "rank: 2. Give 0 to 1"),
        ({"world_size": 3}, "4 x 3 ranks does not divide the global batch size 8"),
        ({"first_step": 11}, "first_step: 11. Give 0 to 10"),
    ],
)
def test_what_cannot_be_honoured(run: PlainRun, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MeCoError, match=message):
        run.training_batches(**({"micro_batch_size": 4, "borders": "document_ids"} | changes))


def test_borders_must_be_named(run: PlainRun) -> None:
    with pytest.raises(TypeError, match="borders"):
        run.training_batches(micro_batch_size=4)  # type: ignore[call-arg]
    with pytest.warns(UserWarning, match="attention goes across documents"):
        run.training_batches(micro_batch_size=4, borders="none")


@pytest.mark.parametrize("borders", ["document_ids", "cu_seqlens"])
@pytest.mark.parametrize("obey", [True, False])
def test_a_trainer_that_ignores_the_borders_is_warned(
    run: PlainRun, monkeypatch: pytest.MonkeyPatch, borders: Any, obey: bool
) -> None:
    monkeypatch.setattr(PackedBatch, "_warned", False)
    batches = run.training_batches(micro_batch_size=4, borders=borders)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in DataLoader(batches, batch_size=None):
            moved = batch.to("cpu")
            moved["tokens"], moved["targets"]
            if obey:
                moved[borders]
        del batch, moved
        gc.collect()
    told = [str(w.message) for w in caught if "never was" in str(w.message)]
    assert len(told) == (0 if obey else 1), told
    assert obey or borders in told[0]


def test_batches_that_are_not_used_are_no_mistake(
    run: PlainRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefetched batches, and those whose tokens nobody looked at."""
    monkeypatch.setattr(PackedBatch, "_warned", False)
    batches = run.training_batches(micro_batch_size=4, borders="document_ids")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in DataLoader(batches, batch_size=None, num_workers=2):
            assert len(batch) == 5 and "tokens" in batch and "(4, 64)" in repr(batch)
            break
        del batch
        gc.collect()
    assert not PackedBatch._warned
