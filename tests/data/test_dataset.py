"""Samples of MeCoGPTDataset against packs that are concatenated by hand."""

from __future__ import annotations

import pickle
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from small_corpus import BOS, EOD, LetterTokenizer, random_bodies, write_corpus

from megatron_meco.config import COOLDOWN, MeCoConfig, View
from megatron_meco.data import opened_corpus
from megatron_meco.data.dataset import MeCoGPTDataset, MeCoGPTDatasetConfig
from megatron_meco.data.evaluation import EvaluationBlocks, FullEvaluation
from megatron_meco.data.phases import BatchSize, make_schedule
from megatron_meco.data.report import Run, most_documents
from megatron_meco.data.run_datasets import PhasedDataset, build_datasets
from megatron_meco.errors import DataError, FlagError

LENGTH = 48
SEED = 7
TEMPLATE = r"U:{url.host}\n"


def hosts(num_documents: int) -> list[str | None]:
    """Every seventh document has no URL."""
    names = ["a.org", "bb.com", "www.c.net"]
    return [None if i % 7 == 3 else f"https://{names[i % 3]}/{i}" for i in range(num_documents)]


def prefix_of(url: str | None) -> list[int] | None:
    """What the template renders to, tokenised: by hand."""
    if url is None:
        return None
    return LetterTokenizer().tokenize("U:" + url.split("/")[2] + "\n")


def make_config(prefix: str, **changes: Any) -> MeCoGPTDatasetConfig:
    options: dict[str, Any] = {
        "random_seed": SEED,
        "sequence_length": LENGTH,
        "blend": ([prefix], None),
        "split": "100,0,0",
        "path_to_cache": f"{prefix}-cache",
        "tokenizer": LetterTokenizer(),
        "meco": MeCoConfig(template=TEMPLATE),
    }
    return MeCoGPTDatasetConfig(**{**options, **changes})


def build(config: MeCoGPTDatasetConfig, num_samples: int | None, split: Split = Split.train) -> Any:
    sizes = [0, 0, 0]
    sizes[split.value] = num_samples
    builder = BlendedMegatronDatasetBuilder(MeCoGPTDataset, sizes, lambda: True, config)
    return builder.build()[split.value]


