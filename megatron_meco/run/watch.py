"""`meco watch`: a training run as a person wants to see it, from its log.

A terminal gets a live bar: phase, steps, loss, tokens per second, time left. Anything else gets a
line at every tenth of the run. Checkpoints, the switch, validation and warnings are printed as they
come. `meco train` shows its own runs by the same code.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from megatron_meco.errors import MeCoError
from megatron_meco.run.endings import has_failed, last_lines, meaning_of, refusal_in, tail_of
from megatron_meco.run.run_folder import last_log, lock_of
from megatron_meco.run.training_log import (
    Event,
    Message,
    Phases,
    Saved,
    Step,
    TrainingLog,
    Validation,
)

_POLL_SECONDS = 0.2
# A run that was started by other means is over when it is complete and says nothing for this long.
_QUIET_SECONDS = 20
_HANG_SECONDS = 300


def add_watch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco watch`."""
    parser.add_argument(
        "log", type=Path, metavar="LOG", help="A run's log, or the folder of a `meco train` run."
    )
    parser.add_argument(
        "--once", action="store_true", help="Show what there is, and do not wait for more."
    )


def run_watch(args: argparse.Namespace) -> int:
    """Run `meco watch`; 1 where the run has failed."""
    path: Path = args.log
    log = last_log(path) if path.is_dir() else path
    if log is None or not log.is_file():
        raise MeCoError(
            "holds no log of `meco train`" if path.is_dir() else "is not a file",
            where=str(path),
            remedy="Name the log of a run, or the folder that it saves into.",
        )
    follower = Follower(log)
    if path.is_dir():
        follower.say(f"log {log}")
    status = follower.follow(
        lambda: 0 if args.once else follower.ended(lock_of(log)), tells_of_waiting=not args.once
    )
    return follower.conclude(status, is_over=not args.once)


