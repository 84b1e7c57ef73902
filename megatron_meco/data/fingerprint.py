"""Short, stable names for everything that decides a sample: values, files, tokenizers.

Files are hashed by size and sampled blocks, which takes milliseconds at any size. A cache key adds
the modification time (`file_identity`), because an edit that keeps the size can miss every block.
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
# Encoded to tell vocabularies apart.
_CANARY = "URL: en.wikipedia.org/wiki/Bill_Gates?a=1\n\nTopic: 0123456789 \u00e9\u4e2d"


def digest(value: Any) -> str:
    """32 hexadecimal digits for a JSON-serializable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, default=_identifiers)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """Hash of a file's size, its first and last MiB, and 1,024 evenly spaced 4 KiB blocks."""
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
    """Cache key of a file: name, fingerprint and modification time."""
    return [Path(path).name, file_fingerprint(path), os.stat(path).st_mtime_ns]


def tokenizer_identity(tokenizer: Any) -> list[Any]:
    """Cache key of a tokenizer: Megatron's description, vocabulary size, ids of a fixed text.

    The ids are needed because the same path may later hold another vocabulary.
    """
    try:
        ids = list(tokenizer.tokenize(_CANARY))
    except ValueError:  # NullTokenizer reads numbers only
        ids = []
    return [tokenizer.unique_identifiers, tokenizer.vocab_size, ids]


def _identifiers(value: Any) -> Any:
    """JSON form of Megatron's tokenizers and configurations."""
    return value.unique_identifiers
