"""The prefixes of a corpus: each distinct one tokenised once, one number for each document.

Cost: one pass over the metadata columns that the template reads (two when it keeps only frequent
values), on all cores, with 2 to 6 s of one core for a million URLs; one tokenizer call for each
distinct prefix; 4 bytes for each document. The result is cached as one memory-mapped file whose
name holds all that decides it: template, tokenizer, metadata file, length cap. What was given up:
merging tokens across the border of prefix and body; they are tokenised apart, so the span of a
prefix is exact.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megatron_meco.corpus.manifest import check_checksum
from megatron_meco.corpus.metadata import (
    METADATA_SUFFIX,
    check_row_count,
    describe_metadata,
    metadata_path,
    open_metadata,
)
from megatron_meco.data.array_file import load_or_build
from megatron_meco.data.fingerprint import digest, file_identity
from megatron_meco.data.progress import BuildProgress
from megatron_meco.data.template import Draws, Placeholder, Template, Token, frequent_values
from megatron_meco.errors import FlagError

KIND = "prefix table"
_ROWS_PER_BATCH = 1 << 18
_TEXTS_PER_CALL = 1 << 14

EncodeBatch = Callable[[list[str]], list[list[int] | None]]
"""Texts to token ids without BOS or EOS; None for a text that the tokenizer refuses."""


@dataclass(frozen=True)
class PrefixTable:
    """Prefixes of one corpus under one template and tokenizer.

    Attributes:
        prefix_ids: (num_documents,), int32; -1 for a document that trains plain.
        prefix_tokens: (total,), int32; all distinct prefixes, one after the other.
        prefix_offsets: (num_prefixes + 1,), int64; borders in `prefix_tokens`.
        documents_without_value: Documents that lack a value the template asks for.
        documents_with_long_prefix: Documents whose prefix is longer than the cap.
        identity: Names everything that decided the table.
    """

    prefix_ids: NDArray[np.int32]
    prefix_tokens: NDArray[np.int32]
    prefix_offsets: NDArray[np.int64]
    documents_without_value: int
    documents_with_long_prefix: int
    identity: str

    def tokens_of(self, prefix_id: int) -> NDArray[np.int32]:
        """Token ids of one prefix."""
        begin, end = self.prefix_offsets[prefix_id], self.prefix_offsets[prefix_id + 1]
        return self.prefix_tokens[begin:end]


def load_prefix_table(
    corpus_prefix: str,
    num_documents: int,
    template: Template,
    encode_batch: EncodeBatch,
    tokenizer_identity: Any,
    max_prefix_tokens: int,
    cache_folder: Path,
    *,
    token_ids: Mapping[str, int] | None = None,
    seed: int = 0,
) -> PrefixTable:
    """Open the cached prefix table of a corpus, building it first if needed.

    Args:
        corpus_prefix: The path that `.bin`, `.idx` and `.metadata.arrow` are appended to.
        num_documents: Number of documents in the corpus.
        template: What to render.
        encode_batch: The tokenizer; called only when the table is built.
        tokenizer_identity: What names the tokenizer (JSON-serialisable).
        max_prefix_tokens: Longer prefixes are not used.
        cache_folder: Where the table is or will be.
        token_ids: The ids of the template's special tokens, by name.
        seed: Of the run; decides what the filters `keep` and `shuffled` do.

    Raises:
        DataError: When the metadata is missing, damaged, or does not fit the corpus; when the
            cached file is damaged.
        FlagError: When the template does not fit the metadata.
    """
    where = str(metadata_path(corpus_prefix))
    # Special tokens alone need no metadata.
    needs_metadata = bool(template.placeholders)
    if needs_metadata:
        check_row_count(corpus_prefix, num_documents)
        fields, _ = describe_metadata(corpus_prefix)
        template.check_fields(fields, where)
    key: dict[str, Any] = {
        "template": template.source,
        "tokenizer": tokenizer_identity,
        "metadata": file_identity(where) if needs_metadata else num_documents,
        "max_prefix_tokens": max_prefix_tokens,
    }
    # Only where they matter, so that a cache of before them, or of another seed, is used.
    if template.tokens:
        key["token_ids"] = {name: (token_ids or {})[name] for name in template.tokens}
    if template.is_seeded:
        key["seed"] = seed
    if template.has_groups:
        key["groups"] = True  # earlier versions took [[ for text
    identity = digest(key)
    path = cache_folder / f"{identity}-prefixes.meco"

    def build() -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        # Here and not at each opening: the key of a finished table names the file it was made from.
        if needs_metadata:
            check_checksum(corpus_prefix, METADATA_SUFFIX)
            metadata = open_metadata(corpus_prefix)
        else:
            metadata = pa.table({"": pa.nulls(num_documents, pa.string())})
        draws = Draws(seed, metadata)
        return _build(
            metadata, template, encode_batch, token_ids or {}, max_prefix_tokens, where, draws
        )

    file = load_or_build(path, KIND, build)
    file.check(prefix_ids=np.int32, prefix_tokens=np.int32, prefix_offsets=np.int64)
    try:
        return PrefixTable(
            prefix_ids=file.arrays["prefix_ids"],
            prefix_tokens=file.arrays["prefix_tokens"],
            prefix_offsets=file.arrays["prefix_offsets"],
            identity=identity,
            **file.header["counts"],
        )
    except (KeyError, TypeError) as error:
        raise file.damaged("its header makes no sense") from error


def _build(
    metadata: pa.Table,
    template: Template,
    encode_batch: EncodeBatch,
    token_ids: Mapping[str, int],
    max_prefix_tokens: int,
    where: str,
    draws: Draws,
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    frequent = _count_frequent(metadata, template, where, draws)
    ids, rendered = _number_prefixes(metadata, template, frequent, where, draws)
    segments = [template.segments(text) for text in rendered]
    texts = [part for parts in segments for part in parts if isinstance(part, str)]
    encoded = iter(_encode(texts, encode_batch, template.flag))
    tokens = [
        [
            i
            for part in parts
            for i in ([token_ids[part.name]] if isinstance(part, Token) else next(encoded))
        ]
        for parts in segments
    ]
    too_long = np.array([len(t) > max_prefix_tokens for t in tokens], dtype=bool)
    missing = ids < 0
    long_documents = np.zeros_like(missing)
    long_documents[~missing] = too_long[ids[~missing]]
    ids[long_documents] = -1
    # A plan has to find room for all prefixes of a table, so those that nobody shows are emptied.
    tokens = [[] if long else ids_of for ids_of, long in zip(tokens, too_long, strict=True)]
    arrays: dict[str, NDArray[Any]] = {
        "prefix_ids": ids,
        "prefix_tokens": np.array([i for t in tokens for i in t], dtype=np.int32),
        "prefix_offsets": np.cumsum([0] + [len(t) for t in tokens], dtype=np.int64),
    }
    counts = {
        "documents_without_value": int(missing.sum()),
        "documents_with_long_prefix": int(long_documents.sum()),
    }
    return {"template": template.source, "counts": counts}, arrays


def _encode(texts: list[str], encode_batch: EncodeBatch, flag: str) -> list[list[int]]:
    tokens: list[list[int]] = []
    for begin in range(0, len(texts), _TEXTS_PER_CALL):
        for text, ids in zip(
            texts[begin:], encode_batch(texts[begin : begin + _TEXTS_PER_CALL]), strict=False
        ):
            if ids is None:
                raise FlagError(
                    f"the tokenizer cannot encode the prefix {text!r}",
                    where=flag,
                    remedy="Use a tokenizer for text.",
                )
            tokens.append(ids)
    return tokens


def _number_prefixes(
    metadata: pa.Table,
    template: Template,
    frequent: dict[Placeholder, pa.Array],
    where: str,
    draws: Draws,
) -> tuple[NDArray[np.int32], list[str | bytes]]:
    """Number of each document's prefix (-1: none), and the distinct prefixes in that order."""
    ids = np.full(metadata.num_rows, -1, dtype=np.int32)
    numbers: dict[str | bytes, int] = {}
    row = 0

    def render(batch: pa.RecordBatch, begin: int) -> pa.DictionaryArray:
        return template.render(batch, where, frequent, draws, begin).dictionary_encode()

    for encoded in _map_batches(render, metadata, template, where, f"prefixes of {where}"):
        lookup = [numbers.setdefault(text, len(numbers)) for text in encoded.dictionary.to_pylist()]
        local = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
        # The extra last entry answers index -1: a document without a prefix.
        ids[row : row + len(local)] = np.array([*lookup, -1], dtype=np.int32)[local]
        row += len(local)
    return ids, list(numbers)


