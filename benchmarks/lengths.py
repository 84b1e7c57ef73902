"""Synthetic web-like document lengths, the ones that all packing figures here are on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
