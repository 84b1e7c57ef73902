"""`meco attach`: metadata for existing `.bin/.idx` files; the tokens are not touched.

Three sources of rows:

- the original files, in the order of the documents. The counts must agree, and a sample of the
  documents is tokenised again and compared with the stored tokens;
- a Parquet, Arrow or CSV table with one row per document, where only the count can be checked;
- tables whose fields are added to existing metadata by a key (`join`).

The metadata file appears when everything has been checked. Costs reading the input, and the
tokenizer for the sample.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from datatrove.data import Document

from megatron_meco.corpus.documents import (
    line_of,
    metadata_columns,
    metadata_of,
    read_batches,
    text_bytes_of,
)
from megatron_meco.corpus.index_file import CorpusIndex, open_index
from megatron_meco.corpus.input_bytes import Part
from megatron_meco.corpus.input_files import SourceFile, check_unchanged, find_files
from megatron_meco.corpus.join import DUPLICATES, Duplicates, JoinCounts, join_metadata
from megatron_meco.corpus.metadata import check_row_count, metadata_path, replace_metadata
from megatron_meco.corpus.outputs import (
    check_fields,
    check_local,
    check_no_input,
    is_metadata_file,
)
from megatron_meco.corpus.progress import DocumentProgress
from megatron_meco.corpus.records import BadRecord, column_names, read_records
from megatron_meco.corpus.tokenizer import (
    TOKENIZER_TYPES,
    TextEncoder,
    build_tokenizer,
    resolve_bos,
    resolve_eod,
    text_encoder,
)
from megatron_meco.errors import DataError, FlagError
from megatron_meco.wording import JSON_HELP, counted, json_line

_ROWS = 10_000
_TABLES = (".parquet", ".arrow", ".csv")
# Values that pyarrow's CSV reader takes for null.
_NULLS = frozenset(
    [
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "n/a",
        "nan",
        "null",
    ]
)
_ORDER = "Give exactly the files that the corpus was made of, in the same order."


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What the stored documents are compared with.

    Attributes:
        encoder: Texts to ids, without BOS and EOD.
        bos: May stand before a stored document.
        eod: May stand behind it.
    """

    encoder: TextEncoder
    bos: int | None
    eod: int

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
        text_field: Field of the text.
        num_verified: Approximate number of documents to tokenise again.
        overwrite: Whether to replace existing metadata.

    Returns:
        The numbers of documents and of verified documents.

    Raises:
        DataError: The corpus was not made of these files.
    """
    index = _open(prefix, overwrite)
    files = find_files(inputs, prefix)
    check_no_input([metadata_path(prefix)], [file.path for file in files])
    step = max(index.num_documents // num_verified, 1)
    verified = text_bytes = 0
    with replace_metadata(prefix, fields) as writer, _progress(index) as progress:
        for batch in read_batches(files, text_field, fields):
            begin = writer.num_rows
            if begin + len(batch) > index.num_documents:
                raise _other_count("more than ", index.num_documents, index, prefix)
            for number in range(-(-begin // step) * step, begin + len(batch), step):
                _verify(batch[number - begin], number, index, tokenizer, prefix)
                verified += 1
            writer.append(metadata_columns(batch, fields))
            text_bytes += text_bytes_of(batch)
            progress.update(writer.num_rows, writer.num_rows, text_bytes)
        if writer.num_rows != index.num_documents:
            raise _other_count("", writer.num_rows, index, prefix)
    return index.num_documents, verified


def attach_from_table(
    prefix: Path, tables: Sequence[str | Path], fields: list[str], *, overwrite: bool = False
) -> int:
    """Write the metadata of a corpus from tables with one row per document.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.
        tables: Parquet, Arrow or CSV files, in order.
        fields: The columns to keep; dots lead into nested ones.
        overwrite: Whether to replace existing metadata.

    Returns:
        The number of documents.

    Raises:
        DataError: A table cannot be read or lacks a column, or the number of rows differs.
    """
    index = _open(prefix, overwrite)
    check_no_input([metadata_path(prefix)], tables)
    with replace_metadata(prefix, fields) as writer, _progress(index) as progress:
        for table in find_files(tables):
            for rows in _table_rows(table, fields):
                writer.append([[metadata_of(row, name) for row in rows] for name in fields])
                progress.update(writer.num_rows, writer.num_rows)
        if writer.num_rows != index.num_documents:
            raise _other_count("", writer.num_rows, index, prefix)
    return index.num_documents


def attach_by_key(
    prefix: Path,
    tables: Sequence[str | Path],
    key: str,
    fields: list[str] | None,
    *,
    duplicates: Duplicates = "refuse",
    overwrite: bool = False,
) -> JoinCounts:
    """Add fields of tables to the metadata of a corpus, by a key.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.
        tables: Parquet, Arrow or CSV files.
        key: A field of the metadata and a column of the tables.
        fields: The columns to add; None: all of the first table but the key.
        duplicates: Which of several rows with the same key counts.
        overwrite: Whether to replace existing fields.

    Raises:
        DataError: A table or the metadata cannot be read, or a key occurs twice.
        FlagError: A field exists already.
    """
    index = _open_index(prefix)
    _check_ours(prefix)
    check_row_count(prefix, index.num_documents)
    check_no_input([metadata_path(prefix)], tables)
    files = find_files(tables)
    if fields is None:
        fields = [name for name in column_names(_whole(files[0])) if name != key]
        check_fields(fields)
    rows = ((file.path, _table_rows(file, [key, *fields])) for file in files)
    return join_metadata(prefix, rows, key, fields, duplicates=duplicates, overwrite=overwrite)


def _open_index(prefix: Path) -> CorpusIndex:
    index = open_index(prefix)
    if index.broken:
        raise DataError(
            index.broken, where=f"{prefix}.idx", remedy="Copy or prepare the corpus again."
        )
    return index


def _check_ours(prefix: Path) -> None:
    path = metadata_path(prefix)
    if os.path.lexists(path) and not is_metadata_file(path):
        raise DataError(
            "is not metadata that this package wrote, and is not replaced",
            where=str(path),
            remedy="Move or remove it yourself.",
        )


def _open(prefix: Path, overwrite: bool) -> CorpusIndex:
    index = _open_index(prefix)
    path = metadata_path(prefix)
    if os.path.lexists(path) and not overwrite:
        raise DataError("already there", where=str(path), remedy="Add --overwrite to replace it.")
    if os.path.lexists(path) and not is_metadata_file(path):
        raise DataError(
            "is not metadata that this package wrote; --overwrite replaces nothing else",
            where=str(path),
            remedy="Move or remove it yourself.",
        )
    return index


def _progress(index: CorpusIndex) -> DocumentProgress:
    return DocumentProgress("attach", index.num_documents)


def _verify(
    document: Document, number: int, index: CorpusIndex, tokenizer: Tokenizer, prefix: Path
) -> None:
    begin, end = index.bounds(number, number + 1)
    if tokenizer.is_stored_as(document.text, index.tokens[begin:end]):
        return
    raise DataError(
        f"document {number:,} is not what the tokenizer makes of {line_of(document)}",
        where=str(prefix),
        remedy=f"{_ORDER} The tokenizer must be the one of the corpus.",
    )


def _other_count(more: str, found: int, index: CorpusIndex, prefix: Path) -> DataError:
    return DataError(
        f"{more}{counted(found, 'document')} in the input, {index.num_documents:,} in the corpus",
        where=str(prefix),
        remedy=_ORDER,
    )


def _table_rows(table: SourceFile, fields: list[str]) -> Iterator[list[dict[str, Any]]]:
    part = _whole(table)
    names = column_names(part)
    missing = sorted({f if f in names else f.partition(".")[0] for f in fields} - set(names))
    if missing:
        raise DataError(
            f"no column {missing[0]!r}; there are {', '.join(names)}",
            where=part.path,
            remedy="Name columns with --metadata-fields.",
        )
    rows: list[dict[str, Any]] = []
    for number, record, _ in read_records(part, fields, parquet_rows=_ROWS, newline=""):
        if isinstance(record, BadRecord):
            raise DataError(
                str(record),
                where=f"{part.path}, row {number:,}",
                remedy="Fix the row: each row belongs to a document.",
            )
        is_csv = part.format == "csv"
        values = cast(dict[str, Any], record)
        rows.append({k: None if is_csv and v in _NULLS else v for k, v in values.items()})
        if len(rows) == _ROWS:
            yield rows
            rows = []
    check_unchanged(part)
    yield rows


def _whole(table: SourceFile) -> Part:
    return Part(table.path, table.format, 0, table.num_bytes, True, table.stamp)


def add_attach_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco attach` to its parser."""
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="the corpus, as in --data-path")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--from", nargs="+", dest="inputs", metavar="INPUT", help="what the corpus was made of"
    )
    source.add_argument(
        "--table",
        nargs="+",
        metavar="FILE",
        help=f"{', '.join(_TABLES)} with one row per document",
    )
    source.add_argument(
        "--join",
        nargs="+",
        metavar="FILE",
        help=f"{', '.join(_TABLES)} with a row for each --key, in any order: adds its fields to "
        "the metadata that is there",
    )
    add(
        "--metadata-fields",
        metavar="A,B.C",
        help="default: url; with --join all columns of the first table but the key",
    )
    add("--key", metavar="NAME", help="with --join: a field of both, such as id or url")
    add(
        "--duplicates",
        choices=DUPLICATES,
        default="refuse",
        help="with --join: which one of several rows with the same key counts; default: "
        "%(default)s",
    )
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
    add("--json", action="store_true", help=JSON_HELP)


