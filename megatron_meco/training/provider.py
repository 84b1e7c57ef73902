"""What `megatron.training.pretrain()` asks a script for: datasets and the training step.

With `--meco` the datasets are MeCo's and the step reports two validation losses, on conditioned and
on plain documents; without it both are what Megatron's own `pretrain_gpt.py` does. How batches
travel is in `batch.py`. Costs no wait for the device within a micro-batch but Megatron's own check
for NaN (`--no-check-for-nan-in-loss-and-grad` takes it away), and at the end of a step the sum of
document lengths that Megatron's FLOPs account asks of all ranks. What was given up: Megatron's
paths for SFT, distillation, multi-token prediction and context parallelism.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import (
    get_args,
    get_tensorboard_writer,
    get_timers,
    get_tokenizer,
    print_rank_0,
)
from megatron.training.global_vars import get_wandb_writer
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_meco.config import MeCoConfig
from megatron_meco.data.dataset import MeCoGPTDatasetConfig, build_datasets
from megatron_meco.data.report import Run, most_documents, plan_report, summary_lines
from megatron_meco.errors import MeCoError
from megatron_meco.training.arguments import cooldown_blend, schedule_from_args
from megatron_meco.training.batch import Batch, CompactSamples, meco_batch, stock_batch
from megatron_meco.training.compat import check_version
from megatron_meco.training.phase_switch import PhaseSwitch


@dataclass
class RunState:
    """What the training step needs to know of the datasets.

    Attributes:
        switch: Announces and checks the phases.
        num_bounds: Length of a sample's `cu_seqlens` on the device, the same for all packs of the
            run and on all ranks.
    """

    switch: PhaseSwitch
    num_bounds: int


_state: RunState | None = None


def begin_run(run: Run, args: argparse.Namespace) -> RunState:
    """Have `forward_step` train on these datasets; a call for all ranks.

    `train_valid_test_datasets_provider` does it for its own. Megatron's loader is to be given
    `CompactSamples` of them.

    Args:
        run: Datasets (None on ranks that hold none) and schedule.
        args: Megatron's arguments.
    """
    global _state
    most = torch.tensor(most_documents(run), device="cuda")
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    # A zero, the end of each document, and that of the padding.
    num_bounds = min(int(most) + 2, args.seq_length + 1)
    _state = RunState(PhaseSwitch(run.schedule, saves=bool(args.save)), num_bounds)
    return _state


def _state_of_run() -> RunState:
    assert _state is not None, "the datasets come from another provider: call begin_run"
    return _state


def train_valid_test_datasets_provider(
    train_val_test_num_samples: Sequence[int | None], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Megatron's datasets provider.

    Args:
        train_val_test_num_samples: Samples of the three splits; None: one epoch.
        vp_stage: Virtual pipeline stage, or None.

    Returns:
        Training, validation and test dataset; None on ranks that hold none.
    """
    args = get_args()
    if not args.meco:
        return _stock_datasets(args, train_val_test_num_samples, vp_stage)
    warning = check_version()
    if warning:
        print_rank_0(warning)
    _share_fingerprint(args)
    schedule = schedule_from_args(args)
    print_rank_0(f"> MeCo: {schedule.describe()}")
    try:
        config = MeCoGPTDatasetConfig(
            **dataset_options(args),
            vocab_size=args.padded_vocab_size,
            meco=MeCoConfig.from_args(args),
        )
        # Every pipeline stage needs cu_seqlens, so every stage holds the datasets.
        datasets = build_datasets(
            train_val_test_num_samples,
            lambda: mpu.get_tensor_model_parallel_rank() == 0,
            config,
            schedule,
            cooldown_blend(args),
        )
    except MeCoError as error:
        # Rank 0 builds first and the others wait for it, so this is printed once.
        print(f"meco: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    run = Run(schedule, *datasets)
    state = begin_run(run, args)
    if datasets[0] is not None and args.consumed_train_samples >= len(datasets[0]):
        # A finished run, started again: Megatron's loader wants a sample, though none is trained.
        datasets[0].num_spare = 1
    if datasets[0] is not None and not vp_stage:
        for line in summary_lines(plan_report(run), args.seq_length):
            print_rank_0(f"> MeCo: {line}")
    train, valid, test = (
        None if dataset is None else CompactSamples(dataset, args.seq_length, state.num_bounds)
        for dataset in datasets
    )
    return train, valid, test


# Megatron calls a provider with this mark on every rank, and lets it decide where to build.
train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def _share_fingerprint(args: argparse.Namespace) -> None:
    """Tell all ranks what rank 0 worked out: arguments that are saved should not differ."""
    shared = [getattr(args, "meco_fingerprint", None)]
    torch.distributed.broadcast_object_list(shared, src=0)
    args.meco_fingerprint = shared[0]


def dataset_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of Megatron's `GPTDatasetConfig`, from its parsed flags."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences_per_dataset = json.load(file)
    return {
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
        "tokenizer": get_tokenizer(),
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
        "inter_document_masking": args.dataloader_inter_document_masking,
    }


def forward_step(data_iterator: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
    """Megatron's forward step: one micro-batch through one model chunk.

    Args:
        data_iterator: Gives batches on tensor-parallel rank 0; not used elsewhere.
        model: The model chunk, wrapped as Megatron wraps it.

    Returns:
        The output tensor (per-token losses on the last stage) and the loss function.
    """
    args = get_args()
    timers = get_timers()
    if args.meco and model.training:
        _announce(args)
    timers("batch-generator", log_level=2).start()
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    batch = _next_batch(args, data_iterator, vp_stage, model.training)
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=_packed_seq_params(args, batch["cu_seqlens"]),
    )
    return output, partial(
        loss_func, batch["loss_mask"], facts=batch.get("facts"), training=model.training
    )


def _next_batch(
    args: argparse.Namespace, data_iterator: Iterator[Batch], vp_stage: int | None, training: bool
) -> Batch:
    if not args.meco:
        return stock_batch(args, data_iterator, vp_stage, training=training)
    state = _state_of_run()

    def check(num_prefix_tokens: int) -> None:
        if training:
            state.switch.check_batch(args.curr_iteration, num_prefix_tokens)

    return meco_batch(
        args, data_iterator, vp_stage, training=training, num_bounds=state.num_bounds, check=check
    )


def loss_func(
    loss_mask: torch.Tensor,
    output_tensor: torch.Tensor,
    *,
    facts: torch.Tensor | None = None,
    training: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the losses inside the mask, and what to report of it.

    Args:
        loss_mask: (1, micro-batch * sequence) or (micro-batch, sequence), float32.
        output_tensor: Per-token losses, as many.
        facts: (2, micro-batch), int32: prefix tokens of each sample, and 1 for a validation sample
            that shows them; None without MeCo.
        training: Whether this is a training step.

    Returns:
        The loss summed over trained tokens, their number (int32), and the report: for each name the
        pair (sum, number) that Megatron adds up over micro-batches and ranks, and divides.
    """
    losses = output_tensor.view(-1).float()
    mask = loss_mask.reshape(-1).float()
    masked = losses * mask
    loss = masked.sum()
    num_tokens = mask.sum().detach().to(torch.int)
    _check_finite(loss)
    if facts is None or training:
        report = {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}
        if facts is not None:
            report |= _token_counts(facts, num_tokens, mask.numel())
        return loss, num_tokens, report
    views = facts[1]
    sums = masked.detach().view(len(views), -1).sum(1)
    counts = mask.view(len(views), -1).sum(1)
    report = {}
    for name, chosen in (("conditioned", views == 1), ("plain", views == 0)):
        report[f"lm loss {name}"] = torch.stack([(sums * chosen).sum(), (counts * chosen).sum()])
    if get_args().meco_template == "":
        del report["lm loss conditioned"]
    return loss, num_tokens, report


def _token_counts(
    facts: torch.Tensor, num_tokens: torch.Tensor, num_places: int
) -> dict[str, torch.Tensor]:
    """Pairs that Megatron logs as losses: the step's share of prefix tokens, and trained tokens."""
    places = torch.full_like(num_tokens, num_places, dtype=torch.float32)
    # Megatron divides by what it added up over these, which makes a sum out of the mean.
    parts = get_num_microbatches() * mpu.get_data_parallel_world_size()
    return {
        "prefix share": torch.stack([facts[0].sum().float(), places]),
        "trained tokens": torch.stack([num_tokens.float() * parts, torch.ones_like(places)]),
    }


def _packed_seq_params(
    args: argparse.Namespace, cu_seqlens: torch.Tensor | None
) -> PackedSeqParams | None:
    if cu_seqlens is None:
        return None
    update_seqlen_stats_from_cu_seqlens(cu_seqlens)  # Megatron's FLOPs account
    # An upper bound serves the kernels, and costs no wait for the device.
    longest = args.seq_length
    if args.meco and args.transformer_impl != "local" and not args.apply_rope_fusion:
        # Megatron's own RoPE counts on through a pack that is as long as its table of angles.
        longest += 1
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=args.seq_length,
    )


def _announce(args: argparse.Namespace) -> None:
    writers = get_tensorboard_writer(), get_wandb_writer()
    text = _state_of_run().switch.before_step(args.curr_iteration, *writers)
    if text:
        print_rank_0(text)


def _check_finite(loss: torch.Tensor) -> None:
    if not get_args().check_for_nan_in_loss_and_grad:
        return
    # Megatron's script asks twice, for NaN and for infinity; each question waits for the device.
    get_rerun_state_machine().validate_result(
        result=loss,
        rejection_func=_is_not_finite,
        message="found NaN or Inf in local forward loss calculation",
        tolerance=0.0,
        fatal=True,
    )


def _is_not_finite(loss: torch.Tensor) -> torch.Tensor:
    return ~torch.isfinite(loss)


def _stock_datasets(
    args: argparse.Namespace, sizes: Sequence[int | None], vp_stage: int | None
) -> tuple[Any, Any, Any]:
    """What Megatron's own script builds."""

    def built_here() -> bool:
        everywhere = args.dataloader_inter_document_masking or is_first_or_last_pipeline_stage(
            vp_stage
        )
        return mpu.get_tensor_model_parallel_rank() == 0 and everywhere

    kind = MockGPTDataset if args.mock_data else GPTDataset
    config = GPTDatasetConfig(**dataset_options(args))
    train, valid, test = BlendedMegatronDatasetBuilder(kind, sizes, built_here, config).build()
    return train, valid, test
