"""The plan: which documents make up which pack.

A thin layer over `_core` (C++): it names the strategies, keys and caches the plan, and counts what
a plan costs. Strategies:

    truncate  the paper's: documents in order until the pack is full, the rest of the last one is
              discarded, the next pack starts with a new document
    split     documents in order, too; the rest of a cut one opens the next pack, under its own BOS
              and prefix; nothing is discarded
    best-fit  documents longer than a pack are split, all pieces of a window of the order are placed
              best-fit-decreasing with room set aside for tiny ones, and the packs of the window
              shuffled; nothing is discarded, and no document that fits a pack is cut

The order of the documents is a seeded permutation that is computed, never stored. Documents of a
split are dealt to the two phases by their place in that permutation, so the phases share none.
Cost: 4 bytes for each document visit and 8 for each pack, memory-mapped by every rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_meco import _core
from megatron_meco.data.array_file import load_or_build
from megatron_meco.data.fingerprint import digest
from megatron_meco.data.progress import BuildProgress
from megatron_meco.errors import DataError, FlagError

KIND = "pack plan"
PACKING_RULES = {"truncate": 1, "split": 1, "best-fit": 2}
"""Part of every cache key and of a run's fingerprint; raise one when the same inputs give another
plan."""

_VERSION = 2
"""Part of every cache key, too: of what the strategies have in common."""

# Not in a plan's file where they are 0, so that its bytes are those of before there were these.
_LATER_COUNTS = ("alignment_tokens", "suffix_tokens")


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """All that decides a plan, apart from the lengths of documents and prefixes.

    Attributes:
        strategy: One of `megatron_meco.config.PACKING_STRATEGIES`.
        capacity: Tokens in a pack (Megatron's sequence length).
        max_documents: Cap on documents in a pack.
        num_packs: Packs to make, over as many epochs as it takes; None: one epoch.
        first_document: First document of the split.
        num_documents: Documents of the split.
        share_begin: The phase's documents are those at [share_begin, share_end) of the split's
            permuted order, as shares.
        share_end: See `share_begin`.
        seed: Decides the order.
        repeat_prefix: Whether every piece that continues a document has its prefix again.
        repeat_every: Tokens of a body after which its prefix is repeated within a piece; 0: never.
        alignment: Every segment of a pack, its final padding included, is a multiple of it.
    """

    strategy: str
    capacity: int
    max_documents: int
    num_packs: int | None
    first_document: int
    num_documents: int
    share_begin: float = 0.0
    share_end: float = 1.0
    seed: int = 0
    repeat_prefix: bool = True
    repeat_every: int = 0
    alignment: int = 1

    @property
    def range(self) -> tuple[int, int]:
        """Positions of the phase's documents in the permuted order, half-open.

        A phase with any share at all gets at least one document, if there are enough.
        """
        return self._place(self.share_begin), self._place(self.share_end)

    def _place(self, share: float) -> int:
        place = round(share * self.num_documents)
        if 0 < share < 1 and self.num_documents > 1:
            return min(max(place, 1), self.num_documents - 1)
        return place


@dataclass(frozen=True)
class PlanCounts:
    """What a plan holds and what it costs.

    Tokens of a body include its EOD. `padding_tokens` include `alignment_tokens`, which stand
    behind a piece and in its segment.
    """

    documents: int = 0
    packs: int = 0
    body_tokens: int = 0
    prefix_tokens: int = 0
    suffix_tokens: int = 0
    bos_tokens: int = 0
    padding_tokens: int = 0
    discarded_tokens: int = 0
    documents_cut: int = 0
    documents_plain: int = 0
    documents_empty: int = 0
    num_epochs: int = 0
    alignment_tokens: int = 0
    documents_per_pack: dict[str, float] = field(default_factory=dict)

    @classmethod
    def total(cls, parts: Iterable[PlanCounts]) -> PlanCounts:
        """Sum of several plans.

        Documents per pack are the pack-weighted mean of the medians and the worst of the rest.
        """
        rows = [part for part in parts if part.packs]
        sums = {
            f.name: sum(getattr(row, f.name) for row in rows)
            for f in fields(cls)
            if f.name not in ("documents_per_pack", "num_epochs")
        }
        per_pack: dict[str, float] = {}
        if rows:
            weights = [row.packs for row in rows]
            medians = [row.documents_per_pack["median"] for row in rows]
            per_pack = {
                "median": float(np.average(medians, weights=weights)),
                "p99": max(row.documents_per_pack["p99"] for row in rows),
                "max": max(row.documents_per_pack["max"] for row in rows),
            }
        epochs = max((row.num_epochs for row in rows), default=0)
        return cls(**sums, num_epochs=epochs, documents_per_pack=per_pack)


@dataclass(frozen=True)
class Plan:
    """A plan, in memory or mapped from its cache file.

    Attributes:
        pack_offsets: (num_packs + 1,), int64; pack `p` holds pieces
            [pack_offsets[p], pack_offsets[p + 1]).
        piece_document: (num_pieces,), int32; document of each piece.
        continued_piece: (num_continued,), int64, rising; pieces that begin inside a document.
        continued_begin: (num_continued,), int64; the body token they begin at.
        one_sequence_each: Whether every document of the corpus is one Megatron sequence, which is
            not to be found out again by each rank.
        counts: What it holds and costs.
    """

    pack_offsets: NDArray[np.int64]
    piece_document: NDArray[np.int32]
    continued_piece: NDArray[np.int64]
    continued_begin: NDArray[np.int64]
    one_sequence_each: bool
    counts: PlanCounts

    def __len__(self) -> int:
        return len(self.pack_offsets) - 1


def load_plan(
    corpus: Callable[[], _core.Corpus],
    request: PlanRequest,
    identity: Any,
    cache_folder: Path,
    where: str,
) -> Plan:
    """Open the cached plan, building it first if needed.

    Args:
        corpus: Gives lengths of documents and prefixes; called only when the plan is built.
        request: What to build.
        identity: What names the corpus and its prefixes (JSON-serialisable).
        cache_folder: Where the plan is or will be.
        where: Names the corpus in messages.

    Raises:
        DataError: When the documents do not suffice for a single pack, or the cached file is
            damaged.
        FlagError: When prefix and suffix leave no room for their document.
    """
    version = _VERSION + PACKING_RULES[request.strategy]
    asked = dict(vars(request))
    if request.alignment == 1:
        del asked["alignment"]  # plans made before there was one keep their names
    if request.repeat_every == 0:
        del asked["repeat_every"]  # likewise
    key = {"version": version, "corpus": identity, "request": asked}
    path = cache_folder / f"{digest(key)}-plan.meco"

    def build() -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        with BuildProgress(f"packing {where}") as progress:
            plan = build_plan(corpus(), request, where, progress=progress)
        arrays = {k: v for k, v in vars(plan).items() if isinstance(v, np.ndarray)}
        counts = {k: v for k, v in vars(plan.counts).items() if k not in _LATER_COUNTS or v}
        header = {"counts": counts, "one_sequence_each": plan.one_sequence_each}
        return header, arrays

    file = load_or_build(path, KIND, build)
    file.check(
        pack_offsets=np.int64,
        piece_document=np.int32,
        continued_piece=np.int64,
        continued_begin=np.int64,
    )
    try:
        return Plan(
            **file.arrays,
            one_sequence_each=file.header["one_sequence_each"],
            counts=PlanCounts(**file.header["counts"]),
        )
    except (KeyError, TypeError) as error:
        raise file.damaged("its header makes no sense") from error


def build_plan(
    corpus: _core.Corpus,
    request: PlanRequest,
    where: str,
    *,
    num_threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Plan:
    """Build a plan in memory.

    Args:
        corpus: Lengths of documents and prefixes.
        request: What to build.
        where: Names the corpus in messages.
        num_threads: None: one for each core of this process. The plan does not depend on it.
        progress: Told the share that is done, now and then.

    Raises:
        DataError: When no document can be placed, the plan does not fit into memory, or what it is
            made from is damaged.
        FlagError: When prefix and suffix leave no room for their document.
    """
    begin, end = request.range
    if request.strategy != "truncate":
        _check_room(corpus, request.capacity)
    try:
        result = _core.build_plan(
            corpus,
            strategy=request.strategy,
            capacity=request.capacity,
            max_documents=request.max_documents,
            num_packs=request.num_packs,
            first_document=request.first_document,
            num_documents=request.num_documents,
            range_begin=begin,
            range_end=end,
            seed=request.seed & 0xFFFF_FFFF_FFFF_FFFF,
            repeat_prefix=request.repeat_prefix,
            repeat_every=request.repeat_every,
            alignment=request.alignment,
            num_threads=num_threads or len(os.sched_getaffinity(0)),
            progress=progress,
        )
    except IndexError as error:  # std::out_of_range
        raise DataError(
            f"its lengths or prefixes are damaged ({error})",
            where=where,
            remedy="Look at it with `meco verify`, delete the data cache and start again.",
        ) from error
    except (MemoryError, OverflowError, ValueError) as error:  # std::length_error among them
        raise DataError(
            f"cannot be packed into {request.capacity:,} tokens each ({error or 'no memory'})",
            where=where,
            remedy="Ask for fewer samples, or longer or shorter sequences.",
        ) from error
    counts = result.pop("counts")
    per_pack = _documents_per_pack(result.pop("packs_by_size"))
    num_packs = len(result["pack_offsets"]) - 1
    if num_packs == 0 and request.num_packs != 0:
        raise DataError(
            f"no document to train on: {end - begin} of {request.num_documents} documents belong "
            f"here, {counts['documents_empty']} of them are empty",
            where=where,
            remedy="Use a larger corpus, or another --split or --meco-cooldown-fraction.",
        )
    return Plan(
        **result,
        one_sequence_each=corpus.one_sequence_each,
        counts=PlanCounts(**counts, packs=num_packs, documents_per_pack=per_pack),
    )


def _check_room(corpus: _core.Corpus, capacity: int) -> None:
    """Refuse prefixes and suffixes that leave no room for a document where none is dropped."""
    if corpus.longest_head >= capacity:
        raise FlagError(
            f"a prefix of {corpus.longest_head:,} tokens (with BOS) leaves no room for its "
            f"document in a pack of {capacity:,}",
            where="--meco-max-prefix-tokens",
            remedy=f"Give {max(1, capacity // 2):,} or less, or a longer --seq-length.",
        )
    # A token of the document and EOD stand in one piece with the suffix.
    most = capacity - 2
    longest = corpus.longest_metadata(most)
    if longest > most:
        raise FlagError(
            f"prefix and suffix of a document are {longest:,} tokens (with BOS) and leave no room "
            f"for it in a pack of {capacity:,}",
            where="--meco-max-prefix-tokens",
            remedy=f"Give {max(1, (capacity - 3) // 2):,} or less, or a longer --seq-length.",
        )


def _documents_per_pack(packs_by_size: NDArray[np.int64]) -> dict[str, float]:
    """Median, 99th percentile and maximum, from the number of packs of each size."""
    below = np.cumsum(packs_by_size)
    if not len(below) or below[-1] == 0:
        return {}
    median, p99, most = (
        float(np.searchsorted(below, max(1, -(-below[-1] * q // 100)))) for q in (50, 99, 100)
    )
    return {"median": median, "p99": p99, "max": most}
