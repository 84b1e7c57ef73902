"""Reference kernels in place of the CUDA packages mamba_ssm and causal_conv1d, for a CPU.

Stand-ins by name: Megatron's own mixer imports the two packages and refuses to run without them.
`install()` comes before Megatron is imported. The scan is the recurrence of Mamba-2 as its paper
writes it (arXiv 2405.21060, section 2), one token at a time.
"""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch.nn.functional import silu, softplus


class RMSNorm(torch.nn.Module):
    """RMS norm in groups, without a gate: the mixer calls it with one argument."""

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.eps = eps
        self.group_size = group_size or width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, self.group_size))
        scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (groups * scale).flatten(-2) * self.weight


def mamba_split_conv1d_scan_combined(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int,
    seq_idx: torch.Tensor | None = None,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Short convolution, selective scan and gate; state and convolution restart with `seq_idx`.

    Args:
        zxbcdt: (batch, tokens, 2 * heads * headdim + 2 * groups * state + heads).
        conv1d_weight: (channels, width).
        conv1d_bias: (channels,).
        dt_bias: (heads,).
        A: (heads,), negative.
        D: (heads,).
        chunk_size: Of the real kernel; no effect.
        seq_idx: (batch, tokens), int32: the document of each token, or None.
        activation: silu.
        headdim: Size of a head.
        ngroups: Groups of heads that share B and C.
        norm_before_gate: Of the real kernel's norm, which the mixer does not ask for.
        state_dtype: Likewise.

    Returns:
        (batch, tokens, heads * headdim).
    """
    heads = A.numel()
    assert headdim is not None and activation == "silu"
    inner = heads * headdim
    channels, width = conv1d_weight.shape
    z, xbc, dt = zxbcdt.split([inner, channels, heads], dim=-1)
    tokens = zxbcdt.shape[1]
    numbers = torch.zeros(zxbcdt.shape[:2], dtype=torch.int32) if seq_idx is None else seq_idx
    mixed = conv1d_bias.expand(xbc.shape).clone()
    for back in range(width):
        shifted = torch.nn.functional.pad(xbc, (0, 0, back, 0))[:, :tokens]
        before = torch.nn.functional.pad(numbers, (back, 0), value=-1)[:, :tokens]
        same = (before == numbers).unsqueeze(-1)
        # Not a product: what lies outside the document must not reach it, not even as 0 * NaN.
        mixed = mixed + torch.where(same, shifted * conv1d_weight[:, width - 1 - back], 0.0)
    x, b, c = silu(mixed).split([inner, *[(channels - inner) // 2] * 2], dim=-1)
    x = x.unflatten(-1, (heads, headdim))
    b, c = (y.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, 2) for y in (b, c))
    dt = softplus(dt + dt_bias)
    state = torch.zeros(len(x), heads, headdim, b.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(tokens):
        if t and seq_idx is not None:
            fresh = (numbers[:, t] != numbers[:, t - 1])[:, None, None, None]
            state = torch.where(fresh, torch.zeros_like(state), state)
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        update = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
        state = state * decay + update
        outputs.append((state * c[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1).flatten(-2) * silu(z)


def put_module(name: str, **members: Any) -> None:
    """Let an import find a package that is not installed."""
    made = types.ModuleType(name)
    made.__spec__ = ModuleSpec(name, None, is_package=True)
    made.__path__ = []
    vars(made).update(members)
    sys.modules[name] = made


def install() -> None:
    """Put the stand-ins where Megatron looks for the packages."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("no kernel for inference here")

    put_module("mamba_ssm", __version__="2.2.6")
    put_module("mamba_ssm.ops")
    put_module("mamba_ssm.ops.triton")
    put_module("mamba_ssm.ops.triton.layernorm_gated", RMSNorm=RMSNorm)
    put_module(
        "mamba_ssm.ops.triton.ssd_combined",
        mamba_chunk_scan_combined=refuse,
        mamba_split_conv1d_scan_combined=mamba_split_conv1d_scan_combined,
    )
    put_module("causal_conv1d", __version__="1.5.3", causal_conv1d_fn=refuse)
    put_module("causal_conv1d.causal_conv1d_varlen", causal_conv1d_varlen_states=refuse)
