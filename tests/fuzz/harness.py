"""Runs damaged files and hostile numbers against a target, in processes that may die.

A case is a target and a seed; it mutates files of its own in an empty folder, lets the package read
them and judges what came of it. Allowed are a refusal (one `MeCoError`) and a result that is right.
A signal, a hang, any other exception and a wrong result are failures, named with the command that
runs the case again. Workers are forked from a process that has imported and prepared everything, so
a case costs milliseconds; the parent watches them and replaces those that end.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_meco.errors import MeCoError

SECONDS_PER_CASE = 60.0
_MEMORY = 6 << 30  # bytes that a case may allocate


class Wrong(Exception):
    """A result that a checksum or a structural rule could have told from the right one."""


class Target(ABC):
    """Something that reads files or numbers which may be damaged."""

    name: str

    def prepare(self, folder: Path) -> None:
        """Make what cases start from, once; the folder stays until the last one."""
        return

    @abstractmethod
    def attempt(self, draw: random.Random, folder: Path) -> str:
        """Run one case in an empty folder.

        Returns:
            How it ended: "same", or the reason why a result that is not the same is right.

        Raises:
            MeCoError: A refusal, which is right as well.
            Wrong: See there.
        """


@dataclass(frozen=True)
class Case:
    """One case; the same one does the same."""

    target: str
    seed: int

    def __str__(self) -> str:
        return f"{self.target}:{self.seed}"


@dataclass
class Failure:
    """A case that ended as none may."""

    case: Case
    kind: str
    detail: str

    def __str__(self) -> str:
        command = f'make fuzz ARGS="--only {self.case}"'
        return f"{self.case}: {self.kind}\n    {command}\n{self.detail}".rstrip()


@dataclass
class Report:
    """What came of all cases."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def num_cases(self) -> int:
        """Cases that ended in any way."""
        return sum(counter.total() for counter in self.outcomes.values())

    def add(self, case: Case, outcome: str) -> None:
        """Count a case."""
        self.outcomes.setdefault(case.target, Counter())[outcome] += 1

    def fail(self, case: Case, kind: str, detail: str = "") -> None:
        """Count a case that failed."""
        self.add(case, "FAILED")
        self.failures.append(Failure(case, kind, detail))


def run_case(target: Target, case: Case, folder: Path) -> tuple[str, str]:
    """Run a case here.

    Returns:
        The outcome; and for a failure, what there is to say of it.
    """
    folder.mkdir(parents=True)
    try:
        outcome = target.attempt(random.Random(str(case)), folder)
    except MeCoError as refusal:
        if "\n" in str(refusal) or not refusal.where or not refusal.remedy:
            return "FAILED", f"a refusal that is not one line with a remedy: {refusal!r}"
        return "refused", ""
    except Wrong as wrong:
        return "FAILED", f"wrong: {wrong}"
    except BaseException:
        return "FAILED", traceback.format_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome, ""


def run_all(
    targets: dict[str, Target], cases: Iterable[Case], *, workers: int, seconds: float
) -> Report:
    """Run cases in forked processes.

    Args:
        targets: Prepared targets by name.
        cases: What to run.
        workers: How many at a time.
        seconds: No case is begun later.
    """
    begin = time.monotonic()
    report = Report()
    waiting = iter(cases)
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-") as scratch,
        selectors.DefaultSelector() as selector,
        contextlib.ExitStack() as stack,
    ):
        busy: dict[int, _Worker] = {}

        def start() -> None:
            worker = _Worker(targets, Path(scratch))
            stack.callback(worker.stop)
            if worker.give(next(waiting, None)):
                selector.register(worker.answers, selectors.EVENT_READ, worker)
                busy[worker.pid] = worker

        def end(worker: _Worker) -> None:
            selector.unregister(worker.answers)
            del busy[worker.pid]
            worker.stop()

        for _ in range(workers):
            start()
        while busy:
            for key, _ in selector.select(timeout=1.0):
                worker: _Worker = key.data
                assert worker.case is not None
                answer = worker.answer()
                if answer is None:
                    report.fail(worker.case, worker.died())
                    end(worker)
                    start()
                    continue
                outcome, detail = answer
                if outcome == "FAILED":
                    report.fail(worker.case, detail.strip().splitlines()[-1], detail)
                else:
                    report.add(worker.case, outcome)
                if time.monotonic() - begin > seconds:
                    waiting = iter(())
                if not worker.give(next(waiting, None)):
                    end(worker)
            for worker in list(busy.values()):
                if time.monotonic() - worker.since > SECONDS_PER_CASE:
                    assert worker.case is not None
                    report.fail(worker.case, f"hangs: more than {SECONDS_PER_CASE:.0f} s")
                    end(worker)
                    start()
    report.seconds = time.monotonic() - begin
    return report


class _Worker:
    """A forked process that runs cases one after the other."""

    def __init__(self, targets: dict[str, Target], scratch: Path) -> None:
        self.case: Case | None = None
        self.since = time.monotonic()
        orders, self._orders = os.pipe()
        self.answers, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._orders)
                os.close(self.answers)
                _serve(targets, scratch, os.fdopen(orders), answers)
                status = 0
            finally:
                os._exit(status)
        os.close(orders)
        os.close(answers)
        self._lines = os.fdopen(self.answers, closefd=False)
        self._running = True

    def give(self, case: Case | None) -> bool:
        """Hand over a case; False: there is none left."""
        self.case, self.since = case, time.monotonic()
        if case is None:
            return False
        with contextlib.suppress(BrokenPipeError):  # it died: there will be no answer either
            os.write(self._orders, f"{case.target} {case.seed}\n".encode())
        return True

    def answer(self) -> tuple[str, str] | None:
        """Outcome and detail of the case; None: the process is no more."""
        line = self._lines.readline()
        if not line:
            return None
        outcome, detail = json.loads(line)
        return outcome, detail

    def died(self) -> str:
        """How it ended."""
        self._running = False
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
        return f"ended with status {os.WEXITSTATUS(status)}"

    def stop(self) -> None:
        """End it and wait for it."""
        with contextlib.suppress(OSError):
            os.close(self._orders)
        if self._running:
            self._running = False
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        with contextlib.suppress(OSError):
            os.close(self.answers)


def _serve(targets: dict[str, Target], scratch: Path, orders: Iterable[str], answers: int) -> None:
    """Run what comes in, in a process of its own."""
    # What is printed and warned of is not looked at.
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    sys.stdout = sys.stderr = os.fdopen(nothing, "w")
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in orders:
        name, seed = line.split()
        folder = scratch / f"{os.getpid()}-{name}-{seed}"
        outcome = run_case(targets[name], Case(name, int(seed)), folder)
        os.write(answers, (json.dumps(outcome) + "\n").encode())


def prepared(targets: Iterable[Target], folder: Path) -> Iterator[tuple[str, Target]]:
    """Prepare targets below a folder; by name."""
    for target in targets:
        (folder / target.name).mkdir()
        target.prepare(folder / target.name)
        yield target.name, target
