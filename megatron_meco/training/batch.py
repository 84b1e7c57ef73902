"""One micro-batch, from a loader's worker to the device of each rank.

`CompactSamples` packs each sample of MeCo's datasets into one vector, and `meco_batch` splits it on
the device. So a worker sends one tensor instead of eight with a file descriptor each, and a batch
needs one copy to the device and one broadcast to the other tensor-parallel ranks. `cu_seqlens` has
the same length in the whole run, so there is no device sync. Megatron's own functions need two for
each sample, to find the end of `cu_seqlens`, and send its length to the other ranks first. The cost
is a copy of each sample in a worker and a few kernels on the device. There is no dense attention
mask. Context-parallel ranks load the same samples; each keeps its chunks of every document
(`context_parallel.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import mpu
from megatron.training.utils import is_first_or_last_pipeline_stage

from megatron_meco.data.borders import merged
from megatron_meco.training.context_parallel import places_by_rank

Batch = dict[str, Any]

_KEYS = (
    "attention_mask",
    "compared",
    "cu_seqlens",
    "cu_seqlens_padded",
    "labels",
    "loss_mask",
    "max_seqlen",
    "padding",
    "position_ids",
    "tokens",
)
# Behind the borders of documents: prefix tokens, and the view and set of a validation sample.
_NUM_FACTS = 3
_VECTOR = "meco_sample"
# Samples of the baseline have no `meco_view`; all are plain.
_PLAIN = torch.tensor(0)
_FIRST_SET = torch.tensor(0)


def has_experts(args: argparse.Namespace) -> bool:
    """Whether the model has experts, which count the tokens that each of them gets."""
    return bool(getattr(args, "num_experts", None))


class CompactSamples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """MeCo's samples as vectors: `cu_seqlens`, three facts, tokens, positions, loss mask.

    Args:
        dataset: Samples with Megatron's keys, such as those of `MeCoGPTDataset`.
        sequence_length: Tokens of a sample.
        num_bounds: Length of `cu_seqlens` that suffices for every pack of the run.
    """

    def __init__(self, dataset: Any, sequence_length: int, num_bounds: int) -> None:
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.num_bounds = num_bounds
        # Megatron's loader asks for it, under one of two names.
        self.split = dataset.split if hasattr(dataset, "split") else dataset.index_split

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """One sample.

        Args:
            idx: Index for the dataset.

        Returns:
            meco_sample: (num_bounds + 3 * sequence_length + 4,), int32; the loss mask in it is
                float32 bit by bit. In evaluation the mask is 2 for labels that are compared
                between views, which are all in the loss. It is -1 for padding where the dataset
                marks it, which is never in the loss.

        Raises:
            RuntimeError: The pack has more documents than fit `num_bounds`.
        """
        sample = self.dataset[idx]
        bounds = sample["cu_seqlens"][: self.num_bounds]
        if bounds[-1] != self.sequence_length:
            raise RuntimeError(
                f"a pack holds more documents than the {self.num_bounds - 2} of the largest pack "
                "of all plans: the data cache changed under the run"
            )
        parts = (
            bounds,
            sample["meco_prefix_tokens"].view(1),
            sample.get("meco_view", _PLAIN).view(1),
            sample.get("meco_set", _FIRST_SET).view(1),
            # Labels are the tokens from the second on, and one more.
            sample["tokens"],
            sample["labels"][-1:],
            sample["position_ids"],
        )
        mask = sample["loss_mask"]
        if "meco_compared" in sample:
            mask = mask + sample["meco_compared"]
        if "meco_padding" in sample:
            mask = mask.masked_fill(sample["meco_padding"], -1)
        return {_VECTOR: torch.cat([*(part.int() for part in parts), mask.view(torch.int32)])}


def meco_batch(
    args: argparse.Namespace,
    data_iterator: Iterator[Batch] | None,
    vp_stage: int | None,
    *,
    training: bool,
    num_bounds: int,
    check: Callable[[int], None],
) -> Batch:
    """The next micro-batch of `CompactSamples`.

    Args:
        args: Megatron's arguments.
        data_iterator: Gives batches on tensor-parallel rank 0; not used elsewhere.
        vp_stage: Virtual pipeline stage, or None.
        training: Whether this is a training step.
        num_bounds: As for `CompactSamples`.
        check: Called with the number of prefix tokens, on tensor-parallel rank 0.

    Returns:
        tokens, position_ids, labels: (1, micro-batch * sequence / context-parallel ranks), int64;
            None at a pipeline stage between the first and the last of a model without experts.
        loss_mask: Likewise, float32.
        cu_seqlens: (micro-batch * (num_bounds - 1) + 1,), int32, from 0 to micro-batch * sequence;
            the tail of each sample repeats its end: empty documents.
        compared: In evaluation, as the loss mask but bool: labels compared between views.
        padding: As the loss mask but bool: tokens of no document. None without experts.
        facts: (3, micro-batch), int32: prefix tokens of each sample, its `View`, and the number of
            its validation set.
        The rest of Megatron's keys: None.

    Raises:
        RuntimeError: When a document does not divide into chunks for the context-parallel ranks.
    """
    size = int(args.micro_batch_size if training else args.eval_micro_batch_size)
    length = args.seq_length
    head = num_bounds + _NUM_FACTS
    # Middle pipeline stages need `cu_seqlens` only, but for experts, which do not count padding.
    experts = has_experts(args)
    edge = experts or is_first_or_last_pipeline_stage(vp_stage)
    width = head + 3 * length + 1 if edge else head
    vectors: torch.Tensor | None = None
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        vectors = next(data_iterator)[_VECTOR]
        assert vectors.shape == (size, head + 3 * length + 1), "other samples than begin_run's"
        check(int(vectors[:, num_bounds].sum()))
        # Still on the host.
        _check_chunks(vectors[:, :num_bounds], mpu.get_context_parallel_world_size())
    vectors = _on_all_ranks(vectors, (size, width))
    batch: Batch = dict.fromkeys(_KEYS)
    batch["cu_seqlens"] = merged(vectors[:, :num_bounds], length)
    batch["facts"] = vectors[:, num_bounds:head].T
    if edge:
        columns = vectors[:, head:]
        tokens, position_ids, loss_mask = torch.split(columns, [length + 1, length, length], dim=1)
        batch["tokens"] = tokens[:, :-1].long().view(1, -1)
        batch["labels"] = tokens[:, 1:].long().view(1, -1)
        batch["position_ids"] = position_ids.long().view(1, -1)
        batch["loss_mask"] = loss_mask.view(torch.float32).reshape(1, -1)
        if mpu.get_context_parallel_world_size() > 1:
            _keep_own_part(batch, size * length)
        if experts:
            batch["padding"] = batch["loss_mask"] < 0
            batch["loss_mask"] = batch["loss_mask"].clamp(min=0)
        if not training:
            batch["compared"] = batch["loss_mask"] > 1
            batch["loss_mask"] = batch["loss_mask"].clamp(max=1)
    return batch


def _check_chunks(bounds: torch.Tensor, num_ranks: int) -> None:
    """Refuse documents that do not divide into two chunks for each context-parallel rank."""
    if num_ranks > 1 and bool((bounds % (2 * num_ranks)).any()):
        raise RuntimeError(
            f"a document of a pack is no multiple of {2 * num_ranks} tokens, twice the "
            "--context-parallel-size: ranks would mix the tokens of different documents"
        )


def _keep_own_part(batch: Batch, num_tokens: int) -> None:
    """Leave the tokens of this context-parallel rank: the same number of each sample."""
    num_ranks = mpu.get_context_parallel_world_size()
    places = places_by_rank(batch["cu_seqlens"], num_tokens, num_ranks)
    own = places[mpu.get_context_parallel_rank()]
    for key in ("tokens", "labels", "position_ids", "loss_mask"):
        batch[key] = batch[key][:, own]


def _on_all_ranks(vectors: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor:
    """What tensor-parallel rank 0 has, on the device of each."""
    if vectors is None:
        on_device = torch.empty(shape, dtype=torch.int32, device="cuda")
    else:
        # Cut on the device: on the host the part would be a copy that is not pinned.
        on_device = vectors.cuda(non_blocking=True)[:, : shape[1]].contiguous()
    if mpu.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            on_device,
            mpu.get_tensor_model_parallel_src_rank(),
            group=mpu.get_tensor_model_parallel_group(),
        )
    return on_device
