"""The samples of lanes, a step of each in turn.

A lane is a training split of MeCo's own datasets, with its packing, phase and template. Two lanes
have no documents: each sequence is attended to as one, by the kernel for packed documents and by
the one for plain sequences. Sample `i` of an `AlternatingDataset` belongs to step `i // batch`,
and a step to one lane; each round holds every lane once, and begins one lane later than the last.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from lanes import Lane
from megatron.core.datasets.utils import Split
from megatron.training import get_tokenizer

from megatron_meco.config import MeCoConfig
from megatron_meco.data.dataset import MeCoGPTDatasetConfig
from megatron_meco.data.phases import Schedule
from megatron_meco.data.run_datasets import build_datasets
from megatron_meco.training.stock import dataset_options


class OneDocument(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Samples as one document each: the same tokens and loss mask, no borders.

    Args:
        dataset: MeCo's samples.
    """

    split = Split.train

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.parts = (dataset,)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        sample: dict[str, torch.Tensor] = self.dataset[idx]
        length = len(sample["tokens"])
        bounds = torch.full_like(sample["cu_seqlens"], length)
        bounds[0] = 0
        return {**sample, "cu_seqlens": bounds, "position_ids": torch.arange(length)}


class AlternatingDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The samples of several lanes, a step of each in turn.

    Args:
        lanes: Name -> samples, all of the same length.
        batch_size: Samples of a step.
    """

    split = Split.train

    def __init__(self, lanes: dict[str, Any], batch_size: int) -> None:
        self.names = list(lanes)
        self.parts = tuple(lanes.values())
        self.batch_size = batch_size

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def lane_of(self, step: int) -> str:
        """The lane that a step trains on."""
        return self.names[self._place(step)]

    def _place(self, step: int) -> int:
        return (step + step // len(self.names)) % len(self.names)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        step, place = divmod(idx, self.batch_size)
        round_begin = step // len(self.names) * self.batch_size
        sample: dict[str, torch.Tensor] = self.parts[self._place(step)][round_begin + place]
        return sample


def build_lane(lane: Lane, args: argparse.Namespace, num_steps: int) -> Any:
    """The samples of a lane.

    Args:
        lane: What they are.
        args: Megatron's arguments.
        num_steps: Global batches to provide.
    """
    own = {"template": lane.template, "packing": lane.packing}
    meco = replace(
        MeCoConfig.from_args(args),
        **{name: value for name, value in own.items() if value is not None},
        cooldown_fraction=float(lane.cooldown),
        cooldown_start_iteration=None,
    )
    num_samples = num_steps * args.global_batch_size
    conditioned = 0 if lane.cooldown else num_steps
    schedule = Schedule(
        num_iterations=num_steps,
        num_samples=num_samples,
        switch_iteration=conditioned,
        switch_sample=conditioned * args.global_batch_size,
    )
    config = MeCoGPTDatasetConfig(
        **dataset_options(args, get_tokenizer()), vocab_size=args.padded_vocab_size, meco=meco
    )
    samples, _, _ = build_datasets([num_samples, 0, 0], lambda: True, config, schedule)
    return samples if lane.documents else OneDocument(samples)
