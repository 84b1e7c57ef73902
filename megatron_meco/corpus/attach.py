"""`meco attach`: metadata for `.bin/.idx` files that exist already; the tokens are not touched.

The rows come from the original files, in whose order the documents are: their number must be the
same, and documents all over the corpus are tokenised again and must give the stored tokens. Or they
come from a Parquet, Arrow or CSV table with one row per document, where only the number can be
checked. The metadata file appears when everything has been checked. Costs reading the input, and
the tokenizer for the sample alone. Given up: joining on anything but the order.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datatrove.data import Document

from megatron_meco.corpus.documents import RejectedRecords, TaskReader, is_arrow_stream
from megatron_meco.corpus.index_file import CorpusIndex, broken_structure, open_index
from megatron_meco.corpus.metadata import MetadataWriter, metadata_path
from megatron_meco.corpus.progress import DocumentProgress
from megatron_meco.corpus.readers import count_lines
from megatron_meco.corpus.records import metadata_of
from megatron_meco.corpus.sources import find_files, plan_tasks
from megatron_meco.corpus.task_writer import batches, metadata_columns
from megatron_meco.corpus.tokenizer import (
    TOKENIZER_TYPES,
    TextEncoder,
    build_tokenizer,
    resolve_bos,
    resolve_eod,
    text_encoder,
)
from megatron_meco.errors import DataError, FlagError

_ROWS = 10_000
_TABLES = (".parquet", ".arrow", ".csv")
_ORDER = "Give exactly the files that the corpus was made of, in the same order."


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What the stored documents are compared with."""

    encoder: TextEncoder
    """Texts to ids, without BOS and EOD."""

    bos: int | None
    """May stand before a stored document."""

    eod: int
    """May stand behind it."""

    def is_stored_as(self, text: str, stored: np.ndarray[Any, Any]) -> bool:
        """Whether these tokens are this text, with or without BOS and EOD around it."""
        (ids,) = self.encoder.encode_batch([text])
        tokens = stored.tolist()
        if tokens[-1:] == [self.eod]:
            tokens.pop()
        return bool(tokens == ids or (tokens[:1] == [self.bos] and tokens[1:] == ids))


def attach_from_files(
    prefix: Path,
    inputs: list[str],
    fields: list[str],
    tokenizer: Tokenizer,
    *,
    text_field: str = "text",
    num_verified: int = 1000,
    overwrite: bool = False,
) -> tuple[int, int]:
    """Write the metadata of a corpus from the files that it was made of.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.
        inputs: Files, folders or patterns, as for `meco prepare`.
        fields: The fields to keep.
        tokenizer: The tokenizer of the corpus.
        text_field: Where a record's text is.
        num_verified: About how many documents to tokenise again.
        overwrite: Whether to replace metadata that is there.

    Returns:
        The numbers of documents and of verified ones.

    Raises:
        DataError: The files are not what the corpus was made of.
    """
    index = _open(prefix, overwrite)
    step = max(index.num_documents // max(num_verified, 1), 1)
    verified = 0
    with _metadata(prefix, fields) as writer, _progress(index) as progress:
        for batch in _document_batches(inputs, text_field):
            begin = writer.num_rows
            if begin + len(batch) > index.num_documents:
                raise _other_count("more than ", index.num_documents, index, prefix)
            for number in range(-(-begin // step) * step, begin + len(batch), step):
                _verify(batch[number - begin], number, index, tokenizer, prefix)
                verified += 1
            writer.append(metadata_columns(batch, fields))
            progress.update(writer.num_rows, writer.num_rows, 0)
        if writer.num_rows != index.num_documents:
            raise _other_count("", writer.num_rows, index, prefix)
    return index.num_documents, verified


def attach_from_table(
    prefix: Path, tables: list[Path], fields: list[str], *, overwrite: bool = False
) -> int:
    """Write the metadata of a corpus from tables with one row per document.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.
        tables: Parquet, Arrow or CSV files, one after the other.
        fields: The columns to keep; dots lead into nested ones.
        overwrite: Whether to replace metadata that is there.

    Returns:
        The number of documents.

    Raises:
        DataError: A table cannot be read, lacks a column, or the number of rows is another.
    """
    index = _open(prefix, overwrite)
    with _metadata(prefix, fields) as writer, _progress(index) as progress:
        for path in tables:
            for rows in _table_rows(path, fields):
                writer.append([[metadata_of(row, name) for row in rows] for name in fields])
                progress.update(writer.num_rows, writer.num_rows, 0)
        if writer.num_rows != index.num_documents:
            raise _other_count("", writer.num_rows, index, prefix)
    return index.num_documents


def _open(prefix: Path, overwrite: bool) -> CorpusIndex:
    index = open_index(prefix)
    broken = broken_structure(index)
    if broken:
        raise DataError(broken, where=f"{prefix}.idx", remedy="Copy or prepare the corpus again.")
    if metadata_path(prefix).exists() and not overwrite:
        raise DataError(
            "already there",
            where=str(metadata_path(prefix)),
            remedy="Add --overwrite to replace it.",
        )
    return index


def _metadata(prefix: Path, fields: list[str]) -> MetadataWriter:
    try:
        return MetadataWriter(prefix, fields)
    except OSError as error:
        raise DataError(
            f"cannot be written ({error.strerror or error})",
            where=str(metadata_path(prefix)),
            remedy="The metadata goes beside the corpus: its folder must allow that.",
        ) from None


def _progress(index: CorpusIndex) -> DocumentProgress:
    return DocumentProgress("attach", index.num_documents)


def _document_batches(inputs: list[str], text_field: str) -> Iterator[list[Document]]:
    tasks = plan_tasks(find_files(inputs))
    rejected = RejectedRecords()
    reader = TaskReader(tasks, text_field, rejected)
    for rank in range(len(tasks)):
        yield from batches(reader.run(rank=rank))
        rejected.reset()


def _verify(
    document: Document, number: int, index: CorpusIndex, tokenizer: Tokenizer, prefix: Path
) -> None:
    begin, end = index.bounds(number, number + 1)
    if tokenizer.is_stored_as(document.text, index.tokens[begin:end]):
        return
    path, line = getattr(document, "path", ""), getattr(document, "line", 0)
    line += count_lines(path, getattr(document, "begin", 0))
    raise DataError(
        f"document {number:,} is not what the tokenizer makes of {path}, line {line}",
        where=str(prefix),
        remedy=f"{_ORDER} The tokenizer must be the one of the corpus.",
    )


def _other_count(more: str, found: int, index: CorpusIndex, prefix: Path) -> DataError:
    return DataError(
        f"{more}{found:,} documents in the input, {index.num_documents:,} in the corpus",
        where=str(prefix),
        remedy=_ORDER,
    )


def _table_rows(path: Path, fields: list[str]) -> Iterator[list[dict[str, Any]]]:
    try:
        for batch in _record_batches(path):
            names = batch.schema.names
            columns = {f if f in names else f.split(".")[0] for f in fields}
            missing = sorted(columns - set(names))
            if missing:
                raise DataError(
                    f"no column {missing[0]!r}; there are {', '.join(names)}",
                    where=str(path),
                    remedy="Name columns with --metadata-fields.",
                )
            wanted = batch.select(sorted(columns))
            for begin in range(0, wanted.num_rows, _ROWS):
                yield wanted.slice(begin, _ROWS).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot be read to its end ({what})", where=str(path), remedy="Write it again."
        ) from None


def _record_batches(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        with pa.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_ROWS)
    elif path.suffix == ".csv":
        # As text: `007` is no number here.
        with path.open("rb") as file:
            names = pa.csv.open_csv(file).schema.names
        options = pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True
        )
        yield from pa.csv.open_csv(
            path,
            convert_options=options,
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        )
    elif is_arrow_stream(str(path)):
        with pa.memory_map(str(path)) as source:
            yield from pa.ipc.open_stream(source)
    else:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)


