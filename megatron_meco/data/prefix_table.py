"""The prefixes or suffixes of a corpus: each distinct one tokenised once, numbered by document.

One pass over the metadata columns that the template reads (three when it keeps only frequent
values), on all cores. Distinct prefixes are told apart by 128-bit hashes and tokenised as they
come, their tokens go to the disk: in memory are 4 bytes for each document and 25 to 38 for each
distinct prefix. gigatoken encodes where it gives the tokenizer's ids; some texts of every batch are
compared. The result is cached as one memory-mapped file whose name holds all that decides it:
template, tokenizer, metadata file, length cap, and the seed where the template draws. While it is
built the disk holds the tokens twice. Prefix and body are tokenised apart, so the span of a prefix
is exact. Suffixes are made in the same way: whatever is said of prefixes here goes for them, too.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megatron_meco import _core
from megatron_meco.corpus.manifest import check_checksum
from megatron_meco.corpus.metadata import (
    METADATA_SUFFIX,
    check_row_count,
    describe_metadata,
    metadata_path,
    open_metadata,
)
from megatron_meco.corpus.text_arrays import text_buffers
from megatron_meco.data.array_file import ArraySpool, load_or_build
from megatron_meco.data.fingerprint import digest, file_identity
from megatron_meco.data.progress import BuildProgress
from megatron_meco.data.template import (
    Draws,
    Placeholder,
    Template,
    cut_at_tokens,
    in_current_syntax,
    kind_of,
    num_frequent,
)
from megatron_meco.errors import DataError, FlagError

KIND = "prefix table"
_ROWS_PER_BATCH = 1 << 18
_TEXTS_PER_CALL = 1 << 14
_TEXTS_PER_CHECK = 1 << 13
_MOST_BYTES_KEPT = 2**31 - 1  # of one array of strings

EncodeBatch = Callable[[list[str]], list[list[int] | None]]
"""Texts to token ids without BOS or EOS; None for a text that the tokenizer refuses."""


class FastEncoder(Protocol):
    """Turns many texts into one array of ids; may be called from several threads."""

    def encode(self, texts: pa.Array) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the ids of all texts end to end, and each text's number of ids."""
        ...


ChooseEncoder = Callable[[list[str]], FastEncoder | None]


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
    fast_encoder: ChooseEncoder | None = None,
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
        fast_encoder: Finds an encoder of the same ids for many texts, from some of them.

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
    elif in_current_syntax(template.source, 1) != template.source and not template.tokens:
        key["brackets"] = True  # likewise: of [[[[ they kept all four
    identity = digest(key)
    path = cache_folder / f"{identity}-prefixes.meco"

    def build() -> tuple[dict[str, Any], dict[str, NDArray[Any] | ArraySpool]]:
        # Here and not at each opening: the key of a finished table names the file it was made from.
        if needs_metadata:
            check_checksum(corpus_prefix, METADATA_SUFFIX)
            metadata = open_metadata(corpus_prefix)
        else:
            metadata = pa.table({"": pa.nulls(num_documents)})  # takes no memory
        texts = _Texts(template, where, Draws(seed, metadata))
        encoder = _Encoder(template, encode_batch, token_ids or {}, fast_encoder)
        try:
            return _build(texts, encoder, max_prefix_tokens, cache_folder)
        except _OtherIdsError:
            encoder = _Encoder(template, encode_batch, token_ids or {}, None)
            return _build(texts, encoder, max_prefix_tokens, cache_folder)

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


class _OtherIdsError(Exception):
    """The fast encoder gave other ids than the tokenizer, or none."""