def arrays(sample: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The arrays of a sample as lists, cu_seqlens without its tail."""
    keys = ("tokens", "labels", "loss_mask", "position_ids")
    return {
        **{k: sample[k].tolist() for k in keys},
        "cu_seqlens": np.unique(sample["cu_seqlens"]).tolist(),
        "max_seqlen": int(sample["max_seqlen"]),
    }


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("sequences_each", [1, 2])
@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize("template", [TEMPLATE, ""])
@pytest.mark.parametrize("mmap", [True, False])
def test_packs_equal_the_oracle(
    tmp_path: Path, dtype: Any, sequences_each: int, bos: int | None, template: str, mmap: bool
) -> None:
    bodies = random_bodies(150)
    urls = hosts(len(bodies))
    prefix = write_corpus(tmp_path / "c", bodies, {"url": urls}, dtype, sequences_each)
    config = make_config(
        prefix,
        tokenizer=LetterTokenizer(bos),
        meco=MeCoConfig(template=template),
        mmap_bin_files=mmap,
    )
    dataset = build(config, 120)

    order = reference.document_order(len(bodies), (0, len(bodies)), SEED, epochs=6)
    prefixes = [prefix_of(url) if template else None for url in urls]
    packs, discarded = reference.truncate_packs(order, bodies, prefixes, bos, LENGTH, 120)
    assert len(dataset) == len(packs) == 120
    for i, pack in enumerate(packs):
        assert arrays(dataset[i]) == pack.arrays(LENGTH, pad=EOD), f"pack {i}"
    assert dataset.plan.counts.discarded_tokens == discarded
    assert dataset.plan.counts.num_epochs > 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_tokens_of_every_width(tmp_path: Path, dtype: Any) -> None:
    bodies = [[min(token, 255) for token in body] for body in random_bodies(60)]
    prefix = write_corpus(tmp_path / "c", bodies, dtype=dtype)
    dataset = build(make_config(prefix, meco=MeCoConfig(template="")), 40)
    order = reference.document_order(60, (0, 60), SEED, epochs=4)
    packs, _ = reference.truncate_packs(order, bodies, [None] * 60, BOS, LENGTH, 40)
    for i, pack in enumerate(packs):
        assert arrays(dataset[i]) == pack.arrays(LENGTH, pad=EOD), f"pack {i}"


@pytest.mark.parametrize("strategy", ["split", "best-fit"])
@pytest.mark.parametrize("sequences_each", [1, 3])
@pytest.mark.parametrize("repeat_prefix", [True, False])
@pytest.mark.parametrize("align", [1, 6, 16])
def test_split_documents_begin_again_under_bos_and_prefix(
    tmp_path: Path, strategy: str, sequences_each: int, repeat_prefix: bool, align: int
) -> None:
    bodies = random_bodies(150, longest=200)
    urls = hosts(len(bodies))
    prefix = write_corpus(tmp_path / "c", bodies, {"url": urls}, sequences_each=sequences_each)
    meco = MeCoConfig(
        template=TEMPLATE, packing=strategy, repeat_prefix=repeat_prefix, pad_documents_to=align
    )
    dataset = build(make_config(prefix, meco=meco), None)
    prefixes = [prefix_of(url) for url in urls]
    placed: list[tuple[int, int, int]] = []
    for i in range(len(dataset)):
        pieces = [(d["document"], d["body_begin"], d["body_end"]) for d in dataset.documents_of(i)]
        pack = reference.pieces_to_pack(pieces, bodies, prefixes, BOS, repeat_prefix, align)
        assert arrays(dataset[i]) == pack.arrays(LENGTH, pad=EOD), f"pack {i}"
        placed += pieces
    for document, body in enumerate(bodies):
        tokens = [t for d, b, e in sorted(placed) if d == document for t in body[b:e]]
        assert tokens == (body if len(body) > 1 else []), f"document {document}"
    assert any(b > 0 for _, b, _ in placed)


@pytest.mark.parametrize("align", [2, 16, LENGTH])
@pytest.mark.parametrize("bos", [BOS, None])
def test_padding_behind_documents_equals_the_oracle(
    tmp_path: Path, align: int, bos: int | None
) -> None:
    bodies = random_bodies(150)
    urls = hosts(len(bodies))
    prefix = write_corpus(tmp_path / "c", bodies, {"url": urls})
    meco = MeCoConfig(template=TEMPLATE, pad_documents_to=align, train_on_prefix=True)
    config = make_config(prefix, meco=meco, tokenizer=LetterTokenizer(bos), mark_padding=True)
    dataset = build(config, 90)
    order = reference.document_order(150, (0, 150), SEED, epochs=6)
    prefixes = [prefix_of(url) for url in urls]
    packs, _ = reference.truncate_packs(order, bodies, prefixes, bos, LENGTH, 90, align=align)
    for i, pack in enumerate(packs):
        sample = dataset[i]
        assert arrays(sample) == pack.arrays(LENGTH, EOD, train_on_prefix=True), f"pack {i}"
        assert not (sample["cu_seqlens"] % align).any()
        padded = sum(d["alignment_tokens"] for d in dataset.documents_of(i))
        assert padded == sum(token.kind == "pad" for token in pack.tokens)
        kinds = [token.kind == "pad" for token in pack.tokens]
        assert sample["meco_padding"].tolist() == kinds + [True] * (LENGTH - len(kinds))


def test_one_epoch_holds_every_document_once_and_pads_the_last_pack(tmp_path: Path) -> None:
    bodies = random_bodies(45)
    prefix = write_corpus(tmp_path / "c", bodies, {"url": hosts(45)})
    dataset = build(make_config(prefix), None)
    order = reference.document_order(45, (0, 45), SEED, epochs=1)
    prefixes = [prefix_of(u) for u in hosts(45)]
    packs, _ = reference.truncate_packs(order, bodies, prefixes, BOS, LENGTH, None)
    assert [arrays(dataset[i]) for i in range(len(dataset))] == [
        p.arrays(LENGTH, EOD) for p in packs
    ]
    assert dataset.plan.counts.padding_tokens > 0
    documents = [d["document"] for i in range(len(dataset)) for d in dataset.documents_of(i)]
    assert sorted(documents) == [d for d in range(45) if len(bodies[d]) > 1]
    assert dataset.plan.counts.documents_empty == 45 - len(documents)


def test_train_on_prefix_and_documents_cap(tmp_path: Path) -> None:
    bodies = random_bodies(60)
    prefix = write_corpus(tmp_path / "c", bodies, {"url": hosts(60)})
    meco = MeCoConfig(template=TEMPLATE, train_on_prefix=True, max_documents_per_pack=2)
    dataset = build(make_config(prefix, meco=meco), 30)
    order = reference.document_order(60, (0, 60), SEED, epochs=3)
    prefixes = [prefix_of(u) for u in hosts(60)]
    packs, _ = reference.truncate_packs(order, bodies, prefixes, BOS, LENGTH, 30, max_documents=2)
    for i, pack in enumerate(packs):
        assert arrays(dataset[i]) == pack.arrays(LENGTH, EOD, train_on_prefix=True)
    assert len(dataset[0]["cu_seqlens"]) == 4  # 0, two documents, padding: fixed for all packs


def test_the_mask_is_aligned_with_labels(tmp_path: Path) -> None:
    """Golden: two documents, at the start of a pack and inside it, written out by hand."""
    bodies = [[300, 301, EOD], [302, 303, 304, EOD]]
    prefix = write_corpus(tmp_path / "c", bodies, {"topic": ["xyz", "xyz"]})
    config = make_config(prefix, sequence_length=16, meco=MeCoConfig(template="{topic}"))
    dataset = build(config, None)
    x, y, z = LetterTokenizer().tokenize("xyz")
    sample = arrays(dataset[0])
    first = [BOS, x, y, z, 300, 301, EOD]
    second = [BOS, x, y, z, 302, 303, 304, EOD]
    if sample["tokens"][4] == 302:
        first, second = second, first
    assert sample["tokens"] == [*first, *second, EOD]
    assert sample["labels"] == [*first[1:], *second, EOD, EOD]
    # Zero where the label is BOS, prefix or padding; one from the first body token to EOD.
    mask_first = [0, 0, 0, *[1] * (len(first) - 4), 0]
    mask_second = [0, 0, 0, *[1] * (len(second) - 4), 0]
    assert sample["loss_mask"] == [*mask_first, *mask_second, 0]


def test_no_step_from_eod_to_bos_is_trained_in_either_phase(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_bodies(100), {"url": hosts(100)})
    for phase in ("conditioned", COOLDOWN):
        dataset = build(make_config(prefix, phase=phase), 50)
        for i in range(50):
            sample = dataset[i]
            assert not sample["loss_mask"][sample["labels"] == BOS].any()
            bounds = sample["cu_seqlens"][1:].long() - 1
            assert not sample["loss_mask"][bounds].any()
            assert sample["loss_mask"].sum() > 0


def test_the_cooldown_carries_no_prefix(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_bodies(100), {"url": hosts(100)})
    plain = build(make_config(prefix, phase=COOLDOWN), 50)
    baseline = build(make_config(prefix, meco=MeCoConfig(template="")), 50)
    for i in range(50):
        assert int(plain[i]["meco_prefix_tokens"]) == 0
        assert arrays(plain[i]) == arrays(baseline[i])


def test_overwriting_a_sample_does_not_change_the_next_reading(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_bodies(50), {"url": hosts(50)})
    dataset = build(make_config(prefix), 20)
    before = arrays(dataset[3])
    for value in dataset[3].values():
        value.fill_(77)
    assert arrays(dataset[3]) == before


def test_a_filler_sample_trains_nothing(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_bodies(50), {"url": hosts(50)})
    assert build(make_config(prefix), 5)[None]["loss_mask"].sum() == 0


def test_a_pickled_dataset_gives_the_same_samples(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_bodies(50), {"url": hosts(50)})
    dataset = build(make_config(prefix), 20)
    before = arrays(dataset[4])
    assert arrays(pickle.loads(pickle.dumps(dataset))[4]) == before


def test_plain_fraction_is_a_seeded_share_that_does_not_depend_on_order(tmp_path: Path) -> None:
    bodies = [[300, 301, EOD]] * 400
    prefix = write_corpus(tmp_path / "c", bodies, {"url": ["https://a.org/"] * 400})
    meco = MeCoConfig(template=TEMPLATE, plain_fraction=0.25)
    dataset = build(make_config(prefix, meco=meco), None)
    shown = {
        d["document"]: d["prefix"] is not None
        for i in range(len(dataset))
        for d in dataset.documents_of(i)
    }
    expected = {d: reference.hash_pair(SEED, d) >= 2**62 for d in range(400)}
    assert shown == expected
    assert 60 < sum(not s for s in shown.values()) < 140


def test_a_run_switches_at_its_sample_and_the_phases_share_no_document(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_bodies(300), {"url": hosts(300)})
    schedule = make_schedule(MeCoConfig(), BatchSize.constant(4), train_iterations=20)
    config = make_config(prefix, split="80,20,0")
    train, valid, test = build_datasets([80, 10, 4], lambda: True, config, schedule)
    assert (len(train), test) == (80, None)
    seen: dict[str, set[int]] = {"conditioned": set(), COOLDOWN: set()}
    for i in range(80):
        dataset, pack = train.locate(i)
        phase = "conditioned" if i < 72 else COOLDOWN
        assert dataset.config.phase == phase
        documents = dataset.documents_of(pack)
        seen[phase] |= {d["document"] for d in documents}
        assert all(d["prefix"] is None for d in documents) or phase == "conditioned"
        assert torch.equal(train[i]["tokens"], dataset[pack]["tokens"])
    assert not seen["conditioned"] & seen[COOLDOWN]
    assert max(seen["conditioned"] | seen[COOLDOWN]) < 240
    documents = {
        d["document"] for i in range(4) for d in valid.views[View.CONDITIONED].documents_of(i)
    }
    assert min(documents) >= 240
    with pytest.raises(IndexError):
        train[80]


@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize("blended", [False, True])
def test_validation_shows_each_pack_in_three_views_as_the_oracle(
    tmp_path: Path, bos: int | None, blended: bool
) -> None:
    bodies, urls = random_bodies(300), hosts(300)
    prefixes = [prefix_of(url) for url in urls]
    path = write_corpus(tmp_path / "c", bodies, {"url": urls})
    schedule = make_schedule(MeCoConfig(), BatchSize.constant(4), train_iterations=20)
    blend = ([path, path], [0.5, 0.5]) if blended else ([path], None)
    config = make_config(
        path, split="80,20,0", blend=blend, tokenizer=LetterTokenizer(bos), mark_padding=True
    )
    train, valid, _ = build_datasets(
        [80, 20, 0], lambda: True, config, schedule, evaluation=EvaluationBlocks(10)
    )
    order = reference.document_order(60, (0, 60), SEED, 3, first=240)
    packs, _ = reference.truncate_packs(order, bodies, prefixes, bos, LENGTH, 20)
    assert len(valid) == 20
    assert not any("meco_compared" in train[i] for i in range(80))
    num_compared = 0
    for i in range(20):
        sample, (dataset, number) = valid[i], valid.locate(i)
        # Two evaluations of ten samples: three packs in all views, and one in the first view.
        place = i % 10
        assert number == 4 * (i // 10) + place // 3
        view = (View.CONDITIONED, View.PLAIN, View.SHUFFLED)[place % 3]
        assert dataset is valid.views[view]
        assert int(sample["meco_view"]) == int(view)
        if blended:
            number = int(dataset.dataset_sample_index[number])
        pack = reference.in_view(packs[number], prefixes, view.name.lower(), number)
        assert arrays(sample) == pack.arrays(LENGTH, pad=EOD)
        kinds = [token.kind == "pad" for token in pack.tokens]
        assert sample["meco_padding"].tolist() == kinds + [True] * (LENGTH - len(kinds))
        compared = pack.compared(LENGTH)
        assert sample["meco_compared"].tolist() == [mark * (place < 9) for mark in compared]
        num_compared += sum(compared)
    assert num_compared > 200


def test_validation_shows_each_pack_with_and_without_prefixes(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_bodies(300), {"url": hosts(300)})
    schedule = make_schedule(MeCoConfig(), BatchSize.constant(4), train_iterations=20)
    config = make_config(prefix, split="80,20,0")
    _, valid, _ = build_datasets([80, 12, 0], lambda: True, config, schedule)
    assert len(valid) == 12
    for i in range(0, 12, 3):
        shown, hidden, wrong = (valid[i + turn] for turn in range(3))
        assert [int(sample["meco_view"]) for sample in (shown, hidden, wrong)] == [1, 0, 2]
        assert int(shown["meco_prefix_tokens"]) == int(wrong["meco_prefix_tokens"]) > 0
        assert int(hidden["meco_prefix_tokens"]) == 0
        bodies = [
            [(d["document"], d["body_begin"], d["body_end"]) for d in view.documents_of(i // 3)]
            for view in valid.views.values()
        ]
        assert bodies[0] == bodies[1] == bodies[2]
        assert shown["loss_mask"].sum() >= hidden["loss_mask"].sum() > 0
    filler = valid[None]
    assert not filler["loss_mask"].any()
    assert not filler["meco_compared"].any()


@pytest.mark.parametrize("begin", [0, 1, 5, 12, 19])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 12, 13])
def test_each_evaluation_shows_its_packs_in_all_views(size: int, begin: int) -> None:
    blocks = EvaluationBlocks(size, begin)
    places = [blocks.locate(i) for i in range(60)]
    packs = [pack for pack, _, _ in places]
    assert packs[0] >= 0
    assert all(later - earlier in (0, 1) for earlier, later in pairwise(packs))
    for n in range(1, 61):
        assert blocks.packs_for(n) == max(packs[:n]) + 1
        assert blocks.samples_of(blocks.packs_for(n)) >= n
    for num_packs in range(max(packs) + 1):
        assert blocks.samples_of(num_packs) == sum(pack < num_packs for pack in packs)
    for first in range(begin % size, 60 - size, size):
        evaluation = places[first : first + size]
        complete = [(pack, view) for pack, view, is_complete in evaluation if is_complete]
        assert len(complete) == size // 3 * 3
        assert {pack for pack, view in complete if view is View.CONDITIONED} == {
            pack for pack, _ in complete
        }
        assert len(set(complete)) == len(complete)
        outside = places[:first] + places[first + size :]
        assert not {pack for pack, _, _ in evaluation} & {pack for pack, _, _ in outside}


STEPS = "0:2 384:3 1440:4"  # from samples 8 and 30 on


@pytest.mark.parametrize("strategy", ["truncate", "split"])
@pytest.mark.parametrize("template", [TEMPLATE, ""])
@pytest.mark.parametrize(
    ("start", "held_out", "batch_size"),
    [
        ({"start_iteration": 3}, None, BatchSize.constant(4)),
        ({"start_fraction": 0.2}, 0.3, BatchSize.constant(5)),
        # The batch grows within the plain phase, and within the cooldown.
        ({"start_iteration": 5}, None, BatchSize.parse(STEPS, LENGTH)),
        ({"start_fraction": 0.7}, None, BatchSize.constant(3)),
    ],
)
def test_a_run_that_starts_plain_equals_the_oracle(
    tmp_path: Path,
    strategy: str,
    template: str,
    start: dict[str, Any],
    held_out: float | None,
    batch_size: BatchSize,
) -> None:
    bodies = random_bodies(130)
    urls = hosts(len(bodies))
    prefix = write_corpus(tmp_path / "c", bodies, {"url": urls})
    meco = MeCoConfig(
        template=template,
        packing=strategy,
        cooldown_fraction=0.2,
        cooldown_documents=held_out,
        **start,
    )
    schedule = make_schedule(meco, batch_size, train_iterations=15)
    ends = (schedule.start_sample, schedule.switch_sample, schedule.num_samples)
    assert 0 < ends[0] < ends[1] < ends[2]
    train, _, _ = build_datasets(
        [ends[2], 0, 0], lambda: True, make_config(prefix, meco=meco), schedule
    )
    shown: dict[str, set[int]] = {}
    expected = {}
    share = None if held_out is None else Fraction(str(held_out))
    for phase, places in reference.documents_by_phase(len(bodies), ends, share).items():
        prefixes = [prefix_of(url) if template and phase == "conditioned" else None for url in urls]
        order = reference.document_order(len(bodies), places, SEED, epochs=20)
        if strategy == "truncate":
            expected[phase], _ = reference.truncate_packs(
                order, bodies, prefixes, BOS, LENGTH, ends[2]
            )
        else:
            found = reference.split_pieces(order, bodies, prefixes, BOS, LENGTH, ends[2], LENGTH)
            expected[phase] = [
                reference.pieces_to_pack(pack, bodies, prefixes, BOS) for pack in found
            ]
    for i in range(ends[2]):
        phase, number = reference.phase_at(i, ends)
        source, pack = train.locate(i)
        assert (source.config.phase, pack) == (phase, number)
        assert arrays(train[i]) == expected[phase][number].arrays(LENGTH, pad=EOD), f"sample {i}"
        documents = source.documents_of(pack)
        shown.setdefault(phase, set()).update(d["document"] for d in documents)
        if phase == "plain" and template:
            assert {d["plain_because"] for d in documents} == {"the plain phase has no prefixes"}
    assert list(shown) == ["plain", "conditioned", "cooldown"]
    phases = list(shown.values())
    assert not phases[0] & phases[1] | phases[0] & phases[2] | phases[1] & phases[2]


@pytest.mark.parametrize("template", [TEMPLATE, ""])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("packing", ["truncate", "best-fit"])
def test_a_full_validation_reads_every_pack_once_in_each_view(
    tmp_path: Path, template: str, named: bool, packing: str
) -> None:
    """Two corpora, three evaluations, the first of them begun at another sample than 0."""
    bodies = [random_bodies(60), random_bodies(23, seed=1)]
    paths = [
        write_corpus(tmp_path / name, each, {"url": hosts(len(each))})
        for name, each in zip("ab", bodies, strict=True)
    ]
    meco = MeCoConfig(template=template, packing=packing)
    config = make_config(
        paths[0],
        blend=None,
        split=None,
        blend_per_split=[([paths[0]], None), (paths, None), ([paths[1]], None)],
        meco=meco,
    )
    schedule = make_schedule(meco, BatchSize.constant(4), train_iterations=1)
    full = FullEvaluation(batch=16, begin=5, number=3, sets=tuple(paths) if named else ())
    _, valid, test = build_datasets(
        [4, 99, 7], lambda: True, config, schedule, evaluation=EvaluationBlocks(2), full=full
    )
    size = valid.evaluation_size
    assert size % 16 == 0
    assert len(valid) == 5 + 3 * size
    assert len(test) == size
    views = [View.CONDITIONED, View.PLAIN, View.SHUFFLED] if template else [View.PLAIN]
    whole = [valid.locate(i) for i in range(5, 5 + size)]
    samples = [valid[i] for i in range(5, 5 + size)]
    num_packs = [len(part) for part in valid.parts]
    num_samples = sum(num_packs)
    assert 0 <= size - num_samples < 16
    assert size != num_samples
    seen = [(id(part), pack) for part, pack in whole[:num_samples]]
    assert len(set(seen)) == len(seen)
    assert {part for part, _ in seen} == {id(part) for part in valid.parts}
    assert [int(s["meco_view"]) for s in samples[:num_samples]] == views * (
        num_samples // len(views)
    )
    # Set after set; without sets all are of the first.
    numbers = [int(s["meco_set"]) for s in samples]
    assert numbers == sorted(numbers)
    assert set(numbers) == ({0, 1} if named else {0})
    for sample in samples[num_samples:]:
        assert not sample["loss_mask"].any()
        assert not sample.get("meco_compared", torch.zeros(1)).any()
    if named:
        for (part, _), number in zip(whole, numbers, strict=True):
            assert part.corpus_prefix == paths[number]
    for view in views:
        labels = sum(int(s["loss_mask"].sum()) for s in samples if int(s["meco_view"]) == view)
        if packing == "best-fit":
            # Every token of every document that is more than its EOD.
            assert labels == sum(len(body) for each in bodies for body in each if len(body) > 1)
    for evaluation in (1, 2):
        assert [valid.locate(5 + evaluation * size + i) for i in range(size)] == whole


def test_a_full_validation_without_documents_is_refused(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_bodies(60), {"url": hosts(60)})
    config = make_config(prefix)
    schedule = make_schedule(config.meco, BatchSize.constant(4), train_iterations=1)
    with pytest.raises(DataError, match="--full-validation: there are no documents"):
        build_datasets([4, 0, 0], lambda: True, config, schedule, full=FullEvaluation(4, 0, 1))


def test_cooldown_from_a_corpus_of_its_own(tmp_path: Path) -> None:
    main = write_corpus(tmp_path / "main", random_bodies(100), {"url": hosts(100)})
    other = write_corpus(tmp_path / "other", random_bodies(100, seed=5))  # needs no metadata
    schedule = make_schedule(
        MeCoConfig(cooldown_fraction=0.5), BatchSize.constant(2), train_iterations=10
    )
    train, _, _ = build_datasets(
        [20, 0, 0], lambda: True, make_config(main), schedule, ([other], None)
    )
    assert train.locate(9)[0].corpus_prefix == main
    assert train.locate(10)[0].corpus_prefix == other
    assert train.conditioned.plan.counts.packs == 10


@pytest.mark.parametrize("strategy", ["truncate", "split", "best-fit"])
@pytest.mark.parametrize("template", [TEMPLATE, ""])
def test_suffixes_come_with_the_conditioned_phase(
    tmp_path: Path, strategy: str, template: str
) -> None:
    prefix = write_corpus(tmp_path / "c", random_bodies(130), {"url": hosts(130)})
    meco = MeCoConfig(
        template=template,
        suffix_template=r"\n{url.host}",
        packing=strategy,
        start_fraction=0.3,
        cooldown_fraction=0.2,
    )
    schedule = make_schedule(meco, BatchSize.constant(4), train_iterations=10)
    config = make_config(prefix, meco=meco)
    train, _, _ = build_datasets([40, 0, 0], lambda: True, config, schedule)
    totals = Counter[str]()
    for i in range(40):
        source, pack = train.locate(i)
        phase, number = reference.phase_at(i, (12, 32, 40))
        assert (source.config.phase, pack) == (phase, number)
        documents = source.documents_of(pack)
        given = sum(document["prefix_tokens"] + document["suffix_tokens"] for document in documents)
        assert int(train[i]["meco_prefix_tokens"]) == given
        totals[phase] += given
        if phase == "plain":
            because = {document["no_suffix_because"] for document in documents}
            assert because == {"the plain phase has no suffixes"}
    assert (totals["plain"], totals["cooldown"]) == (0, 0)
    assert totals["conditioned"] > 100


def test_a_plain_start_of_a_blend_and_a_cooldown_of_its_own(tmp_path: Path) -> None:
    """Without documents held out, plain and conditioned phase divide all of each corpus."""
    paths = [
        write_corpus(tmp_path / name, random_bodies(200, seed=i), {"url": hosts(200)})
        for i, name in enumerate("abc")
    ]
    meco = MeCoConfig(template=TEMPLATE, start_fraction=0.3)
    schedule = make_schedule(meco, BatchSize.constant(10), train_iterations=10)
    config = make_config(paths[0], meco=meco, blend=(paths[:2], [0.7, 0.3]), split="90,10,0")
    train, valid, _ = build_datasets(
        [100, 20, 0], lambda: True, config, schedule, ([paths[2]], None)
    )
    assert [len(part) for part in train.parts] == [30, 60, 10]
    has_prefix = [int(train[i]["meco_prefix_tokens"]) > 0 for i in range(100)]
    assert has_prefix == [False] * 30 + [True] * 60 + [False] * 10
    for corpus in (0, 1):
        ranges = [part.datasets[corpus]._request().range for part in train.parts[:2]]
        assert ranges == [(0, 60), (60, 180)]
    assert train.cooldown._request().range == (0, 200)
    assert {int(sample["meco_view"]) for sample in valid} == {0, 1, 2}


def test_blends_of_corpora_with_weights(tmp_path: Path) -> None:
    paths = [
        write_corpus(tmp_path / name, random_bodies(200, seed=i), {"url": hosts(200)})
        for i, name in enumerate("ab")
    ]
    schedule = make_schedule(MeCoConfig(), BatchSize.constant(10), train_iterations=10)
    config = make_config(paths[0], blend=(paths, [0.7, 0.3]), split="90,10,0")
    train, valid, _ = build_datasets([100, 20, 0], lambda: True, config, schedule)
    assert isinstance(train, PhasedDataset)
    ids = [int(train[i]["dataset_id"]) for i in range(100)]
    assert abs(ids[:90].count(0) - 63) <= 1
    assert abs(ids[90:].count(0) - 7) <= 1
    assert all(int(train[i]["meco_prefix_tokens"]) == 0 for i in range(90, 100))
    assert len(valid) == 20


def test_the_largest_pack_of_a_run_is_found_in_every_split_phase_and_corpus(
    tmp_path: Path,
) -> None:
    """It decides the length of cu_seqlens on the device, so no pack may hold more."""
    tiny = write_corpus(tmp_path / "tiny", [[300, EOD]] * 40, {"url": hosts(40)})
    large = write_corpus(tmp_path / "large", [[300] * 20 + [EOD]] * 90, {"url": hosts(90)})
    schedule = make_schedule(MeCoConfig(), BatchSize.constant(4), train_iterations=10)
    blend, alone = ([tiny, large], [0.5, 0.5]), ([large], None)
    for template in ("", TEMPLATE):
        most = {}
        for name, train, valid in (("train", blend, alone), ("valid", alone, blend)):
            config = make_config(
                large,
                blend=None,
                split=None,
                blend_per_split=[train, valid, None],
                meco=MeCoConfig(template=template),
            )
            splits = build_datasets([40, 16, 0], lambda: True, config, schedule)
            most[name] = most_documents(Run(schedule, *splits))
            samples = [split[i] for split in splits[:2] for i in range(len(split))]
            # Padding is a segment too, and no document.
            held = max(len(np.unique(sample["cu_seqlens"])) - 1 for sample in samples)
            assert held - 1 <= most[name] <= held
        if not template:
            assert most == {"train": 16, "valid": 16}
    assert most_documents(Run(schedule, None, None, None)) == 0


def test_a_corpus_smaller_than_one_pack_repeats(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[300, 301, EOD]] * 3, {"url": ["http://a.org"] * 3})
    dataset = build(make_config(prefix), 5)
    assert len(dataset) == 5
    assert dataset.plan.counts.num_epochs > 5


def test_a_second_build_opens_the_cache_and_a_new_corpus_does_not(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_bodies(50), {"url": hosts(50)})
    first = arrays(build(make_config(prefix), 10)[0])
    files = sorted(Path(f"{prefix}-cache").glob("*.meco"))
    assert arrays(build(make_config(prefix), 10)[0]) == first
    assert sorted(Path(f"{prefix}-cache").glob("*.meco")) == files
    write_corpus(tmp_path / "c", random_bodies(50, seed=9), {"url": hosts(50)})
    assert arrays(build(make_config(prefix), 10)[0]) != first


class TestRefusals:
    def test_metadata_with_a_row_too_few(self, tmp_path: Path) -> None:
        bodies = random_bodies(10)
        prefix = write_corpus(tmp_path / "c", bodies, {"url": hosts(9)})
        with pytest.raises(DataError, match=r"9 rows of metadata for 10 documents"):
            build(make_config(prefix), 5)

    def test_a_missing_field(self, tmp_path: Path) -> None:
        prefix = write_corpus(tmp_path / "c", random_bodies(10), {"url": hosts(10)})
        with pytest.raises(DataError, match=r"no metadata field 'topic'.*It holds: url"):
            build(make_config(prefix, meco=MeCoConfig(template="{topic}: ")), 5)

    def test_missing_metadata(self, tmp_path: Path) -> None:
        prefix = write_corpus(tmp_path / "c", random_bodies(10))
        with pytest.raises(DataError, match="no metadata file"):
            build(make_config(prefix), 5)

    def test_a_corpus_without_eod(self, tmp_path: Path) -> None:
        prefix = write_corpus(tmp_path / "c", [[300, 301]] * 4, {"url": hosts(4)})
        with pytest.raises(DataError, match="document 0 does not end in the tokenizer's EOD"):
            build(make_config(prefix), 5)

    def test_a_token_outside_the_vocabulary(self, tmp_path: Path) -> None:
        bodies = [[300] * 5 + [EOD]] * 4
        bodies[2] = [300, 400, EOD]
        prefix = write_corpus(tmp_path / "c", bodies, {"url": hosts(4)})
        with pytest.raises(DataError, match="document 2 holds token id 400, outside the vocab"):
            build(make_config(prefix), 5)
        # With padding the model has embeddings for more.
        assert len(build(make_config(prefix, vocab_size=401), 5)) == 5

    def test_a_negative_token(self, tmp_path: Path) -> None:
        bodies = [[300, -3, EOD]] * 4
        prefix = write_corpus(tmp_path / "c", bodies, {"url": hosts(4)}, np.int32)
        with pytest.raises(DataError, match="document 0 holds token id -3, outside the vocab"):
            build(make_config(prefix), 5)

    @pytest.mark.parametrize("mmap", [True, False])
    def test_a_token_outside_where_nobody_looked(self, tmp_path: Path, mmap: bool) -> None:
        """In a long document only its end is looked at; the sample that holds the id tells it."""
        bodies = [[300] * 2000 + [EOD], [300, EOD]]
        bodies[0][7] = 77_777
        prefix = write_corpus(tmp_path / "c", bodies, {"url": hosts(2)}, np.int32)
        dataset = build(make_config(prefix, mmap_bin_files=mmap), 6)
        with pytest.raises(DataError, match=r"c\.bin: pack \d+ .*token id 77777 outside the vocab"):
            for pack in range(6):
                dataset[pack]

    def test_an_eod_behind_an_empty_last_sequence(self, tmp_path: Path) -> None:
        builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.uint16)
        for last in (EOD, 300):
            builder.add_document(np.array([300, last]), [2, 0])
        builder.finalize(str(tmp_path / "c.idx"))
        prefix = str(tmp_path / "c")
        with pytest.raises(DataError, match="document 1 does not end in the tokenizer's EOD"):
            build(make_config(prefix, meco=MeCoConfig(template="")), 5)

    def test_an_index_that_megatron_is_told_to_read_otherwise(self, tmp_path: Path) -> None:
        """With --per-dataset-sequences-path Megatron takes the type from the vocabulary."""
        prefix = write_corpus(tmp_path / "c", random_bodies(10), {"url": hosts(10)}, np.int32)
        config = make_config(prefix, sequences_per_dataset={prefix: (10, 11)})
        with pytest.raises(DataError, match=r"10 documents of int32, this run was told .* uint16"):
            MeCoGPTDataset.build_low_level_dataset(prefix, config)
        config = make_config(prefix, sequences_per_dataset={prefix: (9, 11)})
        with pytest.raises(DataError, match="Megatron cannot open it"):
            MeCoGPTDataset.build_low_level_dataset(prefix, config)

    def test_a_remote_index_is_checked_as_megatron_opened_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Files in an object storage cannot be looked at before."""
        prefix = write_corpus(tmp_path / "c", random_bodies(10), {"url": hosts(10)})
        monkeypatch.setattr(opened_corpus, "is_object_storage_path", lambda path: True)
        config = make_config(prefix)
        assert len(MeCoGPTDataset.build_low_level_dataset(prefix, config)) == 10
        content = bytearray(Path(f"{prefix}.idx").read_bytes())
        content[34 + 4 * 10 + 8 * 3] ^= 1
        Path(f"{prefix}.idx").write_bytes(content)
        with pytest.raises(DataError, match=r"c\.idx: .*number 3 begins at byte"):
            MeCoGPTDataset.build_low_level_dataset(prefix, config)
        Path(f"{prefix}.idx").write_bytes(content[:100])
        with pytest.raises(DataError, match="Megatron cannot open it"):
            MeCoGPTDataset.build_low_level_dataset(prefix, config)

    @pytest.mark.parametrize("length", [3, 2**26 + 1, 10**12])
    def test_a_sequence_length_that_makes_no_pack(self, tmp_path: Path, length: int) -> None:
        with pytest.raises(FlagError, match="--seq-length"):
            make_config(str(tmp_path / "c"), sequence_length=length)

    @pytest.mark.parametrize("packing", ["split", "best-fit"])
    def test_a_prefix_as_long_as_a_pack(self, tmp_path: Path, packing: str) -> None:
        """Without room for its document it is refused; over the cap it is not used."""
        urls = ["http://" + "x" * 60 + ".org", "http://a.org"] * 5
        prefix = write_corpus(tmp_path / "c", [[300, 301, EOD]] * 10, {"url": urls})
        meco = MeCoConfig(template=TEMPLATE, packing=packing)
        dataset = build(make_config(prefix, meco=meco), None)
        assert dataset.prefixes.documents_with_long_prefix == 5
        assert dataset.plan.counts.documents == 10
        meco = MeCoConfig(template=TEMPLATE, packing=packing, max_prefix_tokens=100)
        with pytest.raises(FlagError, match=r"--meco-max-prefix-tokens: a prefix of 68 tokens"):
            build(make_config(prefix, meco=meco), None)

    def test_an_alignment_that_does_not_divide_the_sequence(self, tmp_path: Path) -> None:
        with pytest.raises(FlagError, match="--meco-pad-documents-to: 7 does not divide"):
            make_config("c", meco=MeCoConfig(template="", pad_documents_to=7))

    def test_more_samples_than_memory_holds(self, tmp_path: Path) -> None:
        prefix = write_corpus(tmp_path / "c", random_bodies(10), {"url": hosts(10)})
        with pytest.raises(DataError, match="more than a third of this machine's memory"):
            build(make_config(prefix), 2**62)

    def test_nothing_but_empty_documents(self, tmp_path: Path) -> None:
        prefix = write_corpus(tmp_path / "c", [[EOD]] * 4, {"url": hosts(4)})
        with pytest.raises(DataError, match="4 of them are empty"):
            build(make_config(prefix), 5)

    def test_long_prefixes_train_plain_and_are_counted(self, tmp_path: Path) -> None:
        urls = ["http://" + "x" * 40 + ".org", "http://a.org"] * 5
        prefix = write_corpus(tmp_path / "c", [[300, 301, EOD]] * 10, {"url": urls})
        dataset = build(make_config(prefix), None)
        assert dataset.prefixes.documents_with_long_prefix == 5
        shown = [d["prefix"] for i in range(len(dataset)) for d in dataset.documents_of(i)]
        assert sorted(p or "" for p in shown) == [""] * 5 + ["U:a.org\n"] * 5

    def test_documents_without_a_value_train_plain_and_are_counted(self, tmp_path: Path) -> None:
        prefix = write_corpus(tmp_path / "c", [[300, 301, EOD]] * 7, {"url": hosts(7)})
        dataset = build(make_config(prefix), None)
        assert dataset.prefixes.documents_without_value == 1
        assert dataset.plan.counts.documents_plain == 1

    @pytest.mark.parametrize(
        ("option", "flag"),
        [
            ({"reset_attention_mask": True}, "--reset-attention-mask"),
            ({"reset_position_ids": True}, "--reset-position-ids"),
            ({"eod_mask_loss": True}, "--eod-mask-loss"),
            ({"context_parallel_size": 2}, "--context-parallel-size"),
            ({"create_attention_mask": True}, "--create-attention-mask-in-dataloader"),
        ],
    )
    def test_stock_options_that_contradict(
        self, tmp_path: Path, option: dict[str, Any], flag: str
    ) -> None:
        with pytest.raises(FlagError, match=flag):
            make_config(str(tmp_path / "c"), **option)

    def test_context_parallelism_wants_documents_of_two_chunks_for_each_rank(
        self, tmp_path: Path
    ) -> None:
        prefix = str(tmp_path / "c")
        for padded_to in (4, 8):
            meco = MeCoConfig(pad_documents_to=padded_to)
            make_config(prefix, meco=meco, context_parallel_size=padded_to // 2)
        with pytest.raises(FlagError, match="Give --meco-pad-documents-to 12"):
            make_config(prefix, meco=MeCoConfig(pad_documents_to=6), context_parallel_size=2)

    def test_a_damaged_cache_is_named_and_not_read(self, tmp_path: Path) -> None:
        prefix = write_corpus(tmp_path / "c", random_bodies(50), {"url": hosts(50)})
        build(make_config(prefix), 10)
        (plan,) = Path(f"{prefix}-cache").glob("*-plan.meco")
        plan.write_bytes(plan.read_bytes()[:-100])
        with pytest.raises(DataError, match=r"plan\.meco.*damaged.*Delete it"):
            build(make_config(prefix), 10)

    @pytest.mark.parametrize("kind", ["plan", "prefixes"])
    def test_a_bit_that_flips_in_a_cache_is_told(self, tmp_path: Path, kind: str) -> None:
        prefix = write_corpus(tmp_path / "c", random_bodies(50), {"url": hosts(50)})
        build(make_config(prefix), 10)
        (path,) = Path(f"{prefix}-cache").glob(f"*-{kind}.meco")
        content = bytearray(path.read_bytes())
        content[-64] ^= 1
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{kind}\.meco.*do not match their checksum"):
            build(make_config(prefix), 10)
