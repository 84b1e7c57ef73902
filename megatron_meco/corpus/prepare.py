"""`meco prepare`: JSONL with text and metadata to files that Megatron trains from.

Each line becomes one document of text tokens and EOD, and one row of metadata; nothing of the
metadata is in the tokens, so templates can change without preparing again. Chunks of lines go to
worker processes and come back in order: the output is the same for any number of workers, and at
most four chunks per worker are in flight, whatever the size of the input. The tokenizer is what it
costs. Given up for now: continuing after a kill, and formats other than JSONL.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_meco import __version__
from megatron_meco.corpus.encoding import (
    ChunkEncoder,
    EncodedChunk,
    Rejected,
    encode_in_worker,
    start_worker,
)
from megatron_meco.corpus.progress import DocumentProgress
from megatron_meco.corpus.readers import LineChunk, read_chunks
from megatron_meco.corpus.tokenizer import (
    TOKENIZER_TYPES,
    build_tokenizer,
    resolve_eod,
    text_encoder,
)
from megatron_meco.corpus.writer import CorpusWriter, output_paths
from megatron_meco.errors import DataError, FlagError, MeCoError

_CHUNKS_PER_WORKER = 4
_EXAMPLE = """example:
  meco prepare pages-*.jsonl.gz --output data/corpus \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model llama3/ --metadata-fields url,topic
