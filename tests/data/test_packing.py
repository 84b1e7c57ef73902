"""Plans against the oracle: orders, random and edge lengths, ranges of the phases."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_meco import _core
from megatron_meco.data.packing import Plan, PlanCounts, PlanRequest, build_plan, load_plan
from megatron_meco.errors import DataError

EOD, BOS = 1, 0


def make_corpus(lengths: list[int], prefixes: list[int], bos: bool) -> _core.Corpus:
    """A corpus whose documents have these body and prefix lengths; prefix length -1: plain."""
    distinct = sorted({p for p in prefixes if p >= 0})
    return _core.Corpus(
        sequence_lengths=np.array(lengths, np.int32),
        document_indices=None,
        prefix_ids=np.array([distinct.index(p) if p >= 0 else -1 for p in prefixes], np.int32),
        prefix_tokens=np.full(sum(distinct), 5, np.int32),
        prefix_offsets=np.cumsum([0, *distinct], dtype=np.int64),
        bos_id=BOS if bos else -1,
        plain_seed=0,
        plain_threshold=0,
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
)
@settings(max_examples=300, deadline=None)
def test_truncate_equals_the_oracle(
    documents: list[tuple[int, int]],
    bos: bool,
    num_packs: int | None,
    max_documents: int,
    seed: int,
) -> None:
    lengths, prefixes = map(list, zip(*documents, strict=True))
    wanted = request(len(documents), num_packs=num_packs, max_documents=max_documents, seed=seed)
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
    )
    assert pieces(plan) == documents_of(packs)
    kinds = [t.kind for p in packs for t in p.tokens]
    used = [d for pack in pieces(plan) for d in pack]
    assert plan.counts.body_tokens == kinds.count("body")
    assert plan.counts.prefix_tokens == kinds.count("prefix")
    assert plan.counts.bos_tokens == kinds.count("bos")
    assert plan.counts.padding_tokens == 16 * len(packs) - len(kinds)
    assert plan.counts.discarded_tokens == discarded + sum(lost[d] for d in used)
    assert sum(lengths[d] for d in used) == (plan.counts.body_tokens + plan.counts.discarded_tokens)


def pieces(plan: Plan) -> list[list[int]]:
    """Documents of each pack."""
    bounds = plan.pack_offsets.tolist()
    documents = plan.piece_document.tolist()
    return [documents[a:b] for a, b in pairwise(bounds)]


def documents_of(packs: list[reference.Pack]) -> list[list[int]]:
    """The same of the oracle's packs; a document may come twice, in two visits."""
    visits = [dict.fromkeys((t.visit, t.document) for t in p.tokens) for p in packs]
    return [[document for _, document in pack] for pack in visits]


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


def test_lengths_beyond_32_bits() -> None:
    """3 * 2^31 tokens in 3,000 documents of two million."""
    lengths = [2**31 // 1000] * 3000
    corpus = make_corpus(lengths, [-1] * 3000, bos=True)
    plan = build_plan(corpus, request(3000, capacity=2**20, max_documents=2**20), "c")
    assert plan.counts.body_tokens + plan.counts.discarded_tokens == sum(lengths) > 2**32


def test_documents_of_several_sequences() -> None:
    corpus = _core.Corpus(
        sequence_lengths=np.array([3, 4, 5, 6], np.int32),
        document_indices=np.array([0, 2, 2, 4], np.int64),
        prefix_ids=None,
        prefix_tokens=np.zeros(0, np.int32),
        prefix_offsets=np.zeros(1, np.int64),
        bos_id=-1,
        plain_seed=0,
        plain_threshold=0,
    )
    plan = build_plan(corpus, request(3, capacity=32, max_documents=32), "c")
    assert sorted(plan.piece_document.tolist()) == [0, 2]
    assert plan.counts.body_tokens == 18
    assert plan.counts.documents_empty == 1


def test_a_cached_plan_is_the_plan_that_was_built(tmp_path: Path) -> None:
    corpus = make_corpus([5, 9, 30, 1, 12], [2, -1, 3, 2, 0], bos=True)
    built = build_plan(corpus, request(5), "c")
    for _ in range(2):
        opened = load_plan(corpus, request(5), {"id": 1}, tmp_path, "c")
        for name, value in vars(built).items():
            assert np.array_equal(getattr(opened, name), value), name
    assert len(list(tmp_path.iterdir())) == 1
    load_plan(corpus, request(5, seed=4), {"id": 1}, tmp_path, "c")
    load_plan(corpus, request(5), {"id": 2}, tmp_path, "c")
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