def _count_frequent(
    metadata: pa.Table, template: Template, where: str, draws: Draws
) -> dict[Placeholder, pa.Array]:
    """The values to keep of each placeholder with a frequency filter."""
    placeholders = [p for p in template.placeholders if p.frequency_filters]
    counts: dict[Placeholder, Counter[str]] = {p: Counter() for p in placeholders}

    def count(batch: pa.RecordBatch, begin: int) -> list[list[dict[str, Any]]]:
        columns = (template.values(p, batch, where, draws, begin).drop_null() for p in placeholders)
        return [pc.value_counts(column).to_pylist() for column in columns]

    if placeholders:
        label = f"frequent values of {where}"
        for columns in _map_batches(count, metadata, template, where, label):
            for placeholder, entries in zip(placeholders, columns, strict=True):
                for entry in entries:
                    counts[placeholder][entry["values"]] += entry["counts"]
    return {p: frequent_values(p, counts[p]) for p in placeholders}


def _map_batches[T](
    function: Callable[[pa.RecordBatch, int], T],
    metadata: pa.Table,
    template: Template,
    where: str,
    label: str,
) -> Iterator[T]:
    """Apply a function to the rows, a stretch at a time, on all cores; results in order.

    The function gets them with the number of the first. Arrow's kernels let go of the interpreter,
    so threads help; a few stretches are in flight.
    """
    columns = metadata.select(
        template.fields(metadata.schema.names, where) or metadata.schema.names
    )
    num_threads = len(os.sched_getaffinity(0))
    pending: deque[tuple[int, Future[T]]] = deque()
    begin = done = 0
    with ThreadPoolExecutor(num_threads) as pool, BuildProgress(label) as progress:
        for batch in columns.to_batches(max_chunksize=_ROWS_PER_BATCH):
            pending.append((len(batch), pool.submit(function, batch, begin)))
            begin += len(batch)
            if len(pending) > 2 * num_threads:
                num_rows, future = pending.popleft()
                yield future.result()
                done += num_rows
                progress(done / metadata.num_rows)
        for _, future in pending:
            yield future.result()
