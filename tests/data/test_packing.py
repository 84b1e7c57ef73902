"""Plans against the oracle: orders, random and edge lengths, ranges of the phases."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_meco import _core
from megatron_meco.data.packing import (
    Plan,
    PlanCounts,
    PlanRequest,
    build_plan,
    load_plan,
)
from megatron_meco.errors import DataError

EOD, BOS = 1, 0
ALIGNMENTS = st.sampled_from([1, 1, 2, 4, 8, 16])
"""Of packs of 16."""


def make_corpus(lengths: list[int], prefixes: list[int], bos: bool) -> _core.Corpus:
    """A corpus whose documents have these body and prefix lengths; prefix length -1: plain."""
    distinct = sorted({p for p in prefixes if p >= 0})
    return _core.Corpus(
        sequence_lengths=np.array(lengths, np.int32),
        prefix_ids=np.array([distinct.index(p) if p >= 0 else -1 for p in prefixes], np.int32),
        prefix_tokens=np.full(sum(distinct), 5, np.int32),
        prefix_offsets=np.cumsum([0, *distinct], dtype=np.int64),
        bos_id=BOS if bos else -1,
    )


def request(num_documents: int, /, **changes: Any) -> PlanRequest:
    options: dict[str, Any] = {
        "strategy": "truncate",
        "capacity": 16,
        "max_documents": 16,
        "num_packs": None,
        "first_document": 0,
        "num_documents": num_documents,
        "seed": 3,
    }
    return PlanRequest(**{**options, **changes})


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 100, 1000, 1024, 1025, 5000])
@pytest.mark.parametrize("stream", [0, 1])
def test_the_order_is_a_permutation_and_equals_the_oracle(size: int, stream: int) -> None:
    order = _core.permutation(size, 42, stream, 0, size).tolist()
    assert order == reference.permutation(size, 42, stream)
    assert sorted(order) == list(range(size))
    assert _core.permutation(size, 42, stream, size // 2, size).tolist() == order[size // 2 :]


def test_orders_look_random() -> None:
    """Positions are spread evenly, neighbours are apart, seeds and epochs differ."""
    size = 1 << 14
    order = _core.permutation(size, 1, 0, 0, size)
    counts = np.histogram2d(np.arange(size), order, bins=16)[0]
    expected = size / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 150 < chi_square < 320  # 225 degrees of freedom
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    for other in (_core.permutation(size, 2, 0, 0, size), _core.permutation(size, 1, 1, 0, size)):
        assert (order == other).mean() < 0.01


@given(
    documents=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 40), st.sampled_from([0, 1, 15, 16, 17, 1_000_000])),
            st.integers(-1, 8),
        ),
        min_size=1,
        max_size=40,
    ),
    bos=st.booleans(),
    num_packs=st.one_of(st.none(), st.integers(1, 30)),
    max_documents=st.sampled_from([1, 2, 16]),
    seed=st.integers(0, 2**64 - 1),
    align=ALIGNMENTS,
)
@settings(max_examples=300, deadline=None)
def test_truncate_equals_the_oracle(
    documents: list[tuple[int, int]],
    bos: bool,
    num_packs: int | None,
    max_documents: int,
    seed: int,
    align: int,
) -> None:
    lengths, prefixes = map(list, zip(*documents, strict=True))
    wanted = request(
        len(documents),
        num_packs=num_packs,
        max_documents=max_documents,
        seed=seed,
        alignment=align,
    )
    corpus = make_corpus(lengths, prefixes, bos)
    if max(lengths) <= 1:
        with pytest.raises(DataError, match="are empty"):
            build_plan(corpus, wanted, "c")
        return
    plan = build_plan(corpus, wanted, "c")
    # A million tokens are as many as fit, for the oracle's lists.
    bodies = [[7] * min(length, 64) for length in lengths]
    lost = [length - min(length, 64) for length in lengths]
    epochs = plan.counts.num_epochs + 1 if num_packs else 1
    order = reference.document_order(len(documents), (0, len(documents)), seed, epochs)
    packs, discarded = reference.truncate_packs(
        order,
        bodies,
        [[5] * p if p >= 0 else None for p in prefixes],
        BOS if bos else None,
        16,
        num_packs,
        max_documents,
        align,
    )
    assert pieces(plan) == documents_of(packs)
    kinds = [t.kind for p in packs for t in p.tokens]
    used = [d for pack in pieces(plan) for d in pack]
    assert plan.counts.body_tokens == kinds.count("body")
    assert plan.counts.prefix_tokens == kinds.count("prefix")
    assert plan.counts.bos_tokens == kinds.count("bos")
    assert plan.counts.alignment_tokens == kinds.count("pad")
    assert plan.counts.padding_tokens == 16 * len(packs) - len(kinds) + kinds.count("pad")
    assert plan.counts.discarded_tokens == discarded + sum(lost[d] for d in used)
    assert sum(lengths[d] for d in used) == (plan.counts.body_tokens + plan.counts.discarded_tokens)


def pieces(plan: Plan) -> list[list[int]]:
    """Documents of each pack."""
    bounds = plan.pack_offsets.tolist()
    documents = plan.piece_document.tolist()
    return [documents[a:b] for a, b in pairwise(bounds)]


def documents_of(packs: list[reference.Pack]) -> list[list[int]]:
    """The same of the oracle's packs; a document may come twice, in two visits."""
    visits = [
        dict.fromkeys((t.visit, t.document) for t in p.tokens if t.kind != "pad") for p in packs
    ]
    return [[document for _, document in pack] for pack in visits]


