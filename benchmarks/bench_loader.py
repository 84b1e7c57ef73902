"""Micro-batches through a loader like Megatron's, compared with a GPU's consumption.

A `DataLoader` as Megatron makes it (two persistent workers, micro-batches of one sequence), over
MeCo's samples as a run hands them over, one vector each, over the same samples with Megatron's
keys, and over Megatron's GPTDataset with document masks, in alternating rounds. First as fast as it
goes; then with a pause as long as a GPU computes on a micro-batch, and what is left to wait for
then (on a GPU host a thread that pins memory takes that over). A GPU's pace is the paper's (table
9): 57,300 tokens a second for its smallest model.

    python benchmarks/bench_loader.py --sequence-length 8192
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from bench_samples import datasets, write_corpus
from torch.utils.data import DataLoader

from megatron_meco.training.batch import CompactSamples

TOKENS_PER_SECOND = 57_300


def loader(dataset: Any, num_batches: int) -> DataLoader[Any]:
    """What Megatron builds on a data-parallel rank, apart from pinned memory."""
    return DataLoader(
        dataset,
        batch_sampler=[[i] for i in range(num_batches)],
        num_workers=2,
        persistent_workers=True,
    )


def batches_per_second(batches: DataLoader[Any], warm_up: int = 20) -> float:
    """Batches per second of a consumer that does nothing."""
    for number, _ in enumerate(batches):
        if number == warm_up:
            begin = time.perf_counter()
    return (number - warm_up) / (time.perf_counter() - begin)


def waits(batches: DataLoader[Any], pause: float, number: int) -> list[float]:
    """Seconds that a consumer that pauses in between waits for each batch."""
    found = []
    stream = iter(batches)
    for _ in range(number):
        begin = time.perf_counter()
        next(stream)
        found.append(time.perf_counter() - begin)
        time.sleep(pause)
    return found[5:]  # the first ones wait for the workers to begin


def ratio(rates: dict[str, list[float]], other: str) -> float:
    """Median over rounds of our pace over another's."""
    pairs = zip(rates["meco"], rates[other], strict=True)
    return round(statistics.median(ours / theirs for ours, theirs in pairs), 1)


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequence-length", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    length = args.sequence_length
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "corpus")
        write_corpus(prefix, args.documents)
        ours, theirs = datasets(prefix, length, "truncate")
        num = min(len(ours), len(theirs), 1000)
        # The largest pack of all has fewer documents than that.
        compact = CompactSamples(ours, length, len(ours[0]["cu_seqlens"]))
        loaders = {
            "meco": loader(compact, num),
            "keys": loader(ours, num),
            "megatron": loader(theirs, num),
        }
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(args.rounds):
            for name, batches in loaders.items():
                rates[name].append(batches_per_second(batches))
        pause = length / TOKENS_PER_SECOND
        left = waits(loaders["meco"], pause, min(num, 100))
    rate = {name: statistics.median(r) * length for name, r in rates.items()}
    result = {
        "sequence_length": length,
        "million_tokens_per_second": {name: round(r / 1e6, 1) for name, r in rate.items()},
        "times_megatron": ratio(rates, "megatron"),
        "times_own_samples_with_megatrons_keys": ratio(rates, "keys"),
        "times_a_gpu": round(rate["meco"] / TOKENS_PER_SECOND),
        "wait_share_at_a_gpus_pace": round(statistics.median(left) / pause, 4),
        "longest_wait_share": round(max(left) / pause, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
