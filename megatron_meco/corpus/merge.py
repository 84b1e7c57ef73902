"""Join the output of a preparation's tasks into one corpus that is complete or absent.

Tasks are joined in order, whoever ran them and when, so the bytes depend on the input alone. All
files are made in the work folder, synced, and renamed at the end, the index last: a corpus with an
index is complete. Costs one copy of the tokens and 40 bytes of memory per sequence of the largest
task. The disk holds both copies until the work folder is removed, because a kill before then must
not lose anything.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megatron_meco.corpus.documents import Rejected
from megatron_meco.corpus.index_file import header
from megatron_meco.corpus.manifest import checksum_of
from megatron_meco.corpus.metadata import MetadataWriter, metadata_path
from megatron_meco.corpus.outputs import PUBLISHING, check_output, check_prefix, output_paths
from megatron_meco.corpus.task_writer import (
    TaskRecord,
    read_record,
    record_path,
    task_prefix,
)
from megatron_meco.corpus.work_folder import (
    cannot_write,
    check_work_folder,
    load_settings,
    remove_work_folder,
    write_synced,
)
from megatron_meco.errors import DataError, MeCoError
from megatron_meco.wording import counted

_COPY_BYTES = 8 << 20
_HISTOGRAM_BINS = 1 << 20


@dataclass
class MergedCorpus:
    """What all tasks wrote together.

    Attributes:
        documents: Number of documents.
        tokens: Tokens, EODs included.
        sequences: Megatron sequences.
        text_bytes: UTF-8 bytes of text.
        median_tokens: Median tokens per document, EOD included.
        rejected: Rejected records by reason.
        first_rejected: The first of them.
        missing_metadata: Documents without a value, by metadata field.
        checksums: CRC-32 by suffix, as eight hexadecimal digits.
        files: The files written.
    """

    documents: int = 0
    tokens: int = 0
    sequences: int = 0
    text_bytes: int = 0
    median_tokens: float = 0.0
    rejected: Counter[str] = field(default_factory=Counter)
    first_rejected: Rejected | None = None
    missing_metadata: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def num_finished(folder: Path, num_tasks: int) -> int:
    """Return how many tasks of a work folder are finished."""
    return sum(read_record(folder, rank) is not None for rank in range(num_tasks))


def with_state(error: MeCoError, folder: Path, num_tasks: int) -> MeCoError:
    """Return the error with the state of the unfinished work added to its remedy."""
    finished = num_finished(folder, num_tasks)
    if finished == 0:
        return error
    kept = (
        f"{finished:,} of {num_tasks:,} tasks are finished and kept in {folder}: the same "
        "command continues with the rest."
    )
    return type(error)(error.what, where=error.where, remedy=f"{error.remedy} {kept}")


def merge_tasks(
    folder: str | os.PathLike[str],
    prefix: str | os.PathLike[str],
    num_tasks: int,
    manifest: dict[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
    overwrite: bool = False,
) -> MergedCorpus:
    """Write the corpus of finished tasks, and remove their folder.

    Args:
        folder: The work folder of the tasks.
        prefix: Where the corpus goes, as in Megatron's `--data-path`; on the same file system.
        num_tasks: The number of tasks.
        manifest: Content of `PREFIX.prepare.json` beside the counts.
        on_progress: Called with the number of tasks joined so far.
        overwrite: Whether to replace an existing corpus.

    Returns:
        Counts and files.

    Raises:
        DataError: A task is not finished, there are no documents, existing files must stay, or the
            disk is full.
    """
    folder, prefix = Path(folder), check_prefix(os.fspath(prefix), "prefix")
    if folder.exists():
        check_work_folder(folder)
    check_output(prefix, folder, (), overwrite=overwrite)
    records = _records(folder, num_tasks)
    settings = load_settings(folder)
    merged = _counts(records)
    try:
        _write_rejected(folder, records, merged)
        if merged.documents == 0:
            # Running again could use none of it.
            remove_work_folder(folder)
            raise _no_documents(merged)
        _write_tokens(folder, num_tasks, merged, on_progress)
        _write_index(folder, records, merged, np.dtype(settings["dtype"]))
        _write_metadata(folder, records, merged)
        write_synced(folder / "corpus.prepare.json", _manifest_text(merged, manifest or {}))
        merged.files = _publish(folder, prefix, overwrite=overwrite)
        remove_work_folder(folder)
    except OSError as error:
        raise cannot_write(error, prefix) from error
    return merged


class MergeStep(PipelineStep):  # type: ignore[misc]
    """Joins the tasks: the only step of the Slurm job that follows theirs.

    Args:
        folder: The work folder.
        prefix: Where the corpus goes.
        num_tasks: The number of tasks.
        manifest: Content of `PREFIX.prepare.json` beside the counts.
        overwrite: Whether to replace an existing corpus.
    """

    name = "Merge"
    type = "WRITER"

    def __init__(
        self,
        folder: Path,
        prefix: Path,
        num_tasks: int,
        manifest: dict[str, Any],
        overwrite: bool = False,
    ):
        super().__init__()
        self.folder, self.prefix = folder, prefix
        self.num_tasks, self.manifest = num_tasks, manifest
        self.overwrite = overwrite

    def run(
        self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Join the tasks; yields nothing."""
        merge_tasks(self.folder, self.prefix, self.num_tasks, self.manifest, None, self.overwrite)
        yield from ()