DOCUMENTS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 70), st.sampled_from([0, 1, 2, 15, 16, 17, 500])),
        st.integers(-1, 8),
    ),
    min_size=1,
    max_size=40,
)


@given(
    documents=DOCUMENTS,
    bos=st.booleans(),
    num_packs=st.one_of(st.none(), st.integers(1, 60)),
    max_documents=st.sampled_from([1, 2, 16]),
    repeat_prefix=st.booleans(),
    sentences=st.booleans(),
    seed=st.integers(0, 1000),
    align=ALIGNMENTS,
)
@settings(max_examples=300, deadline=None)
def test_split_equals_the_oracle(
    documents: list[tuple[int, int]],
    bos: bool,
    num_packs: int | None,
    max_documents: int,
    repeat_prefix: bool,
    sentences: bool,
    seed: int,
    align: int,
) -> None:
    lengths, prefixes = map(list, zip(*documents, strict=True))
    if max(lengths) <= 1:
        return
    corpus, borders = make_sentences(lengths, prefixes, bos, seed if sentences else None)
    wanted = request(
        len(documents),
        strategy="split",
        num_packs=num_packs,
        max_documents=max_documents,
        seed=seed,
        repeat_prefix=repeat_prefix,
        alignment=align,
    )
    plan = build_plan(corpus, wanted, "c", num_threads=2)
    bodies = [[7] * length for length in lengths]
    shown = [[5] * p if p >= 0 else None for p in prefixes]
    epochs = plan.counts.num_epochs + 1 if num_packs else 1
    order = reference.document_order(len(documents), (0, len(documents)), seed, epochs)
    head = BOS if bos else None
    packs = reference.split_pieces(
        order, bodies, shown, head, 16, num_packs, max_documents, repeat_prefix, borders, align
    )
    assert described(corpus, plan, wanted) == packs
    check_counts(plan, packs, lengths, shown, head, repeat_prefix, align)


