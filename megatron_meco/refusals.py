"""Every refusal of a Megatron flag under `--meco`, and the ranges of its numbers.

`check_flags` goes through all parsed arguments before anything is built. A flag passes when it has
Megatron's default, or when `megatron_meco.megatron_flags` says that it means the same with MeCo.
The dataset's configuration, `meco plan`, `meco inspect` and the training script share this table.
Needs neither torch nor megatron.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_meco.config import layout_alignment
from megatron_meco.errors import FlagError
from megatron_meco.megatron_flags import (
    COMPANIONS,
    HONOURED,
    OTHER_PROGRAMS,
    REFUSED,
    UNTESTED,
    names_in,
)

_DROP = "Drop the flag."
_LOCAL = (
    "Drop it, or train on a GPU with Transformer Engine (--transformer-impl transformer_engine)."
)


@dataclass(frozen=True)
class Flag:
    """A flag of Megatron's parser.

    Attributes:
        spelling: The option as a user types it, such as `--seq-length`.
        default: What the parser fills in.
    """

    spelling: str
    default: Any


def flags_of(parser: argparse.ArgumentParser) -> dict[str, Flag]:
    """The flags of a parser by `dest`, with the defaults that hold now."""
    found: dict[str, Flag] = {}
    for action in parser._actions:  # argparse has no public list
        if action.option_strings and action.dest not in ("help", *found):
            default = action.default
            # As argparse does it.
            if isinstance(default, str) and callable(action.type):
                default = action.type(default)
            found[action.dest] = Flag(action.option_strings[0], default)
    return found


def refusal(name: str) -> tuple[str, str]:
    """The reason and the remedy for a flag in `REFUSED`."""
    reason, *remedy = REFUSED[name]
    return reason, remedy[0] if remedy else _DROP


def check_flags(
    args: argparse.Namespace,
    flags: Mapping[str, Flag],
    *,
    local_layers: bool,
    allowed: Collection[str] = (),
) -> None:
    """Refuse each flag that MeCo does not support.

    Args:
        args: Parsed flags, not yet validated by Megatron.
        flags: Megatron's flags (`flags_of` its parser), without those of MeCo or of the script.
        local_layers: Whether MeCo's layers for hosts without Transformer Engine are used.
        allowed: Names (`dest`) of untested flags that the user allows.

    Raises:
        FlagError: Names the first such flag, its value and the remedy.
    """
    check_numbers(args, flags)
    given = {n: f for n, f in flags.items() if _differs(getattr(args, n, f.default), f.default)}
    for name, flag in given.items():
        value = getattr(args, name)
        where = shown(flag.spelling, value)
        if name in REFUSED and _VALUES_REFUSED.get(name, _any)(value):
            reason, remedy = refusal(name)
            raise FlagError(f"does not go with --meco: {reason}", where=where, remedy=remedy)
        for program, names in OTHER_PROGRAMS.items():
            if name in names:
                raise FlagError(
                    f"belongs to Megatron's code for {program} and has no effect here",
                    where=where,
                    remedy=_DROP,
                )
        for main, names in COMPANIONS.items():
            if name in names and main not in given:
                needed = f"without {flags[main].spelling}" if main in flags else "in this Megatron"
                raise FlagError(
                    f"has no effect {needed}",
                    where=where,
                    remedy=_DROP,
                )
        if local_layers and name in _NOT_ON_LOCAL_LAYERS and _VALUES_LOCAL.get(name, _any)(value):
            raise FlagError(
                "the layers for hosts without Transformer Engine do not have it",
                where=where,
                remedy=_LOCAL,
            )
        known = name in HONOURED or name in REFUSED or any(name in c for c in COMPANIONS.values())
        if not known and name not in allowed:
            tried = "is not tested with --meco" if name in UNTESTED else "is not known to MeCo"
            raise FlagError(
                f"{tried}: it may change samples, layers or losses",
                where=where,
                remedy=f"Drop it, or let it through with --meco-allow-flags {name}.",
            )
    for rule in _RULES:
        rule(args)


def check_numbers(args: argparse.Namespace, flags: Mapping[str, Flag]) -> None:
    """Refuse numbers that are invalid in any run: NaN, infinite, of the wrong sign, or too large.

    Args:
        args: Parsed flags.
        flags: Megatron's flags.

    Raises:
        FlagError: Names the first such flag and its value.
    """
    for name, flag in flags.items():
        value = getattr(args, name, flag.default)
        if _differs(value, flag.default):
            _check_number(flag.spelling, name, value)


# Options of Megatron's dataset configuration that contradict MeCo, and the `dest` of their flags.
_DATASET_OPTIONS = {
    "reset_attention_mask": "reset_attention_mask",
    "reset_position_ids": "reset_position_ids",
    "eod_mask_loss": "eod_mask_loss",
    "create_attention_mask": "create_attention_mask_in_dataloader",
    "fast_cache_load": "dataloader_fast_cache_load",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
    "multiple_validation_sets": "multiple_validation_sets",
    "hybrid_context_parallel": "hybrid_context_parallel",
}


def check_dataset_options(config: Any) -> None:
    """Refuse options of Megatron's dataset configuration that contradict MeCo.

    Args:
        config: A `GPTDatasetConfig`.

    Raises:
        FlagError: Names the flag behind the first such option.
    """
    for option, dest in _DATASET_OPTIONS.items():
        value = getattr(config, option)
        if value:
            reason, remedy = refusal(dest)
            raise FlagError(
                f"does not go with MeCo: {reason}",
                where=shown(f"--{dest.replace('_', '-')}", value),
                remedy=remedy,
            )
    ranks = config.context_parallel_size or 1
    padded_to = config.meco.pad_documents_to
    if ranks > 1 and padded_to % (2 * ranks):
        raise FlagError(
            f"each rank takes two equal chunks of every document of a pack, and documents are "
            f"padded to multiples of {padded_to}",
            where=f"--context-parallel-size {ranks}",
            remedy=f"Give --meco-pad-documents-to {math.lcm(padded_to, 2 * ranks)}.",
        )


def shown(spelling: str, value: Any) -> str:
    """A flag as typed: `--seq-length 64`, or only the flag for a switch."""
    if isinstance(value, bool) or value is None:
        return spelling
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join([spelling, *(str(getattr(v, "name", v)) for v in values)])


def is_finite(number: float) -> bool:
    """Whether a number is finite as a float: not NaN, infinite, or an integer of 400 digits."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def closest(word: str, known: Collection[str]) -> str:
    """` Did you mean X?`, or nothing when no known word is close."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return f" Did you mean {match[0]}?" if match else ""


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a start without a launcher, which torch would report minutes later.

    Raises:
        FlagError: Names the first missing variable.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise FlagError(
                "not set: the script was started without a launcher",
                where=f"environment variable {name}",
                remedy="Start it with torchrun (--nproc-per-node 1 for a single process).",
            )


def _any(value: Any) -> bool:
    return True


def _each(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _differs(value: Any, default: Any) -> bool:
    # NaN differs from every default, as it should here.
    return type(value) is not type(default) or bool(value != default)


# ------------------------------------------------------------------------------------- values
# Flags of which only some values are refused.
_VALUES_REFUSED: dict[str, Callable[[Any], bool]] = {
    "create_attention_mask_in_dataloader": bool,
    "dataloader_type": lambda value: value == "cyclic",
    "position_embedding_type": lambda value: value in ("mrope", "relative"),
    "transformer_impl": lambda value: value == "inference_optimized",
    "non_persistent_ckpt_type": lambda value: value == "local",
    "ckpt_format": lambda value: value in ("fsdp_dtensor", "torch_dcp"),
    "moe_router_load_balancing_type": lambda value: (
        not set(_each(value)) <= {"aux_loss", "seq_aux_loss", "global_aux_loss", "none"}
    ),
}

_VALUES_LOCAL: dict[str, Callable[[Any], bool]] = {
    "attention_backend": lambda value: value.name not in ("auto", "unfused", "local"),
    "normalization": lambda value: value not in ("RMSNorm", "LayerNorm"),
    "softmax_type": lambda value: value != "vanilla",
    "moe_token_dispatcher_type": lambda value: value == "flex",
    "cross_entropy_fusion_impl": lambda value: value != "native",
}
_NOT_ON_LOCAL_LAYERS = names_in(
    """
    attention_backend cross_entropy_fusion_impl flash_attention_version fp8 fp8_output_proj
    fp8_param_gather layernorm_zero_centered_gamma log_max_attention_logit mla_down_proj_fusion
    moe_enable_deepep
    moe_grouped_gemm moe_permute_fusion moe_token_dispatcher_type normalization
    qk_clip softmax_type tp_comm_overlap use_flash_attn use_grouped_gemm_for_shared_expert
    """
)

# ------------------------------------------------------------------------------------ numbers
_POSITIVE = names_in(
    """
    adam_eps adlr_autoresume_interval check_weight_hash_across_dp_replicas_interval
    context_parallel_size ddp_bucket_size ddp_num_buckets dist_ckpt_workers
    distributed_timeout_minutes distributed_timeout_seconds_after_init embedding_init_method_std
    encoder_num_layers eval_global_batch_size eval_interval eval_micro_batch_size
    exit_duration_in_mins exit_interval ffn_hidden_size flight_recorder_trace_buffer_size
    fp8_amax_history_len fp8_interval global_batch_size gpu_sniff_test_interval hidden_size
    init_method_std initial_loss_scale kv_channels layernorm_epsilon log_interval
    log_memory_interval loss_scale loss_scale_window lr_decay_iters lr_decay_samples
    make_vocab_size_divisible_by max_position_embeddings micro_batch_size
    microbatch_group_size_per_vp_stage non_persistent_save_interval num_attention_heads
    num_dataset_builder_threads num_distributed_optimizer_instances num_layers
    num_layers_per_virtual_pipeline_stage num_query_groups num_virtual_stages_per_pipeline_rank
    padded_vocab_size pipeline_model_parallel_size recompute_num_layers rope_scaling_factor
    rotary_base rotary_percent rotary_seq_len_interpolation_factor save_activations_interval
    save_dgrads_interval save_interval save_params_interval save_retain_interval
    save_wgrads_interval seed seq_length tensor_model_parallel_size tensorboard_log_interval
    tensorboard_queue_size tiktoken_num_special_tokens train_iters train_samples train_sync_interval
    vocab_size
    """
)
_SHARES = names_in(
    """
    adam_beta1 adam_beta2 attention_dropout hidden_dropout lion_beta1 lion_beta2
    lr_warmup_fraction muon_momentum optimizer_offload_fraction rotary_percent sgd_momentum
    """
)
_ANY_SIGN = names_in("glu_linear_offset null_tokenizer_eod_id null_tokenizer_pad_id")
# Megatron numbers samples with 64 bits and schedules with floats, numpy seeds with 32 bits.
_LARGEST = {
    **dict.fromkeys(
        names_in(
            """
        eval_interval exit_interval log_interval lr_decay_iters lr_decay_samples lr_warmup_iters
        lr_warmup_samples lr_wsd_decay_iters lr_wsd_decay_samples save_interval save_retain_interval
        train_iters train_samples
        """
        ),
        2**53,
    ),
    "seed": 4_000_000_000,
    "num_workers": 10_000,
    "num_dataset_builder_threads": 10_000,
}
_LARGEST_INTEGER = 2**31 - 1


def _check_number(spelling: str, name: str, value: Any) -> None:
    """Refuse a number that is invalid in any run.

    Raises:
        FlagError: It is NaN or infinite, has the wrong sign, or is too large for Megatron.
    """
    for number in value if isinstance(value, list | tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        where = f"{spelling} {number}"
        if not is_finite(number):
            raise FlagError("not a finite number", where=where, remedy="Give a number.")
        if name in _POSITIVE and number <= 0:
            raise FlagError("must be above 0", where=where, remedy="Give a positive number.")
        if name in HONOURED and name not in _ANY_SIGN and number < 0:
            raise FlagError("must not be negative", where=where, remedy="Give 0 or more.")
        if name in _SHARES and number > 1:
            raise FlagError("must not be above 1", where=where, remedy="For 10 % write 0.1.")
        if isinstance(number, int) and number > _LARGEST.get(name, _LARGEST_INTEGER):
            largest = _LARGEST.get(name, _LARGEST_INTEGER)
            raise FlagError("too large", where=where, remedy=f"Give a number up to {largest:,}.")


# -------------------------------------------------------------------------------------- rules
def _need(args: argparse.Namespace, name: str, spelling: str, what: str) -> None:
    if getattr(args, name, None) is None:
        raise FlagError(f"missing: {what}", where=spelling, remedy=f"Give {spelling} N.")


def check_run(args: argparse.Namespace) -> None:
    """Refuse a command line that lacks what a run needs, or whose numbers contradict each other.

    Megatron reports these by bare assertions and type errors, some only after the model is built.

    Args:
        args: Parsed flags of a whole training command, not yet validated by Megatron.

    Raises:
        FlagError: Names the flag and the remedy.
    """
    depths = ("num_layers", "encoder_num_layers", "hybrid_layer_pattern", "hybrid_override_pattern")
    if all(getattr(args, name, None) is None for name in depths):
        _need(args, "num_layers", "--num-layers", "the depth of the model")
    _need(args, "hidden_size", "--hidden-size", "the width of the model")
    _need(args, "num_attention_heads", "--num-attention-heads", "the model's attention heads")
    _need(args, "seq_length", "--seq-length", "tokens in a sequence")
    _need(args, "max_position_embeddings", "--max-position-embeddings", "positions of the model")
    _need(args, "micro_batch_size", "--micro-batch-size", "sequences in a micro-batch")
    if args.train_iters is None and args.train_samples is None:
        raise FlagError(
            "missing: the length of the run, by which documents are dealt to the phases",
            where="--train-iters / --train-samples",
            remedy="Give one of the two.",
        )
    _need(
        args, "eval_interval", "--eval-interval", "Megatron divides by it, also with --eval-iters 0"
    )
    if not args.skip_train:
        _need(args, "lr", "--lr", "the learning rate")
    if args.save is not None:
        _need(args, "save_interval", "--save-interval", "training steps between checkpoints")
    ranks = args.world_size
    layout = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    layout *= args.context_parallel_size
    if ranks % layout:
        kinds = ("tensor_model", "pipeline_model", "context")
        sizes = {kind: getattr(args, f"{kind}_parallel_size") for kind in kinds}
        kind = next(kind for kind, size in sizes.items() if size > 1)
        raise FlagError(
            f"tensor x pipeline x context parallel sizes are {layout}, which does not divide the "
            f"{ranks} ranks",
            where=f"--{kind.replace('_', '-')}-parallel-size {sizes[kind]}",
            remedy=f"Start a multiple of {layout} ranks, or change the layout.",
        )
    _check_expert_layout(args)
    step = args.micro_batch_size * (ranks // layout)
    if args.step_batch_size_schedule is None and (args.global_batch_size or step) % step:
        raise FlagError(
            f"not a multiple of {step}, which is --micro-batch-size times {ranks // layout} "
            "data-parallel ranks",
            where=f"--global-batch-size {args.global_batch_size}",
            remedy=f"Give a multiple of {step}.",
        )
    if args.max_position_embeddings < args.seq_length:
        raise FlagError(
            f"smaller than --seq-length {args.seq_length}",
            where=f"--max-position-embeddings {args.max_position_embeddings}",
            remedy=f"Give {args.seq_length} or more.",
        )
    if args.lr is not None and args.min_lr > args.lr:
        raise FlagError(
            f"above --lr {args.lr}", where=f"--min-lr {args.min_lr}", remedy="Give a smaller one."
        )


def _check_expert_layout(args: argparse.Namespace) -> None:
    """Refuse expert-parallel sizes that do not fit the ranks; Megatron does so with a traceback."""
    experts = getattr(args, "expert_model_parallel_size", 1) or 1
    if experts == 1:
        return
    tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    layout = experts * tensor * args.pipeline_model_parallel_size
    if args.world_size % layout:
        raise FlagError(
            f"expert x expert-tensor x pipeline parallel sizes are {layout}, which does not divide "
            f"the {args.world_size} ranks",
            where=f"--expert-model-parallel-size {experts}",
            remedy=f"Start a multiple of {layout} ranks, or change the layout.",
        )
    if args.num_experts and args.num_experts % experts:
        raise FlagError(
            f"no divisor of --num-experts {args.num_experts}",
            where=f"--expert-model-parallel-size {experts}",
            remedy="Choose one that is.",
        )


def _check_batch_schedule(args: argparse.Namespace) -> None:
    if args.step_batch_size_schedule is not None and args.global_batch_size is not None:
        raise FlagError(
            "given beside --step-batch-size-schedule",
            where=f"--global-batch-size {args.global_batch_size}",
            remedy="Give one of the two.",
        )


def _check_iterations_and_samples(args: argparse.Namespace) -> None:
    by_samples = args.train_samples is not None
    if by_samples and args.train_iters is not None:
        raise FlagError(
            f"given beside --train-iters {args.train_iters}",
            where=f"--train-samples {args.train_samples}",
            remedy="Give one of the two.",
        )
    unit, other = ("iters", "samples")[:: -1 if by_samples else 1]
    for stem in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        value = getattr(args, f"{stem}_{other}")
        if value:
            flag = stem.replace("_", "-")
            raise FlagError(
                f"the run is counted in {'samples' if by_samples else 'iterations'}",
                where=f"--{flag}-{other} {value}",
                remedy=f"Give --{flag}-{unit}.",
            )


def _check_background_saves(args: argparse.Namespace) -> None:
    if not args.async_save:
        return
    if not args.use_persistent_ckpt_worker:
        raise FlagError(
            "without --use-persistent-ckpt-worker Megatron's `validate_args` turns it off",
            where="--async-save",
            remedy="Add that flag, or drop this one.",
        )
    if args.ckpt_format != "torch_dist":
        raise FlagError(
            "Megatron's `save_checkpoint` has it for other formats only",
            where=f"--async-save --ckpt-format {args.ckpt_format}",
            remedy="Use --ckpt-format torch_dist, or drop --async-save.",
        )


def _check_micro_batch(args: argparse.Namespace) -> None:
    for name in ("micro_batch_size", "eval_micro_batch_size"):
        tokens = (getattr(args, name) or 0) * (args.seq_length or 0)
        if tokens > _LARGEST_INTEGER:
            raise FlagError(
                f"a micro-batch of {tokens:,} tokens; document borders are 32-bit integers",
                where=f"--{name.replace('_', '-')} {getattr(args, name)}",
                remedy=f"Keep it times --seq-length below {_LARGEST_INTEGER:,}.",
            )


# Layers of a hybrid pattern: why they are refused.
_HYBRID_LAYERS = {
    "D": REFUSED["experimental_attention_variant"][0],
    "+": "latent attention in a hybrid model is not tested over packed documents",
    "/": "nobody has shown that further heads of these layers keep packed documents apart",
}


def _check_hybrid_pattern(args: argparse.Namespace) -> None:
    """Refuse layers that a letter of the pattern brings in, and that their own flag would not."""
    for flag in ("hybrid_layer_pattern", "hybrid_override_pattern"):
        pattern = getattr(args, flag, None) or ""
        for letter in pattern:
            if letter in _HYBRID_LAYERS:
                raise FlagError(
                    f"layer {letter!r}: {_HYBRID_LAYERS[letter]}",
                    where=shown(f"--{flag.replace('_', '-')}", pattern),
                    remedy="Build the model of M (Mamba), * (attention), - (MLP), E (experts) and "
                    "G (gated delta net).",
                )
        if "E" in pattern and not args.num_experts:
            raise FlagError(
                "layer 'E': the number of its experts is missing",
                where=shown(f"--{flag.replace('_', '-')}", pattern),
                remedy="Give --num-experts N.",
            )


def _check_further_heads(args: argparse.Namespace) -> None:
    """Refuse kinds of multi-token prediction other than the one that is shown to be right."""
    if not getattr(args, "mtp_num_layers", None):
        return
    others = {
        "mtp_standalone": "a stage with further heads alone gets no tokens",
        "mtp_hybrid_override_pattern": _HYBRID_LAYERS["/"],
        "hybrid_layer_pattern": _HYBRID_LAYERS["/"],
        "mtp_hsm": "nobody has shown that it keeps packed documents apart",
        "pipeline_model_parallel_layout": "only the last stage is known to get what the heads need",
    }
    for name, reason in others.items():
        if getattr(args, name, None):
            raise FlagError(
                f"does not go with --mtp-num-layers under --meco: {reason}",
                where=shown(f"--{name.replace('_', '-')}", getattr(args, name)),
                remedy="Drop one of the two.",
            )


def _check_query_groups(args: argparse.Namespace) -> None:
    """Megatron looks at it when it builds the model."""
    heads, groups = args.num_attention_heads, args.num_query_groups
    if args.group_query_attention and heads and groups and heads % groups:
        raise FlagError(
            f"does not divide the {heads} attention heads",
            where=f"--num-query-groups {groups}",
            remedy=f"Give a number by which {heads} can be divided.",
        )


def _check_experts(args: argparse.Namespace) -> None:
    """Refuse layouts in which Megatron's router counts other tokens than those of the documents."""
    if not args.num_experts:
        return
    where = f"--num-experts {args.num_experts}"
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise FlagError(
            "Megatron trains experts on tensor-parallel ranks with sequence parallelism alone",
            where=where,
            remedy="Add --sequence-parallel.",
        )
    if args.sequence_parallel and getattr(args, "mtp_num_layers", None):
        raise FlagError(
            "further heads with experts are not tested with --sequence-parallel: each rank holds a "
            "part of the padding mask, which Megatron moves by the borders of all documents",
            where=where,
            remedy="Use --tensor-model-parallel-size 1, or drop --mtp-num-layers.",
        )
    if (
        "seq_aux_loss" in _each(args.moe_router_load_balancing_type)
        and args.sequence_parallel
        and (args.micro_batch_size or 1) > 1
    ):
        raise FlagError(
            "Megatron would take the loss over all samples of a micro-batch: with "
            "--sequence-parallel ranks hold parts of it, and no whole samples",
            where="--moe-router-load-balancing-type seq_aux_loss",
            remedy="Use --micro-batch-size 1 or aux_loss.",
        )


