"""Starting Megatron's `pretrain()` for a GPT or hybrid model, in each Megatron that has one.

From 0.19 on the container of the configuration says which model is built; 0.18 wants a function
that builds it, of which its wheel has none for GPT. What is installed is found out by looking, not
by its number.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.transformer.spec_utils import import_module
from megatron.training import argument_utils, pretrain, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args

from megatron_meco.errors import FlagError


def run_pretraining(
    args: argparse.Namespace, datasets_provider: Callable[..., Any], forward_step: Any
) -> None:
    """Train as the arguments say; `--hybrid-layer-pattern` makes a HybridModel of it.

    Args:
        args: Megatron's validated arguments.
        datasets_provider: As `pretrain()` takes it.
        forward_step: Likewise.
    """
    model = model_config(args)
    container = argument_utils.pretrain_cfg_container_from_args(args, model)
    builder: dict[str, Any] = {}
    parameters = inspect.signature(pretrain).parameters
    if parameters["model_provider"].default is inspect.Parameter.empty:
        builder["model_provider"] = _gpt_builder if model is None else _builder_of(model)
    pretrain(
        container,
        datasets_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        **builder,
    )


def model_config(args: argparse.Namespace) -> Any | None:
    """Megatron's configuration of the model; None for GPT where this Megatron has none.

    Args:
        args: Megatron's validated arguments.
    """
    if getattr(args, "hybrid_layer_pattern", None):
        return argument_utils.hybrid_config_from_args(args)
    make = getattr(argument_utils, "gpt_config_from_args", None)
    return None if make is None else make(args)


def _builder_of(model: Any) -> Callable[..., Any]:
    """A function of Megatron 0.18's kind from a model's configuration."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    def build(
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
    ) -> Any:
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        builder = model.get_builder_cls()(model)
        return builder.build_model(groups, pre_process, post_process, vp_stage)

    return build


def _gpt_builder(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """`gpt_builder` of Megatron-LM 0.18, without further heads."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.training import get_args

    args = get_args()
    if args.mtp_num_layers:
        raise FlagError(
            "this script builds such models from Megatron 0.19 on",
            where=f"--mtp-num-layers {args.mtp_num_layers}",
            remedy="Use this Megatron's own pretrain_gpt.py, wrapped by with_meco.",
        )
    print_rank_0("building GPT model ...")
    config = config or core_transformer_config_from_args(args)
    if args.spec is not None:
        spec = import_module(args.spec)
    elif args.num_experts:
        spec = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=args.transformer_impl == "transformer_engine",
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=vp_stage,
        )
    elif args.transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            qk_l2_norm=config.qk_l2_norm,
        )
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            normalization=args.normalization,
        )
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
