"""Attention over packed documents without Transformer Engine.

Megatron's local attention refuses packed sequences, its local RMSNorm refuses sequence parallelism,
and its rotary embedding without Transformer Engine goes over the documents in Python, waits for the
device twice in each call and, where the pack is as long as its table of angles, counts positions on
from document to document. `packed_local_layer_spec` is Megatron's local GPT layer with all three
replaced: use it as `--spec megatron_meco.training.attention packed_local_layer_spec` together with
`--transformer-impl local`. Checkpoints have the names and shapes of the stock local layer.

On a CPU each document of a pack is one call of `scaled_dot_product_attention`, so that nothing of
one document can reach another: the others stay bit-identical whatever it holds. On CUDA one call
of `torch.nn.attention.varlen` serves the whole pack where this PyTorch has it. What it costs: a
Python loop over the documents of a pack, and on CUDA without varlen a copy of the boundaries to
the host in each layer. What was given up: all but dense causal attention (no sliding window, no
attention bias, no latent attention, no experts, no context parallelism), and on CUDA the speed of
Transformer Engine, which is to be preferred where it is installed.
"""

from __future__ import annotations

import inspect
import itertools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_meco.errors import DataError, FlagError
from megatron_meco.training.megatron_patches import rotary_scale

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]  # PyTorch before 2.10

PACKED_LOCAL_SPEC = ["megatron_meco.training.attention", "packed_local_layer_spec"]
"""The value of Megatron's `--spec` (and of `args.spec`) for `packed_local_layer_spec`."""


@dataclass
class RotaryPackedSeqParams(PackedSeqParams):  # type: ignore[misc]  # Megatron has no types
    """Megatron's parameters of a packed batch, with what RoPE needs on their way to the attention.

    Attributes:
        angles: (tokens, 1, 1, rotary dimensions), float32: the angles of each token's position
            within its document.
        scale: What cosines and sines are multiplied with (1 but for YaRN).
        waves: Cosines and sines of the angles, worked out by the first layer for all.
    """

    angles: Tensor | None = None
    scale: float = 1.0
    waves: tuple[Tensor, Tensor] | None = None

    def waves_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (tokens, 1, rotary dimensions) each.

        Args:
            dtype: Of the queries and keys.
        """
        if self.waves is None or self.waves[0].dtype != dtype:
            assert self.angles is not None
            angles = self.angles.squeeze(1)
            cos, sin = ((f(angles) * self.scale).to(dtype) for f in (torch.cos, torch.sin))
            self.waves = cos, sin
        return self.waves


class PackedSelfAttention(SelfAttention):  # type: ignore[misc]  # Megatron has no types
    """Megatron's self-attention with rotary positions that restart at each document.

    RoPE moves into `PackedDotProductAttention`, one call for all documents and none of them waits
    for the device. Batches that are not packed, fused RoPE and layers without RoPE are Megatron's.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's.

        Args:
            hidden_states: `[t, 1, hidden]` packed, `[s, b, hidden]` otherwise.
            attention_mask: Passed on.
            *args: Passed on.
            rotary_pos_emb: `[positions, 1, 1, rotary dimensions]`, one row for each position of the
                longest document at least.
            packed_seq_params: The documents of a packed batch.
            **kwargs: Passed on.

        Returns:
            Output and bias.
        """
        if (
            packed_seq_params is not None
            and isinstance(rotary_pos_emb, Tensor)
            and not self.config.apply_rope_fusion
            and not self.config.no_rope_freq
        ):
            # Tokens of all tensor-parallel ranks; with sequence parallelism each holds a part.
            parts = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
            packed_seq_params = _with_rotary(
                packed_seq_params,
                rotary_pos_emb,
                parts * hidden_states.size(0),
                rotary_scale(self),
            )
            rotary_pos_emb = None
        output: tuple[Tensor, Tensor | None] = super().forward(
            hidden_states,
            attention_mask,
            *args,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )
        return output


def _with_rotary(
    packed: PackedSeqParams, table: Tensor, num_tokens: int, scale: float
) -> RotaryPackedSeqParams:
    """Add the angles of each token; all layers of a forward pass share what the first one makes."""
    known, made = getattr(packed, "meco_rotary", (None, None))
    if known is table and isinstance(made, RotaryPackedSeqParams):
        return made
    given = {f.name: getattr(packed, f.name) for f in fields(PackedSeqParams)}
    positions = positions_of(packed.cu_seqlens_q, num_tokens)
    made = RotaryPackedSeqParams(**given, angles=table[positions], scale=scale)
    packed.meco_rotary = (table, made)
    return made


def _rotate_half(states: Tensor, interleaved: bool) -> Tensor:
    """`(-x2, x1)` of RoPE, for pairs (x1, x2) that are the two halves, or neighbours."""
    if interleaved:
        return torch.stack((-states[..., 1::2], states[..., ::2]), dim=-1).flatten(-2)
    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def positions_of(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The position of each token of a pack within its document, without a wait for the device.

    Args:
        cu_seqlens: (documents + 1,), int32, from 0 to `num_tokens`; empty documents are allowed.
        num_tokens: The length of the pack.

    Returns:
        (num_tokens,), int64.
    """
    places = torch.arange(num_tokens, device=cu_seqlens.device)
    documents = torch.searchsorted(cu_seqlens, places, right=True) - 1
    return places - cu_seqlens[documents]