def _check_rotary(args: argparse.Namespace) -> None:
    """RoPE rotates pairs of dimensions; with an odd number the model fails at its first step."""
    heads, width = args.num_attention_heads, args.hidden_size
    if args.position_embedding_type not in ("rope", "yarn") or not heads or not width:
        return
    latent = getattr(args, "multi_latent_attention", False)
    size = args.qk_pos_emb_head_dim if latent else args.kv_channels or width // heads
    rotary = int(size * args.rotary_percent)
    if rotary % 2 or not rotary:
        raise FlagError(
            f"{rotary} rotary dimensions in a head; RoPE needs an even number",
            where=f"--{'qk-pos-emb-head-dim' if latent else 'kv-channels'} / --rotary-percent",
            remedy="Choose heads whose size times --rotary-percent is even.",
        )


# Minor versions of Transformer Engine from which a way of communication serves packed documents.
_ENGINE_SINCE = {"p2p": (1, 10), "a2a": (2, 10), "all_gather": (2, 18)}
# What nobody has shown to work where ranks hold parts of documents.
_NOT_WITH_CONTEXT_PARALLELISM = {
    "hybrid_layer_pattern": "state-space layers",
    "hybrid_override_pattern": "state-space layers",
    "mtp_num_layers": "multi-token prediction",
    "multi_latent_attention": "latent attention",
    "num_experts": "a mixture of experts",
    "qk_clip": "clipping of attention logits",
    "log_max_attention_logit": "a report of attention logits",
    "softmax_type": "another softmax",
    "window_size": "sliding-window attention",
}


