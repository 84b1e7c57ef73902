"""A run without `--meco`: the glue of Megatron's `pretrain_gpt.py` and `pretrain_hybrid.py`.

Megatron's wheel has no training scripts, so ours need the few lines that those scripts put between
`pretrain()` and Megatron's own functions: which dataset class, which batch functions, which loss.
Nothing here is specific to MeCo. A script that has such functions of its own hands them to
`megatron_meco.training.provider.with_meco`, and this module is not used. Source:
pretrain_gpt.py of core_v0.19.0.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import mpu, parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_meco.errors import MeCoError

try:
    from megatron.core.utils import flatten_batch_for_packed_sequences
except ImportError:
    # Megatron 0.18: its own script reads batches in another way.
    flatten_batch_for_packed_sequences = None

Batch = dict[str, Any]

straggler_timer = StragglerDetector()
"""Megatron's detector of slow ranks (`--log-straggler`), one for a process."""

_SPIKY_LOSS_FACTOR = 10  # pretrain_gpt.py's
_BATCH_KEYS = (
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "hybrid_cp_group",
    "labels",
    "local_cp_size",
    "loss_mask",
    "max_seqlen",
    "position_ids",
    "tokens",
)


def dataset_options(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """The options of Megatron's `GPTDatasetConfig`.

    Args:
        args: Megatron's validated arguments.
        tokenizer: Megatron's.
    """
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences_per_dataset = json.load(file)
    options = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "split": args.split,
        "multiple_validation_sets": args.multiple_validation_sets,
        "full_validation": args.full_validation,
        "num_dataset_builder_threads": args.num_dataset_builder_threads,
        "path_to_cache": args.data_cache_path,
        "mmap_bin_files": args.mmap_bin_files,
        "tokenizer": tokenizer,
        "reset_position_ids": args.reset_position_ids,
        "reset_attention_mask": args.reset_attention_mask,
        "eod_mask_loss": args.eod_mask_loss,
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "object_storage_cache_path": args.object_storage_cache_path,
        "mid_level_dataset_surplus": args.mid_level_dataset_surplus,
        "allow_ambiguous_pad_tokens": args.allow_ambiguous_pad_tokens,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "sequences_per_dataset": sequences_per_dataset,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "context_parallel_size": args.context_parallel_size,
        "data_parallel_size": args.data_parallel_size,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
        "hybrid_context_parallel": args.hybrid_context_parallel,
        "inter_document_masking": getattr(args, "dataloader_inter_document_masking", False),
    }
    # Those of the installed Megatron.
    known = {field.name for field in dataclasses.fields(GPTDatasetConfig)}
    return {name: value for name, value in options.items() if name in known}


def train_valid_test_datasets_provider(
    train_val_test_num_samples: Sequence[int | None], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Megatron's datasets: GPT, FIM, SFT or mock, as the flags say.

    Args:
        train_val_test_num_samples: Samples of the three splits; None: one epoch.
        vp_stage: Virtual pipeline stage, or None.

    Returns:
        Training, validation and test dataset; None on ranks that hold none.
    """
    args = get_args()
    if flatten_batch_for_packed_sequences is None:
        raise MeCoError(
            "this Megatron has no functions for a run without --meco in this script",
            where="--meco",
            remedy="Add --meco, or wrap this Megatron's own pretrain_gpt.py by with_meco.",
        )
    options = dataset_options(args, get_tokenizer())
    kind: type = GPTDataset
    config = GPTDatasetConfig
    if args.sft:
        from megatron.training.datasets.sft_dataset import SFTDataset

        kind = SFTDataset
    elif args.mock_data:
        kind = MockGPTDataset
    elif args.fim_data:
        from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig

        kind, config = GPTFIMDataset, GPTFIMDatasetConfig
        options |= {
            "fim_rate": args.fim_rate,
            "fim_spm_rate": args.fim_spm_rate,
            "fim_extra_tokens": {
                name: getattr(args, f"fim_{name}_token")
                for name in ("prefix", "middle", "suffix", "pad", "eod")
            },
            "fim_split_sample": args.fim_split_sample,
            "fim_fragment_rate": args.fim_fragment_rate,
            "fim_no_prefix": args.fim_no_prefix,
        }

    def built_here() -> bool:
        everywhere = args.sft or args.dataloader_inter_document_masking
        return mpu.get_tensor_model_parallel_rank() == 0 and (
            everywhere or _has_batches(args, vp_stage)
        )

    builder = BlendedMegatronDatasetBuilder(
        kind, train_val_test_num_samples, built_here, config(**options)
    )
    train, valid, test = builder.build()
    return train, valid, test


# Megatron calls a provider with this mark on every rank, and lets it decide where to build.
train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def forward_step(
    data_iterator: Iterator[Batch], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """Megatron's forward step: one micro-batch through one model chunk.

    Args:
        data_iterator: Gives batches on tensor-parallel rank 0; not used elsewhere.
        model: The model chunk, wrapped as Megatron wraps it.
        return_schedule_plan: Whether to return a schedule plan in place of the output.

    Returns:
        The output tensor (per-token losses on the last stage) and the loss function.
    """
    args = get_args()
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with straggler_timer(bdata=True):
        batch = get_batch(args, data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    packed = _packed_seq_params(args, batch)
    timers("batch-generator").stop()
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    with straggler_timer:
        if return_schedule_plan:
            output = model.build_schedule_plan(
                *inputs, labels=batch["labels"], loss_mask=batch["loss_mask"]
            )
        else:
            output = model(
                *inputs,
                labels=batch["labels"],
                loss_mask=batch["loss_mask"],
                packed_seq_params=packed,
            )
    return output, functools.partial(loss_func, batch["loss_mask"], model=model)


def loss_func(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor, model: Any = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Megatron's loss.

    Args:
        loss_mask: (micro-batch, sequence) or flat, float32.
        output_tensor: Per-token losses, as many.
        model: The model, which the loss of a distillation asks for.

    Returns:
        The loss summed over the mask, tokens in the mask (int32), and the report.
    """
    args = get_args()
    if args.logits_load_dir is not None:
        loss, num_tokens, report = _distillation_loss()(loss_mask, output_tensor, model=model)
    else:
        mask = loss_mask.view(-1).float()
        loss = torch.sum(output_tensor.view(-1).float() * mask)
        num_tokens = mask.sum().clone().detach().to(torch.int)
        report = {"lm loss": torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])}
    check_for_nan(loss, torch.isnan, "found NaN in local forward loss calculation")
    check_for_nan(loss, torch.isinf, "found Inf in local forward loss calculation")
    check_for_spike(loss)
    return loss, num_tokens, report