class PackedDotProductAttention(MegatronModule):  # type: ignore[misc]  # Megatron has no types
    """Causal dot-product attention that keeps the documents of a pack apart.

    The constructor has the signature that Megatron's `SelfAttention` calls; it has no parameters.

    Args:
        config: The model's configuration.
        layer_number: Unused: Megatron's query-key layer scaling cancels out in exact arithmetic.
        attn_mask_type: Causal, or causal with padding.
        attention_type: "self"; Megatron's "cross" is refused.
        attention_dropout: Overrides `config.attention_dropout`.
        softmax_scale: Overrides 1 / sqrt(head_dim).
        cp_comm_type: Unused: context parallelism is refused.
        pg_collection: Unused: every rank attends within its own heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if attention_type != "self":
            raise _unsupported(f"{attention_type}-attention", "attention_type")
        _check_mask_type(attn_mask_type)
        if config.context_parallel_size > 1:
            raise _unsupported("context parallelism", "--context-parallel-size")
        if config.window_size is not None:
            raise _unsupported("sliding-window attention", "--window-size")
        if config.softmax_type != "vanilla":
            raise _unsupported(f"softmax type {config.softmax_type}", "--softmax-type")
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.attention_dropout = (
            config.attention_dropout if attention_dropout is None else attention_dropout
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend causally, within each document where the batch is packed.

        Args:
            query: `[t, heads, head_dim]` packed, `[s, b, heads, head_dim]` otherwise.
            key: As `query`, with as many heads as there are query groups.
            value: As `key`.
            attention_mask: Ignored: the mask is causal, `packed_seq_params` holds the documents.
            attn_mask_type: As in the constructor.
            attention_bias: Must be None.
            packed_seq_params: `cu_seqlens_q`, int32 `[documents + 1]`, from 0 to t. Empty
                documents are allowed. A `RotaryPackedSeqParams` has queries and keys rotated
                first. None for a batch that is not packed.

        Returns:
            `[t, heads * head_dim]` packed, `[s, b, heads * head_dim]` otherwise, dtype of `query`.
        """
        if attention_bias is not None:
            raise _unsupported("an attention bias", "attention_bias")
        if attn_mask_type is not None:
            _check_mask_type(attn_mask_type)
        if isinstance(packed_seq_params, RotaryPackedSeqParams):
            query, key = (self._rotate(x, packed_seq_params) for x in (query, key))
        qkv = (query, key, value)
        scale = self.softmax_scale
        dropout = self.attention_dropout if self.training else 0.0
        with self._random_state(dropout):
            if packed_seq_params is None:
                # [s, b, heads, head_dim] <-> [b, heads, s, head_dim]
                samples = (x.permute(1, 2, 0, 3) for x in qkv)
                out = _causal_attention(*samples, scale=scale, dropout=dropout).permute(2, 0, 1, 3)
            elif _can_use_varlen(query, dropout):
                out = _varlen_attention(*qkv, packed_seq_params, scale=scale)
            else:
                bounds = packed_seq_params.cu_seqlens_q
                out = _attention_by_document(*qkv, bounds, scale=scale, dropout=dropout)
        return out.flatten(start_dim=-2)

    def _rotate(self, states: Tensor, packed: RotaryPackedSeqParams) -> Tensor:
        """Megatron's `_apply_rotary_pos_emb_bshd`, to the last bit, with cosines made once."""
        cos, sin = packed.waves_in(states.dtype)
        size = cos.size(-1)
        turned, rest = states[..., :size], states[..., size:]
        turned = turned * cos + _rotate_half(turned, self.config.rotary_interleaved) * sin
        return torch.cat((turned, rest), dim=-1)

    def _random_state(self, dropout: float) -> AbstractContextManager[Any]:
        """Draw dropout as Megatron's own attention does: per rank where heads are split."""
        if dropout == 0.0 or self.config.sequence_parallel:
            return nullcontext()
        fork: AbstractContextManager[Any] = get_cuda_rng_tracker().fork()
        return fork


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` that may be used with sequence parallelism.

    Each rank sees a part of the sequence and so holds a part of the weight's gradient. Megatron
    sums those parts over the tensor-parallel group for parameters marked `sequence_parallel`.

    Args:
        config: The model's configuration.
        hidden_size: The size of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SequenceParallelLayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` that may be used with sequence parallelism.

    Args:
        config: The model's configuration.
        hidden_size: The size of the last dimension.
        eps: Added to the variance.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def packed_local_layer_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Build Megatron's local GPT layers with our attention and norm.

    Args:
        config: Megatron's `GPTModelConfig`; its builder calls whatever `--spec` names with it.
        vp_stage: The virtual pipeline stage that is being built, or None.

    Returns:
        The layers of this pipeline stage and the norm after the last one. Megatron takes this in
        place of a single layer's spec; a layer's spec alone would get the stock final norm.
    """
    transformer: TransformerConfig = config.transformer
    _check_architecture(transformer)
    norm = _norm_class(transformer)
    layer = get_gpt_layer_local_spec(
        qk_layernorm=transformer.qk_layernorm,
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
    )
    layer.submodules.self_attention.module = PackedSelfAttention
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedDotProductAttention
    for name in ("q_layernorm", "k_layernorm"):
        if getattr(attention, name) not in (IdentityOp, L2Norm):
            setattr(attention, name, norm)
    num_layers = get_num_layers_to_build(transformer, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _check_architecture(transformer: TransformerConfig) -> None:
    for refused, what, where in (
        (transformer.num_moe_experts, "a mixture of experts", "--num-experts"),
        (transformer.multi_latent_attention, "latent attention", "--multi-latent-attention"),
        (transformer.mtp_num_layers, "multi-token prediction", "--mtp-num-layers"),
        (transformer.layernorm_zero_centered_gamma, "a 1p norm", "--apply-layernorm-1p"),
    ):
        if refused:
            raise _unsupported(what, where)


def _norm_class(transformer: TransformerConfig) -> type[torch.nn.Module]:
    if transformer.normalization == "RMSNorm":
        return SequenceParallelRMSNorm
    if transformer.normalization == "LayerNorm":
        return SequenceParallelLayerNorm
    raise _unsupported(transformer.normalization, "--normalization")


def _check_mask_type(mask_type: AttnMaskType) -> None:
    if mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
        raise _unsupported(f"mask type {mask_type.name}", "attn_mask_type")


def _unsupported(what: str, where: str) -> FlagError:
    return FlagError(
        f"the packed local attention does not support {what}",
        where=where,
        remedy="Remove it, or install Transformer Engine and use "
        "--transformer-impl transformer_engine without --spec.",
    )


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float) -> Tensor:
    """Causal attention on `[b, heads, s, head_dim]`; `k` and `v` may have fewer heads."""
    return scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=k.size(1) != q.size(1)
    )


def _attention_by_document(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, scale: float, dropout: float
) -> Tensor:
    """One call of attention per document; `[t, heads, head_dim]` in and out."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.size(0):
        raise DataError(
            f"documents cover positions {bounds[0]} to {bounds[-1]} of a pack of {q.size(0)}",
            where="cu_seqlens",
            remedy="Let the last boundary be the length of the pack: padding is a document too.",
        )
    outputs = []
    for begin, end in itertools.pairwise(bounds):
        # The tail of cu_seqlens may repeat the last boundary to keep its length fixed.
        if begin == end:
            continue
        # [n, heads, head_dim] <-> [1, heads, n, head_dim]
        document = (x[begin:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = _causal_attention(*document, scale=scale, dropout=dropout)
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


_VARLEN_PARAMETERS: frozenset[str] = frozenset()
if varlen_attn is not None:
    _VARLEN_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters)


def varlen_serves(dtype: torch.dtype, dropout: float) -> bool:
    """Tell whether PyTorch's varlen kernel can do this on CUDA.

    Args:
        dtype: Of queries, keys and values; the kernel has half precision alone.
        dropout: Of attention weights; the kernel has none.
    """
    return (
        dtype in (torch.float16, torch.bfloat16)
        and dropout == 0.0
        # PyTorch 2.10 spelt causality otherwise and had no scale.
        and {"window_size", "scale"} <= set(_VARLEN_PARAMETERS)
    )


def _can_use_varlen(q: Tensor, dropout: float) -> bool:
    return q.is_cuda and varlen_serves(q.dtype, dropout)


def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedSeqParams, *, scale: float
) -> Tensor:
    """One kernel for the whole pack; `[t, heads, head_dim]` in and out."""
    options: dict[str, Any] = {}
    if "num_splits" in _VARLEN_PARAMETERS:
        # Splitting depends on the longest document of the pack and changes the order of sums.
        options["num_splits"] = 1
    if k.size(1) != q.size(1):
        if "enable_gqa" in _VARLEN_PARAMETERS:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    return varlen_attn(  # type: ignore[return-value]  # a pair only with return_aux
        q,
        k,
        v,
        packed.cu_seqlens_q,
        packed.cu_seqlens_q,
        packed.max_seqlen_q,
        packed.max_seqlen_q,
        window_size=(-1, 0),
        scale=scale,
        **options,
    )
