"""Floating-point operations of a training step over packed documents, and what chips can do.

Model FLOPs as everybody counts them: a multiplication and an addition for each weight of a matrix
product and each token, twice that for the backward pass; attention by the pairs of query and key
that its mask lets through, so within documents alone. Norms, activations, RoPE, softmax and the
optimizer are not counted. Recomputed activations would not be either.
"""

from __future__ import annotations

from dataclasses import dataclass

# Dense bf16, in FLOP/s, as NVIDIA's data sheets have it; the first name that fits counts.
_PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("GH200", 989.4e12),
    ("H100", 989.4e12),
    ("H200 NVL", 835e12),
    ("H200", 989.4e12),
    ("H20", 148e12),
    ("GB200", 2450e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165.2e12),
)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What of a Llama decides its FLOPs.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Width of the gated MLP.
        num_attention_heads: Query heads.
        num_query_groups: Key and value heads.
        head_dim: Size of a head.
        vocab_size: Rows of the output layer, padding included.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int

    @property
    def matrix_weights(self) -> int:
        """Weights that each token is multiplied with; the embedding is looked up and not among."""
        heads = self.num_attention_heads + 2 * self.num_query_groups
        attention = (heads + self.num_attention_heads) * self.head_dim * self.hidden_size
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size
        return self.num_layers * layer + self.hidden_size * self.vocab_size


def num_pairs(lengths: list[int]) -> int:
    """Pairs of query and key in causal attention within documents of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)


def training_flops(shape: ModelShape, num_tokens: int, pairs: int) -> int:
    """FLOPs of the forward and backward pass.

    Args:
        shape: The model.
        num_tokens: Tokens of the step, padding included: the products are made all the same.
        pairs: `num_pairs` of all documents.
    """
    products = 2 * shape.matrix_weights * num_tokens
    # Scores, and the sum of values under them: two products of a head's size for each pair.
    attention = 4 * shape.num_layers * shape.num_attention_heads * shape.head_dim * pairs
    return 3 * (products + attention)


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name, or None where it is not in the table."""
    return next((peak for name, peak in _PEAKS if name in device), None)
