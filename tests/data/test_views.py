"""The three views of a validation pack against the oracle, and the rules of the shuffle."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_meco import _core

BOS, EOD, LENGTH = 0, 1, 48
VIEWS = ("conditioned", "plain", "shuffled")


class Packed:
    """One epoch of a small corpus, and its packs by the oracle's account of the same pieces."""

    def __init__(
        self,
        bodies: list[list[int]],
        table: list[list[int]],
        prefix_ids: list[int],
        *,
        bos: int | None = BOS,
        strategy: str = "best-fit",
        repeat_prefix: bool = True,
        train_on_prefix: bool = False,
        align: int = 1,
    ) -> None:
        self.bodies = bodies
        self.prefixes = [table[i] if i >= 0 else None for i in prefix_ids]
        self.train_on_prefix = train_on_prefix
        self.align = align
        lengths = [len(body) for body in bodies]
        corpus = _core.Corpus(
            sequence_lengths=np.array(lengths, np.int32),
            prefix_ids=np.array(prefix_ids, np.int32),
            prefix_tokens=np.array([i for tokens in table for i in tokens], np.int32),
            prefix_offsets=np.cumsum([0, *map(len, table)], dtype=np.int64),
            bos_id=-1 if bos is None else bos,
        )
        rules: dict[str, Any] = {
            **{"strategy": strategy, "capacity": LENGTH, "max_documents": LENGTH},
            **{"repeat_prefix": repeat_prefix, "alignment": align},
        }
        plan = _core.build_plan(
            corpus,
            **rules,
            **{"num_packs": None, "first_document": 0, "num_documents": len(bodies)},
            **{"range_begin": 0, "range_end": len(bodies), "seed": 3, "num_threads": 1},
        )
        self.num_packs = len(plan["pack_offsets"]) - 1
        del plan["counts"], plan["packs_by_size"]
        self.assemblers = {
            view: _core.Assembler(
                corpus=corpus,
                **plan,
                **rules,
                **{"pad_id": EOD, "view": view, "train_on_prefix": train_on_prefix},
                bin=np.array([i for body in bodies for i in body], np.uint16).view(np.uint8),
                sequence_pointers=2 * np.cumsum([0, *lengths[:-1]]),
                token_bytes=2,
            )
            for view in VIEWS
        }
        self.oracle = [self._oracle(pack, bos, repeat_prefix) for pack in range(self.num_packs)]

    def _oracle(self, pack: int, bos: int | None, repeat_prefix: bool) -> reference.Pack:
        pieces = [
            (p.document, p.body_begin, p.body_end)
            for p in self.assemblers["conditioned"].pieces(pack)
        ]
        made = reference.pieces_to_pack(
            pieces, self.bodies, self.prefixes, bos, repeat_prefix, self.align
        )
        # `truncate` may end a pack inside a head.
        return reference.Pack(made.tokens[:LENGTH])

    def sample(self, view: str, pack: int) -> tuple[dict[str, Any], list[float]]:
        """A sample as the oracle's arrays, and its compared labels."""
        arrays = self.assemblers[view].sample(pack)
        names = ("tokens", "labels", "loss_mask", "position_ids")
        sample = {name: array.tolist() for name, array in zip(names, arrays, strict=False)}
        sample |= {"cu_seqlens": np.unique(arrays[4]).tolist(), "max_seqlen": int(arrays[5])}
        return sample, self.assemblers[view].compared(pack).tolist()

    def check(self) -> None:
        """All packs in all views equal the oracle's, and the same tokens are compared in each."""
        for pack, oracle in enumerate(self.oracle):
            bodies = []
            for view in VIEWS:
                shown = reference.in_view(oracle, self.prefixes, view, pack, self.align, LENGTH)
                sample, compared = self.sample(view, pack)
                assert sample == shown.arrays(LENGTH, EOD, self.train_on_prefix), (pack, view)
                assert compared == shown.compared(LENGTH), (pack, view)
                counted = zip(sample["labels"], sample["loss_mask"], compared, strict=True)
                assert all(mask == 1 for _, mask, mark in counted if mark)
                bodies.append(
                    [label for label, mark in zip(sample["labels"], compared, strict=True) if mark]
                )
            assert bodies[0] == bodies[1] == bodies[2]
            conditioned, shuffled = (self.assemblers[v].sample(pack) for v in VIEWS[::2])
            assert int(conditioned[6]) == int(shuffled[6])
            assert Counter(conditioned[0].tolist()) == Counter(shuffled[0].tolist())


def numbered(lengths: list[int], base: int = 100) -> list[list[int]]:
    """Bodies whose tokens are all different, so that none can be taken for another."""
    bounds = np.cumsum([base, *lengths]).tolist()
    return [list(range(a, b)) for a, b in pairwise(bounds)]