def _records(folder: Path, num_tasks: int) -> list[TaskRecord]:
    records = [read_record(folder, rank) for rank in range(num_tasks)]
    missing = [rank for rank, record in enumerate(records) if record is None]
    if missing:
        raise DataError(
            f"{len(missing):,} of {counted(num_tasks, 'task')} not finished, first {missing[0]}",
            where=str(record_path(folder, missing[0])),
            remedy="Run the same command again: it continues with the missing tasks.",
        )
    return [record for record in records if record is not None]


def _counts(records: list[TaskRecord]) -> MergedCorpus:
    merged = MergedCorpus()
    missing: Counter[str] = Counter()
    for record in records:
        merged.documents += record.documents
        merged.tokens += record.tokens
        merged.sequences += record.sequences
        merged.text_bytes += record.text_bytes
        merged.rejected.update(record.rejected)
        missing.update(record.missing_metadata)
    # In the order of the fields, not of their first occurrence.
    merged.missing_metadata = {name: missing[name] for name in records[0].missing_metadata}
    return merged


def _no_documents(merged: MergedCorpus) -> DataError:
    first = merged.first_rejected
    if first is None:
        return DataError(
            "no documents: every line is blank",
            where="the input",
            remedy="Check the files and --text-field.",
        )
    total = merged.rejected.total()
    return DataError(
        f"no documents: all {counted(total, 'line')} rejected, here: {first.reason}",
        where=f"{first.path}, line {first.line}",
        remedy="Check the file and --text-field.",
    )


def _write_rejected(folder: Path, records: list[TaskRecord], merged: MergedCorpus) -> None:
    """Join the rejected records, with line numbers from the beginning of the file."""
    lines_before = _lines_before(records)
    with (folder / "corpus.rejected.jsonl").open("w", encoding="utf-8") as out:
        for rank, record in enumerate(records):
            for one in _rejected_of(folder, rank, record, lines_before):
                merged.first_rejected = merged.first_rejected or one
                out.write(json.dumps(asdict(one), ensure_ascii=False) + "\n")
    if not merged.rejected:
        (folder / "corpus.rejected.jsonl").unlink()


def _rejected_of(
    folder: Path, rank: int, record: TaskRecord, lines_before: dict[tuple[str, int], int]
) -> Iterator[Rejected]:
    path = Path(f"{task_prefix(folder, rank)}.rejected.jsonl")
    found = 0
    with path.open("rb") as file:
        for line in file:
            try:
                told = orjson.loads(line)
                told["line"] += lines_before.get((told["path"], told.pop("begin")), 0)
                one = Rejected(**told)
            except (KeyError, TypeError, ValueError) as error:
                raise _damaged_task(folder, rank, path, str(error)) from None
            yield one
            found += 1
    if found != sum(record.rejected.values()):
        raise _damaged_task(folder, rank, path, counted(found, "line"))


def _damaged_task(folder: Path, rank: int, path: Path, reason: str) -> DataError:
    """Make a task run again whose files are damaged, and return the error."""
    record_path(folder, rank).unlink(missing_ok=True)
    return DataError(
        f"is damaged ({reason.splitlines()[0] if reason else 'empty'})",
        where=str(path),
        remedy="Run the same command again: it repeats this task.",
    )


def _lines_before(records: list[TaskRecord]) -> dict[tuple[str, int], int]:
    parts = {(path, begin): n for record in records for path, begin, n in record.lines_of_parts}
    before: dict[tuple[str, int], int] = {}
    path_before, num_lines = "", 0
    for path, begin in sorted(parts):
        if path != path_before:
            path_before, num_lines = path, 0
        before[path, begin] = num_lines
        num_lines += parts[path, begin]
    return before


def _write_tokens(
    folder: Path, num_tasks: int, merged: MergedCorpus, on_progress: Callable[[int], None] | None
) -> None:
    checksum = 0
    with (folder / "corpus.bin").open("wb") as out:
        for rank in range(num_tasks):
            with Path(f"{task_prefix(folder, rank)}.bin").open("rb") as file:
                while block := file.read(_COPY_BYTES):
                    checksum = zlib.crc32(block, checksum)
                    out.write(block)
            if on_progress is not None:
                on_progress(rank + 1)
    merged.checksums[".bin"] = f"{checksum:08x}"


