"""A plan of 10^9 documents (1.2 * 10^12 tokens, synthetic lengths), written and opened again.

The lengths of 10^7 documents are repeated: what is random, and costs, is the order. Prints time,
peak memory and size on disk as one JSON object.

    python benchmarks/bench_billion.py --strategy best-fit --folder /tmp
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from lengths import web_like

from megatron_meco import _core
from megatron_meco.data.packing import PlanRequest, load_plan


def main() -> None:
    """Build, write, open."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=float, default=1e9)
    parser.add_argument("--sequence-length", type=int, default=8192)
    parser.add_argument("--strategy", default="truncate")
    parser.add_argument("--folder", help="where the plan is written, and removed again")
    args = parser.parse_args()
    num_documents = int(args.documents)
    part = web_like(min(num_documents, 10**7))
    lengths = np.tile(part, -(-num_documents // len(part)))[:num_documents]
    corpus = _core.Corpus(
        sequence_lengths=lengths,
    )
    request = PlanRequest(
        strategy=args.strategy,
        capacity=args.sequence_length,
        max_documents=args.sequence_length,
        num_packs=None,
        first_document=0,
        num_documents=num_documents,
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        begin = time.perf_counter()
        plan = load_plan(lambda: corpus, request, {}, Path(folder), "synthetic")
        built = time.perf_counter()
        del plan
        plan = load_plan(lambda: corpus, request, {}, Path(folder), "synthetic")
        first = plan.piece_document[plan.pack_offsets[0] : plan.pack_offsets[1]].tolist()
        opened = time.perf_counter()
        (file,) = Path(folder).iterdir()
        size = file.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    counts = plan.counts
    result = {
        "documents": num_documents,
        "strategy": args.strategy,
        "sequence_length": args.sequence_length,
        "tokens": int(lengths.sum(dtype=np.int64)),
        "seconds_to_build_and_write": round(built - begin, 1),
        "milliseconds_to_open_and_read_a_pack": round(1e3 * (opened - built), 2),
        "peak_bytes_per_document": round((peak - lengths.nbytes) / num_documents, 1),
        "file_bytes_per_document": round(size / num_documents, 2),
        "packs": counts.packs,
        "discarded_percent": round(
            100 * counts.discarded_tokens / (counts.discarded_tokens + counts.body_tokens), 2
        ),
        "padding_percent": round(
            100 * counts.padding_tokens / (counts.packs * args.sequence_length), 5
        ),
        "documents_in_first_pack": len(first),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