@given(
    documents=st.lists(
        st.tuples(
            st.one_of(st.integers(2, 20), st.sampled_from([0, 1, 2, LENGTH, 3 * LENGTH])),
            st.integers(-1, 5),
        ),
        min_size=1,
        max_size=40,
    ),
    table=st.lists(st.lists(st.integers(20, 22), max_size=9), min_size=6, max_size=6),
    bos=st.sampled_from([BOS, None]),
    strategy=st.sampled_from(["truncate", "split", "best-fit"]),
    repeat_prefix=st.booleans(),
    train_on_prefix=st.booleans(),
    align=st.sampled_from([1, 1, 2, 4, 6, 16, LENGTH]),
)
@settings(max_examples=300, deadline=None)
def test_views_equal_the_oracle(
    documents: list[tuple[int, int]], table: list[list[int]], **options: Any
) -> None:
    lengths, prefix_ids = map(list, zip(*documents, strict=True))
    Packed(numbered(lengths), table, prefix_ids, **options).check()


@pytest.mark.parametrize("strategy", ["truncate", "split", "best-fit"])
@pytest.mark.parametrize("bos", [BOS, None])
def test_as_few_pieces_as_possible_keep_their_prefix(strategy: str, bos: int | None) -> None:
    draw = random.Random(4)
    lengths = [draw.randint(2, 7) for _ in range(500)]
    table = [[20 + i] * (i + 1) for i in range(5)]
    prefix_ids = [draw.choice([-1, 0, 0, 0, 1, 2, 3, 4]) for _ in lengths]
    packed = Packed(numbered(lengths), table, prefix_ids, bos=bos, strategy=strategy)
    packed.check()
    kept = 0
    for pack in range(packed.num_packs):
        own = packed.assemblers["conditioned"].pieces(pack)
        shown = packed.assemblers["shuffled"].pieces(pack)
        moving = [
            (a.prefix_id, b.prefix_id)
            for a, b in zip(own, shown, strict=True)
            if a.prefix_id >= 0
            and a.prefix_tokens == len(table[a.prefix_id])
            and a.body_begin < a.body_end
        ]
        most = max(Counter(a for a, _ in moving).values(), default=0)
        same = sum(a == b for a, b in moving)
        assert same == max(0, 2 * most - len(moving))
        kept += same
    assert kept > 0, "no pack had a prefix on more than half of its pieces"


@pytest.mark.parametrize(
    ("table", "prefix_ids"),
    [
        ([[20]], [0, 0, 0]),  # all the same
        ([[20], [20]], [0, 1, 0]),  # the same tokens under two numbers
        ([[20], [21]], [0, -1, -1]),  # one alone
        ([[], []], [0, 1, 0]),  # nothing to exchange
        ([[20]], [-1, -1, -1]),
    ],
)
def test_nothing_is_compared_where_no_prefix_can_change(
    table: list[list[int]], prefix_ids: list[int]
) -> None:
    packed = Packed(numbered([5, 6, 7]), table, prefix_ids)
    packed.check()
    assert packed.num_packs == 1
    for view in VIEWS:
        sample, compared = packed.sample(view, 0)
        assert not any(compared)
        assert view == "plain" or sample == packed.sample("conditioned", 0)[0]


def test_a_pack_by_hand() -> None:
    """Documents under prefixes of one and two tokens, and one that has none."""
    bodies = [[100, 101, EOD], [110, EOD], [120, EOD]]
    packed = Packed(bodies, [[20], [21, 22]], [0, 1, -1], strategy="truncate", bos=BOS)
    order = [p.document for p in packed.assemblers["plain"].pieces(0)]
    expected = {
        0: ([BOS, 21, 22, 100, 101, EOD], [0, 0, 1, 1, 1, 0]),
        1: ([BOS, 20, 110, EOD], [0, 1, 1, 0]),
        2: ([BOS, 120, EOD], [0, 0, 0]),
    }
    sample, compared = packed.sample("shuffled", 0)
    tokens = [i for document in order for i in expected[document][0]]
    assert sample["tokens"][: len(tokens)] == tokens
    assert compared[: len(tokens)] == [m for document in order for m in expected[document][1]]
    assert not any(compared[len(tokens) :])


def test_an_unknown_view_is_refused() -> None:
    corpus = _core.Corpus(sequence_lengths=np.array([5], np.int32))
    plan = {"pack_offsets": np.array([0, 1]), "piece_document": np.zeros(1, np.int32)}
    with pytest.raises(ValueError, match="unknown view: hidden"):
        _core.Assembler(
            corpus=corpus,
            **plan,
            **{"continued_piece": np.zeros(0, np.int64), "continued_begin": np.zeros(0, np.int64)},
            **{"capacity": 16, "max_documents": 16, "pad_id": 1, "view": "hidden"},
            **{"train_on_prefix": False, "strategy": "split", "repeat_prefix": True},
        )