def add_attach_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco attach` to its parser."""
    add = parser.add_argument
    add("prefix", metavar="PREFIX", type=Path, help="the corpus, as in --data-path")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--from", nargs="+", dest="inputs", metavar="INPUT", help="what the corpus was made of"
    )
    source.add_argument(
        "--table",
        nargs="+",
        type=Path,
        metavar="FILE",
        help=f"{', '.join(_TABLES)} with one row per document",
    )
    add("--metadata-fields", default="url", metavar="A,B.C", help="default: %(default)s")
    add("--text-field", default="text", metavar="NAME", help="default: %(default)s")
    add("--tokenizer-type", metavar="T", help=f"with --from: one of {', '.join(TOKENIZER_TYPES)}")
    add("--tokenizer-model", metavar="M", help="folder or file of the tokenizer")
    add(
        "--verify-documents",
        type=int,
        default=1000,
        metavar="N",
        help="with --from: how many documents to tokenise again; default: %(default)s",
    )
    add("--overwrite", action="store_true", help="replace metadata that is there")


def run_attach(args: argparse.Namespace) -> int:
    """Run `meco attach`.

    Args:
        args: The parsed arguments of `add_attach_arguments`.

    Returns:
        The exit status, 0.

    Raises:
        MeCoError: The metadata cannot be attached; nothing has been written.
    """
    fields = [name.strip() for name in args.metadata_fields.split(",")]
    if len(set(fields)) < len(fields) or not all(fields):
        raise FlagError(
            f"empty or repeated names in {args.metadata_fields!r}",
            where="--metadata-fields",
            remedy="Name every field once, with commas between.",
        )
    if args.table:
        for path in args.table:
            if path.suffix not in _TABLES or not path.is_file():
                what = "no such file" if not path.is_file() else "not a kind of table known here"
                remedy = f"Give files that end in {', '.join(_TABLES)}."
                raise DataError(what, where=str(path), remedy=remedy)
        count = attach_from_table(args.prefix, args.table, fields, overwrite=args.overwrite)
        verified = "their order cannot be checked"
    else:
        count, number = attach_from_files(
            args.prefix,
            args.inputs,
            fields,
            _tokenizer(args),
            text_field=args.text_field,
            num_verified=args.verify_documents,
            overwrite=args.overwrite,
        )
        verified = f"{number:,} of them tokenised again and equal"
    print(f"written: {metadata_path(args.prefix)}, {count:,} rows ({verified})")
    return 0


def _tokenizer(args: argparse.Namespace) -> Tokenizer:
    if args.tokenizer_type is None:
        raise FlagError(
            "needed to compare documents with the corpus",
            where="--tokenizer-type",
            remedy="Name the tokenizer of the corpus, or give a --table.",
        )
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model)
    return Tokenizer(
        encoder=text_encoder(tokenizer), bos=resolve_bos(tokenizer), eod=resolve_eod(tokenizer)
    )
