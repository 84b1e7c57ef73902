"""Synthetic web-like document lengths, used by all packing benchmarks.

    python benchmarks/lengths.py --documents 1e6 --output web

writes a corpus of them that holds one token over and over (id 0, which is the EOD of Megatron's
NullTokenizer with `--vocab-size 1`). Its `.bin` is a hole and takes no room on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_meco.corpus.index_file import header
from megatron_meco.corpus.manifest import checksum_of


def web_like(num_documents: int, seed: int = 0) -> NDArray[np.int32]:
    """Lognormal lengths: median 600, mean about 1,200, clipped at 200,000 tokens.

    Returns:
        (num_documents,), int32.
    """
    draw = np.random.default_rng(seed)
    lengths = np.empty(num_documents, np.int32)
    for begin in range(0, num_documents, 1 << 24):  # float64 of all at once would be the peak
        part = lengths[begin : begin + (1 << 24)]
        part[:] = np.clip(draw.lognormal(np.log(600), 1.177, len(part)), 2, 200_000)
    return lengths


def write_corpus(prefix: Path, lengths: NDArray[np.int32]) -> None:
    """Write a corpus of documents of these lengths, and the manifest of a preparation.

    Args:
        prefix: Its path without suffix.
        lengths: (num_documents,), int32.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(header(np.dtype(np.uint16), len(lengths), len(lengths)))
        file.write(lengths.data)
        file.write((2 * (ends - lengths)).data)
        file.write(np.arange(len(lengths) + 1).data)
    with open(f"{prefix}.bin", "wb") as file:
        os.truncate(file.fileno(), 2 * int(ends[-1]))
    noted = {
        "documents": len(lengths),
        "tokens": int(ends[-1]),
        "crc32": {".idx": checksum_of(Path(f"{prefix}.idx"))},
    }
    Path(f"{prefix}.prepare.json").write_text(json.dumps(noted))


def main() -> None:
    """Write a corpus."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=float, default=1e6)
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX")
    args = parser.parse_args()
    write_corpus(args.output, web_like(int(args.documents)))


if __name__ == "__main__":
    main()
