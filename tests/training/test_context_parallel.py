"""Context parallelism: which rank holds which tokens, and attention over what the ranks hold."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from runs import launch  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_meco.training.attention import _attention_by_document  # noqa: E402
from megatron_meco.training.context_parallel import RankLayout, places_by_rank  # noqa: E402

SCRIPT = Path(__file__).with_name("context_parallel_ranks.py")


def bounds_of(num_ranks: int, *chunks: int) -> list[int]:
    """Borders of documents of so many times 2 * `num_ranks` tokens, with an empty tail."""
    bounds = [0]
    for length in (*chunks, 0, 0):
        bounds.append(bounds[-1] + 2 * num_ranks * length)
    return bounds


def places_by_hand(bounds: list[int], num_ranks: int) -> list[list[int]]:
    """Transformer Engine's layout, chunk by chunk."""
    found: list[list[int]] = [[] for _ in range(num_ranks)]
    for begin, end in pairwise(bounds):
        size = (end - begin) // (2 * num_ranks)
        for rank in range(num_ranks):
            for chunk in (rank, 2 * num_ranks - 1 - rank):
                found[rank] += range(begin + chunk * size, begin + (chunk + 1) * size)
    return found


PACKS = [(3,), (1, 1, 1), (5, 1, 2), (1, 7), (2, 0, 4)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("chunks", PACKS)
def test_each_rank_holds_its_two_chunks_of_every_document(
    chunks: tuple[int, ...], num_ranks: int
) -> None:
    bounds = bounds_of(num_ranks, *chunks)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    found = places_by_rank(cu_seqlens, bounds[-1], num_ranks)
    assert found.tolist() == places_by_hand(bounds, num_ranks)
    for rank in range(num_ranks):
        layout = RankLayout.of(cu_seqlens, bounds[-1], num_ranks, rank)
        assert layout.places.tolist() == found[rank].tolist()


def qkv(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, 8) for heads in (4, 2, 2)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    return _attention_by_document(q, k, v, cu_q, cu_k, scale=0.3, dropout=0.0, window=None)


def by_ranks(states: list[Tensor], cu_seqlens: Tensor, num_ranks: int, rows: Tensor) -> Tensor:
    """The attention of all ranks, each of which holds a row of places, put together again."""
    q, k, v = states
    num_tokens = q.size(0)
    gathered = rows.reshape(-1)
    outputs = []
    for rank in range(num_ranks):
        layout = RankLayout.of(cu_seqlens, num_tokens, num_ranks, rank)
        outputs.append(layout.attention(q[rows[rank]], k[gathered], v[gathered], attend))
    return torch.cat(outputs)[gathered.argsort()]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("chunks", PACKS)
def test_all_ranks_together_compute_what_one_does(chunks: tuple[int, ...], num_ranks: int) -> None:
    """Values and gradients, in float64."""
    bounds = bounds_of(num_ranks, *chunks)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    rows = places_by_rank(cu_seqlens, bounds[-1], num_ranks)
    one, many = ([x.requires_grad_() for x in qkv(bounds[-1])] for _ in range(2))
    expected = attend(*one, cu_seqlens, cu_seqlens)
    found = by_ranks(many, cu_seqlens, num_ranks, rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    for out in (found, expected):
        (out * weight).sum().backward()
    for x, y in zip(one, many, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_a_document_reaches_no_other_unless_ranks_are_cut_by_sequence(per_sequence: bool) -> None:
    """Megatron's own loader cuts by sequence: then the same check finds the leak."""
    num_ranks = 2
    bounds = bounds_of(num_ranks, 5, 1, 2)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    cut_at = torch.tensor([0, bounds[-1]], dtype=torch.int32) if per_sequence else cu_seqlens
    rows = places_by_rank(cut_at, bounds[-1], num_ranks)
    states = qkv(bounds[-1])
    before = by_ranks(states, cu_seqlens, num_ranks, rows)
    leaks = 0
    for begin, end in pairwise(bounds):
        if begin == end:
            continue
        changed = [x.clone() for x in states]
        for x in changed:
            x[begin:end] += 1
        same = (by_ranks(changed, cu_seqlens, num_ranks, rows) == before).flatten(1).all(1)
        others = torch.ones(bounds[-1], dtype=torch.bool)
        others[begin:end] = False
        leaks += int((~same[others]).sum())
        assert not bool(same[begin:end].any()) or per_sequence
    assert (leaks > 0) == per_sequence


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_model_on_several_ranks_is_the_model_on_one(ranks: int) -> None:
    """Logits, gradients through the gathered keys and values, documents apart on every rank."""
    result = launch([str(SCRIPT), "local"], ranks)
    assert result.status == 0, result.log[-3000:]
    reports = json.loads(result.log.splitlines()[-1])
    assert len(reports) == ranks
    for report in reports:
        assert report["apart"]
        assert report["logits"] < 1e-12
        assert report["gradients"] < 1e-12
