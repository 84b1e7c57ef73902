"""The small Llama that scripts beside this one forward: a GPTModel with our layers or others.

A script imports it after it has got torch ready for its device, as Megatron looks on import.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)

from megatron_meco.training.attention import packed_local_layer_spec


def make_model(
    layers: str,
    *,
    vocab_size: int,
    length: int,
    positions: str = "rope",
    tied: bool = False,
    rotary_percent: float = 1.0,
    **changes: Any,
) -> GPTModel:
    """`layers`: local, transformer_engine, or local with Megatron's own RoPE: stock-rope."""
    # Heads of 64: flash kernels have no smaller ones in every version.
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 256,
        "ffn_hidden_size": 512,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    # Megatron sets those of YaRN on the finished configuration.
    yarn = {name: changes.pop(name) for name in list(changes) if name.startswith("yarn_")}
    made = TransformerConfig
    if changes.get("multi_latent_attention"):
        made = MLATransformerConfig
        values |= {"num_query_groups": None, "q_lora_rank": None, "kv_lora_rank": 64}
        values |= {"qk_head_dim": 32, "qk_pos_emb_head_dim": 16, "v_head_dim": 40}
        values["rope_type"] = "rope"
    config = made(**(values | changes))
    for name, value in yarn.items():
        setattr(config, name, value)
    if layers == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = packed_local_layer_spec(SimpleNamespace(transformer=config))
    if layers == "stock-rope":
        spec.layer_specs[0].submodules.self_attention.module = SelfAttention
    return GPTModel(
        config,
        spec,
        vocab_size,
        length,
        position_embedding_type=positions,
        rotary_percent=rotary_percent,
        share_embeddings_and_output_weights=tied,
    )
