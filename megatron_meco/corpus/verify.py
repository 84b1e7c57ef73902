"""`meco verify PREFIX`: whether a corpus on disk is intact.

Reads every byte once and checks the structure of the index, one EOD at the end of each document and
none inside, ids within the vocabulary, one metadata row per document, and the counts and checksums
in `PREFIX.prepare.json`. `--against FILES` tokenises the original files again and compares tokens
and metadata document by document. Costs the disk, and with `--against` the tokenizer, in one
process. Nothing is repaired.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document

from megatron_meco.corpus.documents import (
    line_of,
    metadata_columns,
    read_batches,
    text_bytes_of,
)
from megatron_meco.corpus.encoder import (
    DocumentEncoder,
    EncodedDocuments,
    build_encoder,
    encoder_of,
)
from megatron_meco.corpus.index_file import (
    CorpusIndex,
    check_index,
    open_index,
)
from megatron_meco.corpus.input_files import find_files
from megatron_meco.corpus.manifest import checksum_of, manifest_path, read_manifest
from megatron_meco.corpus.metadata import check_row_count, metadata_path, open_metadata
from megatron_meco.corpus.outputs import check_local
from megatron_meco.corpus.progress import DocumentProgress
from megatron_meco.corpus.task_writer import with_eod
from megatron_meco.errors import DataError, FlagError
from megatron_meco.wording import JSON_HELP, counted, json_line

_BLOCK = 1 << 20
_REBUILD = "Prepare the corpus again."


@dataclass
class Check:
    """One check.

    Attributes:
        name: What was checked.
        told: What was found.
        is_right: Whether it is as it should be.
    """

    name: str
    told: str
    is_right: bool = True


def verify(prefix: Path, eod: int | None = None) -> Iterator[Check]:
    """Check a corpus.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.
        eod: The end-of-document id; None: that of `PREFIX.prepare.json`.

    Yields:
        The checks.

    Raises:
        DataError: The files cannot be opened as a corpus.
    """
    index = open_index(prefix)
    manifest = read_manifest(prefix)
    if index.broken:
        yield Check("index", index.broken, False)
        return
    documents, sequences = index.num_documents, len(index.lengths)
    told = f"{counted(documents, 'document')} of {counted(sequences, 'sequence')}"
    yield Check("index", f"{told}, {index.tokens.dtype.name}")
    settings = manifest.get("tokenizer", {})
    yield from _tokens(index, settings.get("eod") if eod is None else eod, settings)
    if metadata_path(prefix).is_file():
        check_row_count(prefix, index.num_documents)
        fields = ", ".join(open_metadata(prefix).column_names)
        yield Check("metadata", f"one row per document: {fields}")
    else:
        # `exists`: a pipe also counts; opening it would block forever.
        is_missing = bool(manifest.get("metadata_fields")) or metadata_path(prefix).exists()
        yield Check("metadata", "no file", not is_missing)
    if not manifest:
        yield Check("manifest", "none: counts and checksums cannot be compared")
        return
    found = {"documents": index.num_documents, "tokens": len(index.tokens)}
    wrong = [
        f"{n:,} {key}, not {manifest[key]:,}" for key, n in found.items() if n != manifest[key]
    ]
    told = f"{counted(index.num_documents, 'document')}, {counted(len(index.tokens), 'token')}"
    told = "; ".join(wrong) or told
    yield Check("counts", told, not wrong)
    for suffix, checksum in manifest["crc32"].items():
        path = Path(f"{prefix}{suffix}")
        actual = checksum_of(path) if path.is_file() else "no file"
        is_right = actual == checksum
        yield Check(
            f"CRC-32 {suffix}", actual if is_right else f"{actual}, not {checksum}", is_right
        )


def _tokens(index: CorpusIndex, eod: int | None, settings: dict[str, Any]) -> Iterator[Check]:
    smallest, largest, num_eod = 0, -1, 0
    for begin in range(0, len(index.tokens), _BLOCK):
        block = index.tokens[begin : begin + _BLOCK]
        smallest, largest = min(smallest, int(block.min())), max(largest, int(block.max()))
        num_eod += int((block == eod).sum()) if eod is not None else 0
    vocab_size = settings.get("vocab_size")
    if vocab_size is not None:
        told = f"largest id {largest:,}, vocabulary of {vocab_size:,}"
        if smallest < 0:
            told = f"smallest id {smallest:,}, {told}"
        yield Check("vocabulary", told, smallest >= 0 and largest < vocab_size)
    if eod is None:
        yield Check("EOD", "not known: name it with --eod")
        return
    without = 0
    for first in range(0, index.num_documents, _BLOCK):
        last = min(first + _BLOCK, index.num_documents)
        bounds = index.bounds(first, last)
        ends = bounds[1:][np.diff(bounds) > 0] - 1
        without += (last - first) - int((index.tokens[ends] == eod).sum())
    inside = num_eod - (index.num_documents - without)
    if without:
        verb = "does not end" if without == 1 else "do not end"
        yield Check("EOD", f"{counted(without, 'document')} {verb} in {eod}", False)
    elif inside:
        yield Check("EOD", f"{inside:,} more of {eod} inside documents", False)
    else:
        yield Check("EOD", f"{eod} ends every document and is in none")


def verify_against(
    prefix: Path, inputs: list[str], encoder: str = "auto", *, trust_remote_code: bool = False
) -> Check:
    """Tokenise the original files again and compare.

    Args:
        prefix: A corpus that `meco prepare` made.
        inputs: The files that it was made of.
        encoder: As `meco prepare --encoder`.
        trust_remote_code: Whether code that comes with the tokenizer may run.

    Raises:
        DataError: Names the first document that differs.
        FlagError: The corpus has no manifest, or the tokenizer cannot be loaded.
    """
    manifest = read_manifest(prefix)
    if not manifest:
        raise FlagError(
            f"no {prefix}.prepare.json, which names tokenizer and fields",
            where="--against",
            remedy="Only a corpus that `meco prepare` made can be compared.",
        )
    if "text_field" not in manifest:
        raise FlagError(
            "the corpus was imported as token ids: there is no text to compare it with",
            where="--against",
            remedy="Leave it out; the rest of `meco verify` holds for such a corpus as well.",
        )
    index = check_index(prefix)
    settings = manifest["tokenizer"]
    extra = _tokenizer_extra(prefix, settings, trust_remote_code)
    chosen = build_encoder(settings["type"], settings["model"], extra, encoder=encoder)
    document_encoder = DocumentEncoder(encoder_of(chosen), manifest.get("sentences"))
    comparison = _Comparison(index, prefix, manifest["metadata_fields"], document_encoder, chosen)
    files = find_files(inputs, prefix)
    text_bytes = 0
    with DocumentProgress("verify", index.num_documents) as progress:
        for batch in read_batches(files, manifest["text_field"], manifest["metadata_fields"]):
            comparison.compare(batch)
            text_bytes += text_bytes_of(batch)
            progress.update(comparison.num_documents, comparison.num_documents, text_bytes)
    if comparison.num_documents != index.num_documents:
        raise DataError(
            f"the files give {counted(comparison.num_documents, 'document')}, the corpus has "
            f"{index.num_documents:,}",
            where=str(prefix),
            remedy=_REBUILD,
        )
    is_one = index.num_documents == 1
    equal = f"{counted(index.num_documents, 'document')} {'is' if is_one else 'are'} equal"
    return Check("against the files", equal)


def _tokenizer_extra(prefix: Path, settings: dict[str, Any], trust: bool) -> dict[str, Any]:
    extra = dict(settings.get("extra", {}))
    # The writer of the corpus may have trusted that code; this user has not said so.
    if extra.pop("trust_remote_code", False) and not trust:
        raise FlagError(
            f"{prefix}.prepare.json names a tokenizer that brings code of its own",
            where="--against",
            remedy="Add --trust-remote-code if you trust that code.",
        )
    return extra | {"trust_remote_code": True} if trust else extra


@dataclass
class _Comparison:
    """Compares documents with those of a corpus, from the first one on."""

    index: CorpusIndex
    prefix: Path
    fields: list[str]
    encoder: DocumentEncoder
    chosen: dict[str, Any]
    num_documents: int = 0

    def __post_init__(self) -> None:
        self._table = None
        if self.fields:
            check_row_count(self.prefix, self.index.num_documents)
            self._table = open_metadata(self.prefix)
            if missing := sorted(set(self.fields) - set(self._table.column_names)):
                raise DataError(
                    f"no field {missing[0]!r}, which {manifest_path(self.prefix).name} names",
                    where=str(metadata_path(self.prefix)),
                    remedy=_REBUILD,
                )

    def compare(self, batch: list[Document]) -> None:
        """Compare the next documents."""
        encoded = self.encoder.encode([document.text for document in batch])
        lengths = encoded.lengths
        batch = [d for d, n in zip(batch, lengths.tolist(), strict=True) if n > 0]
        lengths = lengths[lengths > 0]
        begin = self.num_documents
        end = min(begin + len(batch), self.index.num_documents)
        tokens = with_eod(encoded.ids, lengths, self.chosen["eod"], self.index.tokens.dtype)
        bounds = self.index.bounds(begin, end)
        expected = np.concatenate([[0], np.cumsum(lengths + 1)])
        stored = self.index.tokens[bounds[0] : bounds[-1]]
        is_equal = end - begin == len(batch) and np.array_equal(bounds - bounds[0], expected)
        if not is_equal or not np.array_equal(stored, tokens):
            for i in range(end - begin):
                one = self.index.tokens[bounds[i] : bounds[i + 1]]
                if not np.array_equal(one, tokens[expected[i] : expected[i + 1]]):
                    raise self._differs(batch[i], begin + i, "other tokens")
            raise self._differs(batch[end - begin], end, "no such document")
        self._compare_sequences(batch, encoded, begin)
        if self._table is not None:
            rows = self._table.slice(begin, end - begin)
            for name, values in zip(self.fields, metadata_columns(batch, self.fields), strict=True):
                kept = rows[name].to_pylist()
                for i, (one, other) in enumerate(zip(kept, values, strict=True)):
                    if one != other:
                        raise self._differs(batch[i], begin + i, f"{name!r} is {one!r}")
        self.num_documents = end

    def _compare_sequences(
        self, batch: list[Document], encoded: EncodedDocuments, begin: int
    ) -> None:
        first = self.index.first_sequences[begin : begin + len(batch) + 1]
        stored = self.index.lengths[first[0] : first[-1]]
        counts = encoded.num_sequences[encoded.num_sequences > 0]
        if not np.array_equal(np.diff(first), counts):
            i = int(np.flatnonzero(np.diff(first) != counts)[0])
            raise self._differs(batch[i], begin + i, "another number of sequences")
        is_other = stored != encoded.sequence_lengths_with_eod()
        if is_other.any():
            i = int(np.searchsorted(np.cumsum(counts), np.argmax(is_other), side="right"))
            raise self._differs(batch[i], begin + i, "other sentences")

    def _differs(self, document: Document, number: int, what: str) -> DataError:
        return DataError(
            f"document {number:,} differs from {line_of(document)}: {what}",
            where=str(self.prefix),
            remedy="Give the files in the order in which they were prepared, or prepare again.",
        )


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco verify` to its parser."""
    parser.add_argument("prefix", metavar="PREFIX", help="as in --data-path")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="FILES",
        help="what the corpus was made of: tokenise again and compare",
    )
    parser.add_argument("--encoder", default="auto", choices=("auto", "gigatoken", "huggingface"))
    parser.add_argument("--eod", type=int, help="default: what PREFIX.prepare.json says")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="with --against: run the code that the corpus's tokenizer brings",
    )
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


def run_verify(args: argparse.Namespace) -> int:
    """Run `meco verify`; returns the exit status, 1 if something is wrong."""
    check_local(args.prefix, "PREFIX")
    prefix = Path(args.prefix)
    if args.eod is not None and not 0 <= args.eod < 1 << 31:
        raise FlagError(f"no token id: {args.eod}", where="--eod", remedy="Name the id of the EOD.")
    checks = []
    for check in _checks(prefix, args):
        checks.append(check)
        if not args.json:
            _print(check)
    is_right = all(check.is_right for check in checks)
    if args.json:
        print(json_line({"is_right": is_right, "checks": [asdict(check) for check in checks]}))
    return 0 if is_right else 1


def _checks(prefix: Path, args: argparse.Namespace) -> Iterator[Check]:
    yield from verify(prefix, args.eod)
    if args.against:
        yield verify_against(
            prefix, args.against, args.encoder, trust_remote_code=args.trust_remote_code
        )


def _print(check: Check) -> None:
    print(f"{'ok   ' if check.is_right else 'WRONG'}  {check.name}: {check.told}", flush=True)
