"""Train one model on several lanes in turn, in one real Megatron run, and time every step.

    MECO_TRAIN_SCRIPT=benchmarks/gpu/alternate.py examples/train_llama_600m.sh -- --bench-lanes \
        baseline conditioned --bench-rounds 23 --bench-output steps.json

Takes the flags of `examples/pretrain_gpt.py`, so a launcher's own, and three more. Steps are timed
on the device, from the first kernel of one to the first kernel of the next, and nothing is read
from the device until the run is over; so a step holds forward and backward passes, the optimizer,
Megatron's own bookkeeping, and any wait for data. Nothing is saved, nothing is validated. What was
given up: more than one rank.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from flops import ModelShape, num_pairs
from lanes import LANES

warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|apex).*")
warnings.filterwarnings("ignore", category=SyntaxWarning)

from megatron_meco.training.arguments import kernels_of, parse_and_validate_args  # noqa: E402
from megatron_meco.training.cpu import should_use_cpu  # noqa: E402


def add_bench_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What this script needs to know beyond a training run's flags."""
    group = parser.add_argument_group("benchmark")
    group.add_argument("--bench-lanes", nargs="+", required=True, metavar="LANE")
    group.add_argument("--bench-rounds", type=int, required=True, metavar="N")
    group.add_argument("--bench-output", required=True, metavar="FILE")
    return parser


@dataclass
class Step:
    """One training step.

    Attributes:
        lane: What it trained on.
        begun: Device event at its first kernel.
        loader_ms: Milliseconds that the host waited for each micro-batch.
    """

    lane: str
    begun: Any
    loader_ms: list[float] = field(default_factory=list)


class TimedIterator:
    """Batches, and how long each was waited for."""

    def __init__(self, batches: Iterator[Any], waits: list[float]) -> None:
        self.batches = batches
        self.waits = waits

    def __iter__(self) -> TimedIterator:
        return self

    def __next__(self) -> Any:
        begun = time.perf_counter()
        batch = next(self.batches)
        self.waits.append(1000 * (time.perf_counter() - begun))
        return batch


class WithoutDocuments:
    """A model that is not told of documents, and so attends to whole sequences."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, packed_seq_params: Any, **kwargs: Any) -> Any:
        """As the model, on whole sequences."""
        return self._model(*args, packed_seq_params=None, **kwargs)


class Stopwatch:
    """`forward_step` with a note of each step's lane and beginning.

    Args:
        dataset: The alternating samples.
        args: Megatron's arguments.
        state: What `forward_step` knows of the run.
    """

    def __init__(self, dataset: Any, args: argparse.Namespace, state: Any) -> None:
        self.dataset = dataset
        self.args = args
        self.state = state
        self.num_bounds = state.num_bounds
        self.steps: list[Step] = []

    def forward_step(self, data_iterator: Iterator[Any], model: Any) -> Any:
        """As MeCo's, on the lane of the step."""
        import torch

        from megatron_meco.training import provider

        if self.args.curr_iteration == len(self.steps):
            begun = torch.cuda.Event(enable_timing=True)
            begun.record()
            self.steps.append(Step(self.dataset.lane_of(len(self.steps)), begun))
        step = self.steps[-1]
        lane = LANES[step.lane]
        self.state.num_bounds = lane.num_bounds or self.num_bounds
        return provider.forward_step(
            TimedIterator(data_iterator, step.loader_ms),
            model if lane.packed else WithoutDocuments(model),
        )


def describe_step(dataset: Any, number: int) -> dict[str, int]:
    """What a step held, from its samples, which are made once more."""
    found = {"tokens": 0, "trained_tokens": 0, "prefix_tokens": 0, "documents": 0, "pairs": 0}
    for place in range(dataset.batch_size):
        sample = dataset[number * dataset.batch_size + place]
        lengths = [n for n in sample["cu_seqlens"].diff().tolist() if n]
        found["tokens"] += len(sample["tokens"])
        found["trained_tokens"] += int(sample["loss_mask"].sum())
        found["prefix_tokens"] += int(sample["meco_prefix_tokens"])
        found["documents"] += len(lengths)
        found["pairs"] += num_pairs(lengths)
    return found


def main() -> None:
    """Parse, train, write the steps."""
    args = parse_and_validate_args(add_bench_arguments)
    import torch
    from alternating import AlternatingDataset, build_lane
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )

    from megatron_meco.data.report import Run
    from megatron_meco.training import provider
    from megatron_meco.training.arguments import schedule_from_args
    from megatron_meco.training.batch import CompactSamples

    unknown = [name for name in args.bench_lanes if name not in LANES]
    num_steps = args.bench_rounds * len(args.bench_lanes)
    if unknown or args.world_size != 1 or args.train_iters != num_steps + 1:
        sys.exit(
            f"alternate.py: error: lanes are {', '.join(LANES)}; on one rank, with --train-iters "
            f"{num_steps + 1} (a step of each lane in each round, and the end of the last)"
        )
    args.save = args.load = None
    args.eval_iters = 0
    watch: list[Stopwatch] = []

    def datasets_provider(_: Any, vp_stage: int | None = None) -> tuple[Any, None, None]:
        # One step more than the rounds: the beginning of the last step ends the one before.
        rounds = args.bench_rounds + 1
        lanes = {name: build_lane(LANES[name], args, rounds) for name in args.bench_lanes}
        dataset = AlternatingDataset(lanes, args.global_batch_size)
        state = provider.begin_run(Run(schedule_from_args(args), dataset, None, None), args)
        watch.append(Stopwatch(dataset, args, state))
        compact = {
            name: CompactSamples(lane, args.seq_length, LANES[name].num_bounds or state.num_bounds)
            for name, lane in lanes.items()
        }
        return AlternatingDataset(compact, args.global_batch_size), None, None

    datasets_provider.is_distributed = True  # type: ignore[attr-defined]

    def forward_step(data_iterator: Iterator[Any], model: Any) -> Any:
        return watch[0].forward_step(data_iterator, model)

    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    torch.cuda.synchronize()
    shape = ModelShape(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        head_dim=args.kv_channels,
        vocab_size=args.padded_vocab_size,
    )
    steps = watch[0].steps
    result = {
        "shape": asdict(shape),
        "sequence_length": args.seq_length,
        "global_batch_size": args.global_batch_size,
        "num_bounds": watch[0].num_bounds,
        "kernels": kernels_of(args, should_use_cpu()).describe(),
        "peak_memory_bytes": int(torch.cuda.max_memory_allocated()),
        "steps": [
            {
                "lane": step.lane,
                "ms": step.begun.elapsed_time(following.begun),
                "loader_ms": step.loader_ms,
                **describe_step(watch[0].dataset, number),
            }
            for number, (step, following) in enumerate(pairwise(steps))
        ],
    }
    Path(args.bench_output).write_text(json.dumps(result))


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    main()