@given(
    documents=DOCUMENTS,
    bos=st.booleans(),
    max_documents=st.sampled_from([1, 3, 16]),
    repeat_prefix=st.booleans(),
    sentences=st.booleans(),
    seed=st.integers(0, 1000),
    align=ALIGNMENTS,
)
@settings(max_examples=300, deadline=None)
def test_best_fit_places_each_token_once_and_packs_as_the_oracle(
    documents: list[tuple[int, int]],
    bos: bool,
    max_documents: int,
    repeat_prefix: bool,
    sentences: bool,
    seed: int,
    align: int,
) -> None:
    lengths, prefixes = map(list, zip(*documents, strict=True))
    if max(lengths) <= 1:
        return
    corpus, _ = make_sentences(lengths, prefixes, bos, seed if sentences else None)
    wanted = request(
        len(documents),
        strategy="best-fit",
        max_documents=max_documents,
        seed=seed,
        repeat_prefix=repeat_prefix,
        alignment=align,
    )
    plan = build_plan(corpus, wanted, "c", num_threads=2)
    packs = described(corpus, plan, wanted)
    shown = [[5] * p if p >= 0 else None for p in prefixes]
    head = BOS if bos else None
    check_counts(plan, packs, lengths, shown, head, repeat_prefix, align)
    assert plan.counts.discarded_tokens == 0
    held = sorted(piece for pack in packs for piece in pack)
    for document, length in enumerate(lengths):
        spans = [(b, e) for d, b, e in held if d == document]
        if length <= 1:
            assert spans == []
            continue
        assert spans[0][0] == 0
        assert spans[-1][1] == length
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        if int(bos) + max(prefixes[document], 0) + length <= 16:
            assert len(spans) == 1, "a document that fits was cut"
    used = [pack_size(pack, shown, head, repeat_prefix, align) for pack in packs]
    assert max(used) <= 16
    assert max(len(pack) for pack in packs) <= max_documents
    if not sentences:
        sizes = [
            size
            for length, p in zip(lengths, prefixes, strict=True)
            if length > 1
            for size in reference.chunk_sizes(length, max(p, 0), int(bos), 16, repeat_prefix, align)
        ]
        bins = sorted((16 - size, len(pack)) for size, pack in zip(used, packs, strict=True))
        assert bins == reference.best_fit_bins(sizes, 16, max_documents)


@pytest.mark.parametrize("max_documents", [1, 4, 12, 300])
@pytest.mark.parametrize("seed", range(6))
def test_best_fit_spreads_small_documents_as_the_oracle(max_documents: int, seed: int) -> None:
    """Packs of 300 with long, middling and tiny documents: rooms and numbers of documents."""
    draw = np.random.default_rng(seed)
    middle = (8, 25, 60)[seed % 3]
    lengths = np.clip(draw.lognormal(np.log(middle), 1.2, 500), 2, 900).astype(int).tolist()
    corpus = make_corpus(lengths, [-1] * 500, bos=False)
    options = {"strategy": "best-fit", "capacity": 300, "max_documents": max_documents}
    plan = build_plan(corpus, request(500, **options), "c")
    wanted = request(500, **options)
    packs = described(corpus, plan, wanted)
    bins = sorted((300 - sum(e - b for _, b, e in pack), len(pack)) for pack in packs)
    sizes = [s for n in lengths for s in reference.chunk_sizes(n, 0, 0, 300, True)]
    assert bins == reference.best_fit_bins(sizes, 300, max_documents)


