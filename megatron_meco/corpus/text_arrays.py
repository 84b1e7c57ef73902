"""The buffers of Arrow's string arrays as numpy arrays, which the C++ side takes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_meco import _core


def text_buffers(
    texts: pa.Array,
) -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.bool_] | None]:
    """Return the buffers of a string or binary array without a copy.

    Args:
        texts: n values with 32-bit offsets.

    Returns:
        The bytes, the bounds of the values in them (n + 1,), and which values are not null (n,);
        None: all.
    """
    _, borders, data = texts.buffers()
    offsets = np.frombuffer(borders or bytes(4), np.int32)
    valid = texts.is_valid().to_numpy(zero_copy_only=False) if texts.null_count else None
    return (
        np.frombuffer(data or b"", np.uint8),
        offsets[texts.offset : texts.offset + len(texts) + 1],
        valid,
    )


def hash_halves(texts: pa.Array) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the two halves of the 128-bit hash of n strings without nulls, each (n,)."""
    data, borders, _ = text_buffers(texts)
    first, second = np.ascontiguousarray(_core.hash_texts(data, borders).T)
    return first, second
