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
the host in each layer. With context parallelism each rank gathers the keys and values of all ranks
(`context_parallel.py`). A sliding window counts tokens of the same document. Latent attention keeps
Megatron's own rotary embedding. There is no attention bias and no other softmax, and on CUDA
Transformer Engine is faster where it is installed.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_meco.data.borders import positions_of
from megatron_meco.errors import DataError, FlagError
from megatron_meco.training.context_parallel import (
    Attend,
    RankLayout,
    gather_sequence,
)
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
        without = self.config.no_rope_freq
        if without and without[self.layer_number - 1]:
            rotary_pos_emb = None
        if (
            packed_seq_params is not None
            and isinstance(rotary_pos_emb, Tensor)
            and not self.config.apply_rope_fusion
        ):
            # Tokens of this context-parallel rank; with sequence parallelism each
            # tensor-parallel rank holds a part of them.
            parts = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
            packed_seq_params = _with_rotary(
                packed_seq_params,
                rotary_pos_emb,
                parts * hidden_states.size(0),
                rotary_scale(self),
                _context_parallel_group(self.config, self.pg_collection),
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
    packed: PackedSeqParams, table: Tensor, num_tokens: int, scale: float, group: Any
) -> RotaryPackedSeqParams:
    """Add the angles of each token; all layers of a forward pass share what the first one makes."""
    known, made = getattr(packed, "meco_rotary", (None, None))
    if known is table and isinstance(made, RotaryPackedSeqParams):
        return made
    given = {f.name: getattr(packed, f.name) for f in fields(PackedSeqParams)}
    if group is None:
        positions = positions_of(packed.cu_seqlens_q, num_tokens)
    else:
        positions = positions_of(packed.cu_seqlens_q, num_tokens * group.size())
        positions = positions[_layout(packed, num_tokens, group).places]
    made = RotaryPackedSeqParams(**given, angles=table[positions], scale=scale)
    if group is not None:
        made.meco_layout = packed.meco_layout
    packed.meco_rotary = (table, made)
    return made


def _rotate_half(states: Tensor, interleaved: bool) -> Tensor:
    """`(-x2, x1)` of RoPE, for pairs (x1, x2) that are the two halves, or neighbours."""
    if interleaved:
        return torch.stack((-states[..., 1::2], states[..., ::2]), dim=-1).flatten(-2)
    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _context_parallel_group(config: TransformerConfig, groups: Any) -> Any:
    """The ranks that share the tokens of a micro-batch, or None."""
    return groups.cp if config.context_parallel_size > 1 else None


def _layout(packed: PackedSeqParams, num_tokens: int, group: Any) -> RankLayout:
    """This rank's part of each document; all layers share what the first one works out."""
    made: RankLayout | None = getattr(packed, "meco_layout", None)
    if made is None:
        size, rank = group.size(), group.rank()
        made = RankLayout.of(packed.cu_seqlens_q, num_tokens * size, size, rank)
        packed.meco_layout = made
    return made