def _check_context_parallelism(args: argparse.Namespace) -> None:
    ranks = args.context_parallel_size
    if ranks <= 1:
        return
    where = f"--context-parallel-size {ranks}"
    if not args.calculate_per_token_loss:
        raise FlagError(
            "without --calculate-per-token-loss each rank divides its loss by its own trained "
            "tokens, whose number differs from rank to rank",
            where=where,
            remedy="Add --calculate-per-token-loss.",
        )
    for name, what in _NOT_WITH_CONTEXT_PARALLELISM.items():
        value = getattr(args, name, None)
        if value and value != "vanilla":
            raise FlagError(
                f"not tested with --context-parallel-size {ranks}: {what}",
                where=shown(f"--{name.replace('_', '-')}", value),
                remedy="Use --context-parallel-size 1.",
            )
    alignment = layout_alignment(args)
    given = getattr(args, "meco_pad_documents_to", None)
    if given is not None and given % alignment:
        raise FlagError(
            f"not a multiple of {alignment}: the ranks divide every document of a pack by that",
            where=f"--meco-pad-documents-to {given}",
            remedy=f"Give {math.lcm(max(given, 1), alignment)}, or drop the flag.",
        )
    if args.seq_length and args.seq_length % alignment:
        raise FlagError(
            f"not a multiple of {alignment}: the ranks divide every document of a pack by that",
            where=f"--seq-length {args.seq_length}",
            remedy=f"Give {-(-args.seq_length // alignment) * alignment}.",
        )
    kinds = args.cp_comm_type
    for kind in [kinds] if isinstance(kinds, str) else kinds or []:
        _check_communication(args, kind)


