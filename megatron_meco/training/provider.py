"""The functions that a script passes to `megatron.training.pretrain()`: datasets, forward step.

With `--meco` the datasets are MeCo's, and validation reports three losses: of documents with their
own metadata, without it, and with that of other documents. Without it both functions are stock
(`stock.py`, or the script's own with `with_meco`). MeCo adds no device syncs; Megatron's NaN check
syncs for each micro-batch (`--no-check-for-nan-in-loss-and-grad` disables it). At the end of a step
Megatron sums document lengths over all ranks for its FLOPs count. `batch.py` has the path of a
batch to the device.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import (
    get_args,
    get_tensorboard_writer,
    get_timers,
    get_tokenizer,
    print_rank_0,
)
from megatron.training.global_vars import get_wandb_writer
from megatron.training.training import (
    build_pretraining_data_loader,
    update_seqlen_stats_from_cu_seqlens,
)

from megatron_meco.config import MeCoConfig, View
from megatron_meco.data.borders import documents_of
from megatron_meco.data.dataset import MeCoGPTDatasetConfig
from megatron_meco.data.evaluation import EVALUATION_VIEWS
from megatron_meco.data.report import Run, most_documents, plan_report, summary_lines
from megatron_meco.data.run_datasets import build_datasets
from megatron_meco.errors import MeCoError
from megatron_meco.training import stock
from megatron_meco.training.arguments import (
    evaluation_from_args,
    full_evaluation_from_args,
    schedule_from_args,
)
from megatron_meco.training.batch import Batch, CompactSamples, has_experts, meco_batch
from megatron_meco.training.blends import cooldown_blend
from megatron_meco.training.megatron_patches import skip_steps_without_reading_batches
from megatron_meco.training.phase_switch import PhaseSwitch
from megatron_meco.training.versions import check_version

DatasetsProvider = Callable[..., Any]

# Megatron 0.18 has fewer of them.
_PACKED_FIELDS = {field.name for field in fields(PackedSeqParams)}
ForwardStep = Callable[..., Any]


@dataclass
class RunState:
    """What the forward step needs to know about the datasets.

    Attributes:
        switch: Announces and checks the phases.
        num_bounds: Length of a sample's `cu_seqlens` on the device, the same for all packs of the
            run and on all ranks.
    """

    switch: PhaseSwitch
    num_bounds: int


_state: RunState | None = None


def begin_run(run: Run, args: argparse.Namespace) -> RunState:
    """Prepare `forward_step` for these datasets. Collective: call it on all ranks.

    Sets `args.eval_iters` where each evaluation reads the whole validation split.

    `train_valid_test_datasets_provider` does this for the datasets that it builds. Megatron's
    loader must be given `CompactSamples` of them.

    Args:
        run: Datasets (None on ranks that hold none) and schedule.
        args: Megatron's arguments.
    """
    global _state
    evaluation_size = getattr(run.valid, "evaluation_size", 0)
    largest = torch.tensor([most_documents(run), evaluation_size], device="cuda")
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    most, evaluation_size = largest.tolist()
    if evaluation_size:
        args.eval_iters = evaluation_size // args.eval_global_batch_size
    # 0, the end of each document, and the end of the padding.
    num_bounds = min(most + 2, args.seq_length + 1)
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
        Training, validation and test dataset; None on ranks that hold none. With
        `--dataloader-type external`, iterators of their micro-batches, which Megatron takes as they
        are.
    """
    args = get_args()
    if not args.meco:
        return stock.train_valid_test_datasets_provider(train_val_test_num_samples, vp_stage)
    warning = check_version()
    if warning:
        print_rank_0(warning)
    _share_fingerprint(args)
    schedule = schedule_from_args(args)
    print_rank_0(f"> MeCo: {schedule.describe()}")
    try:
        config = MeCoGPTDatasetConfig(
            **stock.dataset_options(args, get_tokenizer()),
            vocab_size=args.padded_vocab_size,
            meco=MeCoConfig.from_args(args),
            mark_padding=has_experts(args),
        )
        # Every pipeline stage needs cu_seqlens, so every stage holds the datasets.
        datasets = build_datasets(
            train_val_test_num_samples,
            lambda: mpu.get_tensor_model_parallel_rank() == 0,
            config,
            schedule,
            cooldown_blend(args),
            evaluation_from_args(args),
            full_evaluation_from_args(args, train_val_test_num_samples[1]),
        )
    except MeCoError as error:
        # Rank 0 builds first and the others wait for it, so this is printed once.
        print(f"meco: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    if args.iterations_to_skip:
        skip_steps_without_reading_batches()
    run = Run(schedule, *datasets)
    state = begin_run(run, args)
    if datasets[0] is not None and args.consumed_train_samples >= len(datasets[0]):
        # A finished run was started again: Megatron's loader needs a sample, although none is used.
        datasets[0].num_spare = 1
    if datasets[0] is not None and not vp_stage:
        for line in summary_lines(plan_report(run), args.seq_length):
            print_rank_0(f"> MeCo: {line}")
    train, valid, test = (
        None if dataset is None else CompactSamples(dataset, args.seq_length, state.num_bounds)
        for dataset in datasets
    )
    if args.dataloader_type == "external":
        train, valid, test = _external_loaders(args, train, valid, test)
    return train, valid, test


def _external_loaders(args: argparse.Namespace, *datasets: CompactSamples | None) -> list[Any]:
    """Iterators of the batches that Megatron's `single` loader would make."""
    seen = (args.consumed_train_samples, evaluation_from_args(args).begin, 0)
    iterators: list[Any] = []
    args.dataloader_type = "single"
    for dataset, num_seen in zip(datasets, seen, strict=True):
        unused = dataset is None or (args.skip_train and not iterators)
        loader = None if unused else build_pretraining_data_loader(dataset, num_seen)
        iterators.append(None if loader is None else iter(loader))
    args.dataloader_type = "external"
    return iterators


# Megatron calls a provider with this attribute on every rank.
train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def _share_fingerprint(args: argparse.Namespace) -> None:
    """Send rank 0's fingerprint to all ranks: saved arguments should be equal."""
    shared = [getattr(args, "meco_fingerprint", None)]
    torch.distributed.broadcast_object_list(shared, src=0)
    args.meco_fingerprint = shared[0]


def forward_step(
    data_iterator: Iterator[Batch], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """Megatron's forward step: one micro-batch through one model chunk.

    Args:
        data_iterator: Gives batches on tensor-parallel rank 0; not used elsewhere.
        model: The model chunk, wrapped as Megatron wraps it.
        return_schedule_plan: As Megatron's own step takes it; without `--meco` only.

    Returns:
        The output tensor (per-token losses on the last stage) and the loss function.
    """
    args = get_args()
    if not args.meco:
        return stock.forward_step(data_iterator, model, return_schedule_plan)
    timers = get_timers()
    if model.training:
        _announce(args)
    timers("batch-generator", log_level=2).start()
    with stock.straggler_timer(bdata=True):
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch = _next_batch(args, data_iterator, vp_stage, model.training)
    timers("batch-generator").stop()
    with stock.straggler_timer:
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=packed_seq_params(args, batch["cu_seqlens"], model.training),
            **_padding_mask(args, model, batch["padding"]),
        )
    return output, functools.partial(
        loss_func,
        batch["loss_mask"],
        facts=batch["facts"],
        compared=batch["compared"],
        training=model.training,
    )


def _padding_mask(
    args: argparse.Namespace, model: Any, padding: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The model's argument that keeps padding out of the experts' losses and statistics.

    Args:
        args: Megatron's arguments.
        model: The model chunk.
        padding: (1, tokens), bool; None for a model without experts.
    """
    if padding is None:
        return {}
    # With sequence parallelism each rank routes its own part of the tokens. Megatron takes that
    # part of the mask in the first stage of a GPTModel, and nowhere else.
    is_hybrid = bool(getattr(args, "hybrid_layer_pattern", None))
    takes_part = not is_hybrid and get_attr_wrapped_model(model, "pre_process")
    if args.sequence_parallel and not takes_part:
        ranks = mpu.get_tensor_model_parallel_world_size()
        padding = padding.chunk(ranks, dim=1)[mpu.get_tensor_model_parallel_rank()].contiguous()
    return {"padding_mask": padding}


def _next_batch(
    args: argparse.Namespace, data_iterator: Iterator[Batch], vp_stage: int | None, training: bool
) -> Batch:
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
    facts: torch.Tensor,
    compared: torch.Tensor | None = None,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the losses inside the mask, and what to report of it.

    Args:
        loss_mask: (1, tokens) or (micro-batch, tokens of a sample), float32: those of this
            context-parallel rank, as many of each sample.
        output_tensor: Per-token losses, as many.
        facts: (3, micro-batch), int32: prefix and suffix tokens of each sample, its `View`, and the
            number of its validation set.
        compared: As `loss_mask`, bool: the labels whose loss is compared between views; in
            evaluation only.
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
    # One check for NaN and infinity. Megatron's script makes two, with a device sync each.
    stock.check_for_nan(loss, _is_not_finite, "found NaN or Inf in local forward loss calculation")
    stock.check_for_spike(loss)
    if training:
        report = {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}
        return loss, num_tokens, report | _token_counts(facts, num_tokens, mask.numel())
    assert compared is not None
    return loss, num_tokens, _view_losses(masked.detach(), mask, compared.reshape(-1), *facts[1:])


def _view_losses(
    losses: torch.Tensor,
    mask: torch.Tensor,
    compared: torch.Tensor,
    views: torch.Tensor,
    sets: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Loss in each view, and of the wrong metadata against the right one on the same tokens.

    Of all samples, and of each validation set that has a name. Only for views that an evaluation
    has: of another one Megatron would report 0 / 0.

    Args:
        losses: (micro-batch * sequence,), float32, 0 outside the mask.
        mask: Likewise, the loss mask.
        compared: Likewise, bool.
        views: (micro-batch,), int32.
        sets: Likewise.
    """
    args = get_args()
    groups = {"": torch.ones_like(sets, dtype=torch.bool)}
    for number, name in enumerate(args.meco_validation_sets or ()):
        # As in Megatron's log.
        groups[f"-{name}"] = sets == number

    def by_sample(values: torch.Tensor) -> torch.Tensor:
        return values.view(len(views), -1).sum(1)

    sums, counts = by_sample(losses), by_sample(mask)
    of_compared, num_compared = by_sample(losses * compared), by_sample(compared.float())
    report = {}
    shown = _views_shown(args)
    for name, inside in groups.items():
        for view in shown:
            chosen = (views == view) & inside
            loss = torch.stack([(sums * chosen).sum(), (counts * chosen).sum()])
            report[f"lm loss {view.name.lower()}{name}"] = loss
        if View.SHUFFLED in shown:
            wrong = (views == View.SHUFFLED) & inside
            sign = wrong.float() - ((views == View.CONDITIONED) & inside).float()
            total = (num_compared * wrong).sum()
            difference = torch.stack([(of_compared * sign).sum(), total])
            report[f"lm loss shuffled minus conditioned{name}"] = difference
            num_shuffled = report[f"lm loss shuffled{name}"][1]
            report[f"compared share{name}"] = torch.stack([total, num_shuffled])
    return report


def _views_shown(args: argparse.Namespace) -> tuple[View, ...]:
    if not (args.meco_template or args.meco_suffix_template):
        return (View.PLAIN,)
    return EVALUATION_VIEWS[: args.eval_iters * args.eval_global_batch_size]


def _token_counts(
    facts: torch.Tensor, num_tokens: torch.Tensor, num_places: int
) -> dict[str, torch.Tensor]:
    """Prefix share and trained tokens of a step, as pairs that Megatron logs like losses.

    Suffixes count as prefixes.
    """
    # Megatron sums both over micro-batches, data-parallel and context-parallel ranks. A
    # context-parallel rank has all prefix tokens of a sample, but only its part of the places.
    num_ranks = mpu.get_context_parallel_world_size()
    places = torch.full_like(num_tokens, num_places * num_ranks, dtype=torch.float32)
    # Megatron averages over these; multiplying makes it a sum.
    parts = get_num_microbatches() * mpu.get_data_parallel_world_size() * num_ranks
    return {
        "prefix share": torch.stack([facts[0].sum().float(), places]),
        "trained tokens": torch.stack([num_tokens.float() * parts, torch.ones_like(places)]),
    }


def packed_seq_params(
    args: argparse.Namespace, cu_seqlens: torch.Tensor, training: bool
) -> PackedSeqParams:
    """Megatron's description of the documents of a micro-batch, for its layers.

    Args:
        args: Megatron's arguments.
        cu_seqlens: (documents + 1,), int32, from 0 to the micro-batch's tokens.
        training: Whether this is a training step.
    """
    update_seqlen_stats_from_cu_seqlens(cu_seqlens)  # for Megatron's FLOPs count
    # An upper bound is enough for the kernels, and needs no device sync.
    longest = args.seq_length
    num_ranks = mpu.get_context_parallel_world_size()
    own_rope = args.transformer_impl == "local" and not getattr(
        args, "multi_latent_attention", False
    )
    if not own_rope and not args.apply_rope_fusion:
        # Megatron's RoPE does not restart in a pack that is as long as its table of angles.
        # Transformer Engine divides this length by the number of chunks.
        longest += 1 if num_ranks == 1 else 2 * num_ranks
    seq_idx = None
    if getattr(args, "hybrid_layer_pattern", None):
        size = args.micro_batch_size if training else args.eval_micro_batch_size
        seq_idx = document_numbers(cu_seqlens, size * args.seq_length)
    more: dict[str, Any] = {}
    if not args.sequence_parallel:
        # By which experts are balanced within a sample. Megatron divides a rank's tokens by it,
        # which with sequence parallelism are not those of whole samples.
        more["tokens_per_sample"] = args.seq_length
    if num_ranks > 1:
        # Transformer Engine asks for both. A document's padding is part of the document, so no
        # kernel has to skip it: the same tensor says so, too, which older versions would compare.
        more |= {
            "cu_seqlens_q_padded": cu_seqlens,
            "cu_seqlens_kv_padded": cu_seqlens,
            "pad_between_seqs": False,
        }
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        seq_idx=seq_idx,
        **{name: value for name, value in more.items() if name in _PACKED_FIELDS},
    )


def document_numbers(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Document number of each token of a pack; state-space layers restart where it changes.

    Megatron's `PackedSeqParams` computes it from `total_tokens` with a device sync.

    Args:
        cu_seqlens: (documents + 1,), int32, from 0 to `num_tokens`; empty documents are allowed.
        num_tokens: Tokens of the pack.

    Returns:
        (1, num_tokens), int32, rising.
    """
    return documents_of(cu_seqlens, num_tokens).int().unsqueeze(0)


def _announce(args: argparse.Namespace) -> None:
    writers = get_tensorboard_writer(), get_wandb_writer()
    text = _state_of_run().switch.before_step(args.curr_iteration, *writers)
    if text:
        print_rank_0(text)


def _is_not_finite(loss: torch.Tensor) -> torch.Tensor:
    return ~torch.isfinite(loss)


def with_meco(datasets_provider: DatasetsProvider, step: ForwardStep) -> tuple[Any, Any]:
    """Add MeCo to the two functions that a training script passes to Megatron's `pretrain()`.

    Args:
        datasets_provider: The script's datasets provider.
        step: The script's forward step.

    Returns:
        Two functions that call MeCo's with `--meco`, and the script's without.
    """

    @functools.wraps(datasets_provider)
    def provide(sizes: Sequence[int | None], vp_stage: int | None = None) -> Any:
        if get_args().meco:
            return train_valid_test_datasets_provider(sizes, vp_stage)
        given = {} if vp_stage is None else {"vp_stage": vp_stage}
        return datasets_provider(sizes, **given)

    @functools.wraps(step)
    def take_step(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = forward_step if get_args().meco else step
        return chosen(data_iterator, model, *args, **kwargs)

    provide.is_distributed = True  # type: ignore[attr-defined]
    return provide, take_step