class PackedDotProductAttention(MegatronModule):  # type: ignore[misc]  # Megatron has no types
    """Causal dot-product attention that keeps the documents of a pack apart.

    The constructor has the signature that Megatron's `SelfAttention` calls; it has no parameters.

    Args:
        config: The model's configuration.
        layer_number: By which `config.window_attn_skip_freq` exempts layers from the window.
            Megatron's query-key layer scaling cancels out in exact arithmetic.
        attn_mask_type: Causal, or causal with padding.
        attention_type: "self"; Megatron's "cross" is refused.
        attention_dropout: Overrides `config.attention_dropout`.
        softmax_scale: Overrides 1 / sqrt(head_dim).
        cp_comm_type: Unused: keys and values are always gathered.
        pg_collection: Its `cp` is the group of context-parallel ranks.
        k_channels: Unused: tensors tell the size of a head, which differs between queries and
            values in latent attention.
        v_channels: Likewise.
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
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        if attention_type != "self":
            raise _unsupported(f"{attention_type}-attention", "attention_type")
        _check_mask_type(attn_mask_type)
        self.group = _context_parallel_group(config, pg_collection)
        self.earlier = _window(config, layer_number)
        if self.earlier is not None and self.group is not None:
            raise _unsupported("a sliding window on context-parallel ranks", "--window-size")
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
            query: `[t, heads, head_dim]` packed, `[s, b, heads, head_dim]` otherwise. With
                context parallelism `t` counts this rank's tokens, as `places_by_rank` deals them.
            key: As `query`, with as many heads as there are query groups.
            value: As `key`.
            attention_mask: Ignored: the mask is causal, `packed_seq_params` holds the documents.
            attn_mask_type: As in the constructor.
            attention_bias: Must be None.
            packed_seq_params: `cu_seqlens_q`, int32 `[documents + 1]`, from 0 to the tokens of all
                context-parallel ranks. Empty documents are allowed. A `RotaryPackedSeqParams` has
                queries and keys rotated first. None for a batch that is not packed.

        Returns:
            `[t, heads * head_dim]` packed, `[s, b, heads * head_dim]` otherwise, dtype of `query`.
        """
        if attention_bias is not None:
            raise _unsupported("an attention bias", "attention_bias")
        if attn_mask_type is not None:
            _check_mask_type(attn_mask_type)
        if isinstance(packed_seq_params, RotaryPackedSeqParams):
            query, key = (self._rotate(x, packed_seq_params) for x in (query, key))
        dropout = self.attention_dropout if self.training else 0.0
        with self._random_state(dropout):
            if packed_seq_params is None:
                out = self._attend_samples(query, key, value, dropout)
            elif self.group is None:
                bounds = packed_seq_params.cu_seqlens_q
                attend = self._attend_documents(query, packed_seq_params, dropout)
                out = attend(query, key, value, bounds, bounds)
            else:
                layout = _layout(packed_seq_params, query.size(0), self.group)
                attend = self._attend_documents(query, packed_seq_params, dropout)
                key, value = (gather_sequence(x, self.group) for x in (key, value))
                out = layout.attention(query, key, value, attend)
        return out.flatten(start_dim=-2)

    def _attend_samples(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        if self.group is not None:
            raise _unsupported(
                "context parallelism for batches that are not packed", "--context-parallel-size"
            )
        # [s, b, heads, head_dim] <-> [b, heads, s, head_dim]
        samples = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = _causal_attention(
            *samples, scale=self.softmax_scale, dropout=dropout, window=self.earlier
        )
        return out.permute(2, 0, 1, 3)

    def _attend_documents(self, q: Tensor, packed: PackedSeqParams, dropout: float) -> Attend:
        """What to call with queries, keys, values and the documents' borders in both."""
        options: dict[str, Any] = {"scale": self.softmax_scale, "window": self.earlier}
        if _can_use_varlen(q, dropout):
            return functools.partial(_varlen_attention, longest=packed.max_seqlen_q, **options)
        return functools.partial(_attention_by_document, dropout=dropout, **options)

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
    block = get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=False,
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    block.layer_norm = norm_class(transformer)
    # Layers share specs: with experts there are two.
    for layer in {id(spec): spec for spec in block.layer_specs}.values():
        _use_packed_attention(layer, transformer)
    return block


def packed_local_heads_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Build Megatron's further heads (multi-token prediction) with our attention and norm.

    Args:
        config: As for `packed_local_layer_spec`.
        vp_stage: Likewise.

    Returns:
        The heads of this pipeline stage; None where it has none.
    """
    transformer: TransformerConfig = config.transformer
    norm = norm_class(transformer)
    layer = get_gpt_decoder_layer_specs(
        transformer,
        use_transformer_engine=False,
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )[-1]
    _use_packed_attention(layer, transformer)
    heads = get_gpt_mtp_block_spec(
        transformer, layer, use_transformer_engine=False, vp_stage=vp_stage
    )
    for head in () if heads is None else heads.layer_specs:
        for name in ("enorm", "hnorm", "layer_norm"):
            setattr(head.submodules, name, norm)
    return heads


def _use_packed_attention(layer: Any, transformer: TransformerConfig) -> None:
    """Replace attention and norms in Megatron's spec of a local layer."""
    norm = norm_class(transformer)
    if not transformer.multi_latent_attention:
        layer.submodules.self_attention.module = PackedSelfAttention
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedDotProductAttention
    for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
        if getattr(attention, name, IdentityOp) not in (IdentityOp, L2Norm):
            setattr(attention, name, norm)


def _check_architecture(transformer: TransformerConfig) -> None:
    for refused, what, where in (
        (transformer.layernorm_zero_centered_gamma, "a 1p norm", "--apply-layernorm-1p"),
    ):
        if refused:
            raise _unsupported(what, where)


def norm_class(transformer: TransformerConfig) -> type[torch.nn.Module]:
    """The norm of `--normalization` that may be used with sequence parallelism.

    Args:
        transformer: The model's configuration.

    Raises:
        FlagError: These layers have no such norm.
    """
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


def _window(config: TransformerConfig, layer_number: int) -> int | None:
    """How many earlier tokens a layer's queries see; None for all."""
    if not is_layer_window_attention(
        config.window_size, config.window_attn_skip_freq, layer_number
    ):
        return None
    earlier, later = config.window_size
    if later > 0:
        raise _unsupported("a window that reaches later tokens", "--window-size")
    return None if earlier < 0 else int(earlier)


def _causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float, window: int | None = None
) -> Tensor:
    """Causal attention on `[b, heads, s, head_dim]`; `k` and `v` may have fewer heads.

    Where there are more keys than queries the last query sees all of them, or with a window the
    last one and as many before it.
    """
    earlier = k.size(2) - q.size(2)
    mask = None
    if earlier or (window is not None and window < k.size(2) - 1):
        # PyTorch's own causal mask lets the first query see the first key alone.
        mask = q.new_ones((q.size(2), k.size(2)), dtype=torch.bool).tril(earlier)
        if window is not None:
            mask = mask.triu(earlier - window)
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=k.size(1) != q.size(1),
    )


