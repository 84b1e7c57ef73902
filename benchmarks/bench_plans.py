"""Plans against Megatron's index path, a random gather, other packers, and the corpus check.

Plans are those of the default cap on documents. The check is what a run does once for each corpus
before it plans (`data/corpora.py`), on a file in memory: of its structure, and of its CRC-32 as
well where `meco prepare` made the corpus. It is compared with plans in memory, and with what a run
waits for: one that is written to the data cache and opened.

Rounds alternate; a figure is the median of the rounds, a ratio the median of the ratios within a
round. Packers that are not installed are left out and named: `lightbinpack` (C++), `trl`,
`ai2-olmo-core` and `megatron-bridge` come from PyPI (the last three in a folder of their own on
PYTHONPATH, since they pin what this project does not). Those three are written in
Python: `--python-packers` runs them, at a million documents in about three minutes a round.

    python benchmarks/bench_plans.py --documents 1e7 --sequence-length 8192
    python benchmarks/bench_plans.py --documents 1e6 --python-packers --rounds 1
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lengths import web_like, write_corpus

from megatron_meco import _core
from megatron_meco.config import MeCoConfig
from megatron_meco.data.corpora import check_files
from megatron_meco.data.packing import Plan, PlanRequest, build_plan, load_plan


def our_plan(lengths: np.ndarray, strategy: str, capacity: int, threads: int) -> Plan:
    """One epoch of the whole corpus, order and shuffle included."""
    corpus = _core.Corpus(
        sequence_lengths=lengths,
    )
    request = request_of(lengths, strategy, capacity)
    return build_plan(corpus, request, "synthetic", num_threads=threads)


def request_of(lengths: np.ndarray, strategy: str, capacity: int) -> PlanRequest:
    """One epoch of the whole corpus."""
    return PlanRequest(
        strategy=strategy,
        capacity=capacity,
        max_documents=MeCoConfig().documents_cap(capacity),
        num_packs=None,
        first_document=0,
        num_documents=len(lengths),
        seed=1,
    )


def checker(lengths: np.ndarray, folder: Path, *, is_noted: bool) -> Callable[[], None]:
    """The check of a corpus of these lengths, without a cached result."""
    folder.mkdir()
    write_corpus(folder / "corpus", lengths)
    if not is_noted:
        (folder / "corpus.prepare.json").unlink()

    def check() -> None:
        check_files(str(folder / "corpus"), folder / "cache")
        shutil.rmtree(folder / "cache")

    return check


def kept_plan(lengths: np.ndarray, capacity: int, folder: Path) -> None:
    """Build, write and open a `truncate` plan."""
    corpus = _core.Corpus(sequence_lengths=lengths)
    load_plan(lambda: corpus, request_of(lengths, "truncate", capacity), 0, folder, "synthetic")
    shutil.rmtree(folder)


def megatron_index(lengths: np.ndarray, capacity: int) -> None:
    """Document, sample and shuffle index, as Megatron's GPTDataset makes them for one epoch."""
    from megatron.core.datasets import gpt_dataset, helpers

    state = np.random.RandomState(1)
    documents = np.arange(len(lengths), dtype=np.int32)
    index = gpt_dataset._build_document_index(documents, 1, state, False)
    tokens = int(np.sum(lengths[documents]))
    samples = helpers.build_sample_idx(lengths, index, capacity, 1, tokens, True, True)
    num = samples.shape[0] - 1
    gpt_dataset._build_shuffle_index(num, num, state)


def gather(lengths: np.ndarray, order: np.ndarray) -> None:
    """A lower bound: read every length once, in random order."""
    np.take(lengths, order)


def lightbinpack_call(lengths: np.ndarray, capacity: int) -> Callable[[], Any]:
    """Its best-fit-decreasing; it takes a list, and lengths up to that of a bin."""
    import lightbinpack

    as_list = np.minimum(lengths, capacity).tolist()
    return lambda: lightbinpack.obfd(as_list, capacity)


def trl_call(lengths: np.ndarray, capacity: int) -> Callable[[], Any]:
    """TRL's `bfd` on a data set of the same lengths."""
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, capacity))]).astype(np.int64)
    tokens = pa.array(np.zeros(int(offsets[-1]), np.int8))
    column = pa.LargeListArray.from_arrays(pa.array(offsets), tokens)
    table = pa.table({"input_ids": column})
    return lambda: _pack_bfd(table, capacity)


