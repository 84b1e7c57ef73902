"""Megatron's GPT model as Hugging Face's Llama: which tensor goes where, and what cannot be mapped.

The two are the same function if the run used RMSNorm, RoPE over the whole head, SwiGLU and no
biases. `check_architecture` refuses everything else and names the flag that asked for it;
`plan_weights` refuses tensors with unknown names, so no tensor is silently left out. The caller
reads the tensors.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_meco.inference.checkpoint import CheckpointError
from megatron_meco.wording import shown

# Not weights: optimizer, random states, counters, and the (empty) states of fused layers.
_NOT_WEIGHTS = re.compile(
    r"(optimizer|chained_\d+|rng_state|rerun_state_machine_state|common_state)\b.*|.*\._extra_state"
)
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")

_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_FINAL_NORM = "decoder.final_layernorm.weight"
_QKV = "self_attention.linear_qkv.weight"
_FC1 = "mlp.linear_fc1.weight"

# (Hugging Face's name in a layer, Megatron's name in a layer on disk, which part of it)
_LAYER_WEIGHTS = (
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight", "all"),
    ("self_attn.q_proj.weight", _QKV, "q"),
    ("self_attn.k_proj.weight", _QKV, "k"),
    ("self_attn.v_proj.weight", _QKV, "v"),
    ("self_attn.o_proj.weight", "self_attention.linear_proj.weight", "all"),
    ("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", "all"),
    ("mlp.gate_proj.weight", _FC1, "gate"),
    ("mlp.up_proj.weight", _FC1, "up"),
    ("mlp.down_proj.weight", "mlp.linear_fc2.weight", "all"),
)

# Required values of the run's flags. A flag that the checkpoint lacks had no effect on it.
_MUST_BE: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "swiglu": True,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "no_rope_freq": None,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "window_size": None,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "linear_attention_freq": None,
    "num_experts": None,
    "mtp_num_layers": None,
    "is_hybrid_model": False,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
    "use_mup": False,
}
# Flags that are not spelled as their names.
_FLAGS = {
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "add_bias_linear": "--disable-bias-linear",
    "is_hybrid_model": "--hybrid-layer-pattern",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The sizes of a Llama, in Hugging Face's meaning."""

    layers: int
    """Transformer layers."""

    hidden: int
    """Width of the residual stream."""

    ffn: int
    """Width of the MLP."""

    heads: int
    """Query heads."""

    groups: int
    """Key and value heads."""

    head_dim: int
    """Width of a head."""

    vocab: int
    """Tokens of the tokenizer; Megatron's padding beyond them is cut off."""

    tied: bool
    """Whether the output layer is the embedding."""

    @classmethod
    def from_args(cls, args: Namespace, vocab: int) -> Sizes:
        """Read the sizes from the run's flags."""
        heads = args.num_attention_heads
        grouped = args.group_query_attention
        return cls(
            layers=args.num_layers,
            hidden=args.hidden_size,
            ffn=args.ffn_hidden_size,
            heads=heads,
            groups=args.num_query_groups if grouped else heads,
            head_dim=args.kv_channels or args.hidden_size // heads,
            vocab=vocab,
            tied=not args.untie_embeddings_and_output_weights,
        )


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the Hugging Face model, and where it comes from.

    Attributes:
        name: Hugging Face's name.
        shape: Its shape there.
        source: Megatron's name.
        row: Row of the stacked tensor on disk; None where it is not stacked.
        part: `all`, `vocab`, `q`, `k`, `v`, `gate` or `up`.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    row: int | None
    part: str

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return torch.Size(self.shape).numel()


def check_architecture(args: Namespace, where: str) -> None:
    """Refuse a run whose model is no Llama.

    Raises:
        CheckpointError: Names the flag and its value.
    """
    for name, needed in _MUST_BE.items():
        value = getattr(args, name, needed)
        if value != needed and not (needed is False and value is None):
            flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
            raise CheckpointError(
                f"the model has {name} = {value!r}, a Llama has {needed!r} ({flag})",
                where=where,
                remedy="Only a Llama can be exported: RMSNorm, RoPE, SwiGLU, no biases.",
            )


def plan_weights(shapes: Mapping[str, tuple[int, ...]], sizes: Sizes, where: str) -> list[Weight]:
    """List the tensors of the Hugging Face model, in the order of their layers.

    Args:
        shapes: Every tensor of the checkpoint.
        sizes: What the model should have.
        where: The checkpoint, for messages.

    Raises:
        CheckpointError: For a tensor that is unknown, missing, or of another shape.
    """
    if sizes.layers > sum(map(math.prod, shapes.values())):
        raise CheckpointError(
            f"its flags say {sizes.layers:,} layers, more than its tensors have numbers",
            where=where,
            remedy="Copy the checkpoint again, or name another one.",
        )
    weights = [_embedding("model.embed_tokens.weight", _EMBEDDING, sizes)]
    for layer in range(sizes.layers):
        for name, within, part in _LAYER_WEIGHTS:
            stacked = f"decoder.layers.{within}"
            source = stacked if stacked in shapes else f"decoder.layers.{layer}.{within}"
            row = layer if source == stacked else None
            shape = _shape_of(name, sizes)
            weights.append(Weight(f"model.layers.{layer}.{name}", shape, source, row, part))
    weights.append(Weight("model.norm.weight", (sizes.hidden,), _FINAL_NORM, None, "all"))
    if not sizes.tied:
        weights.append(_embedding("lm_head.weight", _OUTPUT, sizes))
    _check_names(shapes, {weight.source for weight in weights}, where)
    for weight in weights:
        _check_shape(weight, shapes[weight.source], sizes, where)
    return weights