def _check_communication(args: argparse.Namespace, kind: str) -> None:
    where = f"--cp-comm-type {kind}"
    if args.transformer_impl == "local":
        # p2p is Megatron's default.
        if kind not in ("p2p", "all_gather"):
            raise FlagError(
                "the layers for hosts without Transformer Engine gather keys and values",
                where=where,
                remedy="Use all_gather.",
            )
        return
    engine = _engine_version()
    version = (math.inf,) if engine is None else tuple(int(x) for x in engine.split(".")[:2])
    if kind not in _ENGINE_SINCE:
        raise FlagError(
            f"unknown, or not for packed documents in Transformer Engine {engine or '2.18'}",
            where=where,
            remedy=f"Use {' or '.join(_ENGINE_SINCE)}.",
        )
    since = _ENGINE_SINCE[kind]
    if version < since:
        usable = [name for name, first in _ENGINE_SINCE.items() if first <= version]
        raise FlagError(
            f"Transformer Engine {engine} has it for unpacked batches alone; packed documents need "
            f"{'.'.join(map(str, since))}",
            where=where,
            remedy=f"Use {' or '.join(usable) or 'a newer version'}.",
        )
    heads = args.num_query_groups or args.num_attention_heads
    if (
        kind == "a2a"
        and heads
        and (heads // args.tensor_model_parallel_size) % (args.context_parallel_size)
    ):
        raise FlagError(
            f"it deals {heads} key-value heads over {args.tensor_model_parallel_size} "
            f"tensor-parallel times {args.context_parallel_size} context-parallel ranks",
            where=where,
            remedy="Use p2p.",
        )
    if getattr(args.attention_backend, "name", args.attention_backend) in ("unfused", "local"):
        raise FlagError(
            "Transformer Engine has context parallelism in its flash and fused attention",
            where=shown("--attention-backend", args.attention_backend),
            remedy="Drop the flag.",
        )


def _engine_version() -> str | None:
    """The installed Transformer Engine's, without a look at whether it can be loaded."""
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return None


_RULES = (
    _check_further_heads,
    _check_hybrid_pattern,
    _check_experts,
    _check_context_parallelism,
    _check_query_groups,
    _check_rotary,
    _check_background_saves,
    _check_batch_schedule,
    _check_iterations_and_samples,
    _check_micro_batch,
)