"""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to prepare, and how."""

    inputs: tuple[Path, ...]
    """JSONL files (plain, .gz, .zst), in the order of their documents."""

    output: Path
    """The prefix of the files to write, as in Megatron's `--data-path`."""

    tokenizer_type: str
    """Megatron's `--tokenizer-type`."""

    tokenizer_model: str | None = None
    """Megatron's `--tokenizer-model`."""

    tokenizer_extra: dict[str, Any] = field(default_factory=dict)
    """Further tokenizer settings under Megatron's names."""

    text_field: str = "text"
    """Where a line's text is; dots lead into nested objects."""

    metadata_fields: tuple[str, ...] = ("url",)
    """The fields to keep as metadata; none: no metadata file."""

    workers: int = 1
    """Processes that tokenise; 1 works in this process."""

    strict: bool = False
    """Whether the first line that is no document ends the preparation."""

    overwrite: bool = False
    """Whether to replace a corpus that is already there."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass
class PrepareReport:
    """What came out of a preparation."""

    documents: int = 0
    """Documents written."""

    tokens: int = 0
    """Tokens written, EODs included."""

    text_bytes: int = 0
    """Bytes of their text."""

    median_tokens: float = 0.0
    """Median tokens per document, EOD included."""

    rejected: Counter[str] = field(default_factory=Counter)
    """Rejected lines by reason."""

    first_rejected: Rejected | None = None
    """The first of them."""

    missing_metadata: Counter[str] = field(default_factory=Counter)
    """Documents without a value, by metadata field."""

    eod: int = -1
    """The end-of-document id."""

    eod_text: str = ""
    """The end-of-document token."""

    files: list[Path] = field(default_factory=list)
    """The files written."""

    def count(self, chunk: EncodedChunk, fields: Sequence[str]) -> None:
        """Add a chunk."""
        self.documents += len(chunk.lengths)
        self.tokens += len(chunk.tokens)
        self.text_bytes += chunk.text_bytes
        self.rejected.update(rejected.reason for rejected in chunk.rejected)
        if self.first_rejected is None and chunk.rejected:
            self.first_rejected = chunk.rejected[0]
        for name, values in zip(fields, chunk.metadata, strict=True):
            self.missing_metadata[name] += values.count(None)


def prepare(config: PrepareConfig) -> PrepareReport:
    """Write a corpus.

    Args:
        config: What to prepare. With more than one worker the calling script needs the usual
            `if __name__ == "__main__":`, because workers start from a fresh import.

    Returns:
        Counts and files.

    Raises:
        MeCoError: Something cannot be read, understood or written; no output is left.
    """
    print("loading the tokenizer ...", file=sys.stderr, flush=True)
    tokenizer = build_tokenizer(
        config.tokenizer_type, config.tokenizer_model, **config.tokenizer_extra
    )
    from megatron.core.datasets.indexed_dataset import DType

    report = PrepareReport(eod=resolve_eod(tokenizer))
    report.eod_text = str(tokenizer.detokenize([report.eod]))
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    encoder = ChunkEncoder(
        encoder=text_encoder(tokenizer),
        eod=report.eod,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype.__name__,
        text_field=config.text_field,
        metadata_fields=config.metadata_fields,
    )
    with CorpusWriter(config.output, dtype, list(config.metadata_fields)) as writer:
        _write_documents(config, encoder, writer, report)
        report.median_tokens = float(np.median(writer.document_lengths))
        report.files = writer.publish(_manifest(config, encoder, report))
    return report


def _write_documents(
    config: PrepareConfig, encoder: ChunkEncoder, writer: CorpusWriter, report: PrepareReport
) -> None:
    total = sum(path.stat().st_size for path in config.inputs)
    with DocumentProgress("prepare", total) as progress:
        for done, chunk in _encoded_chunks(config, encoder):
            if config.strict and chunk.rejected:
                first = chunk.rejected[0]
                raise DataError(
                    first.reason,
                    where=f"{first.path}, line {first.line}",
                    remedy="Mend the line, or leave --strict out to set such lines aside.",
                )
            writer.append(chunk)
            report.count(chunk, config.metadata_fields)
            progress.update(done, report.documents, report.text_bytes)
    if report.documents == 0:
        raise _no_documents(config, report)


def _no_documents(config: PrepareConfig, report: PrepareReport) -> DataError:
    first = report.first_rejected
    if first is None:
        what = "no documents: every line is blank"
        where = ", ".join(str(path) for path in config.inputs)
    else:
        what = f"no documents: all {report.rejected.total():,} lines rejected, here: {first.reason}"
        where = f"{first.path}, line {first.line}"
    return DataError(what, where=where, remedy="Check the file and --text-field.")


def _encoded_chunks(
    config: PrepareConfig, encoder: ChunkEncoder
) -> Iterator[tuple[int, EncodedChunk]]:
    """Yield `(bytes of all inputs done, encoded chunk)` in the order of the input."""
    if config.workers == 1:
        yield from ((done, encoder.encode(chunk)) for done, chunk in _line_chunks(config.inputs))
        return
    # Spawned, not forked: this process runs the threads of torch and pyarrow by now.
    pool = ProcessPoolExecutor(
        config.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(encoder,),
    )
    pending: deque[tuple[int, Future[EncodedChunk]]] = deque()
    try:
        for done, chunk in _line_chunks(config.inputs):
            pending.append((done, pool.submit(encode_in_worker, chunk)))
            if len(pending) >= _CHUNKS_PER_WORKER * config.workers:
                yield _first_result(pending)
        while pending:
            yield _first_result(pending)
    except BrokenProcessPool:
        raise DataError(
            "a worker process died",
            where=f"--workers {config.workers}",
            remedy="Usually memory ran out: use fewer workers, or look for a huge document.",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _first_result(pending: deque[tuple[int, Future[EncodedChunk]]]) -> tuple[int, EncodedChunk]:
    done, future = pending.popleft()
    return done, future.result()


def _line_chunks(inputs: Sequence[Path]) -> Iterator[tuple[int, LineChunk]]:
    done = 0
    for path in inputs:
        for chunk in read_chunks(path):
            yield done + chunk.source_bytes, chunk
        done += path.stat().st_size


def _manifest(
    config: PrepareConfig, encoder: ChunkEncoder, report: PrepareReport
) -> dict[str, Any]:
    """Return what `PREFIX.prepare.json` says: nothing that differs between two equal runs."""
    return {
        "format": 1,
        "inputs": [{"path": str(p), "bytes": p.stat().st_size} for p in config.inputs],
        "text_field": config.text_field,
        "metadata_fields": list(config.metadata_fields),
        "tokenizer": {
            "type": config.tokenizer_type,
            "model": config.tokenizer_model,
            "extra": config.tokenizer_extra,
            "vocab_size": encoder.vocab_size,
            "eod": report.eod,
            "eod_text": report.eod_text,
        },
        "token_dtype": encoder.dtype,
        "documents": report.documents,
        "tokens": report.tokens,
        "text_bytes": report.text_bytes,
        "rejected": dict(sorted(report.rejected.items())),
        "missing_metadata": dict(report.missing_metadata),
        "versions": {
            "megatron-meco": __version__,
            "megatron-core": importlib.metadata.version("megatron-core"),
            "tokenizers": importlib.metadata.version("tokenizers"),
        },
    }


def _check(config: PrepareConfig) -> None:
    if config.workers < 1:
        raise FlagError(
            f"{config.workers} workers", where="--workers", remedy="Use a number above 0."
        )
    fields = config.metadata_fields
    if len(set(fields)) < len(fields) or not all(fields):
        raise FlagError(
            f"empty or repeated names in {','.join(fields)!r}",
            where="--metadata-fields",
            remedy="Name every field once, with commas between.",
        )
    if not config.output.name or config.output.is_dir():
        raise FlagError(
            f"{str(config.output)!r} is a folder",
            where="--output",
            remedy="Add the beginning of the file names, for example `data/corpus`.",
        )
    for path in config.inputs:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "no such file"
            raise DataError(what, where=str(path), remedy="Name existing JSONL files.")
    existing = [path for path in output_paths(config.output) if path.exists()]
    if existing and not config.overwrite:
        raise DataError(
            "already there", where=str(existing[0]), remedy="Add --overwrite to replace it."
        )


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `meco prepare` to its parser."""
    parser.description = "Turn JSONL with text and metadata into Megatron files."
    parser.epilog = _EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = functools.partial(parser.add_argument)
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="JSONL file: plain, .gz or .zst")
    add("--output", required=True, type=Path, metavar="PREFIX", help="prefix of the files written")
    add("--tokenizer-type", required=True, metavar="T", help=f"one of {', '.join(TOKENIZER_TYPES)}")
    add("--tokenizer-model", metavar="M", help="folder or file of the tokenizer")
    add("--text-field", default="text", metavar="NAME", help="default: %(default)s")
    add("--metadata-fields", default="url", metavar="A,B.C", help="default: %(default)s")
    add("--workers", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    add("--strict", action="store_true", help="stop at the first line that is no document")
    add("--overwrite", action="store_true", help="replace a corpus that is already there")
    group = parser.add_argument_group("tokenizer settings, as in Megatron")
    group.add_argument("--vocab-size", type=int)
    group.add_argument("--vocab-file")
    group.add_argument("--merge-file")
    group.add_argument("--tiktoken-pattern", choices=["v1", "v2"])
    group.add_argument("--tiktoken-num-special-tokens", type=int)
    group.add_argument("--trust-remote-code", action="store_true", default=None)
    names = [action.dest for action in group._group_actions]
    parser.set_defaults(tokenizer_setting_names=names)


def run_prepare(args: argparse.Namespace) -> int:
    """Run `meco prepare`.

    Args:
        args: The parsed flags of `add_prepare_arguments`.

    Returns:
        The exit status: 0, or 1 after a refusal (told on stderr).
    """
    settings = {name: getattr(args, name) for name in args.tokenizer_setting_names}
    fields = tuple(name.strip() for name in args.metadata_fields.split(","))
    try:
        report = prepare(
            PrepareConfig(
                inputs=tuple(args.inputs),
                output=args.output,
                tokenizer_type=args.tokenizer_type,
                tokenizer_model=args.tokenizer_model,
                tokenizer_extra={name: v for name, v in settings.items() if v is not None},
                text_field=args.text_field,
                metadata_fields=fields if args.metadata_fields else (),
                workers=args.workers,
                strict=args.strict,
                overwrite=args.overwrite,
            )
        )
    except MeCoError as error:
        print(f"meco prepare: {error}", file=sys.stderr)
        return 1
    _print_summary(report)
    return 0


def _print_summary(report: PrepareReport) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("documents", f"{report.documents:,}")
    table.add_row("tokens", f"{report.tokens:,}")
    table.add_row("tokens/document", f"{report.median_tokens:,.0f} (median, EOD included)")
    table.add_row("text", f"{report.text_bytes / 1e6:,.1f} MB")
    table.add_row("EOD", f"{report.eod} {report.eod_text!r}")
    for name, count in report.missing_metadata.items():
        share = 100 * count / report.documents
        table.add_row(f"without {name!r}", f"{count:,} documents ({share:.1f} %)")
    for reason, count in sorted(report.rejected.items()):
        table.add_row("rejected", f"{count:,} {'line' if count == 1 else 'lines'}: {reason}")
    for path in report.files:
        table.add_row("written", f"{path} ({path.stat().st_size / 1e6:,.1f} MB)")
    Console(highlight=False, markup=False).print(table)
    for name, count in report.missing_metadata.items():
        if count == report.documents:
            print(f"warning: no document has the field {name!r}", file=sys.stderr)