class Follower:
    """Shows a run from its log.

    Args:
        log: The file; it may still be written.
        console: Where to; None: stderr for a terminal's bar and messages alike.
    """

    def __init__(self, log: Path, console: Console | None = None) -> None:
        self._path = log
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._log = TrainingLog()
        self._begin = time.monotonic()
        self._heard = time.monotonic()
        self._quiet_told = False
        self._caught_up = False
        self._bar = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task("starting", total=None, state="Megatron is being loaded")

    def say(self, text: str, style: str = "") -> None:
        """Print a line above the bar."""
        self._console.print(escape(text), style=style or None)

    def follow(self, poll: Callable[[], int | None], *, tells_of_waiting: bool = False) -> int:
        """Show the log as it grows.

        Args:
            poll: The exit status of the run, or None while it is going.
            tells_of_waiting: Say so if the log holds no training step yet.

        Returns:
            The status.
        """
        with self._bar, self._path.open("rb") as file:
            rest = b""
            while True:
                # Asked first: what the run wrote before it ended is still to be read.
                status = poll()
                rest = self._read(file, rest)
                if not self._caught_up:
                    self._caught_up = True
                    # A log that ended long ago is not waited for.
                    age = time.time() - self._path.stat().st_mtime
                    self._heard = time.monotonic() - max(0.0, age)
                    if tells_of_waiting and status is None:
                        self._tell_of_waiting()
                if status is not None:
                    if rest:
                        self._take(rest)
                    return status
                self._warn_of_silence()
                time.sleep(_POLL_SECONDS)

    def ended(self, lock: Path | None) -> int | None:
        """The status of a run that another process started, or None while it may be going."""
        quiet = time.monotonic() - self._heard
        if lock is not None and lock.exists():
            return None if _is_locked(lock) else self._status()
        if not self._caught_up or quiet < _QUIET_SECONDS:
            return None
        return self._status() if self._log.is_complete or has_failed(tail_of(self._path)) else None

    def conclude(self, status: int, *, is_over: bool = True) -> int:
        """Say how a run ended; returns `meco`'s exit status."""
        if status != 0:
            self._explain()
            return 1
        last, first = self._log.last, self._log.first
        if last is None or first is None:
            self.say(
                "ended without a training step; the log says why"
                if is_over
                else f"no training step in {self._path}",
                "yellow",
            )
            return 0
        done = "done" if self._log.is_complete else "so far"
        steps = last.iteration - first.iteration + 1
        parts = [f"{done}: iteration {last.iteration:,} of {last.num_iterations:,}"]
        parts.append(f"loss {first.loss:.3f} -> {last.loss:.3f} over {steps:,} iterations")
        if self._log.saved is not None:
            saved = self._log.saved
            parts.append(f"last checkpoint {saved.iteration:,} in {saved.folder}")
        self.say("; ".join(parts))
        return 0

    def _status(self) -> int:
        return int(has_failed(tail_of(self._path)))

    def _read(self, file: BinaryIO, rest: bytes) -> bytes:
        while chunk := file.read(1 << 20):
            self._heard, self._quiet_told = time.monotonic(), False
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._take(line)
        return rest

    def _take(self, line: bytes) -> None:
        # A bar of another program writes over its own line.
        text = line.decode("utf-8", errors="replace").rstrip("\r").rpartition("\r")[2]
        event = self._log.feed(text)
        if event is not None:
            self._show(event)

    def _show(self, event: Event) -> None:
        if isinstance(event, Step):
            self._show_step(event)
        elif isinstance(event, Phases):
            self.say(event.describe())
        elif isinstance(event, Saved):
            self.say(f"checkpoint of iteration {event.iteration:,} in {event.folder}", "green")
        elif isinstance(event, Validation):
            self._show_validation(event)
        elif isinstance(event, Message):
            prefix = "warning: " if event.is_warning else ""
            self.say(f"{prefix}{event.text}", "yellow" if event.is_warning else "")

    def _show_step(self, step: Step) -> None:
        phases = self._log.phases
        phase = phases.phase_of(step.iteration) if phases is not None else "training"
        parts = [f"{step.iteration:,}/{step.num_iterations:,}", f"loss {step.loss:.3f}"]
        rate = self._log.tokens_per_second()
        if rate is not None:
            parts.append(f"{rate:,.0f} tokens/s")
        left = self._log.seconds_left()
        parts.append(f"{clock(left or 0.0)} left")
        state = "  ".join(parts)
        self._bar.update(
            self._task,
            description=phase,
            completed=step.iteration,
            total=step.num_iterations,
            state=state,
        )
        if step.nan or step.skipped or not math.isfinite(step.loss):
            self.say(
                f"warning: up to iteration {step.iteration:,}: loss {step.loss:.3f}, "
                f"{step.skipped} steps skipped, {step.nan} with a loss that is no number",
                "yellow",
            )
        tenth = max(1, step.num_iterations // 10)
        if not self._console.is_terminal and step.iteration % tenth == 0:
            self.say(f"{phase:<11} {state}")

    def _show_validation(self, validation: Validation) -> None:
        names = {
            "conditioned": "with metadata",
            "plain": "without",
            "shuffled": "with wrong",
            "shuffled minus conditioned": "wrong minus right",
            "": "",
        }

        def shown(losses: dict[str, float]) -> str:
            parts = [
                " ".join(filter(None, [f"{value:.3f}", names.get(name, name)]))
                for name, value in losses.items()
            ]
            return ", ".join(parts)

        phases = self._log.phases
        at_switch = phases is not None and validation.iteration in (
            phases.start_iteration,
            phases.switch_iteration,
        )
        note = " (at the switch)" if at_switch else ""
        whole = shown(validation.losses)
        self.say(f"iteration {validation.iteration:,}{note}: validation loss {whole}")
        for name, losses in validation.sets.items():
            self.say(f"  validation set {name}: {shown(losses)}")

    def _tell_of_waiting(self) -> None:
        if self._log.last is not None:
            return
        what = "is empty" if self._path.stat().st_size == 0 else "holds no training step"
        self.say(
            f"{self._path} {what} so far; waiting for the first step. Ctrl-C ends this, not a run"
        )

    def _warn_of_silence(self) -> None:
        quiet = time.monotonic() - self._heard
        longest = max([_HANG_SECONDS / 20, *self._log.recent_seconds]) * 20
        if quiet > longest and not self._quiet_told:
            self._quiet_told = True
            self.say(
                f"warning: the log has not grown for {clock(quiet)}; a rank may hang", "yellow"
            )

    def _explain(self) -> None:
        text = tail_of(self._path)
        refusal = refusal_in(text)
        if refusal is not None:
            self.say(f"meco: error: {refusal}", "red")
            return
        last = self._log.last
        at = (
            f" after iteration {last.iteration:,}" if last is not None else " before the first step"
        )
        self.say(f"the run failed{at}. Its last lines:", "red")
        for line in last_lines(text):
            self.say(f"  {line}")
        meaning = meaning_of(text)
        if meaning is not None:
            self.say(f"What it means: {meaning}")
        self.say(f"The whole log: {os.path.relpath(self._path)}")


def clock(seconds: float) -> str:
    """Days, hours, minutes and seconds as `2 d 3:04:05`, `3:04:05` or `4:05`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def _is_locked(lock: Path) -> bool:
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False
