"""Small corpora on disk for tests, written with Megatron's own builder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

EOD = 1
BOS = 0


class LetterTokenizer:
    """A tokenizer of single characters: id = code point + 10. Stands in for nothing else.

    It has the few attributes that Megatron's datasets ask of a tokenizer.
    """

    vocab_size = 400
    eod = EOD
    unique_identifiers: ClassVar = {"class": "LetterTokenizer"}

    def __init__(self, bos: int | None = BOS) -> None:
        self.bos = bos

    @property
    def pad(self) -> int:
        raise NotImplementedError

    @property
    def _tokenizer(self) -> LetterTokenizer:
        return self

    def tokenize(self, text: str) -> list[int]:
        return [ord(c) % 256 + 10 for c in text]

    def detokenize(self, ids: list[int]) -> str:
        return "".join(chr(i - 10) if i >= 10 else f"<{i}>" for i in ids)


def random_bodies(num_documents: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Token lists of web-like lengths (a few long ones), EOD last; some documents are empty."""
    draw = random.Random(seed)
    bodies = []
    for _ in range(num_documents):
        length = min(int(draw.lognormvariate(2, 1)), longest) if draw.random() > 0.05 else 0
        bodies.append([draw.randrange(270, 400) for _ in range(length)] + [EOD])
    return bodies


def write_corpus(
    prefix: Path,
    bodies: list[list[int]],
    metadata: dict[str, list[Any]] | None = None,
    dtype: type[np.generic] = np.uint16,
    sequences_each: int = 1,
) -> str:
    """Write `.bin`, `.idx` and, when metadata is given, `.metadata.arrow`.

    Args:
        prefix: Path without suffix.
        bodies: Tokens of each document.
        metadata: Columns, one value for each document.
        dtype: Type of a token on disk.
        sequences_each: Megatron sequences that a document is cut into.
    """
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for body in bodies:
        parts = [list(p) for p in np.array_split(np.array(body), sequences_each)]
        tokens = np.array([t for p in parts for t in p])
        builder.add_document(tokens, [len(p) for p in parts])
    builder.finalize(f"{prefix}.idx")
    if metadata is not None:
        table = pa.table({k: pa.array(v, pa.string()) for k, v in metadata.items()})
        with pa.ipc.new_file(f"{prefix}.metadata.arrow", table.schema) as writer:
            writer.write_table(table)
    return str(prefix)