def check_for_nan(loss: torch.Tensor, rejects: Any, message: str) -> None:
    """Have Megatron's rerun state machine look at a loss, unless its check is off.

    Args:
        loss: A scalar.
        rejects: Tells from it whether it is wrong.
        message: What is wrong with it then.
    """
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=loss, rejection_func=rejects, message=message, tolerance=0.0, fatal=True
        )


def check_for_spike(loss: torch.Tensor) -> None:
    """Report a loss above ten times the largest so far, where `--check-for-spiky-loss` asks."""
    if get_args().check_for_spiky_loss:
        machine = get_rerun_state_machine()
        machine.validate_result(
            result=loss,
            rejection_func=functools.partial(
                machine.is_unexpectedly_large, threshold=_SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )


def get_embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Pipeline ranks that hold the embedding: the first, with tied weights the last, and MTP's.

    Args:
        pp_ranks: Ranks of a pipeline group.
    """
    args = get_args()
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def _has_batches(args: argparse.Namespace, vp_stage: int | None) -> bool:
    return bool(is_first_or_last_pipeline_stage(vp_stage) or _mtp_is_here(args, vp_stage))


def _mtp_is_here(args: argparse.Namespace, vp_stage: int | None) -> bool:
    if not args.mtp_num_layers:
        return False
    config = core_transformer_config_from_args(args)
    return bool(
        mtp_on_this_rank(
            layout=config.pipeline_model_parallel_layout,
            mtp_num_layers=config.mtp_num_layers,
            ignore_virtual=False,
            vp_stage=vp_stage,
        )
    )


def get_batch(
    args: argparse.Namespace, data_iterator: Iterator[Batch] | None, vp_stage: int | None
) -> Batch:
    """The next micro-batch, by Megatron's own functions.

    Args:
        args: Megatron's arguments.
        data_iterator: Gives batches on tensor-parallel rank 0; not used elsewhere.
        vp_stage: Virtual pipeline stage, or None.

    Returns:
        Megatron's batch keys; None for what this pipeline stage does not need.
    """
    packed = args.sft or args.dataloader_inter_document_masking
    here = _has_batches(args, vp_stage)
    if not here and not packed:
        return dict.fromkeys(_BATCH_KEYS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: Batch = {}
    if tp_rank == 0:
        assert data_iterator is not None
        loaded = next(data_iterator)
        for key in _BATCH_KEYS:
            value = loaded.get(key)
            batch[key] = None if value is None else value.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=packed,
        is_hybrid_cp=args.hybrid_context_parallel,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_mtp_is_here(args, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not here:
        kept = {key: batch[key] for key in ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")}
        return {**dict.fromkeys(_BATCH_KEYS), **kept}
    batch = get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=args.hybrid_context_parallel,
        cp_group=parallel_state.get_context_parallel_group(),
        hybrid_cp_group_func=parallel_state.get_hybrid_data_context_parallel_groups,
        use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
    )
    return {key: batch.get(key) for key in _BATCH_KEYS}


def _packed_seq_params(args: argparse.Namespace, batch: Batch) -> PackedSeqParams | None:
    if batch["cu_seqlens"] is None:
        return None
    bounds = batch["cu_seqlens"].squeeze(0)
    padded = batch["cu_seqlens_padded"]
    padded = None if padded is None else padded.squeeze(0)
    update_seqlen_stats_from_cu_seqlens(bounds)
    bounds = bounds if padded is None else padded
    longest = int(batch["max_seqlen"].item())
    size = batch["local_cp_size"]
    # pretrain_hybrid.py gives the number of tokens: state-space layers restart by it.
    hybrid = getattr(args, "hybrid_layer_pattern", None) is not None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        local_cp_size=None if size is None else int(size.item()),
        cp_group=batch["hybrid_cp_group"],
        total_tokens=int(bounds[-1].item()) if hybrid else None,
        tokens_per_sample=args.seq_length,
    )


@functools.lru_cache(maxsize=1)
def _distillation_loss() -> Any:
    """The loss of an offline distillation; the reader of its logits is made once."""
    from megatron.training.distillation import LossFuncCallable

    args = get_args()
    return LossFuncCallable(
        logprobs_dir=args.logits_load_dir,
        decode_threads=args.logits_load_decode_threads,
        prefetch_factor=args.logits_load_prefetch_factor,
        msc_prefetch_depth=args.logits_load_msc_prefetch_depth,
        kd_loss_alpha=args.logits_load_kd_loss_alpha,
        ignore_errors=args.logits_load_ignore_errors,
    )
