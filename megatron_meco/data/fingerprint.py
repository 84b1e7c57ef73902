"""Short, stable names for what decides a sample.

`digest` hashes JSON-serialisable values; `file_fingerprint` hashes a file by its size and a fixed
set of sampled blocks, so it costs milliseconds at any size. What was given up: an edit that keeps
the size and misses all sampled blocks is not seen by content, which is why cache keys add the
modification time (`file_identity`).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

_BLOCK = 4096
_EDGE = 1 << 20
_SAMPLES = 1024


def digest(value: Any) -> str:
    """A 32-digit hexadecimal name of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, default=_identifiers)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """Hash of a file's size, its first and last MiB and 1,024 blocks spread evenly between."""
    size = os.path.getsize(path)
    hasher = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as file:
        hasher.update(file.read(_EDGE))
        step = max(size // _SAMPLES, _BLOCK)
        for offset in range(_EDGE, max(size - _EDGE, _EDGE), step):
            file.seek(offset)
            hasher.update(file.read(_BLOCK))
        file.seek(max(size - _EDGE, 0))
        hasher.update(file.read(_EDGE))
    return hasher.hexdigest()


def file_identity(path: str | os.PathLike[str]) -> list[Any]:
    """Content sample and modification time: what a cache key needs, stricter than a fingerprint."""
    return [Path(path).name, file_fingerprint(path), os.stat(path).st_mtime_ns]


def _identifiers(value: Any) -> Any:
    """Megatron's tokenizers and configurations name themselves by `unique_identifiers`."""
    return value.unique_identifiers
