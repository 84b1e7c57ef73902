"""The command line of `meco prepare`: its flags, and the summary that it prints."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_meco.corpus.executors import parse_options
from megatron_meco.corpus.outputs import check_prefix
from megatron_meco.corpus.prepare import EXECUTORS, PrepareConfig, PrepareReport, prepare
from megatron_meco.corpus.records import Rejected
from megatron_meco.corpus.sentences import SENTENCE_LANGUAGES
from megatron_meco.corpus.tokenizer import TOKENIZER_TYPES
from megatron_meco.corpus.work_folder import ENCODERS
from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.wording import counted

_EXAMPLE = """example:
  meco prepare pages-*.jsonl.gz --output data/corpus \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model llama3/ --metadata-fields url,topic
  meco prepare s3://bucket/crawl/ --output /shared/corpus --executor slurm --workers 500 \\
      --executor-option time=10:00:00 --executor-option partition=cpu \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model llama3/
"""


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `meco prepare` to its parser."""
    parser.description = "Turn raw documents with metadata into Megatron files."
    parser.epilog = _EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = functools.partial(parser.add_argument)
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="file, folder or pattern; JSONL (plain, .gz, .zst), .parquet, .arrow, .csv, "
        ".warc.wet.gz; local or a URL such as s3://bucket/folder, hf://datasets/org/name",
    )
    add("--output", required=True, metavar="PREFIX", help="prefix of the files written")
    add("--tokenizer-type", required=True, metavar="T", help=f"one of {', '.join(TOKENIZER_TYPES)}")
    add("--tokenizer-model", metavar="M", help="folder or file of the tokenizer")
    add("--text-field", default="text", metavar="NAME", help="default: %(default)s")
    add("--metadata-fields", default="url", metavar="A,B.C", help="default: %(default)s")
    add(
        "--split-sentences",
        action="store_true",
        help="store each document as one sequence per sentence, so that packing `split` and "
        "`best-fit` cut between sentences",
    )
    add(
        "--sentence-language",
        metavar="L",
        help=f"with --split-sentences: {', '.join(sorted(SENTENCE_LANGUAGES))}; default: english",
    )
    add("--encoder", choices=ENCODERS, default="auto", help="default: %(default)s")
    add("--executor", choices=EXECUTORS, default="local", help="default: %(default)s")
    add(
        "--executor-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of datatrove's Slurm or Ray executor; may be repeated",
    )
    add("--workers", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    add("--strict", action="store_true", help="stop at the first line that is no document")
    add("--overwrite", action="store_true", help="replace a corpus that is already there")
    add("--json", action="store_true", help="print one JSON object instead of a table")
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
                output=check_prefix(args.output),
                tokenizer_type=args.tokenizer_type,
                tokenizer_model=args.tokenizer_model,
                tokenizer_extra={name: v for name, v in settings.items() if v is not None},
                text_field=args.text_field,
                metadata_fields=fields if args.metadata_fields else (),
                sentence_language=_sentence_language(args),
                encoder=args.encoder,
                executor=args.executor,
                executor_options=parse_options(args.executor_option),
                workers=args.workers,
                strict=args.strict,
                overwrite=args.overwrite,
            )
        )
    except MeCoError as error:
        print(f"meco prepare: {error}", file=sys.stderr)
        return 1
    if args.json:
        # Not `asdict` of the whole, which breaks a Counter.
        print(json.dumps(vars(report), default=_plain))
    else:
        _print_summary(report, Path(args.output))
    return 0


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Rejected) else str(value)


def _sentence_language(args: argparse.Namespace) -> str | None:
    if args.sentence_language is not None and not args.split_sentences:
        raise FlagError(
            "has no effect without --split-sentences",
            where="--sentence-language",
            remedy="Add --split-sentences, or leave it out.",
        )
    return (args.sentence_language or "english") if args.split_sentences else None


def _print_summary(report: PrepareReport, output: Path) -> None:
    if report.job:
        print(f"submitted; job {report.job} joins the tasks and writes {output}.idx last")
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("documents", f"{report.documents:,}")
    table.add_row("tokens", f"{report.tokens:,}")
    table.add_row("tokens/document", f"{report.median_tokens:,.0f} (median, EOD included)")
    if report.sequences > report.documents:
        table.add_row("sequences", f"{report.sequences:,} (sentences)")
    table.add_row("text", f"{report.text_bytes / 1e6:,.1f} MB")
    table.add_row("EOD", f"{report.eod} {report.eod_text!r}")
    for name, count in report.missing_metadata.items():
        share = 100 * count / report.documents
        table.add_row(f"without {name!r}", f"{counted(count, 'document')} ({share:.1f} %)")
    for reason, count in sorted(report.rejected.items()):
        table.add_row("rejected", f"{counted(count, 'line')}: {reason}")
    for path in report.files:
        table.add_row("written", f"{path} ({path.stat().st_size / 1e6:,.1f} MB)")
    Console(highlight=False, markup=False).print(table)
    for name, count in report.missing_metadata.items():
        if count == report.documents:
            print(f"warning: no document has the field {name!r}", file=sys.stderr)
