"""`meco import-mds`: token shards of mosaicml-streaming, such as the MeCo authors', as a corpus.

The authors publish documents as ids without BOS and EOS, with `url` and `length`. Each row becomes
a document with an EOD behind it and a row of metadata. A BOS before and an EOD behind the ids of a
row are taken for what they are (the one dropped, the other not doubled); either inside is refused:
such rows are packs of several documents. Runs on the executor of `meco prepare`: a task is a
gigabyte of shards, the bytes do not depend on the workers, an import that was stopped goes on, and
files appear only when all is there. Costs the memory of one shard per worker, and the disk space of
the corpus twice. Given up: checking that the tokenizer is the one that made the ids, which nothing
tells; only its EOD, BOS and the size of its vocabulary are used.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_meco import __version__
from megatron_meco.corpus.executors import LocalExecutor, check_workers, run_with_progress
from megatron_meco.corpus.manifest import MANIFEST_FORMAT
from megatron_meco.corpus.mds import (
    INDEX_NAME,
    Shard,
    find_indices,
    ids_decoder,
    read_index,
    text_decoder,
)
from megatron_meco.corpus.mds_importer import MdsImporter
from megatron_meco.corpus.merge import MergedCorpus, merge_tasks, num_finished, with_state
from megatron_meco.corpus.outputs import (
    check_fields,
    check_local,
    check_output,
    check_prefix,
)
from megatron_meco.corpus.sources import is_remote, tell_repeated, warn
from megatron_meco.corpus.tokenizer import (
    TOKENIZER_TYPES,
    build_tokenizer,
    resolve_bos,
    resolve_eod,
)
from megatron_meco.corpus.wording import counted
from megatron_meco.corpus.work_folder import WorkFolder
from megatron_meco.errors import DataError, MeCoError
from megatron_meco.wording import JSON_HELP, json_line

_TASK_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What to import."""

    folders: tuple[str, ...]
    """Folders of shards, in the order of their documents; URLs need an index of their own."""

    output: Path
    """The prefix of the files to write, as in Megatron's `--data-path`."""

    tokenizer_type: str
    """Megatron's `--tokenizer-type`: the tokenizer that made the ids."""

    tokenizer_model: str | None = None
    """Megatron's `--tokenizer-model`."""

    ids_column: str = "input_ids"
    """The column of token ids."""

    token_dtype: str | None = None
    """The type of the ids where the column is `bytes`."""

    metadata_fields: tuple[str, ...] = ("url",)
    """The columns to keep as metadata; none: no metadata file."""

    workers: int = 1
    """Tasks that run at once; 1 works in this process."""

    overwrite: bool = False
    """Whether to replace a corpus that is already there."""


def import_mds(config: ImportConfig) -> MergedCorpus:
    """Write shards of mosaicml-streaming as a corpus, or go on with an unfinished import.

    Args:
        config: What to import. With more than one worker the calling script needs the usual
            `if __name__ == "__main__":`, because workers start from a fresh import.

    Returns:
        Counts and files.

    Raises:
        MeCoError: Something cannot be read, understood or written. Finished tasks are kept, and
            the same call goes on with the rest.
    """
    _check_config(config)
    indices = [path for folder in config.folders for path in find_indices(os.fspath(folder))]
    read = [read_index(path) for path in indices]
    tasks = _plan_tasks([shard for shards, _ in read for shard in shards], config)
    paths = [*indices, *(shard.path for shards in tasks for shard in shards)]
    check_output(config.output, WorkFolder(config.output).path, paths, overwrite=config.overwrite)
    tell_repeated(indices)
    _tell_unlisted(paths)
    with WorkFolder(config.output) as work:
        try:
            # Once more: another process may have been at work until now.
            check_output(config.output, work.path, paths, overwrite=config.overwrite)
            settings = _settings(config)
            step = MdsImporter(
                work.path,
                tasks,
                settings,
                config.ids_column,
                config.token_dtype,
                config.metadata_fields,
            )
            inputs = [[path, digest] for path, (_, digest) in zip(indices, read, strict=True)]
            manifest = _manifest(config, inputs, settings)
            with LocalExecutor([step], work.path, len(tasks), config.workers) as executor:
                work.begin({"import": manifest}, settings, restart=config.overwrite)
                return _run(executor, tasks, config, manifest)
        finally:
            if not num_finished(work.path, len(tasks)):
                work.remove()


def _run(
    executor: LocalExecutor,
    tasks: list[list[Shard]],
    config: ImportConfig,
    manifest: dict[str, Any],
) -> MergedCorpus:
    folder = executor.work_folder
    sizes = [sum(shard.stored_bytes for shard in shards) for shards in tasks]
    try:
        run_with_progress(executor, "import-mds", sizes)
        return merge_tasks(folder, config.output, len(tasks), manifest, None, config.overwrite)
    except MeCoError as error:
        raise with_state(error, folder, len(tasks)) from error


