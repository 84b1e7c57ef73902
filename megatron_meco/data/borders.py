"""Borders of documents as tensors: which document a token is of, and where in it.

Sizes depend on the numbers of tokens and samples alone, so nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def documents_of(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The document of each token of a pack.

    Args:
        cu_seqlens: (..., documents + 1), int32, from 0 to `num_tokens` in the last dimension; empty
            documents are allowed.
        num_tokens: The length of the pack.

    Returns:
        (..., num_tokens), int64, rising in the last dimension.
    """
    places = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    places = places.expand(*cu_seqlens.shape[:-1], num_tokens).contiguous()
    return torch.searchsorted(cu_seqlens, places, right=True) - 1


def positions_of(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The position of each token of a pack within its document.

    Args:
        cu_seqlens: (documents + 1,), int32, from 0 to `num_tokens`; empty documents are allowed.
        num_tokens: The length of the pack.

    Returns:
        (num_tokens,), int64.
    """
    places = torch.arange(num_tokens, device=cu_seqlens.device)
    return places - cu_seqlens[documents_of(cu_seqlens, num_tokens)]


def merged(cu_seqlens: Tensor, length: int) -> Tensor:
    """The borders of documents in a flat batch.

    Args:
        cu_seqlens: (samples, documents + 1), int32, from 0 to `length` in each sample.
        length: Tokens of a sample.

    Returns:
        (samples * documents + 1,), int32, from 0 to samples * length.
    """
    if len(cu_seqlens) == 1:
        return cu_seqlens[0]
    begins = length * torch.arange(
        len(cu_seqlens), dtype=cu_seqlens.dtype, device=cu_seqlens.device
    )
    return torch.cat([cu_seqlens[0, :1], (cu_seqlens[:, 1:] + begins[:, None]).reshape(-1)])
