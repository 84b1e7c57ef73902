"""`meco import-mds`: token shards of mosaicml-streaming, such as the MeCo authors', as a corpus.

The authors publish documents as ids without BOS and EOS, with `url` and `length`. Each row becomes
a document with an EOD and a row of metadata. A BOS before the ids of a row is dropped, and an EOD
behind them is not doubled. Either inside a row is refused: such rows are packs of several
documents. Runs on the executor of `meco prepare`: a task is a gigabyte of shards, the bytes do not
depend on the workers, an interrupted import resumes, and files appear when the import is complete.
Costs the memory of one shard and of a batch of 4 M ids per worker, and the disk space of the corpus
twice. Nothing in the shards tells which tokenizer made the ids; only the tokenizer's EOD, BOS and
vocabulary size are used.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megatron_meco import __version__
from megatron_meco.corpus.documents import Rejected
from megatron_meco.corpus.encoder import EncodedDocuments
from megatron_meco.corpus.executors import LocalExecutor, check_workers, run_with_progress
from megatron_meco.corpus.input_bytes import is_remote
from megatron_meco.corpus.input_files import tell_repeated, warn
from megatron_meco.corpus.manifest import MANIFEST_FORMAT
from megatron_meco.corpus.mds import (
    INDEX_NAME,
    INTEGER_ENCODINGS,
    Shard,
    find_indices,
    ids_decoder,
    read_index,
    read_shard,
    rows_of,
    text_decoder,
)
from megatron_meco.corpus.merge import MergedCorpus, merge_tasks, num_finished, with_state
from megatron_meco.corpus.outputs import (
    check_fields,
    check_local,
    check_output,
    check_prefix,
)
from megatron_meco.corpus.progress import tell_progress
from megatron_meco.corpus.task_writer import TaskFiles, read_record
from megatron_meco.corpus.tokenizer import (
    TOKENIZER_TYPES,
    build_tokenizer,
    resolve_bos,
    resolve_eod,
)
from megatron_meco.corpus.work_folder import WorkFolder
from megatron_meco.errors import DataError, MeCoError
from megatron_meco.wording import JSON_HELP, counted, json_line

_TASK_BYTES = 1 << 30
_BATCH_IDS = 4 << 20
_LENGTH = "length"


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What to import.

    Attributes:
        folders: Folders of shards, in document order; URLs need an index of their own.
        output: Prefix of the files to write, as in Megatron's `--data-path`.
        tokenizer_type: Megatron's `--tokenizer-type`: the tokenizer that made the ids.
        tokenizer_model: Megatron's `--tokenizer-model`.
        ids_column: The column of token ids.
        token_dtype: The type of the ids if the column is `bytes`.
        metadata_fields: The columns to keep as metadata; empty: no metadata file.
        workers: Tasks that run at once; 1 works in this process.
        overwrite: Whether to replace an existing corpus.
    """

    folders: tuple[str, ...]
    output: Path
    tokenizer_type: str
    tokenizer_model: str | None = None
    ids_column: str = "input_ids"
    token_dtype: str | None = None
    metadata_fields: tuple[str, ...] = ("url",)
    workers: int = 1
    overwrite: bool = False