def _attention_by_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    dropout: float,
    window: int | None,
) -> Tensor:
    """One call of attention per document; `[t, heads, head_dim]` in and out.

    The last query of a document stands at its last key.
    """
    bounds, key_bounds = (x.tolist() for x in (cu_seqlens_q, cu_seqlens_k))
    if bounds[0] != 0 or bounds[-1] != q.size(0):
        raise DataError(
            f"documents cover positions {bounds[0]} to {bounds[-1]} of a pack of {q.size(0)}",
            where="cu_seqlens",
            remedy="Let the last boundary be the length of the pack: padding is a document too.",
        )
    outputs = []
    pairs = zip(itertools.pairwise(bounds), itertools.pairwise(key_bounds), strict=True)
    for queries, keys in pairs:
        # The tail of cu_seqlens may repeat the last boundary to keep its length fixed.
        if queries[0] == queries[1]:
            continue
        parts = (x[slice(*of)] for x, of in ((q, queries), (k, keys), (v, keys)))
        # [n, heads, head_dim] <-> [1, heads, n, head_dim]
        document = (x.transpose(0, 1).unsqueeze(0) for x in parts)
        out = _causal_attention(*document, scale=scale, dropout=dropout, window=window)
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """One kernel for the whole pack; `[t, heads, head_dim]` in and out.

    The last query of a document stands at its last key.
    """
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
        cu_seqlens_q,
        cu_seqlens_k,
        longest,
        longest,
        window_size=(-1 if window is None else window, 0),
        scale=scale,
        **options,
    )
