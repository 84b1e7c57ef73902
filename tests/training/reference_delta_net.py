"""Reference kernels in place of the CUDA package fla (flash-linear-attention), for a CPU.

Stand-ins by name: Megatron's own gated delta net imports three functions and refuses to run without
them. `install()` comes before Megatron is imported. The rule is the recurrence of gated delta nets
as their paper writes it (arXiv 2412.06464, section 3), one token at a time, each document alone.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from reference_mamba import put_module
from torch.nn.functional import conv1d, pad, silu


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def by_document(
    of_one: Callable[..., torch.Tensor], cu_seqlens: torch.Tensor | None, *states: torch.Tensor
) -> torch.Tensor:
    """Apply a function to the tokens of each document; they are the second dimension."""
    if cu_seqlens is None:
        return of_one(*states)
    parts = [
        of_one(*(x[:, begin:end] for x in states))
        for begin, end in pairwise(cu_seqlens.tolist())
        if begin < end
    ]
    return torch.cat(parts, dim=1)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    initial_state: None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:
    """Short convolution.

    Args:
        x: (1, tokens, channels).
        weight: (channels, width).
        bias: (channels,) or None.
        activation: silu.
        initial_state: None.
        output_final_state: Must be false.
        cu_seqlens: (documents + 1,), or None.
    """
    assert activation in ("silu", "swish") and not output_final_state
    channels, width = weight.shape

    def of_one(states: torch.Tensor) -> torch.Tensor:
        before = pad(states.transpose(1, 2), (width - 1, 0))
        return silu(conv1d(before, weight[:, None], bias, groups=channels)).transpose(1, 2)

    return by_document(of_one, cu_seqlens, x), None


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:
    """`S = exp(g) S; S += beta k (v - k S); out = q S / sqrt(d)`.

    Args:
        q: (1, tokens, heads, d).
        k: Likewise.
        v: (1, tokens, heads, value size).
        g: (1, tokens, heads), logarithm of the decay.
        beta: Likewise.
        initial_state: None.
        output_final_state: Must be false.
        use_qk_l2norm_in_kernel: Likewise.
        cu_seqlens: (documents + 1,), or None.
    """
    assert not output_final_state and not use_qk_l2norm_in_kernel

    def of_one(*given: torch.Tensor) -> torch.Tensor:
        query, key, value, log_decay, rate = given
        state = torch.zeros(*key.shape[:1], *key.shape[2:], value.shape[-1])
        outputs = []
        for t in range(key.shape[1]):
            state = state * log_decay[:, t].exp()[..., None, None]
            read = (key[:, t, ..., None] * state).sum(-2)
            change = rate[:, t, :, None] * (value[:, t] - read)
            state = state + key[:, t, ..., None] * change[..., None, :]
            outputs.append((query[:, t, ..., None] * state).sum(-2) / key.shape[-1] ** 0.5)
        return torch.stack(outputs, dim=1)

    return by_document(of_one, cu_seqlens, q, k, v, g, beta), None


def install() -> None:
    """Put the stand-ins where Megatron looks for the package."""

    put_module("fla", __version__="0.4.0")
    put_module("fla.modules")
    put_module("fla.modules.convolution", causal_conv1d=causal_conv1d)
    put_module("fla.modules.l2norm", l2norm=l2norm)
    put_module("fla.ops")
    put_module("fla.ops.gated_delta_rule", chunk_gated_delta_rule=chunk_gated_delta_rule)