def _arrays(folder: Path, num_tasks: int, suffix: str) -> Iterator[np.ndarray[Any, Any]]:
    for rank in range(num_tasks):
        yield np.fromfile(f"{task_prefix(folder, rank)}{suffix}", dtype=np.int32)


def _write_index(
    folder: Path, records: list[TaskRecord], merged: MergedCorpus, dtype: np.dtype[Any]
) -> None:
    """Write the index as Megatron's own builder would, without lists of all documents."""
    num_tasks = len(records)
    histogram = np.zeros(_HISTOGRAM_BINS, dtype=np.int64)
    with (folder / "corpus.idx").open("wb") as out:
        out.write(header(dtype, merged.sequences, merged.documents))
        for rank, (lengths, counts) in enumerate(
            zip(
                _arrays(folder, num_tasks, ".lengths"),
                _arrays(folder, num_tasks, ".sequences"),
                strict=True,
            )
        ):
            told = (records[rank].tokens, records[rank].sequences)
            sums = (int(lengths.sum(dtype=np.int64)), int(counts.sum(dtype=np.int64)))
            if sums != told or (lengths < 1).any() or (counts < 1).any():
                path = Path(f"{task_prefix(folder, rank)}.lengths")
                raise _damaged_task(folder, rank, path, "other numbers than its record has")
            out.write(lengths)
            begins = np.cumsum(counts, dtype=np.int64) - counts
            # reduceat needs at least one sequence per document.
            of_documents = np.add.reduceat(lengths, begins) if len(begins) else lengths
            clipped = np.minimum(of_documents, _HISTOGRAM_BINS - 1)
            histogram += np.bincount(clipped, minlength=_HISTOGRAM_BINS)
        offset = 0
        for lengths in _arrays(folder, num_tasks, ".lengths"):
            sizes = lengths.astype(np.int64) * dtype.itemsize
            ends = np.cumsum(sizes)
            out.write(offset + ends - sizes)
            offset += int(ends[-1]) if len(ends) else 0
        first = np.zeros(1, dtype=np.int64)
        out.write(first)
        for counts in _arrays(folder, num_tasks, ".sequences"):
            bounds = first[-1] + np.cumsum(counts, dtype=np.int64)
            out.write(bounds)
            first = bounds if len(bounds) else first
    merged.median_tokens = _median(histogram)
    merged.checksums[".idx"] = checksum_of(folder / "corpus.idx")


def _median(histogram: np.ndarray[Any, Any]) -> float:
    ranks = np.cumsum(histogram)
    total = int(ranks[-1])
    low, high = (int(np.searchsorted(ranks, n + 1)) for n in ((total - 1) // 2, total // 2))
    return (low + high) / 2


def _write_metadata(folder: Path, records: list[TaskRecord], merged: MergedCorpus) -> None:
    fields = list(merged.missing_metadata)
    if not fields:
        return
    with MetadataWriter(folder / "corpus", fields) as writer:
        for rank, record in enumerate(records):
            path, before = metadata_path(task_prefix(folder, rank)), writer.num_rows
            try:
                _append_metadata(writer, path)
            except pa.ArrowException as error:
                raise _damaged_task(folder, rank, path, str(error)) from None
            if writer.num_rows - before != record.documents:
                found = counted(writer.num_rows - before, "row")
                raise _damaged_task(folder, rank, path, found)
    merged.checksums[".metadata.arrow"] = checksum_of(metadata_path(folder / "corpus"))


def _append_metadata(writer: MetadataWriter, path: Path) -> None:
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            batch.validate(full=True)
            writer.append_batch(batch)


def _manifest_text(merged: MergedCorpus, manifest: dict[str, Any]) -> str:
    counts = {
        "documents": merged.documents,
        "tokens": merged.tokens,
        "sequences": merged.sequences,
        "text_bytes": merged.text_bytes,
        "rejected": dict(sorted(merged.rejected.items())),
        "missing_metadata": merged.missing_metadata,
        "crc32": merged.checksums,
    }
    return json.dumps({**manifest, **counts}, indent=2, ensure_ascii=False) + "\n"


def _publish(folder: Path, prefix: Path, *, overwrite: bool) -> list[Path]:
    made = dict(zip(output_paths(prefix), output_paths(folder / "corpus"), strict=True))
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for path in made.values():
        if path.exists():
            _sync(path)
    # Again: a file may have appeared since the first check.
    check_output(prefix, folder, (), overwrite=overwrite)
    # From here on, files under the final names are this preparation's own.
    write_synced(folder / PUBLISHING, "")
    # An older index goes first: it must never lie beside a newer .bin.
    for path in reversed(made):
        path.unlink(missing_ok=True)
    written = [path for path in made if made[path].exists()]
    for path in written:
        os.replace(made[path], path)
    _sync(prefix.parent)
    return written


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