class _Encoder:
    """Rendered prefixes to tokens, from several threads."""

    def __init__(
        self,
        template: Template,
        encode_batch: EncodeBatch,
        token_ids: Mapping[str, int],
        choose: ChooseEncoder | None,
    ) -> None:
        self._flag = template.flag
        self._special = np.array([token_ids[name] for name in template.tokens], dtype=np.int32)
        self._encode_batch = encode_batch
        self._choose = choose
        self._fast: FastEncoder | None = None
        self._num_slow = 0
        self._lock = threading.Lock()

    def encode(self, rendered: pa.Array) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Tokenise prefixes.

        Args:
            rendered: A string array, or a binary one with special tokens; no nulls.

        Returns:
            All tokens end to end, and the number of each prefix.
        """
        if pa.types.is_string(rendered.type):
            return self._encode_texts(rendered)
        texts, owners, special = cut_at_tokens(rendered)
        # A tokenizer may have tokens for no text at all.
        is_text = pc.greater(pc.binary_length(texts), 0)
        ids, text_lengths = self._encode_texts(texts.filter(is_text))
        lengths = np.zeros(len(texts), dtype=np.int64)
        lengths[is_text.to_numpy(zero_copy_only=False)] = text_lengths
        # One special token stands behind each text that is not the last one of its prefix.
        has_token = np.append(owners[1:] == owners[:-1], np.zeros(min(1, len(owners)), dtype=bool))
        is_special = np.zeros(len(ids) + len(special), dtype=bool)
        is_special[(np.cumsum(lengths + has_token) - 1)[has_token]] = True
        tokens = np.empty(len(is_special), dtype=np.int32)
        tokens[is_special], tokens[~is_special] = self._special[special], ids
        totals = np.bincount(owners, weights=lengths + has_token, minlength=len(rendered))
        return tokens, totals.astype(np.int64)

    def _encode_texts(self, texts: pa.Array) -> tuple[NDArray[Any], NDArray[np.int64]]:
        with self._lock:
            if self._choose is not None and self._num_slow + len(texts) > _TEXTS_PER_CALL:
                choose, self._choose = self._choose, None
                self._fast = choose(texts.to_pylist())
            if self._fast is None:
                self._num_slow += len(texts)
                return self._encode_slowly(texts)
        try:
            ids, lengths = self._fast.encode(texts)
        except DataError as error:
            raise _OtherIdsError from error
        ends = np.cumsum(lengths)
        for i in range(0, len(texts), _TEXTS_PER_CHECK):
            text = texts[i].as_py()
            if self._encode_batch([text]) != [ids[ends[i] - lengths[i] : ends[i]].tolist()]:
                raise _OtherIdsError
        return ids, lengths

    def _encode_slowly(self, texts: pa.Array) -> tuple[NDArray[Any], NDArray[np.int64]]:
        tokens: list[NDArray[np.int32]] = []
        lengths: list[int] = []
        for begin in range(0, len(texts), _TEXTS_PER_CALL):
            part = texts[begin : begin + _TEXTS_PER_CALL].to_pylist()
            encoded = self._encode_batch(part)
            for text, ids in zip(part, encoded, strict=True):
                if ids is None:
                    raise FlagError(
                        f"the tokenizer cannot encode the {kind_of(self._flag)} {text!r}",
                        where=self._flag,
                        remedy="Use a tokenizer for text.",
                    )
                lengths.append(len(ids))
            tokens.append(np.array([i for ids in encoded for i in ids or ()], dtype=np.int32))
        joined = np.concatenate(tokens) if tokens else np.empty(0, dtype=np.int32)
        return joined, np.array(lengths, dtype=np.int64)


def _build(
    texts: _Texts, encoder: _Encoder, max_tokens: int, folder: Path
) -> tuple[dict[str, Any], dict[str, NDArray[Any] | ArraySpool]]:
    tokens = ArraySpool(folder, np.int32)
    offsets = ArraySpool(folder, np.int64)
    offsets.append(np.zeros(1, dtype=np.int64))
    long_prefixes: list[NDArray[np.int64]] = []

    def add(ids: NDArray[Any], lengths: NDArray[np.int64]) -> None:
        is_long = lengths > max_tokens
        if is_long.any():
            # A plan has to find room for all prefixes of a table, so those that no document has
            # are emptied.
            long_prefixes.append(offsets.size - 1 + np.flatnonzero(is_long))
            ids = ids[~np.repeat(is_long, lengths)]
            lengths = np.where(is_long, 0, lengths)
        offsets.append(tokens.size + np.cumsum(lengths))
        tokens.append(ids)

    prefix_ids = np.empty(texts.draws.metadata.num_rows, dtype=np.int32)
    distinct = _core.DistinctTexts()
    frequent = _count_frequent(texts)
    num_threads = len(os.sched_getaffinity(0))
    pending: deque[Future[tuple[NDArray[Any], NDArray[np.int64]]]] = deque()
    row = 0
    with ThreadPoolExecutor(num_threads) as pool, closing(texts.rendered(frequent)) as batches:
        for rendered in batches:
            numbers, first_rows = distinct.number(*text_buffers(rendered))
            prefix_ids[row : row + len(numbers)] = numbers
            row += len(numbers)
            if len(first_rows):
                all_new = len(first_rows) == len(rendered)
                new = rendered if all_new else rendered.take(pa.array(first_rows))
                pending.append(pool.submit(encoder.encode, new))
            while len(pending) > 2 * num_threads:
                add(*pending.popleft().result())
        while pending:
            add(*pending.popleft().result())

    num_missing = int((prefix_ids < 0).sum())
    num_long = 0
    if long_prefixes:
        is_long = np.zeros(len(distinct) + 1, dtype=bool)  # the last one answers -1
        is_long[np.concatenate(long_prefixes)] = True
        for begin in range(0, len(prefix_ids), _ROWS_PER_BATCH):
            part = prefix_ids[begin : begin + _ROWS_PER_BATCH]
            found = is_long[part]
            part[found] = -1
            num_long += int(found.sum())
    counts = {"documents_without_value": num_missing, "documents_with_long_prefix": num_long}
    header = {"template": texts.template.source, "counts": counts}
    return header, {"prefix_ids": prefix_ids, "prefix_tokens": tokens, "prefix_offsets": offsets}


@dataclass(frozen=True)
class _Texts:
    """The prefixes of a corpus as texts, batch by batch."""

    template: Template
    where: str
    draws: Draws

    def rendered(self, frequent: Mapping[Placeholder, pa.Array]) -> Generator[pa.Array]:
        """The prefixes of the documents, in their order."""
        if self.template.is_shuffled:
            self.draws.prepare()  # before the threads, which would each do it

        def render(batch: pa.RecordBatch, begin: int) -> pa.Array:
            return self.template.render(batch, self.where, frequent, self.draws, begin)

        yield from self._map(render, f"{kind_of(self.template.flag)}es of {self.where}")

    def values(self, placeholder: Placeholder) -> Iterator[pa.Array]:
        """What the frequency filters of a placeholder choose from, without nulls."""

        def values(batch: pa.RecordBatch, begin: int) -> pa.Array:
            found = self.template.values(placeholder, batch, self.where, self.draws, begin)
            return found.drop_null()

        yield from self._map(values, f"frequent values of {self.where}")

    def _map(
        self, function: Callable[[pa.RecordBatch, int], pa.Array], label: str
    ) -> Iterator[pa.Array]:
        """Apply a function to the rows, a stretch at a time, on all cores; results in order.

        The function gets them with the number of the first. Arrow's kernels let go of the
        interpreter, so threads help; a few stretches are in flight.
        """
        metadata = self.draws.metadata
        names = metadata.schema.names
        columns = metadata.select(self.template.fields(names, self.where) or names)
        num_threads = len(os.sched_getaffinity(0))
        pending: deque[tuple[int, Future[pa.Array]]] = deque()
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


def _count_frequent(texts: _Texts) -> dict[Placeholder, pa.Array]:
    """The values to keep of each placeholder with a frequency filter."""
    placeholders = dict.fromkeys(p for p in texts.template.placeholders if p.frequency_filters)
    return {placeholder: _frequent_values(texts, placeholder) for placeholder in placeholders}


def _frequent_values(texts: _Texts, placeholder: Placeholder) -> pa.Array:
    """The values that the frequency filters keep, with numbers in memory and not the texts."""
    distinct = _core.DistinctTexts()
    counts = np.zeros(1 << 16, dtype=np.int64)
    for values in texts.values(placeholder):
        numbers, _ = distinct.number(*text_buffers(values))
        if len(distinct) > len(counts):
            grown = np.zeros(max(len(distinct), len(counts) * 3 // 2), dtype=np.int64)
            grown[: len(counts)] = counts
            counts = grown
        found, times = np.unique(numbers, return_counts=True)
        counts[found] += times
    counts = counts[: len(distinct)]
    kept = num_frequent(placeholder, counts)
    if not kept:
        return pa.array([], pa.string())
    least = np.partition(counts, len(counts) - kept)[len(counts) - kept]
    ties = kept - int((counts > least).sum())
    # Of the values with the least count the first ones of the alphabet stay.
    is_wanted = counts >= least
    kept_values, tied = [], pa.array([], pa.string())
    for values in texts.values(placeholder):
        numbers, _ = distinct.number(*text_buffers(values))
        numbers, rows = np.unique(numbers, return_index=True)
        wanted = is_wanted[numbers]
        numbers, rows = numbers[wanted], rows[wanted]
        is_wanted[numbers] = False
        is_tied = counts[numbers] == least
        kept_values.append(values.take(pa.array(rows[~is_tied])))
        tied = pa.concat_arrays([tied, values.take(pa.array(rows[is_tied]))])
        if len(tied) > 2 * ties + _ROWS_PER_BATCH:
            tied = tied.take(pc.array_sort_indices(tied)[:ties])
    kept_values.append(tied.take(pc.array_sort_indices(tied)[:ties]))
    num_bytes = sum(pc.sum(pc.binary_length(part), min_count=0).as_py() for part in kept_values)
    if num_bytes > _MOST_BYTES_KEPT:
        raise FlagError(
            f"{{{placeholder.name}}} would keep {kept:,} values of {num_bytes:,} bytes",
            where=texts.template.flag,
            remedy="Keep fewer: a smaller top, or a larger min_documents.",
        )
    return pa.concat_arrays(kept_values)