def run_attach(args: argparse.Namespace) -> int:
    """Run `meco attach`; returns the exit status, 0."""
    check_local(args.prefix, "PREFIX")
    prefix = Path(args.prefix)
    given = args.metadata_fields if args.join else args.metadata_fields or "url"
    fields = [name.strip() for name in given.split(",")] if given is not None else []
    if given is not None:
        check_fields(fields)
    _check_join_flags(args)
    check_fields([args.text_field], "--text-field")
    if args.verify_documents < 1:
        raise FlagError(
            f"{args.verify_documents} documents",
            where="--verify-documents",
            remedy="Use a number above 0.",
        )
    _check_tables("--table", args.table or ())
    _check_tables("--join", args.join or ())
    report: dict[str, Any] = {}
    if args.join:
        counts = attach_by_key(
            prefix,
            args.join,
            args.key,
            fields or None,
            duplicates=args.duplicates,
            overwrite=args.overwrite,
        )
        count, verified = counts.documents, str(counts)
        report = asdict(counts)
    elif args.table:
        count = attach_from_table(prefix, args.table, fields, overwrite=args.overwrite)
        verified = "their order cannot be checked"
    else:
        count, number = attach_from_files(
            prefix,
            args.inputs,
            fields,
            _tokenizer(args),
            text_field=args.text_field,
            num_verified=args.verify_documents,
            overwrite=args.overwrite,
        )
        verified = f"{number:,} of them tokenised again and equal"
        report = {"verified": number}
    if args.json:
        print(json_line({"documents": count, **report, "files": [metadata_path(prefix)]}))
        return 0
    print(f"written: {metadata_path(prefix)}, {counted(count, 'row')} ({verified})")
    return 0


def _check_join_flags(args: argparse.Namespace) -> None:
    if args.join and not args.key:
        raise FlagError(
            "is needed to join", where="--key", remedy="Name a field of both, such as id or url."
        )
    for flag, given in (("--key", args.key), ("--duplicates", args.duplicates != "refuse")):
        if given and not args.join:
            raise FlagError("only valid with --join", where=flag, remedy="Leave it out.")


def _check_tables(flag: str, paths: Sequence[str]) -> None:
    for path in paths:
        check_local(path, flag)
        what = "" if path.endswith(_TABLES) else "not a kind of table known here"
        if not os.path.isfile(path):
            what = "not a plain file" if os.path.exists(path) else "no such file"
        if what:
            remedy = f"Give files that end in {', '.join(_TABLES)}."
            raise DataError(what, where=path, remedy=remedy)


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
