"""What `meco prepare` does: raw documents with metadata to files that Megatron trains from.

A datatrove pipeline of two steps: a reader that accounts for every record, and a writer of tokens
and metadata. The input is cut into tasks by itself alone, and what the tasks write is joined in
their order, so the output is the same for any number of workers, on one machine or on many. Each
document becomes text tokens and EOD, and one row of metadata; nothing of the metadata is in the
tokens, so templates can change without preparing again. Costs the tokenizer, and the disk space of
the corpus twice until it is complete. Given up: progress inside a task that is killed.
"""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_meco import __version__
from megatron_meco.corpus.documents import RejectedRecords, TaskReader
from megatron_meco.corpus.executors import (
    LocalExecutor,
    MergeStep,
    check_slurm_options,
    check_workers,
    run_on_ray,
    run_with_progress,
    submit_to_slurm,
)
from megatron_meco.corpus.manifest import MANIFEST_FORMAT
from megatron_meco.corpus.merge import MergedCorpus, merge_tasks, num_finished, with_state
from megatron_meco.corpus.outputs import check_fields, check_output, check_prefix, logs_of
from megatron_meco.corpus.sentences import check_language
from megatron_meco.corpus.sources import Part, SourceFile, find_files, plan_tasks, tell_repeated
from megatron_meco.corpus.task_writer import MegatronWriter
from megatron_meco.corpus.work_folder import (
    ENCODERS,
    WorkFolder,
    build_encoder,
    plan_of,
    sample_texts,
)
from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.wording import counted

EXECUTORS = ("local", "slurm", "ray")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to prepare, and how."""

    inputs: tuple[str | Path, ...]
    """Files, folders or patterns, local or URLs for fsspec, in the order of their documents."""

    output: Path
    """The prefix of the files to write, as in Megatron's `--data-path`."""

    tokenizer_type: str
    """Megatron's `--tokenizer-type`."""

    tokenizer_model: str | None = None
    """Megatron's `--tokenizer-model`."""

    tokenizer_extra: dict[str, Any] = field(default_factory=dict)
    """Further tokenizer settings under Megatron's names."""

    text_field: str = "text"
    """Where a record's text is; dots lead into nested objects."""

    metadata_fields: tuple[str, ...] = ("url",)
    """The fields to keep as metadata; none: no metadata file."""

    sentence_language: str | None = None
    """Store each document as one sequence per sentence of this language; None: as one sequence."""

    encoder: str = "auto"
    """`auto`: gigatoken where its ids are the same; `gigatoken`: or refuse; `huggingface`."""

    executor: str = "local"
    """`local`, `slurm` or `ray`."""

    executor_options: dict[str, Any] = field(default_factory=dict)
    """Settings of datatrove's executor for Slurm or Ray."""

    workers: int = 1
    """Tasks that run at once; 1 works in this process."""

    strict: bool = False
    """Whether the first record that is no document ends the preparation."""

    overwrite: bool = False
    """Whether to replace a corpus that is already there."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass
class PrepareReport(MergedCorpus):
    """What came out of a preparation; empty apart from `job` where Slurm will write the files."""

    eod: int = -1
    """The end-of-document id."""

    eod_text: str = ""
    """The end-of-document token."""

    encoder: str = ""
    """How texts were encoded, in one line."""

    job: str = ""
    """The id of the last Slurm job."""


def prepare(config: PrepareConfig) -> PrepareReport:
    """Write a corpus, or go on with an unfinished one.

    Args:
        config: What to prepare. With more than one worker the calling script needs the usual
            `if __name__ == "__main__":`, because workers start from a fresh import.

    Returns:
        Counts and files.

    Raises:
        MeCoError: Something cannot be read, understood or written. Finished tasks are kept, and
            the same call goes on with the rest.
    """
    files = find_files(config.inputs, config.output)
    paths = [file.path for file in files]
    check_output(config.output, WorkFolder(config.output).path, paths, overwrite=config.overwrite)
    tell_repeated(paths)
    tasks = plan_tasks(files)
    workers = config.workers if config.executor == "local" else 1
    with WorkFolder(config.output) as work:
        try:
            # Once more: another process may have been at work until now.
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
    """Load the tokenizer, choose the encoder, and see whether earlier work may go on."""
    print("loading the tokenizer ...", file=sys.stderr, flush=True)
    sample = sample_texts(tasks, config.text_field)
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
        # Seconds of import that most corpora have no use for.
        from megatron_meco.corpus.punkt import learn_sentences

        chosen["sentences"] = learn_sentences(sample, language)
        print(
            f"sentences: {language}, learned from {counted(len(sample), 'text')}", file=sys.stderr
        )
    plan = plan_of(files, config.text_field, config.metadata_fields, chosen)
    is_alone = config.executor == "local"
    work.begin(plan, chosen, restart=config.overwrite, is_alone=is_alone)
    return chosen


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
    """Return what `PREFIX.prepare.json` says: nothing that differs between two equal runs."""
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
