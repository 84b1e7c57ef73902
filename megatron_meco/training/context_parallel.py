"""Which tokens of a pack each context-parallel rank holds, in Transformer Engine's layout.

With N ranks each document is cut into 2 * N equal chunks, and rank r holds the chunks r and
2 * N - 1 - r of every document: each rank then has the same work under a causal mask. Each document
(padding is one too) must be a multiple of 2 * N tokens, which `--meco-pad-documents-to` sees to.
Megatron's own loader cuts each sequence as a whole, while attention counts in chunks of documents:
its ranks mix the tokens of different documents.

All sizes depend on the numbers of tokens and ranks alone, so nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_meco.data.borders import documents_of

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def places_by_rank(cu_seqlens: Tensor, num_tokens: int, num_ranks: int) -> Tensor:
    """The places of the tokens that each rank holds.

    Args:
        cu_seqlens: (documents + 1,), int32, from 0 to `num_tokens`, each a multiple of
            2 * `num_ranks`; empty documents are allowed.
        num_tokens: The length of the pack.
        num_ranks: Context-parallel ranks.

    Returns:
        (num_ranks, num_tokens / num_ranks), int64, rising in each row.
    """
    documents = documents_of(cu_seqlens, num_tokens)
    places = torch.arange(num_tokens, device=cu_seqlens.device)
    lengths = cu_seqlens[documents + 1] - cu_seqlens[documents]
    chunks = (places - cu_seqlens[documents]) * (2 * num_ranks) // lengths
    owners = torch.minimum(chunks, 2 * num_ranks - 1 - chunks)
    return owners.argsort(stable=True).view(num_ranks, -1)


@dataclass(frozen=True)
class RankLayout:
    """What one rank computes of the attention of a pack: its two chunks of each document.

    Attributes:
        places: (tokens / ranks,), int64: places of the rank's tokens in the pack.
        queries: For each of the two chunks the places of its queries among the rank's tokens.
        keys: Likewise, the places of the keys that its queries see among the keys of all ranks, as
            gathering them puts them: rank by rank.
        cu_seqlens_q: (documents + 1,), int32: borders of a chunk's queries.
        chunks_seen: Chunks of a document that the queries of each of the two see.
        order: (tokens / ranks,), int64: puts the outputs of both chunks in the rank's own order.
    """

    places: Tensor
    queries: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor]
    cu_seqlens_q: Tensor
    chunks_seen: tuple[int, int]
    order: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, num_tokens: int, num_ranks: int, rank: int) -> RankLayout:
        """The layout of a rank.

        Args:
            cu_seqlens: As `places_by_rank` takes it.
            num_tokens: The length of the whole pack.
            num_ranks: Context-parallel ranks.
            rank: This one's number among them.
        """
        by_rank = places_by_rank(cu_seqlens, num_tokens, num_ranks)
        gathered = by_rank.view(-1).argsort()
        chunk = cu_seqlens // (2 * num_ranks)
        local, size = 2 * chunk, num_tokens // num_ranks
        queries = tuple(_parts(local, chunk, size // 2, begin) for begin in (0, 1))
        seen = rank + 1, 2 * num_ranks - rank
        keys = tuple(
            gathered[_parts(cu_seqlens, chunk * count, num_tokens // (2 * num_ranks) * count, 0)]
            for count in seen
        )
        order = torch.cat(queries).argsort()
        return cls(by_rank[rank], queries, keys, chunk, seen, order)  # type: ignore[arg-type]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Attention of the rank's queries.

        Args:
            q: (tokens / ranks, heads, head_dim).
            k: (tokens, groups, head_dim), gathered: rank by rank.
            v: As `k`.
            attend: Causal attention on queries, keys, values, and the borders of documents in
                queries and in keys; the last query of a document sees its last key.

        Returns:
            (tokens / ranks, heads, head_dim).
        """
        outputs = [
            attend(
                q.index_select(0, queries),
                k.index_select(0, keys),
                v.index_select(0, keys),
                self.cu_seqlens_q,
                self.cu_seqlens_q * count,
            )
            for queries, keys, count in zip(self.queries, self.keys, self.chunks_seen, strict=True)
        ]
        return torch.cat(outputs).index_select(0, self.order)


def _parts(cu_seqlens: Tensor, cu_parts: Tensor, size: int, begin: int) -> Tensor:
    """Places of one part of each document.

    Args:
        cu_seqlens: Borders of documents.
        cu_parts: Borders of the parts, if they stood one behind the other.
        size: Tokens of all parts.
        begin: 0: the parts are at the beginning of their documents; 1: behind one of their length.
    """
    documents = documents_of(cu_parts, size)
    offsets = torch.arange(size, device=cu_seqlens.device) - cu_parts[documents]
    skipped = begin * (cu_parts[documents + 1] - cu_parts[documents])
    return cu_seqlens[documents] + offsets + skipped


def gather_sequence(states: Tensor, group: Any) -> Tensor:
    """Keys or values of all ranks; backward sums gradients and gives each rank its own part.

    Args:
        states: (tokens / ranks, groups, head_dim), a rank's own.
        group: The context-parallel process group.

    Returns:
        (tokens, groups, head_dim), rank by rank.
    """
    # Imported here: megatron.core must not be imported before torch.cuda has been replaced.
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    gathered: Tensor = gather_from_sequence_parallel_region(
        states.contiguous(), tensor_parallel_output_grad=True, group=group
    )
    return gathered