def _plan_tasks(shards: list[Shard], config: ImportConfig) -> list[list[Shard]]:
    """Look the columns over, so that nothing is written before they are right; make tasks."""
    wanted = [config.ids_column, *config.metadata_fields]
    tasks: list[list[Shard]] = []
    room = 0
    for shard in shards:
        missing = [name for name in wanted if name not in shard.columns]
        if missing:
            raise DataError(
                f"no column {missing[0]!r}; there are {', '.join(shard.columns)}",
                where=shard.path,
                remedy="Name columns with --ids-column and --metadata-fields.",
            )
        ids_decoder(shard.columns[config.ids_column], config.token_dtype)
        for name in config.metadata_fields:
            text_decoder(shard.columns[name], name)
        if room <= 0:
            tasks.append([])
            room = _TASK_BYTES
        tasks[-1].append(shard)
        room -= shard.num_bytes
    if not tasks:
        raise DataError(
            "no shards", where=", ".join(config.folders), remedy="Name folders that hold some."
        )
    return tasks


def _tell_unlisted(paths: list[str]) -> None:
    """Say on stderr which shards lie beside those of the indices and are in none."""
    # A shard may lie there packed and unpacked.
    listed = {_without_packing(path) for path in paths}
    folders = sorted({os.path.dirname(path) for path in paths if not is_remote(path)})
    found = [f"{folder}/{name}" for folder in folders for name in sorted(os.listdir(folder or "."))]
    unlisted = [
        path
        for path in found
        if ".mds" in os.path.basename(path) and _without_packing(path) not in listed
    ]
    if unlisted:
        warn(f"{counted(len(unlisted), 'shard')} in no {INDEX_NAME}, first {unlisted[0]}")


def _without_packing(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/{name.partition('.mds')[0]}"


def _settings(config: ImportConfig) -> dict[str, Any]:
    # First: it keeps Megatron's imports from talking.
    tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model)
    from megatron.core.datasets.indexed_dataset import DType

    return {
        "eod": resolve_eod(tokenizer),
        "bos": resolve_bos(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "dtype": DType.optimal_dtype(tokenizer.vocab_size).__name__,
    }


def _manifest(
    config: ImportConfig, inputs: list[list[str]], settings: dict[str, Any]
) -> dict[str, Any]:
    """Return what `PREFIX.prepare.json` says: nothing that differs between two equal runs."""
    return {
        "format": MANIFEST_FORMAT,
        "indices": [{"path": path, "sha256": digest} for path, digest in inputs],
        "ids_column": config.ids_column,
        "ids_dtype": config.token_dtype,
        "metadata_fields": list(config.metadata_fields),
        "tokenizer": {
            "type": config.tokenizer_type,
            "model": config.tokenizer_model,
            **{key: settings[key] for key in ("vocab_size", "eod", "bos")},
        },
        "token_dtype": settings["dtype"],
        "versions": {"megatron-meco": __version__},
    }


def _check_config(config: ImportConfig) -> None:
    for folder in config.folders:
        if not is_remote(folder):
            check_local(folder, "DIR")
    check_fields(config.metadata_fields)
    check_fields((config.ids_column,), "--ids-column")
    check_workers(config.workers)
    check_prefix(config.output)


def add_import_mds_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco import-mds` to its parser."""
    add = parser.add_argument
    add("folders", nargs="+", metavar="DIR", help="folder with index.json, or one of such folders")
    add("--output", required=True, metavar="PREFIX", help="prefix of the files written")
    add("--tokenizer-type", required=True, metavar="T", help=f"one of {', '.join(TOKENIZER_TYPES)}")
    add("--tokenizer-model", metavar="M", help="of the tokenizer that made the ids")
    add("--ids-column", default="input_ids", metavar="NAME", help="default: %(default)s")
    add("--token-dtype", metavar="D", help="type of the ids where their column is `bytes`")
    add("--metadata-fields", default="url", metavar="A,B", help="default: %(default)s")
    add("--workers", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    add("--overwrite", action="store_true", help="replace a corpus that is already there")
    add("--json", action="store_true", help=JSON_HELP)


def run_import_mds(args: argparse.Namespace) -> int:
    """Run `meco import-mds`.

    Args:
        args: The parsed arguments of `add_import_mds_arguments`.

    Returns:
        The exit status, 0.

    Raises:
        MeCoError: The shards cannot be imported; nothing has been written under the output's names.
    """
    fields = tuple(name.strip() for name in args.metadata_fields.split(","))
    merged = import_mds(
        ImportConfig(
            folders=tuple(args.folders),
            output=check_prefix(args.output),
            tokenizer_type=args.tokenizer_type,
            tokenizer_model=args.tokenizer_model,
            ids_column=args.ids_column,
            token_dtype=args.token_dtype,
            metadata_fields=fields if args.metadata_fields else (),
            workers=args.workers,
            overwrite=args.overwrite,
        )
    )
    if args.json:
        print(json_line(vars(merged)))
        return 0
    tokens = counted(merged.tokens, "token")
    print(f"{counted(merged.documents, 'document')}, {tokens} (EODs included)")
    for reason, count in sorted(merged.rejected.items()):
        print(f"rejected: {counted(count, 'row')}: {reason}")
    for path in merged.files:
        print(f"written: {path}")
    return 0
