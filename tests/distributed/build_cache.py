"""Builds one large cache file: some tenths of a second of packing, then 176 MB of writing."""

import sys
from pathlib import Path

import numpy as np

from megatron_meco import _core
from megatron_meco.data.packing import PlanRequest, build_plan, load_plan

NUM_DOCUMENTS = 3_000_000


def main() -> None:
    """Build the plan into the folder named on the command line, then compare with a fresh one."""
    lengths = np.random.default_rng(0).integers(2, 4000, NUM_DOCUMENTS, dtype=np.int32)
    corpus = _core.Corpus(
        sequence_lengths=lengths,
    )
    request = PlanRequest(
        strategy="split",
        capacity=1024,
        max_documents=1024,
        num_packs=None,
        first_document=0,
        num_documents=NUM_DOCUMENTS,
        seed=1,
    )
    print("building", flush=True)
    opened = load_plan(lambda: corpus, request, "large", Path(sys.argv[1]), "large")
    fresh = build_plan(corpus, request, "large")
    assert opened.counts == fresh.counts
    for name in ("pack_offsets", "piece_document", "continued_piece", "continued_begin"):
        assert np.array_equal(getattr(opened, name), getattr(fresh, name)), name
    print("whole")


if __name__ == "__main__":
    main()