def take_part(weight: Weight, tensor: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """Cut one Hugging Face tensor out of Megatron's tensor, that of one layer for layer weights.

    Returns:
        A tensor of `weight.shape`, possibly a view.
    """
    match weight.part:
        case "vocab":
            return tensor[: sizes.vocab]
        case "gate":
            return tensor[: sizes.ffn]
        case "up":
            return tensor[sizes.ffn :]
        case "q" | "k" | "v":
            # For each group: its query heads, then its key head, then its value head.
            repeats = sizes.heads // sizes.groups
            grouped = tensor.view(sizes.groups, repeats + 2, sizes.head_dim, sizes.hidden)
            heads = {
                "q": grouped[:, :repeats],
                "k": grouped[:, repeats],
                "v": grouped[:, repeats + 1],
            }[weight.part]
            return heads.reshape(weight.shape)
    return tensor


def megatron_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint: Megatron's names on disk, layers stacked, no padded tokens."""
    shapes: dict[str, tuple[int, ...]] = {
        _EMBEDDING: (sizes.vocab, sizes.hidden),
        _FINAL_NORM: (sizes.hidden,),
    }
    if not sizes.tied:
        shapes[_OUTPUT] = (sizes.vocab, sizes.hidden)
    for name, within, _ in _LAYER_WEIGHTS:
        shape = _shape_of(name, sizes)
        rows = _joined_rows(sizes).get(within, shape[0])
        shapes[f"decoder.layers.{within}"] = (sizes.layers, rows, *shape[1:])
    return shapes


def join_parts(parts: Mapping[str, torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Join Hugging Face's tensors into Megatron's, the inverse of `take_part`.

    Args:
        parts: By their `Weight.part`: one alone, or `q`, `k`, `v`, or `gate`, `up`.
        sizes: The model's sizes.

    Returns:
        Megatron's tensor, that of one layer for layer weights.
    """
    if "gate" in parts:
        return torch.cat([parts["gate"], parts["up"]])
    if "q" in parts:
        heads = (sizes.groups, -1, sizes.head_dim, sizes.hidden)
        grouped = torch.cat([parts[part].view(heads) for part in ("q", "k", "v")], dim=1)
        return grouped.reshape(-1, sizes.hidden)
    [tensor] = parts.values()
    return tensor


def _joined_rows(sizes: Sizes) -> dict[str, int]:
    """Rows of the tensors that hold several of Hugging Face's."""
    return {
        _QKV: (sizes.heads + 2 * sizes.groups) * sizes.head_dim,
        _FC1: 2 * sizes.ffn,
    }


def _embedding(name: str, source: str, sizes: Sizes) -> Weight:
    return Weight(name, (sizes.vocab, sizes.hidden), source, None, "vocab")


def _shape_of(name: str, sizes: Sizes) -> tuple[int, ...]:
    queries, keys = sizes.heads * sizes.head_dim, sizes.groups * sizes.head_dim
    return {
        "input_layernorm.weight": (sizes.hidden,),
        "self_attn.q_proj.weight": (queries, sizes.hidden),
        "self_attn.k_proj.weight": (keys, sizes.hidden),
        "self_attn.v_proj.weight": (keys, sizes.hidden),
        "self_attn.o_proj.weight": (sizes.hidden, queries),
        "post_attention_layernorm.weight": (sizes.hidden,),
        "mlp.gate_proj.weight": (sizes.ffn, sizes.hidden),
        "mlp.up_proj.weight": (sizes.ffn, sizes.hidden),
        "mlp.down_proj.weight": (sizes.hidden, sizes.ffn),
    }[name]


def _check_names(found: Iterable[str], needed: set[str], where: str) -> None:
    weights = {name for name in found if not _NOT_WEIGHTS.fullmatch(name)}
    if unknown := sorted(weights - needed):
        raise CheckpointError(
            f"unknown tensor {_some(unknown)}",
            where=where,
            remedy="Only Llama architectures can be exported; this one has more to it.",
        )
    if missing := sorted(needed - weights):
        raise CheckpointError(
            f"no tensor {_some(missing)}",
            where=where,
            remedy="Copy the checkpoint again, or name another one.",
        )


def _check_shape(weight: Weight, found: tuple[int, ...], sizes: Sizes, where: str) -> None:
    rows = _joined_rows(sizes)
    layer = _LAYER.fullmatch(weight.source)
    within = layer[2] if layer else weight.source
    expected = (rows.get(within, weight.shape[0]), *weight.shape[1:])
    if weight.row is not None:
        expected = (sizes.layers, *expected)
    if weight.part == "vocab" and found[1:] == expected[1:] and found[0] >= expected[0]:
        return
    if found != expected:
        raise CheckpointError(
            f"tensor {weight.source} has shape {list(found)}, the flags of the run and the "
            f"tokenizer give {list(expected)}",
            where=where,
            remedy="Name the checkpoint of a Llama, and its own tokenizer.",
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    # The names are those of a file that may come from anywhere.
    return ", ".join(shown(name, 120) for name in names[:3]) + more
