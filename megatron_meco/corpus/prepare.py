"""`meco prepare`: raw documents with metadata to files that Megatron trains from.

A datatrove pipeline of two steps: a reader that accounts for every record, and a writer of tokens
and metadata. The input is cut into tasks, independently of the workers, and the output of the tasks
is joined in order, so it is the same for any number of workers, on one machine or on many. Each
document becomes text tokens and EOD, and one row of metadata. The tokens hold no metadata, so
templates can change without preparing again. Costs the tokenizer, and the disk space of the corpus
twice until it is complete. A killed task starts again from its beginning.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_meco import __version__
from megatron_meco.corpus.documents import Rejected, RejectedRecords, TaskReader
from megatron_meco.corpus.encoder import ENCODERS, build_encoder, encoder_digest
from megatron_meco.corpus.executors import (
    LocalExecutor,
    check_slurm_options,
    check_workers,
    parse_options,
    run_on_ray,
    run_with_progress,
    submit_to_slurm,
)
from megatron_meco.corpus.input_bytes import Part
from megatron_meco.corpus.input_files import SourceFile, find_files, plan_tasks, tell_repeated
from megatron_meco.corpus.manifest import MANIFEST_FORMAT
from megatron_meco.corpus.merge import (
    MergedCorpus,
    MergeStep,
    merge_tasks,
    num_finished,
    with_state,
)
from megatron_meco.corpus.outputs import check_fields, check_output, check_prefix, logs_of
from megatron_meco.corpus.sentences import SENTENCE_LANGUAGES, check_language, sentences_digest
from megatron_meco.corpus.task_writer import MegatronWriter
from megatron_meco.corpus.tokenizer import TOKENIZER_TYPES
from megatron_meco.corpus.work_folder import (
    WorkFolder,
)
from megatron_meco.errors import DataError, FlagError, MeCoError
from megatron_meco.wording import counted

_EXAMPLE = """example:
  meco prepare pages-*.jsonl.gz --output data/corpus \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model llama3/ --metadata-fields url,topic
  meco prepare s3://bucket/crawl/ --output /shared/corpus --executor slurm --workers 500 \\
      --executor-option time=10:00:00 --executor-option partition=cpu \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model llama3/
"""

_SAMPLED_TASKS = 8
_SAMPLED_DOCUMENTS = 64

EXECUTORS = ("local", "slurm", "ray")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to prepare, and how.

    Attributes:
        inputs: Files, folders or patterns, local or URLs for fsspec, in document order.
        output: Prefix of the files to write, as in Megatron's `--data-path`.
        tokenizer_type: Megatron's `--tokenizer-type`.
        tokenizer_model: Megatron's `--tokenizer-model`.
        tokenizer_extra: Further tokenizer settings, by Megatron's names.
        text_field: Field of the text; dots lead into nested objects.
        metadata_fields: The fields to keep as metadata; empty: no metadata file.
        sentence_language: Store each document as one sequence per sentence of this language; None:
            as one sequence.
        encoder: `auto`: gigatoken if its ids are the same; `gigatoken`: or refuse; `huggingface`.
        executor: `local`, `slurm` or `ray`.
        executor_options: Settings of datatrove's executor for Slurm or Ray.
        workers: Tasks that run at once; 1 works in this process.
        strict: Whether the first rejected record ends the preparation.
        overwrite: Whether to replace an existing corpus.
    """

    inputs: tuple[str | Path, ...]
    output: Path
    tokenizer_type: str
    tokenizer_model: str | None = None
    tokenizer_extra: dict[str, Any] = field(default_factory=dict)
    text_field: str = "text"
    metadata_fields: tuple[str, ...] = ("url",)
    sentence_language: str | None = None
    encoder: str = "auto"
    executor: str = "local"
    executor_options: dict[str, Any] = field(default_factory=dict)
    workers: int = 1
    strict: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        _check(self)


@dataclass
class PrepareReport(MergedCorpus):
    """The result of a preparation; empty apart from `job` if Slurm will write the files.

    Attributes:
        eod: The end-of-document id.
        eod_text: The end-of-document token.
        encoder: How texts were encoded, in one line.
        job: The id of the last Slurm job.
    """

    eod: int = -1
    eod_text: str = ""
    encoder: str = ""
    job: str = ""


def prepare(config: PrepareConfig) -> PrepareReport:
    """Write a corpus, or resume an unfinished one.

    With more than one worker the calling script needs the usual `if __name__ == "__main__":`,
    because workers start from a fresh import.

    Raises:
        MeCoError: Something cannot be read or written. Finished tasks are kept, and the same call
            continues with the rest.
    """
    files = find_files(config.inputs, config.output)
    paths = [file.path for file in files]
    check_output(config.output, WorkFolder(config.output).path, paths, overwrite=config.overwrite)
    tell_repeated(paths)
    tasks = plan_tasks(files)
    workers = config.workers if config.executor == "local" else 1
    with WorkFolder(config.output) as work:
        try:
            # Again: another process may have held the lock until now.
            check_output(config.output, work.path, paths, overwrite=config.overwrite)
            rejected = RejectedRecords(strict=config.strict)
            steps = [
                TaskReader(tasks, config.text_field, rejected, config.metadata_fields),
                MegatronWriter(work.path, config.metadata_fields, rejected),
            ]
            with LocalExecutor(steps, work.path, len(tasks), workers) as executor:
                chosen = _begin(config, files, tasks, work)
                report = _run(config, executor, tasks, _manifest(config, files, chosen), work.path)
        finally:
            if not num_finished(work.path, len(tasks)) and config.executor != "slurm":
                work.remove()
    report.eod, report.eod_text = chosen["eod"], chosen["eod_text"]
    report.encoder = chosen["reason"]
    return report


