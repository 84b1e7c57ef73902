"""Documents and tokens of a corpus, by length and by the values of its metadata."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_meco.corpus.index_file import CorpusIndex
from megatron_meco.corpus.manifest import check_checksum
from megatron_meco.corpus.metadata import (
    METADATA_SUFFIX,
    check_row_count,
    metadata_path,
    open_metadata,
)
from megatron_meco.corpus.metadata_report import count_values, holds_urls, open_undamaged_index
from megatron_meco.corpus.url import host

_DOCUMENTS_AT_ONCE = 1 << 20
# Distinct values that are kept; beyond that the rarest are dropped, and the page says so.
_MOST_VALUES = 1 << 20


def corpus_facts(prefix: str, top: int) -> dict[str, Any]:
    """Count a corpus.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.
        top: How many values of each field to name.

    Returns:
        `prefix`, `documents`, `tokens` (EODs included), `lengths` (a list of {from, to, documents,
        tokens}; `to` is excluded), and `fields`: for each metadata field `name`, `by` ("host" or
        "value"), `distinct`, `is_exact`, `documents_without`, and `values`, a list of {value,
        documents, tokens} with the most tokens first.

    Raises:
        DataError: A file is missing or damaged.
    """
    index = open_undamaged_index(prefix)
    by_length = np.zeros((2, 64), np.int64)
    for lengths in _document_lengths(index):
        bins = np.frexp(lengths.astype(np.float64))[1]  # 2^(bin-1) <= length < 2^bin; 0 for 0
        by_length[0] += np.bincount(bins, minlength=64)
        by_length[1] += np.bincount(bins, weights=lengths, minlength=64).astype(np.int64)
    facts: dict[str, Any] = {
        "prefix": prefix,
        "documents": index.num_documents,
        "tokens": int(by_length[1].sum()),
        "lengths": [
            {
                "from": 0 if b == 0 else 1 << (b - 1),
                "to": 1 << b,
                "documents": int(by_length[0, b]),
                "tokens": int(by_length[1, b]),
            }
            for b in range(64)
            if by_length[0, b]
        ],
        "fields": [],
    }
    if metadata_path(prefix).exists():
        check_row_count(prefix, index.num_documents)
        check_checksum(prefix, METADATA_SUFFIX)
        table = open_metadata(prefix)
        facts["fields"] = [
            _field_facts(name, table[name], index, top) for name in table.column_names
        ]
    return facts


def _document_lengths(index: CorpusIndex) -> Iterator[np.ndarray[Any, Any]]:
    for begin in range(0, index.num_documents, _DOCUMENTS_AT_ONCE):
        end = min(begin + _DOCUMENTS_AT_ONCE, index.num_documents)
        yield np.diff(index.bounds(begin, end))


def _field_facts(
    name: str, column: pa.ChunkedArray, index: CorpusIndex, top: int
) -> dict[str, Any]:
    by_host = holds_urls(name, column)
    counts = count_values(column, index, host if by_host else None, _MOST_VALUES)
    # By tokens, which `count_values` does not sort by.
    values = counts.values.sort_by([("tokens", "descending"), ("value", "ascending")])
    return {
        "name": name,
        "by": "host" if by_host else "value",
        "distinct": len(values),
        "is_exact": counts.is_exact,
        "documents_without": counts.without,
        "values": values.slice(0, top).to_pylist(),
    }
