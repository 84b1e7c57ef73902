"""One micro-batch on its device, on the ranks and pipeline stages that need it.

`meco_batch` serves MeCo's datasets. All that the host knows of a micro-batch (document borders,
prefix tokens, views) travels in one small vector whose length is the same throughout the run, so no
rank ever waits for its device: Megatron's own functions look for the end of `cu_seqlens` on the
device, twice for each sample, and send its length ahead to the other tensor-parallel ranks.
`stock_batch` is those functions, for runs without `--meco`. Costs the copies, one broadcast for
each tensor within the tensor-parallel group, and nothing for what a stage does not use. What was
given up: a dense attention mask and context parallelism.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import flatten_batch_for_packed_sequences, get_batch_on_this_tp_rank
from megatron.training.utils import is_first_or_last_pipeline_stage

Batch = dict[str, Any]

_KEYS = (
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "labels",
    "loss_mask",
    "max_seqlen",
    "position_ids",
    "tokens",
)
# What the embedding needs, and what the loss needs, with the dtypes of samples.
_INPUTS = {"tokens": torch.int64, "position_ids": torch.int64}
_TARGETS = {"labels": torch.int64, "loss_mask": torch.float32}


def meco_batch(
    args: argparse.Namespace,
    data_iterator: Iterator[Batch] | None,
    vp_stage: int | None,
    *,
    training: bool,
    num_bounds: int,
    check: Callable[[int], None],
) -> Batch:
    """The next micro-batch of MeCo's datasets.

    Args:
        args: Megatron's arguments.
        data_iterator: Gives batches on tensor-parallel rank 0; not used elsewhere.
        vp_stage: Virtual pipeline stage, or None.
        training: Whether this is a training step.
        num_bounds: Length of a sample's `cu_seqlens` that holds every pack of the run.
        check: Called with the number of prefix tokens, on tensor-parallel rank 0.

    Returns:
        tokens, position_ids, labels: (1, micro-batch * sequence), int64; None where the stage does
            not need them.
        loss_mask: Likewise, float32.
        cu_seqlens: (micro-batch * (num_bounds - 1) + 1,), int32, from 0 to micro-batch * sequence;
            the tail of each sample repeats its end: empty documents.
        facts: (2, micro-batch), int32: prefix tokens of each sample, and 1 for a validation sample
            that shows them.
        The rest of Megatron's keys: None.
    """
    size = int(args.micro_batch_size if training else args.eval_micro_batch_size)
    num_borders = size * (num_bounds - 1) + 1
    loaded: Batch | None = None
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        loaded = next(data_iterator)
        check(int(loaded["meco_prefix_tokens"].sum()))
    header = None if loaded is None else pack_header(loaded, args.seq_length, num_bounds)
    header = _on_all_ranks(header, (num_borders + 2 * size,), torch.int32)
    batch: Batch = dict.fromkeys(_KEYS)
    batch["cu_seqlens"] = header[:num_borders]
    batch["facts"] = header[num_borders:].view(2, size)
    for key, dtype in _needed(vp_stage).items():
        tensor = None if loaded is None else loaded[key]
        batch[key] = _on_all_ranks(tensor, (size, args.seq_length), dtype).reshape(1, -1)
    return batch


def pack_header(loaded: Batch, sequence_length: int, num_bounds: int) -> torch.Tensor:
    """What the host knows of a micro-batch, in one vector.

    Args:
        loaded: The collated samples, on the host.
        sequence_length: Of each sample.
        num_bounds: Length of a sample's `cu_seqlens` that holds every pack of the run.

    Returns:
        (micro-batch * (num_bounds - 1) + 1 + 2 * micro-batch,), int32, pinned where the samples
        are: borders of the documents in the flat micro-batch, prefix tokens, views.

    Raises:
        RuntimeError: When a sample has more borders than that: the run must not go on.
    """
    rows = loaded["cu_seqlens"][:, :num_bounds]
    if not (rows[:, -1] == sequence_length).all():
        raise RuntimeError(
            f"a pack holds more documents than the {num_bounds - 2} of the largest pack of all "
            "plans: the data cache changed under the run"
        )
    offsets = torch.arange(len(rows), dtype=torch.int32)[:, None] * sequence_length
    prefix_tokens = loaded["meco_prefix_tokens"].int()
    # A baseline's samples have no view; all are plain.
    views = loaded["meco_view"].int() if "meco_view" in loaded else torch.zeros_like(prefix_tokens)
    borders = (rows[:, 1:] + offsets).reshape(-1)
    header = torch.cat([torch.zeros(1, dtype=torch.int32), borders, prefix_tokens, views])
    return header.pin_memory() if loaded["tokens"].is_pinned() else header


def _needed(vp_stage: int | None) -> dict[str, torch.dtype]:
    if mpu.get_pipeline_model_parallel_world_size() == 1:
        return _INPUTS | _TARGETS
    if not is_first_or_last_pipeline_stage(vp_stage):
        return {}
    return _INPUTS if mpu.is_pipeline_first_stage() else _TARGETS


def _on_all_ranks(
    tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The tensor of tensor-parallel rank 0, on the device of each."""
    if tensor is None:
        on_device = torch.empty(shape, dtype=dtype, device="cuda")
    else:
        on_device = tensor.cuda(non_blocking=True)
    if mpu.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            on_device,
            mpu.get_tensor_model_parallel_src_rank(),
            group=mpu.get_tensor_model_parallel_group(),
        )
    return on_device


def stock_batch(
    args: argparse.Namespace,
    data_iterator: Iterator[Batch] | None,
    vp_stage: int | None,
    *,
    training: bool,
) -> Batch:
    """The next micro-batch of Megatron's datasets, by its own functions; None for what is unused.

    Args:
        args: Megatron's arguments.
        data_iterator: Gives batches on tensor-parallel rank 0; not used elsewhere.
        vp_stage: Virtual pipeline stage, or None.
        training: Whether this is a training step.
    """
    packed = args.dataloader_inter_document_masking
    edge = is_first_or_last_pipeline_stage(vp_stage)
    if not edge and not packed:
        return dict.fromkeys(_KEYS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: Batch = {}
    if tp_rank == 0:
        assert data_iterator is not None
        loaded = next(data_iterator)
        for key in _KEYS:
            value = loaded.get(key)
            batch[key] = None if value is None else value.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=1,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size if training else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not edge:
        return {**dict.fromkeys(_KEYS), "cu_seqlens": batch["cu_seqlens"].squeeze(0)}
    if packed:
        batch["cu_seqlens"] = batch["cu_seqlens"].squeeze(0)
    return batch