def _begin(
    config: PrepareConfig, files: list[SourceFile], tasks: list[list[Part]], work: WorkFolder
) -> dict[str, Any]:
    """Load the tokenizer, choose the encoder, and begin or resume the work."""
    print("loading the tokenizer ...", file=sys.stderr, flush=True)
    sample = _sample_texts(tasks, config.text_field)
    chosen = build_encoder(
        config.tokenizer_type,
        config.tokenizer_model,
        config.tokenizer_extra,
        sample,
        config.encoder,
    )
    print(f"encoder: {chosen['reason']}", file=sys.stderr, flush=True)
    language = config.sentence_language
    chosen["sentences"] = None
    if language is not None:
        # Late: the import takes seconds, and few corpora need it.
        from megatron_meco.corpus.punkt import learn_sentences

        chosen["sentences"] = learn_sentences(sample, language)
        print(
            f"sentences: {language}, learned from {counted(len(sample), 'text')}", file=sys.stderr
        )
    plan = _plan_of(files, config.text_field, config.metadata_fields, chosen)
    is_alone = config.executor == "local"
    work.begin(plan, chosen, restart=config.overwrite, is_alone=is_alone)
    return chosen


def _sample_texts(tasks: list[list[Part]], text_field: str) -> list[str]:
    """Return texts spread over the input; unreadable files are reported when they are prepared."""
    texts: list[str] = []
    step = max(len(tasks) // _SAMPLED_TASKS, 1)
    for rank in range(0, len(tasks), step):
        reader = TaskReader(tasks, text_field, RejectedRecords(), ())
        try:
            found = itertools.islice(reader.run(rank=rank), _SAMPLED_DOCUMENTS)
            texts += [document.text for document in found]
        except DataError:
            continue
    return texts


def _plan_of(
    files: list[SourceFile],
    text_field: str,
    metadata_fields: tuple[str, ...],
    chosen: dict[str, Any],
) -> dict[str, Any]:
    """Return what must be unchanged for an unfinished preparation to resume."""
    return {
        "format": 2,
        "inputs": [[file.path, file.num_bytes, file.stamp] for file in files],
        "text_field": text_field,
        "metadata_fields": list(metadata_fields),
        "tokenizer": [encoder_digest(chosen), chosen["eod"], chosen["vocab_size"], chosen["dtype"]],
        "sentences": sentences_digest(chosen["sentences"]),
    }


def _run(
    config: PrepareConfig,
    executor: LocalExecutor,
    tasks: list[list[Part]],
    manifest: dict[str, Any],
    folder: Path,
) -> PrepareReport:
    try:
        if config.executor == "slurm":
            step = MergeStep(folder, config.output, len(tasks), manifest, config.overwrite)
            options = {"workers": config.workers, **config.executor_options}
            job = submit_to_slurm(executor.pipeline, step, logs_of(config.output), options)
            return PrepareReport(job=job)
        if config.executor == "ray":
            options = config.executor_options
            run_on_ray(executor.pipeline, len(tasks), config.workers, folder, options)
        else:
            sizes = [sum(part.end - part.begin for part in parts) for parts in tasks]
            run_with_progress(executor, "prepare", sizes)
        merged = merge_tasks(folder, config.output, len(tasks), manifest, None, config.overwrite)
        return PrepareReport(**vars(merged))
    except MeCoError as error:
        raise with_state(error, folder, len(tasks)) from error


def _manifest(
    config: PrepareConfig, files: list[SourceFile], chosen: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of `PREFIX.prepare.json`, equal for equal runs."""
    return {
        "format": MANIFEST_FORMAT,
        "inputs": [{"path": file.path, "bytes": file.num_bytes} for file in files],
        "text_field": config.text_field,
        "metadata_fields": list(config.metadata_fields),
        "tokenizer": {
            "type": config.tokenizer_type,
            "model": config.tokenizer_model,
            "extra": config.tokenizer_extra,
            "vocab_size": chosen["vocab_size"],
            "eod": chosen["eod"],
            "eod_text": chosen["eod_text"],
        },
        "encoder": chosen["kind"],
        "sentences": chosen["sentences"],
        "token_dtype": chosen["dtype"],
        "versions": {
            "megatron-meco": __version__,
            **{
                name: importlib.metadata.version(name)
                for name in ("megatron-core", "tokenizers", "gigatoken", "datatrove", "nltk")
            },
        },
    }


def _check(config: PrepareConfig) -> None:
    check_workers(config.workers, is_local=config.executor == "local")
    check_fields(config.metadata_fields)
    check_fields((config.text_field,), "--text-field")
    check_prefix(config.output)
    for flag, value, known in (
        ("--encoder", config.encoder, ENCODERS),
        ("--executor", config.executor, EXECUTORS),
    ):
        if value not in known:
            remedy = f"Use one of: {', '.join(known)}."
            raise FlagError(f"unknown value {value!r}", where=flag, remedy=remedy)
    if config.sentence_language is not None:
        check_language(config.sentence_language)
    if config.executor_options and config.executor == "local":
        raise FlagError(
            "has no effect with --executor local",
            where="--executor-option",
            remedy="Leave it out, or use --executor slurm or ray.",
        )
    if config.executor == "slurm":
        check_slurm_options(config.executor_options)


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
    """Run `meco prepare`; returns the exit status: 0, or 1 after an error, told on stderr."""
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
        # Not `asdict`, which breaks a Counter.
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
