"""Changes one document of a pack after another, and tells what became of the others.

A script imports it after it has got torch ready for its device, as Megatron looks on import.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


def start(rendezvous: str) -> None:
    """Begin a world of one rank, seeded."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)


def documents(
    bounds: Sequence[int], longest: int | None = None, device: str = "cpu"
) -> PackedSeqParams:
    """The borders as Megatron wants them; `longest` is the pack's length unless it is given."""
    # An empty document at the end, as the fixed length of cu_seqlens brings.
    cu_seqlens = torch.tensor([*bounds, bounds[-1]], dtype=torch.int32, device=device)
    longest = longest or bounds[-1]
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def positions_of(bounds: Sequence[int]) -> torch.Tensor:
    """(1, tokens): the position of each token in its document."""
    return torch.cat([torch.arange(end - begin) for begin, end in pairwise(bounds)])[None]


def other_ids(num_ids: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change of token ids: none stays."""
    return lambda ids: (ids + 7) % num_ids


def one_by_one(model: Any) -> None:
    """Let each expert take one token at a time.

    Otherwise the number of rows of its matrix products depends on all documents, and so does their
    rounding.
    """
    for layer in model.modules():
        for expert in getattr(layer, "local_experts", ()):
            expert.forward = functools.partial(of_rows, expert.forward)


def of_rows(forward: Any, tokens: torch.Tensor, scale: torch.Tensor) -> Any:
    rows = zip(tokens.split(1), scale.split(1), strict=True)
    found = [forward(row, own)[0] for row, own in rows]
    return (torch.cat(found) if found else tokens), None


def change_documents(
    forward: Callable[[torch.Tensor], torch.Tensor],
    pack: torch.Tensor,
    bounds: Sequence[int],
    change: Callable[[torch.Tensor], torch.Tensor],
) -> list[dict[str, bool]]:
    """Change each document in turn.

    Args:
        forward: From (tokens, ...) to (..., tokens, features).
        pack: (tokens, ...).
        bounds: Borders of the documents.
        change: What is done to the tokens of one.
    """
    before = forward(pack)
    report = []
    for begin, end in pairwise(bounds):
        changed = pack.clone()
        changed[begin:end] = change(changed[begin:end])
        same = (forward(changed) == before).all(dim=-1)
        others = torch.ones(len(pack), dtype=torch.bool, device=same.device)
        others[begin:end] = False
        report.append(
            {
                "others_identical": bool(same[..., others].all()),
                "own_changed": bool((~same[..., begin:end]).all()),
            }
        )
    return report
