"""Checks of a corpus around its opening by Megatron: files, index arrays, documents.

Megatron maps `.idx` and `.bin` without validation, so a damaged file would give wrong samples or
read outside the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, get_idx_path
from megatron.core.datasets.object_storage_utils import is_object_storage_path

from megatron_meco.corpus.index_file import check_arrays, header_of
from megatron_meco.corpus.tokenizer import resolve_eod
from megatron_meco.data.corpora import check_files
from megatron_meco.errors import DataError

COPY_AGAIN = "Copy the corpus again from an intact source, or prepare it again."
OTHER_TOKENS = (
    "Use the tokenizer that the corpus was made with. If this is the one, the file is damaged "
    f"(`meco verify` checks all of it). {COPY_AGAIN}"
)
_DOCUMENTS_CHECKED = 1000
# Tokens checked at the end of a document: the page or two that hold its EOD.
_TOKENS_CHECKED = 1024


def check_files_of(corpus_prefix: str, cache_folder: Path) -> None:
    """Check the files of a local corpus, once for each data cache.

    Args:
        corpus_prefix: Path without suffix, or a URL, which is not checked.
        cache_folder: Where a passed check is recorded.

    Raises:
        DataError: A file is missing or damaged.
    """
    if not is_object_storage_path(corpus_prefix):
        check_files(corpus_prefix, cache_folder)


def check_arrays_of(dataset: IndexedDataset) -> bool:
    """Check the index arrays that Megatron holds.

    Returns:
        Whether document `i` is sequence `i`.

    Raises:
        DataError: The arrays contradict each other.
    """
    index = dataset.index
    arrays = index.sequence_lengths, index.sequence_pointers, index.document_indices
    return check_arrays(*arrays, index.dtype_size, get_idx_path(dataset.path_prefix))


def check_opened(dataset: IndexedDataset, where: str) -> None:
    """Check that Megatron opened the index that `check_files_of` checked.

    With `--per-dataset-sequences-path` Megatron takes the counts from that file instead of the
    index. An index in object storage could not be checked before, so its arrays are checked here.

    Args:
        dataset: Megatron's reader.
        where: The corpus without suffix.

    Raises:
        DataError: The opened index is another one or damaged.
    """
    if is_object_storage_path(where):
        check_arrays_of(dataset)
        return
    index = dataset.index
    expected = header_of(Path(get_idx_path(where)))
    found = np.dtype(index.dtype), len(index.sequence_lengths), len(index.document_indices)
    if found != expected:
        raise DataError(
            f"the index holds {expected[1]:,} sequences and {expected[2] - 1:,} documents of "
            f"{expected[0]}, this run was told {found[1]:,} and {found[2] - 1:,} of {found[0]}",
            where=get_idx_path(where),
            remedy="Drop --per-dataset-sequences-path, or write that file again.",
        )


def check_documents(dataset: IndexedDataset, tokenizer: Any, num_ids: int, where: str) -> None:
    """Check that documents end in EOD and that token ids are below `num_ids`.

    Checks the last 1,024 tokens of 1,000 evenly spaced documents. The assembler checks all other
    ids when a sample reads them.

    Args:
        dataset: Megatron's reader.
        tokenizer: Megatron's tokenizer.
        num_ids: Upper bound of token ids.
        where: The corpus without suffix.

    Raises:
        DataError: Names the first such document.
    """
    bounds = np.asarray(dataset.document_indices)
    eod = resolve_eod(tokenizer)
    step = max(1, (len(bounds) - 1) // _DOCUMENTS_CHECKED)
    for document in range(0, len(bounds) - 1, step):
        ids = _last_tokens(dataset, int(bounds[document]), int(bounds[document + 1]))
        if ids is None:
            continue
        if int(ids[-1]) != eod:
            raise DataError(
                f"document {document} does not end in the tokenizer's EOD ({eod})",
                where=where,
                remedy="Prepare the corpus with EOD (meco prepare, or Megatron's --append-eod) and "
                "with this tokenizer.",
            )
        if ids.min() < 0 or ids.max() >= num_ids:
            found = int(ids.min() if ids.min() < 0 else ids.max())
            raise DataError(
                f"document {document} holds token id {found}, outside the vocabulary of {num_ids}",
                where=where,
                remedy=OTHER_TOKENS,
            )


def _last_tokens(dataset: IndexedDataset, first: int, end: int) -> Any:
    """Last tokens of the last non-empty sequence in [first, end); None if all are empty."""
    lengths = np.asarray(dataset.sequence_lengths[first:end])
    filled = np.flatnonzero(lengths)
    if not len(filled):
        return None
    last = int(filled[-1])
    return dataset.get(first + last, offset=max(0, int(lengths[last]) - _TOKENS_CHECKED))