def test_best_fit_leaves_no_pack_of_tiny_documents_half_empty() -> None:
    """Web-like lengths under the default cap; without spreading 0.04 % is padding."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(600), 1.177, 1_000_000), 2, 200_000).astype(np.int32)
    corpus = _core.Corpus(sequence_lengths=lengths)
    options = {"strategy": "best-fit", "capacity": 8192, "max_documents": 127}
    plan = build_plan(corpus, request(len(lengths), **options), "c")
    assert plan.counts.discarded_tokens == 0
    assert plan.counts.body_tokens == int(lengths.sum())
    assert plan.counts.padding_tokens <= 0.00005 * plan.counts.packs * 8192


@pytest.mark.parametrize(
    ("length", "strategy", "packs", "alignment", "discarded"),
    [
        *((7, strategy, 1, 3, 0) for strategy in ("truncate", "split", "best-fit")),
        *((8, strategy, 1, 0, 0) for strategy in ("truncate", "split", "best-fit")),
        (9, "truncate", 2, 7 + 0 + 7, 1),
        (9, "split", 2, 7 + 0 + 7 + 7, 0),
        (9, "best-fit", 3, 7 + 7 + 7, 0),
        *((24, strategy, 3, 0, 0) for strategy in ("truncate", "split", "best-fit")),
        (25, "truncate", 3, 0, 3),
        (25, "best-fit", 4, 7 + 7 + 7, 0),
    ],
)
def test_three_documents_around_an_alignment_of_8_in_packs_of_24(
    length: int, strategy: str, packs: int, alignment: int, discarded: int
) -> None:
    corpus = make_corpus([length] * 3, [-1] * 3, bos=False)
    options = {"strategy": strategy, "capacity": 24, "max_documents": 24, "alignment": 8}
    counts = build_plan(corpus, request(3, **options), "c").counts
    found = (counts.packs, counts.alignment_tokens, counts.discarded_tokens)
    assert found == (packs, alignment, discarded)
    assert counts.body_tokens + counts.padding_tokens == 24 * packs


def test_an_alignment_of_one_changes_nothing(tmp_path: Path) -> None:
    corpus = make_corpus([5, 20, 33] * 30, [3, -1, 2] * 30, bos=True)
    for strategy in ("truncate", "split", "best-fit"):
        wanted = request(90, strategy=strategy)
        plan = load_plan(lambda: corpus, wanted, "c", tmp_path, "c")
        assert plan.counts.alignment_tokens == 0
    assert b"alignment" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    names = {path.name for path in tmp_path.iterdir()}
    aligned = request(90, strategy="best-fit", alignment=2)
    assert load_plan(lambda: corpus, aligned, "c", tmp_path, "c").counts.alignment_tokens > 0
    assert len({path.name for path in tmp_path.iterdir()} - names) == 1


@pytest.mark.parametrize("alignment", [0, -1, 3, 32, 2**40])
def test_an_alignment_that_does_not_divide_the_pack_is_refused(alignment: int) -> None:
    corpus = make_corpus([5] * 5, [-1] * 5, bos=False)
    with pytest.raises(DataError, match="multiple of the alignment"):
        build_plan(corpus, request(5, alignment=alignment), "c")


@pytest.mark.parametrize(("align", "share"), [(4, 0.0012), (8, 0.0029), (16, 0.0062)])
def test_what_alignment_costs_on_web_like_lengths(align: int, share: float) -> None:
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(600), 1.177, 200_000), 2, 200_000).astype(np.int32)
    corpus = _core.Corpus(sequence_lengths=lengths)
    options = {"capacity": 8192, "max_documents": 127, "strategy": "best-fit", "alignment": align}
    counts = build_plan(corpus, request(len(lengths), **options), "c").counts
    assert counts.alignment_tokens / (counts.packs * 8192) == pytest.approx(share, rel=0.1)
    assert counts.padding_tokens - counts.alignment_tokens < 0.0002 * counts.packs * 8192
    assert counts.discarded_tokens == 0


def make_sentences(
    lengths: list[int], prefixes: list[int], bos: bool, seed: int | None
) -> tuple[_core.Corpus, list[list[int]]]:
    """A corpus whose documents consist of sentences of random lengths; None: of one each."""
    if seed is None:
        return make_corpus(lengths, prefixes, bos), [[] for _ in lengths]
    draw = random.Random(seed)
    sentences: list[int] = []
    indices, borders = [0], []
    for length in lengths:
        ends: list[int] = []
        while not ends or ends[-1] < length:
            ends.append(min(length, (ends[-1] if ends else 0) + draw.randint(1, 25)))
        sentences += [b - a for a, b in pairwise([0, *ends])]
        indices.append(len(sentences))
        borders.append(ends)
    distinct = sorted({p for p in prefixes if p >= 0})
    corpus = _core.Corpus(
        sequence_lengths=np.array(sentences, np.int32),
        document_indices=np.array(indices, np.int64),
        prefix_ids=np.array([distinct.index(p) if p >= 0 else -1 for p in prefixes], np.int32),
        prefix_tokens=np.full(sum(distinct), 5, np.int32),
        prefix_offsets=np.cumsum([0, *distinct], dtype=np.int64),
        bos_id=BOS if bos else -1,
    )
    return corpus, borders


def described(
    corpus: _core.Corpus, plan: Plan, wanted: PlanRequest
) -> list[list[tuple[int, int, int]]]:
    """The pieces of each pack as the assembler sees them: (document, body_begin, body_end)."""
    assembler = _core.Assembler(
        corpus=corpus,
        pack_offsets=plan.pack_offsets,
        piece_document=plan.piece_document,
        continued_piece=plan.continued_piece,
        continued_begin=plan.continued_begin,
        capacity=wanted.capacity,
        max_documents=wanted.max_documents,
        pad_id=EOD,
        view="conditioned",
        train_on_prefix=False,
        strategy=wanted.strategy,
        repeat_prefix=wanted.repeat_prefix,
        alignment=wanted.alignment,
    )
    return [
        [(p.document, p.body_begin, p.body_end) for p in assembler.pieces(i)]
        for i in range(len(plan))
    ]


def pack_size(
    pack: list[tuple[int, int, int]],
    prefixes: list[list[int] | None],
    bos: int | None,
    repeat_prefix: bool,
    align: int = 1,
) -> int:
    bodies = [[7] * (max(e for _, _, e in pack))] * len(prefixes)
    return len(reference.pieces_to_pack(pack, bodies, prefixes, bos, repeat_prefix, align).tokens)


def check_counts(
    plan: Plan,
    packs: list[list[tuple[int, int, int]]],
    lengths: list[int],
    prefixes: list[list[int] | None],
    bos: int | None,
    repeat_prefix: bool,
    align: int,
) -> None:
    """The plan's own counts against a count of the packs' tokens."""
    bodies = [[7] * length for length in lengths]
    kinds = [
        t.kind
        for pack in packs
        for t in reference.pieces_to_pack(pack, bodies, prefixes, bos, repeat_prefix, align).tokens
    ]
    counts = plan.counts
    assert counts.body_tokens == kinds.count("body")
    assert counts.prefix_tokens == kinds.count("prefix")
    assert counts.bos_tokens == kinds.count("bos")
    assert counts.alignment_tokens == kinds.count("pad")
    assert counts.padding_tokens == 16 * len(packs) - len(kinds) + kinds.count("pad")
    first = [(d, e) for pack in packs for d, b, e in pack if b == 0]
    assert counts.documents == len(first)
    assert counts.documents_cut == sum(e < lengths[d] for d, e in first)
    if counts.num_epochs == 1 and len(packs) == len(plan):
        sizes = sorted(len(pack) for pack in packs)
        assert counts.documents_per_pack["max"] == sizes[-1]
        assert counts.documents_per_pack["median"] == sizes[(len(sizes) - 1) // 2]


@pytest.mark.parametrize("strategy", ["truncate", "split", "best-fit"])
@pytest.mark.parametrize("num_packs", [None, 700, 3000])
def test_a_plan_does_not_depend_on_the_number_of_threads(
    strategy: str, num_packs: int | None
) -> None:
    """600,000 documents are several windows and many chunks, 3,000 packs stop inside one."""
    draw = np.random.default_rng(5)
    lengths = np.clip(draw.lognormal(np.log(60), 1.2, 600_000), 0, 20_000).astype(np.int32)
    corpus = _core.Corpus(
        sequence_lengths=lengths,
        prefix_ids=draw.integers(-1, 3, 600_000).astype(np.int32),
        prefix_tokens=np.full(24, 5, np.int32),
        prefix_offsets=np.array([0, 3, 10, 24], np.int64),
        bos_id=BOS,
        plain_seed=3,
        plain_threshold=2**62,
    )
    wanted = request(
        600_000, strategy=strategy, capacity=2048, max_documents=2048, num_packs=num_packs
    )
    plans = [build_plan(corpus, wanted, "c", num_threads=n) for n in (1, 2, 5)]
    for plan in plans[1:]:
        for name, value in vars(plans[0]).items():
            assert np.array_equal(getattr(plan, name), value), name
    if num_packs is None and strategy != "truncate":
        counts = plans[0].counts
        assert counts.body_tokens == int(lengths[lengths > 1].sum())
        assert counts.padding_tokens < 0.0005 * counts.packs * 2048 or strategy == "split"


@pytest.mark.parametrize("strategy", ["split", "best-fit"])
def test_a_prefix_without_room_for_a_body_is_refused(strategy: str) -> None:
    corpus = make_corpus([5], [15], bos=True)
    with pytest.raises(ValueError, match="no room"):
        build_plan(corpus, request(1, strategy=strategy), "c")


@pytest.mark.parametrize("share", [(0.0, 0.9), (0.9, 1.0), (0.25, 0.5)])
def test_a_phase_draws_from_its_share_of_the_order(share: tuple[float, float]) -> None:
    corpus = make_corpus([9] * 50, [-1] * 50, bos=False)
    wanted = request(
        20,
        first_document=10,
        share_begin=share[0],
        share_end=share[1],
        num_packs=40,
    )
    plan = build_plan(corpus, wanted, "c")
    begin, end = round(share[0] * 20), round(share[1] * 20)
    order = reference.document_order(20, (begin, end), 3, epochs=50, first=10)
    packs, _ = reference.truncate_packs(order, [[7] * 9] * 50, [None] * 50, None, 16, 40)
    assert pieces(plan) == documents_of(packs)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_each_phase_gets_a_document_where_there_are_two(share: float) -> None:
    first = request(2, share_end=share).range
    second = request(2, share_begin=share).range
    assert (first, second) == ((0, 1), (1, 2))


@pytest.mark.parametrize("strategy", ["truncate", "split", "best-fit"])
def test_lengths_beyond_32_bits(strategy: str) -> None:
    """3 * 2^31 tokens in 3,000 documents of two million."""
    lengths = [2**31 // 1000] * 3000
    corpus = make_corpus(lengths, [-1] * 3000, bos=True)
    options = {"strategy": strategy, "capacity": 2**20, "max_documents": 2**20}
    plan = build_plan(corpus, request(3000, **options), "c")
    assert plan.counts.body_tokens + plan.counts.discarded_tokens == sum(lengths) > 2**32
    assert (plan.counts.discarded_tokens > 0) == (strategy == "truncate")


@pytest.mark.parametrize("strategy", ["split", "best-fit"])
def test_a_document_beyond_32_bits(strategy: str) -> None:
    """One document of three sequences of 2^31 - 1 tokens: every piece begins where one ended."""
    capacity = 2**22
    corpus = _core.Corpus(
        sequence_lengths=np.full(3, 2**31 - 1, np.int32),
        document_indices=np.array([0, 3], np.int64),
    )
    options = {"strategy": strategy, "capacity": capacity, "max_documents": 100}
    plan = build_plan(corpus, request(1, **options), "c")
    begins = sorted(plan.continued_begin.tolist())
    total = 3 * (2**31 - 1)
    assert plan.counts.body_tokens == total
    assert begins[-1] > 2**32
    # Cuts fall on the end of a sequence where there is one in reach, else where the pack is full.
    expected = [0]
    while expected[-1] < total:
        reach = expected[-1] + capacity
        ends = [e for e in range(2**31 - 1, total + 1, 2**31 - 1) if expected[-1] < e <= reach]
        expected.append(ends[-1] if ends else reach)
    assert begins == expected[1:-1]


def test_documents_of_several_sequences() -> None:
    corpus = _core.Corpus(
        sequence_lengths=np.array([3, 4, 5, 6], np.int32),
        document_indices=np.array([0, 2, 2, 4], np.int64),
    )
    plan = build_plan(corpus, request(3, capacity=32, max_documents=32), "c")
    assert sorted(plan.piece_document.tolist()) == [0, 2]
    assert plan.counts.body_tokens == 18
    assert plan.counts.documents_empty == 1


def test_a_cached_plan_is_the_plan_that_was_built(tmp_path: Path) -> None:
    corpus = make_corpus([5, 9, 30, 1, 12], [2, -1, 3, 2, 0], bos=True)
    built = build_plan(corpus, request(5), "c")
    for _ in range(2):
        opened = load_plan(lambda: corpus, request(5), {"id": 1}, tmp_path, "c")
        for name, value in vars(built).items():
            assert np.array_equal(getattr(opened, name), value), name
    assert len(list(tmp_path.iterdir())) == 1
    load_plan(lambda: corpus, request(5, seed=4), {"id": 1}, tmp_path, "c")
    load_plan(lambda: corpus, request(5), {"id": 2}, tmp_path, "c")
    assert len(list(tmp_path.iterdir())) == 3


def test_totals() -> None:
    corpus = make_corpus([5, 9, 30, 4, 12], [2, -1, 3, 2, 0], bos=True)
    plan = build_plan(corpus, request(5), "c")
    total = PlanCounts.total([plan.counts, plan.counts])
    assert total.body_tokens == 2 * plan.counts.body_tokens
    assert total.documents_per_pack == plan.counts.documents_per_pack


@pytest.mark.parametrize(
    "changes",
    [
        {"capacity": 1},
        {"max_documents": 0},
        {"num_documents": 6},
        {"first_document": -1},
        {"strategy": "none"},
    ],
)
def test_the_core_refuses_what_is_out_of_range(changes: dict[str, Any]) -> None:
    corpus = make_corpus([5] * 5, [-1] * 5, bos=False)
    with pytest.raises(ValueError, match=r"."):
        build_plan(corpus, request(5, **changes), "c")


HUGE = [-(2**63), -(2**31), -1, 2**31, 2**62, 2**63 - 1]


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize(
    "name",
    [
        *("capacity", "max_documents", "num_packs", "first_document", "num_documents"),
        *("range_begin", "range_end", "num_threads"),
    ],
)
def test_the_core_survives_any_number(name: str, value: int) -> None:
    options: dict[str, Any] = {
        **{"strategy": "best-fit", "capacity": 16, "max_documents": 16, "num_packs": None},
        **{"first_document": 0, "num_documents": 5, "range_begin": 0, "range_end": 5, "seed": 1},
        **{"repeat_prefix": True, "num_threads": 1},
    }
    corpus = make_corpus([5] * 5, [-1] * 5, bos=False)
    if (name, value) == ("num_packs", 2**31) or (name == "max_documents" and value > 0):
        pytest.skip("so many there may be")
    for changes in ({name: value}, {name: value, "num_documents": value}):
        with pytest.raises((ValueError, TypeError)):
            _core.build_plan(corpus, **{**options, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        *({"capacity": value} for value in [*HUGE, 0, 1, 2**26 + 1]),
        *({"max_documents": value} for value in (-(2**63), -1, 0)),
        *({"token_bytes": value} for value in (-1, 0, 3, 16, 2**31 - 1)),
        *({"vocab_size": value} for value in (-1, 0, -(2**63))),
        {"pack_offsets": np.zeros((1, 2), np.int64)},
        {"pack_offsets": np.zeros(0, np.int64)},
        {"continued_begin": np.zeros(1, np.int64)},
        {"bin": None},
        {"bin": np.zeros((2, 2), np.uint8)},
        {"corpus": None},
    ],
    ids=str,
)
def test_the_assembler_refuses_what_it_cannot_use(changes: dict[str, Any]) -> None:
    options: dict[str, Any] = {
        "corpus": make_corpus([5] * 5, [-1] * 5, bos=False),
        "pack_offsets": np.array([0, 2], np.int64),
        "piece_document": np.array([0, 1], np.int32),
        "continued_piece": np.zeros(0, np.int64),
        "continued_begin": np.zeros(0, np.int64),
        **{"capacity": 16, "max_documents": 16, "pad_id": 1, "view": "conditioned"},
        **{"train_on_prefix": False, "strategy": "truncate", "repeat_prefix": True},
        "bin": np.zeros(50, np.uint8),
        "sequence_pointers": np.arange(0, 50, 10),
        "token_bytes": 2,
    }
    assembler = _core.Assembler(**options)
    assert assembler.sample(0)[4].tolist()[:3] == [0, 5, 10]
    for pack in (-1, 1, 2**63 - 1, -(2**63)):
        with pytest.raises(IndexError):
            assembler.sample(pack)
    with pytest.raises((ValueError, TypeError)):
        _core.Assembler(**{**options, **changes})


def test_the_largest_cap_is_none_at_all() -> None:
    corpus = make_corpus([5] * 5, [-1] * 5, bos=False)
    plans = [build_plan(corpus, request(5, max_documents=n), "c") for n in (16, 2**63 - 1)]
    assert np.array_equal(plans[0].pack_offsets, plans[1].pack_offsets)


def test_damaged_lengths_and_prefixes_are_told() -> None:
    corpus = make_corpus([5, -7, 5], [-1] * 3, bos=False)
    with pytest.raises(DataError, match=r"c: .*a length below zero.*meco verify"):
        build_plan(corpus, request(3), "c")


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence_lengths": np.array([1, 2], np.int64)},  # wrong dtype: never converted silently
        {"document_indices": np.array([0, 2, 1], np.int64)},
        {"document_indices": np.array([0, 9], np.int64)},
        {"prefix_ids": np.array([0], np.int32)},
        {"prefix_offsets": np.array([0, 9], np.int64)},
    ],
)
def test_the_core_refuses_arrays_that_do_not_fit(changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "sequence_lengths": np.array([1, 2], np.int32),
        "document_indices": None,
        "prefix_ids": None,
        "prefix_tokens": np.zeros(3, np.int32),
        "prefix_offsets": np.zeros(1, np.int64),
        "bos_id": -1,
        "plain_seed": 0,
        "plain_threshold": 0,
    }
    with pytest.raises((ValueError, TypeError)):
        _core.Corpus(**{**arguments, **changes})


def test_hostile_plans_and_tables_are_told() -> None:
    """Whatever numbers a cache or an index holds: samples inside the arrays, or an error."""
    draw = random.Random(5)
    odd = [-(2**62), -1, 0, 1, 2, 3, 5, 9, 2**31 - 1, 2**62]

    def spoil(values: list[int], limit: int) -> list[int]:
        chosen = [draw.choice(odd) if draw.random() < 0.05 else v for v in values]
        return [max(-limit, min(v, limit - 1)) for v in chosen]

    outcomes = {"sample": 0, "told": 0}
    for _ in range(3000):
        narrow, wide = 2**31, 2**63
        try:
            corpus = _core.Corpus(
                sequence_lengths=np.array(spoil([5, 3, 9, 2, 7], narrow), np.int32),
                prefix_ids=np.array(spoil([0, 1, -1, 0, 1], narrow), np.int32),
                prefix_tokens=np.arange(5, dtype=np.int32),
                prefix_offsets=np.array(spoil([0, 2, 5], wide), np.int64),
                bos_id=BOS,
            )
            assembler = _core.Assembler(
                corpus=corpus,
                pack_offsets=np.array(spoil([0, 2, 3, 6], wide), np.int64),
                piece_document=np.array(spoil([0, 1, 2, 2, 3, 4], narrow), np.int32),
                continued_piece=np.array(spoil([3], wide), np.int64),
                continued_begin=np.array(spoil([4], wide), np.int64),
                capacity=16,
                max_documents=16,
                pad_id=EOD,
                view="conditioned",
                train_on_prefix=False,
                strategy=draw.choice(["truncate", "split", "best-fit"]),
                repeat_prefix=True,
                bin=np.zeros(52, np.uint8),
                sequence_pointers=np.array(spoil([0, 10, 16, 34, 38], wide), np.int64),
                token_bytes=2,
            )
            tokens = [assembler.sample(pack)[0] for pack in range(3)]
        except (IndexError, ValueError):
            outcomes["told"] += 1
        else:
            assert all(len(t) == 16 and t.min() >= 0 and t.max() < 5 for t in tokens)
            outcomes["sample"] += 1
    assert min(outcomes.values()) > 100, outcomes
