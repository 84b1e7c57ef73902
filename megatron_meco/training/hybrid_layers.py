"""Megatron's hybrid layers without Transformer Engine.

Megatron has them for Transformer Engine only. Mamba's state and convolution restart at each
document by `PackedSeqParams.seq_idx`; the kernels are those of the package mamba_ssm, which a GPU
needs. Gated delta nets take the borders of documents; their kernels are those of the package fla.
Checkpoints do not have the names of the Transformer Engine layers, whose norms are part of the
linear layers behind them. Latent attention is not among these layers; `megatron_meco.refusals`
refuses its letter in a pattern.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_meco.training.attention import (
    PackedDotProductAttention,
    PackedSelfAttention,
    norm_class,
)

PACKED_LOCAL_HYBRID_SPEC = ["megatron_meco.training.hybrid_layers", "packed_local_hybrid_spec"]
"""The value of Megatron's `--spec` (and of `args.spec`) for `packed_local_hybrid_spec`."""


class LocalNorm:
    """The norm that the configuration asks for; a class, because Megatron's specs want one."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        """Make it.

        Args:
            config: The model's configuration.
            hidden_size: Size of the last dimension.
            eps: Added to the variance.
        """
        return norm_class(config)(config, hidden_size, eps)


class LocalHybridStack(HybridStack):  # type: ignore[misc]
    """Megatron's stack; its own final norm is Transformer Engine's."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *args: Any,
        post_layer_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = LocalNorm(config, config.hidden_size, config.layernorm_epsilon)


packed_local_hybrid_spec = ModuleSpec(
    module=LocalHybridStack,
    submodules=HybridStackSubmodules(
        mamba_layer=ModuleSpec(
            module=MambaLayer,
            submodules=MambaLayerSubmodules(
                norm=LocalNorm,
                mixer=ModuleSpec(
                    module=MambaMixer,
                    submodules=MambaMixerSubmodules(
                        in_proj=ColumnParallelLinear, out_proj=RowParallelLinear
                    ),
                ),
                mamba_bda=get_bias_dropout_add,
            ),
        ),
        gdn_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=LocalNorm,
                self_attention=ModuleSpec(
                    module=GatedDeltaNet,
                    submodules=GatedDeltaNetSubmodules(
                        in_proj=ColumnParallelLinear, out_norm=LocalNorm, out_proj=RowParallelLinear
                    ),
                ),
                self_attn_bda=get_bias_dropout_add,
            ),
        ),
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=LocalNorm,
                self_attention=ModuleSpec(
                    module=PackedSelfAttention,
                    params={"attn_mask_type": AttnMaskType.causal},
                    submodules=SelfAttentionSubmodules(
                        linear_qkv=ColumnParallelLinear,
                        core_attention=PackedDotProductAttention,
                        linear_proj=RowParallelLinear,
                    ),
                ),
                self_attn_bda=get_bias_dropout_add,
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=LocalNorm,
                mlp=partial(
                    MLP.as_mlp_submodule,
                    submodules=MLPSubmodules(
                        linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
                    ),
                ),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
        moe_layer=ModuleSpec(
            module=MoETransformerLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=LocalNorm,
                # Any number: the configuration says how many experts there are.
                mlp=get_moe_module_spec(use_te=False, num_experts=1),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
    ),
)
"""Megatron's `hybrid_stack_spec` with local layers."""