def olmo_call(lengths: np.ndarray, capacity: int) -> Callable[[], Any]:
    """OLMo-core's best-fit-decreasing packer, on truncated documents."""
    from olmo_core.data.utils import InstancePacker

    ends = np.cumsum(np.minimum(lengths, capacity).astype(np.int64))
    borders = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
    return lambda: InstancePacker(capacity).pack_documents(borders)


def bridge_call(lengths: np.ndarray, capacity: int) -> Callable[[], Any]:
    """Megatron-Bridge's first-fit-decreasing, loaded as one module: the package needs a GPU."""
    files = importlib.metadata.files("megatron-bridge") or []  # PackageNotFoundError: ImportError
    found = [f for f in files if str(f).endswith("bridge/data/packing/algorithms.py")]
    if not found:
        raise ImportError("megatron-bridge is not installed")
    spec = importlib.util.spec_from_file_location("bridge_packing", str(found[0].locate()))
    assert spec is not None
    assert spec.loader is not None
    # It imports a reader of files that packing does not call, and that wants Transformer Engine.
    unused: Any = types.ModuleType("megatron.bridge.utils.safe_pickle")
    unused.safe_load_npy = None
    sys.modules.setdefault(unused.__name__, unused)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    as_list = np.minimum(lengths, capacity).tolist()
    return lambda: module.first_fit_decreasing(as_list, capacity)


PeerCall = Callable[[np.ndarray, int], Callable[[], Any]]
NATIVE_PACKERS: dict[str, PeerCall] = {"lightbinpack": lightbinpack_call}
PYTHON_PACKERS: dict[str, PeerCall] = {
    "trl": trl_call,
    "olmo-core": olmo_call,
    "megatron-bridge": bridge_call,
}


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Wall seconds of each call, in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return times


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=float, default=1e7)
    parser.add_argument("--sequence-length", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--python-packers", action="store_true", help="the slow ones as well")
    args = parser.parse_args()
    num, capacity = int(args.documents), args.sequence_length
    lengths = web_like(num)
    order = np.random.default_rng(2).permutation(num).astype(np.int32)
    calls: dict[str, Callable[[], Any]] = {
        strategy: lambda s=strategy: our_plan(lengths, s, capacity, args.threads)
        for strategy in ("truncate", "split", "best-fit")
    }
    calls["truncate, 1 thread"] = lambda: our_plan(lengths, "truncate", capacity, 1)
    calls["best-fit, 1 thread"] = lambda: our_plan(lengths, "best-fit", capacity, 1)
    calls["megatron index"] = lambda: megatron_index(lengths, capacity)
    calls["gather, 1 thread"] = lambda: gather(lengths, order)
    peers = NATIVE_PACKERS | (PYTHON_PACKERS if args.python_packers else {})
    for name, peer in peers.items():
        try:
            calls[name] = peer(lengths, capacity)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        calls["truncate, kept"] = lambda: kept_plan(lengths, capacity, Path(folder, "plan"))
        calls["check"] = checker(lengths, Path(folder, "plain"), is_noted=False)
        calls["check, CRC"] = checker(lengths, Path(folder, "noted"), is_noted=True)
        times = measure(calls, args.rounds)

    def ratio(slow: str, fast: str) -> float | None:
        if slow not in times:
            return None
        return round(
            statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True)), 2
        )

    plan = our_plan(lengths, "best-fit", capacity, args.threads)
    result = {
        "documents": num,
        "sequence_length": capacity,
        "threads": args.threads,
        "nanoseconds_per_document": {
            name: round(1e9 * statistics.median(t) / num, 1) for name, t in times.items()
        },
        "megatron_index / truncate": ratio("megatron index", "truncate"),
        **{
            f"{check} / {plan}": ratio(check, plan)
            for check in ("check", "check, CRC")
            for plan in ("truncate", "best-fit", "truncate, kept")
        },
        "truncate, 1 thread / gather": ratio("truncate, 1 thread", "gather, 1 thread"),
        **{f"{name} / best-fit": ratio(name, "best-fit") for name in peers},
        "lightbinpack / best-fit, 1 thread": ratio("lightbinpack", "best-fit, 1 thread"),
        "best_fit_padding_percent": round(
            100 * plan.counts.padding_tokens / (plan.counts.packs * capacity), 5
        ),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
