from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# tokens, labels, loss_mask, position_ids, cu_seqlens, max_seqlen, prefix_tokens
SampleArrays = tuple[
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.float32],
    NDArray[np.int64],
    NDArray[np.int32],
    NDArray[np.int32],
    NDArray[np.int64],
]

MAX_CAPACITY: int

class Piece:
    document: int
    body_begin: int
    body_end: int
    prefix_id: int
    prefix_tokens: int
    suffix_id: int
    suffix_tokens: int
    runs: list[tuple[str, int]]
    padding: int
    has_bos: bool

class Corpus:
    one_sequence_each: bool
    longest_head: int
    def __init__(
        self,
        *,
        sequence_lengths: NDArray[np.int32],
        document_indices: NDArray[np.int64] | None = None,
        prefix_ids: NDArray[np.int32] | None = None,
        prefix_tokens: NDArray[np.int32] = ...,
        prefix_offsets: NDArray[np.int64] = ...,
        suffix_ids: NDArray[np.int32] | None = None,
        suffix_tokens: NDArray[np.int32] = ...,
        suffix_offsets: NDArray[np.int64] = ...,
        bos_id: int = -1,
        plain_seed: int = 0,
        plain_threshold: int = 0,
    ) -> None: ...
    def longest_metadata(self, enough: int) -> int: ...

class Assembler:
    def __init__(
        self,
        *,
        corpus: Corpus,
        pack_offsets: NDArray[np.int64],
        piece_document: NDArray[np.int32],
        continued_piece: NDArray[np.int64],
        continued_begin: NDArray[np.int64],
        capacity: int,
        max_documents: int,
        pad_id: int,
        view: str,
        train_on_prefix: bool,
        train_on_suffix: bool = True,
        strategy: str,
        repeat_prefix: bool,
        repeat_every: int = 0,
        alignment: int = 1,
        bin: NDArray[np.uint8] | None = None,
        sequence_pointers: NDArray[np.int64] | None = None,
        token_bytes: int = 8,
        vocab_size: int | None = None,
    ) -> None: ...
    def pieces(self, pack: int) -> list[Piece]: ...
    def sample(self, pack: int) -> SampleArrays: ...
    def compared(self, pack: int) -> NDArray[np.float32]: ...
    def sample_from_bodies(self, pack: int, bodies: NDArray[np.int64]) -> SampleArrays: ...

def build_plan(
    corpus: Corpus,
    *,
    strategy: str,
    capacity: int,
    max_documents: int,
    num_packs: int | None,
    first_document: int,
    num_documents: int,
    range_begin: int,
    range_end: int,
    seed: int,
    repeat_prefix: bool,
    repeat_every: int = 0,
    alignment: int = 1,
    num_threads: int,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]: ...
def scan_index(
    lengths: NDArray[np.int32],
    pointers: NDArray[np.int64],
    first_sequences: NDArray[np.int64],
    *,
    token_bytes: int,
    num_threads: int,
) -> dict[str, int]: ...
def permutation(size: int, seed: int, stream: int, begin: int, end: int) -> NDArray[np.int64]: ...
def hash_pair(a: int, b: int) -> int: ...

class DistinctTexts:
    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def number(
        self,
        data: NDArray[np.uint8],
        offsets: NDArray[np.int32],
        valid: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...

def hash_texts(data: NDArray[np.uint8], offsets: NDArray[np.int32]) -> NDArray[np.uint64]: ...
def hash_text(text: bytes) -> tuple[int, int]: ...
def copy_plain_urls(
    data: NDArray[np.uint8], offsets: NDArray[np.int32], *, hosts_only: bool
) -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.bool_]]: ...