def import_mds(config: ImportConfig) -> MergedCorpus:
    """Write shards of mosaicml-streaming as a corpus, or resume an unfinished import.

    With more than one worker the calling script needs the usual `if __name__ == "__main__":`,
    because workers start from a fresh import.

    Raises:
        MeCoError: Something cannot be read or written. Finished tasks are kept, and the same call
            continues with the rest.
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
            # Again: another process may have held the lock until now.
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
    """Check the columns before anything is written, and make tasks."""
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
    """Warn about shards in the folders that no index lists."""
    # A shard may exist both packed and unpacked.
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
    # First: it silences the warnings of Megatron's imports.
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
    """Return the content of `PREFIX.prepare.json`, equal for equal runs."""
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


class MdsImporter(PipelineStep):  # type: ignore[misc]
    """Writes the rows of shards as tokens and metadata; the only step of its pipeline.

    Args:
        folder: The work folder.
        tasks: The shards of each task.
        settings: `eod`, `bos`, `vocab_size` and `dtype` of the tokenizer.
        ids_column: The column of token ids.
        token_dtype: The type of the ids if the column is `bytes`.
        metadata_fields: The columns to keep as metadata.
    """

    name = "MdsImporter"
    type = "TOKENIZER"

    def __init__(
        self,
        folder: Path,
        tasks: list[list[Shard]],
        settings: dict[str, Any],
        ids_column: str,
        token_dtype: str | None,
        metadata_fields: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.folder, self.tasks, self.settings = folder, tasks, settings
        self.ids_column, self.token_dtype = ids_column, token_dtype
        self.metadata_fields = metadata_fields

    def run(
        self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Write the rows of the shards of the task `rank`, unless it is finished; yields nothing.

        Raises:
            DataError: A shard is damaged, or the files cannot be written.
        """
        if read_record(self.folder, rank) is not None:
            return
        fields = list(self.metadata_fields)
        done = 0
        with TaskFiles(self.folder, rank, self.settings, fields) as files:
            record = files.record
            for shard in self.tasks[rank]:
                self._write_shard(files, shard)
                done += shard.stored_bytes
                tell_progress(rank, done, record.documents, record.tokens, done)
            files.finish([])
        yield from ()

    def _write_shard(self, files: TaskFiles, shard: Shard) -> None:
        columns = shard.columns
        decode_ids = ids_decoder(columns[self.ids_column], self.token_dtype)
        decode_texts = [text_decoder(columns[name], name) for name in self.metadata_fields]
        names = [self.ids_column, *self.metadata_fields]
        has_length = _LENGTH in columns and columns[_LENGTH] in INTEGER_ENCODINGS
        if has_length:
            names.append(_LENGTH)
            decode_length = text_decoder(columns[_LENGTH], _LENGTH)
        batch = _Batch(files, shard, self.settings, len(decode_texts))
        for row, values in enumerate(rows_of(shard, read_shard(shard), names)):
            try:
                ids = decode_ids(values[0])
                texts = [f(value) for f, value in zip(decode_texts, values[1:], strict=False)]
                length = decode_length(values[-1]) if has_length else str(len(ids))
            except ValueError as error:
                raise _bad_row(shard, row, f"cannot be read ({error})") from None
            if int(length) != len(ids):
                raise _bad_row(shard, row, f"{len(ids)} ids, not the {length} of its length")
            batch.add(row, ids, texts)
        batch.write()


class _Batch:
    """Rows of a shard that are written together."""

    def __init__(
        self, files: TaskFiles, shard: Shard, settings: dict[str, Any], num_fields: int
    ) -> None:
        self._files, self._shard = files, shard
        self._bos, self._eod = settings["bos"], settings["eod"]
        self._vocab_size = settings["vocab_size"]
        self._num_fields = num_fields
        self._clear()

    def _clear(self) -> None:
        self._rows: list[int] = []
        self._ids: list[np.ndarray[Any, Any]] = []
        self._columns: list[list[str | None]] = [[] for _ in range(self._num_fields)]
        self._room = _BATCH_IDS

    def add(self, row: int, ids: np.ndarray[Any, Any], texts: list[str]) -> None:
        """Add a row, without the BOS and EOD that it may have around it."""
        if len(ids) and self._bos is not None and ids[0] == self._bos:
            ids = ids[1:]
        if len(ids) and ids[-1] == self._eod:
            ids = ids[:-1]
        if len(ids) == 0:
            self._files.reject([(Rejected(self._shard.path, row + 1, "no tokens", ""), 0)])
            return
        self._rows.append(row)
        self._ids.append(ids)
        for column, text in zip(self._columns, texts, strict=True):
            column.append(text)
        self._room -= len(ids)
        if self._room <= 0:
            self.write()

    def write(self) -> None:
        """Write the added rows."""
        if not self._rows:
            return
        ids = np.concatenate(self._ids)
        lengths = np.array([len(one) for one in self._ids], dtype=np.int64)
        self._check(ids, lengths)
        ones = np.ones(len(lengths), dtype=np.int64)
        self._files.write(EncodedDocuments(ids, lengths, lengths, ones), self._columns)
        self._clear()

    def _check(self, ids: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> None:
        is_outside = (ids < 0) | (ids >= self._vocab_size)
        is_special = np.isin(ids, [i for i in (self._bos, self._eod) if i is not None])
        if not (is_outside.any() or is_special.any()):
            return
        place = int(np.argmax(is_outside | is_special))
        row = self._rows[int(np.searchsorted(np.cumsum(lengths), place, side="right"))]
        if is_outside[place]:
            raise DataError(
                f"id {ids[place]}, the vocabulary ends at {self._vocab_size}",
                where=f"{self._shard.path}, row {row + 1}",
                remedy="Name the tokenizer that made the ids.",
            )
        raise DataError(
            f"{'EOD' if ids[place] == self._eod else 'BOS'} {ids[place]} inside: not one document",
            where=f"{self._shard.path}, row {row + 1}",
            remedy="Import the unpacked data, and name the tokenizer that made the ids.",
        )


def _bad_row(shard: Shard, row: int, what: str) -> DataError:
    return DataError(what, where=f"{shard.path}, row {row + 1}", remedy="Fetch the shard again.")


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
    """Run `meco import-mds`; returns the exit status, 0."""
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
