"""Sample assembly against Megatron's GPTDataset with document masks, and against bare copying.

All three read the same tokens from the same memory-mapped file and give the same arrays. Rounds
alternate; a figure is the median of the rounds, a ratio is taken within a round.

    python benchmarks/bench_samples.py --sequence-length 8192
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lengths import web_like
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_meco.config import MeCoConfig
from megatron_meco.data.dataset import MeCoGPTDataset, MeCoGPTDatasetConfig

EOD = 2


class NumberTokenizer:
    """A placeholder: nothing is tokenised here."""

    vocab_size = 60_000
    eod = EOD
    bos = 1
    unique_identifiers = {"class": "NumberTokenizer"}  # noqa: RUF012

    def tokenize(self, text: str) -> list[int]:
        """Characters as numbers."""
        return [ord(c) for c in text]


def write_corpus(prefix: Path, num_documents: int) -> None:
    """Random tokens in documents of web-like lengths."""
    draw = np.random.default_rng(1)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in web_like(num_documents):
        tokens = draw.integers(3, 60_000, length)
        tokens[-1] = EOD
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def build(kind: type, config: Any) -> Any:
    """One epoch of a dataset, by Megatron's builder."""
    return BlendedMegatronDatasetBuilder(kind, [None, 0, 0], lambda: True, config).build()[0]


def datasets(prefix: Path, length: int, strategy: str) -> tuple[Any, Any]:
    """MeCo's dataset and Megatron's, on the same corpus."""
    shared: dict[str, Any] = {
        "random_seed": 1,
        "sequence_length": length,
        "blend": ([str(prefix)], None),
        "split": "1,0,0",
        "path_to_cache": str(prefix.parent / "cache"),
        "tokenizer": NumberTokenizer(),
    }
    meco = MeCoConfig(template="", packing=strategy)
    ours = build(MeCoGPTDataset, MeCoGPTDatasetConfig(**shared, meco=meco))
    flags: dict[str, Any] = {
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
        "inter_document_masking": True,
    }
    return ours, build(GPTDataset, GPTDatasetConfig(**shared, **flags))


def bare_copy(prefix: Path, length: int, num_bounds: int) -> Callable[[int], Any]:
    """A lower bound: the same output arrays from contiguous tokens, with numpy."""
    tokens = np.memmap(f"{prefix}.bin", np.uint16, "r")
    ones, count = np.ones(length, np.float32), np.arange(length)
    bounds = np.full(num_bounds, length, np.int32)

    def sample(index: int) -> dict[str, torch.Tensor]:
        part = tokens[index * length : (index + 1) * length]
        arrays = {"tokens": part.astype(np.int64), "loss_mask": ones.copy()}
        arrays |= {"labels": arrays["tokens"].copy(), "position_ids": count.copy()}
        arrays["cu_seqlens"] = bounds.copy()
        return {key: torch.from_numpy(array) for key, array in arrays.items()}

    return sample


def seconds(read: Callable[[int], Any], indices: list[int]) -> float:
    """Wall time of reading the samples."""
    begin = time.perf_counter()
    for index in indices:
        read(index)
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequence-length", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--strategy", default="truncate")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    length = args.sequence_length
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "corpus")
        write_corpus(prefix, args.documents)
        ours, theirs = datasets(prefix, length, args.strategy)
        copy = bare_copy(prefix, length, len(ours[0]["cu_seqlens"]))
        num = min(len(ours), len(theirs), 2**22 // length)
        indices = list(range(num))
        times: dict[str, list[float]] = {"meco": [], "megatron": [], "copy": []}
        for _ in range(args.rounds):
            times["meco"].append(seconds(ours.__getitem__, indices))
            times["megatron"].append(seconds(theirs.__getitem__, indices))
            times["copy"].append(seconds(copy, indices))
    rate = {name: num * length / statistics.median(t) / 1e6 for name, t in times.items()}
    pairs = list(zip(*times.values(), strict=True))
    result = {
        "sequence_length": length,
        "strategy": args.strategy,
        "million_tokens_per_second": {name: round(r, 1) for name, r in rate.items()},
        "times_megatron": round(statistics.median(m / o for o, m, _ in pairs), 1),
        "times_slower_than_copy": round(statistics.median(o / c for o, _, c in pairs), 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
