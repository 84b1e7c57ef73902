"""Run the tasks of a preparation: on this machine, by Slurm, or on Ray.

Slurm and Ray run datatrove's executors as they are. The local executor is datatrove's with another
pool: datatrove's hangs when a worker is killed, and shows no progress. Workers are spawned (this
process runs the threads of torch and pyarrow) and end with their parent; each takes a second or two
to start. After a worker died, the command has to be repeated.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from multiprocessing import connection, parent_process
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from datatrove.executor import LocalPipelineExecutor
from loguru import logger

from megatron_meco.corpus.merge import MergeStep
from megatron_meco.corpus.progress import DocumentProgress, report_progress_to
from megatron_meco.corpus.task_writer import read_record
from megatron_meco.corpus.work_folder import cannot_write, cannot_write_for
from megatron_meco.errors import DataError, FlagError
from megatron_meco.whole_file import whole_file
from megatron_meco.wording import counted

_COUNTS = 4
_SECONDS_BETWEEN_LOOKS = 0.2
# Most workers: the larger of a fixed number and a number per core.
_WORKERS = 64
_WORKERS_PER_CORE = 4

# Called with the counts of all tasks so far: source bytes, documents, tokens, text bytes.
type CountsCallback = Callable[[list[int]], None]


class LocalExecutor(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's local executor with a pool that notices killed workers and reports progress.

    Args:
        pipeline: The steps, the last one a `MegatronWriter`.
        work_folder: Its folder.
        tasks: The number of tasks.
        workers: Processes; 1 works in this process.
    """

    def __init__(
        self,
        pipeline: list[Any],
        work_folder: Path,
        tasks: int,
        workers: int,
    ) -> None:
        super().__init__(pipeline, tasks, workers, logging_dir=str(work_folder / "logs"))
        self.pipeline: list[Any] = pipeline
        self.work_folder = work_folder
        self._pool: ProcessPoolExecutor | None = None
        self._shared: Any = None
        self._warm: Sequence[Future[None]] = ()
        self._processes: Collection[Any] = ()

    def is_rank_completed(self, rank: int) -> bool:
        """Whether a task's record exists; datatrove's own mark says nothing about the files."""
        return read_record(self.work_folder, rank) is not None

    def __enter__(self) -> Self:
        """Start the workers, which import what they need while this process continues."""
        workers = min(self.workers, len(self._unfinished()))
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            self._shared = context.RawArray("q", self.tasks * _COUNTS)
            others = set(multiprocessing.active_children())
            self._pool = ProcessPoolExecutor(
                workers, mp_context=context, initializer=_start_worker, initargs=(self._shared,)
            )
            self._warm = [self._pool.submit(_warm_up) for _ in range(workers)]
            self._processes = set(multiprocessing.active_children()) - others
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the workers, at once after an error."""
        if self._pool is None:
            return
        if kind is not None:
            # A task may run for minutes, and its work would be discarded.
            for process in self._processes:
                process.terminate()
        self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def wait_for_workers(self) -> None:
        """Return when all workers have started."""
        wait(self._warm)

    def run(self, on_counts: CountsCallback = lambda counts: None) -> None:
        """Run all tasks that are not finished. The executor must have been entered.

        Args:
            on_counts: Called now and then with the counts of all tasks so far.

        Raises:
            DataError: From a task; the first one ends the others.
        """
        try:
            if self._pool is None:
                self._run_here(on_counts)
            else:
                self._run_in_pool(self._pool, on_counts)
        except OSError as error:
            # Readers raise DataErrors; this is datatrove's log or the pickle.
            raise cannot_write(error, self.work_folder) from error

    def _unfinished(self) -> list[int]:
        return [rank for rank in range(self.tasks) if not self.is_rank_completed(rank)]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process."""
        here = {"_pool": None, "_shared": None, "_warm": (), "_processes": ()}
        return {**self.__dict__, **here}

    def run_task(self, rank: int) -> None:
        """Run one task in this process."""
        # It logs every error with a traceback, also that its log is on a full disk. The parent
        # reports the error in one line.
        logger.disable("datatrove")
        self._run_for_rank(rank, local_rank=1)

    def _run_here(self, on_counts: CountsCallback) -> None:
        counts = np.zeros((self.tasks, _COUNTS), dtype=np.int64)

        def note(rank: int, *values: int) -> None:
            counts[rank] = values
            on_counts(counts.sum(axis=0).tolist())

        report_progress_to(note)
        try:
            for rank in self._unfinished():
                self.run_task(rank)
        finally:
            report_progress_to(None)

    def _run_in_pool(self, pool: ProcessPoolExecutor, on_counts: CountsCallback) -> None:
        # Once for all tasks, because it may hold a long list of input files.
        pickled = self.work_folder / "executor.pickle"
        with whole_file(pickled, partial(cannot_write_for, path=pickled)) as file:
            file.write(pickle.dumps(self))
        counts = np.frombuffer(self._shared, dtype=np.int64).reshape(self.tasks, _COUNTS)
        try:
            pending: set[Future[None]] = {
                pool.submit(_run_in_worker, pickled, rank) for rank in self._unfinished()
            }
            while pending:
                done, pending = wait(pending, _SECONDS_BETWEEN_LOOKS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                on_counts(counts.sum(axis=0).tolist())
        except BrokenProcessPool:
            raise DataError(
                "a worker process died",
                where=f"--workers {self.workers}",
                remedy="Usually memory ran out: use fewer workers, or look for a huge document.",
            ) from None


def check_workers(workers: int, *, is_local: bool = True) -> None:
    """Refuse a number of workers below 1, or too large for this machine if it `is_local`.

    Raises:
        FlagError: With the limit.
    """
    # Not `< 1`, which NaN would pass.
    if not workers >= 1:
        raise FlagError(f"{workers} workers", where="--workers", remedy="Use a number above 0.")
    cores = os.cpu_count() or 1
    most = max(_WORKERS, _WORKERS_PER_CORE * cores)
    if is_local and workers > most:
        raise FlagError(
            f"{workers:,} workers on {counted(cores, 'core')}",
            where="--workers",
            remedy=f"Use {most:,} at most; about one for each core is fastest.",
        )


def run_with_progress(executor: LocalExecutor, label: str, task_bytes: Sequence[int]) -> None:
    """Run the tasks that are not finished, with progress on stderr.

    Args:
        executor: Entered already.
        label: Name of the work.
        task_bytes: Source bytes of every task.

    Raises:
        MeCoError: A task failed, or its worker was killed.
    """
    left = [n for rank, n in enumerate(task_bytes) if not executor.is_rank_completed(rank)]
    if len(left) < len(task_bytes):
        done = len(task_bytes) - len(left)
        print(f"going on: {done:,} of {len(task_bytes):,} tasks are finished", file=sys.stderr)
    with DocumentProgress(label, sum(left)) as progress:

        def note(counts: list[int]) -> None:
            source_bytes, documents, tokens, text_bytes = counts
            progress.update(source_bytes, documents, text_bytes, tokens)

        executor.run(note)


def _start_worker(shared: Any) -> None:
    """Make this process a worker (the pool's initialiser)."""
    # The pool already uses all cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The parent handles Ctrl-C and ends the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    counts = np.frombuffer(shared, dtype=np.int64).reshape(-1, _COUNTS)

    def note(rank: int, *values: int) -> None:
        counts[rank] = values

    report_progress_to(note)


def _warm_up() -> None:
    # gigatoken imports awkward at its first call, which takes most of a second.
    import awkward  # noqa: F401
    import gigatoken  # noqa: F401


@lru_cache(maxsize=1)
def _unpickled(path: Path) -> LocalExecutor:
    executor = pickle.loads(path.read_bytes())
    assert isinstance(executor, LocalExecutor)
    return executor


def _run_in_worker(path: Path, rank: int) -> None:
    _unpickled(path).run_task(rank)


def _exit_with_parent() -> None:
    # A killed parent cannot end its pool, and its workers would wait forever.
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def check_slurm_options(options: dict[str, Any]) -> None:
    """Refuse settings of `SlurmPipelineExecutor` without `time` or `partition`.

    Raises:
        FlagError: One is missing.
    """
    missing = [name for name in ("time", "partition") if name not in options]
    if missing:
        raise FlagError(
            f"Slurm needs {' and '.join(missing)}",
            where="--executor-option",
            remedy="For example: --executor-option time=10:00:00 --executor-option partition=cpu.",
        )


def submit_to_slurm(
    pipeline: list[Any], merge: MergeStep, logs: Path, options: dict[str, Any]
) -> str:
    """Submit the tasks as an array job, and a job that merges them after all have succeeded.

    Args:
        pipeline: The steps of the tasks.
        merge: The step that merges them.
        logs: A permanent folder for Slurm's and datatrove's logs.
        options: Settings of datatrove's `SlurmPipelineExecutor`.

    Returns:
        The id of the second job.

    Raises:
        FlagError: An option is unknown, or `sbatch` failed.
    """
    from datatrove.executor import SlurmPipelineExecutor

    activate = f"source {Path(sys.prefix, 'bin', 'activate')}"
    # The writer skips finished tasks by their own records.
    settings = {"env_command": activate, **options, "skip_completed": False}
    first = _executor_of(
        SlurmPipelineExecutor,
        pipeline=pipeline,
        tasks=merge.num_tasks,
        logging_dir=str(logs / "tasks"),
        **{"job_name": "meco-prepare", **settings},
    )
    second = _executor_of(
        SlurmPipelineExecutor,
        pipeline=[merge],
        tasks=1,
        depends=first,
        logging_dir=str(logs / "merge"),
        **{**settings, "job_name": "meco-merge", "workers": -1, "tasks_per_job": 1},
    )
    try:
        second.run()
    except (OSError, subprocess.CalledProcessError) as error:
        raise FlagError(
            f"sbatch does not work ({error})",
            where="--executor slurm",
            remedy="Submit from a machine of the cluster; what sbatch said is above.",
        ) from None
    return str(second.job_id)


def run_on_ray(
    pipeline: list[Any], tasks: int, workers: int, folder: Path, options: dict[str, Any]
) -> None:
    """Run the tasks on Ray.

    Args:
        pipeline: The steps of the tasks.
        tasks: The number of tasks.
        workers: Tasks that run at once.
        folder: The work folder, which all nodes must reach.
        options: Settings of datatrove's `RayPipelineExecutor`.

    Raises:
        FlagError: Ray is not installed, or an option is unknown.
    """
    try:
        import ray  # noqa: F401
    except ImportError:
        raise FlagError(
            "Ray is not installed",
            where="--executor ray",
            remedy="Install it: pip install 'megatron-meco[ray]'.",
        ) from None
    from datatrove.executor import RayPipelineExecutor

    executor = _executor_of(
        RayPipelineExecutor,
        pipeline=pipeline,
        tasks=tasks,
        workers=workers,
        logging_dir=str(folder / "logs"),
        **{**options, "skip_completed": False},
    )
    executor.run()


def parse_options(words: list[str]) -> dict[str, Any]:
    """Parse `KEY=VALUE` words; values are Python literals where possible, else strings.

    Raises:
        FlagError: A word has no `=`.
    """
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise FlagError(
                f"{word!r} is not KEY=VALUE",
                where="--executor-option",
                remedy="For example: --executor-option partition=cpu.",
            )
        try:
            options[key] = ast.literal_eval(value)
        # Deep nesting stops Python's parser.
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            options[key] = value
    return options


def _executor_of(kind: Any, **settings: Any) -> Any:
    try:
        return kind(**settings)
    except TypeError as error:
        raise FlagError(
            f"{kind.__name__} does not take this ({error})",
            where="--executor-option",
            remedy="Its settings are in datatrove's documentation.",
        ) from None
