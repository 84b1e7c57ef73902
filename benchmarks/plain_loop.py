"""A Llama in plain PyTorch, trained on packed documents in a loop: the peer of `bench_cpu_step.py`.

The same architecture, attention per document, loss mask, AdamW, gradient clipping and schedule as
the trainer's, without its layers of abstraction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and its batch."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    vocabulary: int
    length: int
    batch: int


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to (tokens, heads, head size)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Layer(nn.Module):
    """Attention within each document, then a SwiGLU, both after an RMSNorm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1 = nn.RMSNorm(size.hidden, eps=1e-5)
        self.norm2 = nn.RMSNorm(size.hidden, eps=1e-5)
        self.qkv = nn.Linear(size.hidden, 3 * size.hidden, bias=False)
        self.proj = nn.Linear(size.hidden, size.hidden, bias=False)
        self.up = nn.Linear(size.hidden, 2 * size.ffn, bias=False)
        self.down = nn.Linear(size.ffn, size.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bounds: list[int]) -> Tensor:
        """Map (tokens, hidden) to the same shape; `bounds` are the documents' borders."""
        q, k, v = self.qkv(self.norm1(x)).view(len(x), 3, self.heads, -1).unbind(1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        outputs = []
        for begin, end in pairwise(bounds):
            parts = (y[begin:end].transpose(0, 1)[None] for y in (q, k, v))
            outputs.append(scaled_dot_product_attention(*parts, is_causal=True)[0].transpose(0, 1))
        x = x + self.proj(torch.cat(outputs).flatten(1))
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(silu(gate) * up)


class Llama(nn.Module):
    """Embedding, layers, norm and output layer, not tied."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.hidden)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden, eps=1e-5)
        self.head = nn.Linear(size.hidden, size.vocabulary, bias=False)
        half = size.hidden // size.heads // 2
        frequencies = 10000.0 ** (-torch.arange(half) / half)
        angles = torch.outer(torch.arange(size.length), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos()[:, None])
        self.register_buffer("sin", angles.sin()[:, None])

    def forward(self, tokens: Tensor, positions: Tensor, bounds: list[int]) -> Tensor:
        """Map (tokens,) ids to (tokens, vocabulary) logits."""
        x = self.embed(tokens)
        cos, sin = self.cos[positions], self.sin[positions]
        for layer in self.layers:
            x = layer(x, cos, sin, bounds)
        return self.head(self.norm(x))


def batch_bounds(samples: list[dict[str, Tensor]], length: int) -> list[int]:
    """Document borders of a flat micro-batch."""
    bounds = [0]
    for number, sample in enumerate(samples):
        ends = sorted(set(sample["cu_seqlens"].tolist()) - {0})
        bounds += [number * length + end for end in ends]
    return bounds


def train(size: Size, samples: Iterator[dict[str, Tensor]], steps: int, skip: int) -> float:
    """Train, and return processor seconds per step after the first `skip` ones."""
    torch.manual_seed(1)
    model = Llama(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    total = steps + skip
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.1 + 0.45 * (1 + math.cos(math.pi * step / total))
    )
    begin = 0.0
    for step in range(total):
        if step == skip:
            begin = time.process_time()
        chosen = [next(samples) for _ in range(size.batch)]
        flat = {k: torch.cat([s[k] for s in chosen]) for k in ("tokens", "labels", "loss_mask")}
        positions = torch.cat([s["position_ids"] for s in chosen])
        logits = model(flat["tokens"], positions, batch_bounds(chosen, size.length))
        losses = cross_entropy(logits.float(), flat["labels"], reduction="none")
        loss = (losses * flat["loss_mask"]).sum() / flat["loss_mask"].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            loss.item()
    return (time.process_time() - begin) / steps
