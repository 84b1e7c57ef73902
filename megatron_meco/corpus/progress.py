"""Progress of a long pass over documents, on stderr.

A terminal gets a live bar with rates and the remaining time. A log file gets one plain line every
ten seconds, because a bar's control characters make a log unreadable. Rates are means since the
start. Call `update` once per chunk, not per document: it reads the clock twice.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megatron_meco.wording import counted

_SECONDS_BETWEEN_LINES = 10.0


class DocumentProgress:
    """Reports the progress of a pass over documents.

    Args:
        label: The work, in one or two words.
        total: The amount of work in any unit (bytes, files); 0 if unknown.
    """

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._begin = time.monotonic()
        self._last_line = self._begin
        self._state = "starting"
        self._bar = _bar() if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._task = self._bar.add_task(self._label, total=self._total or None, state="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._print_line()

    def update(self, done: int, documents: int, text_bytes: int = 0, tokens: int = 0) -> None:
        """Report the state of the pass; all counts are from its beginning.

        Args:
            done: Work done, in the unit of `total`.
            documents: Documents finished.
            text_bytes: Bytes of their text, or 0.
            tokens: Their tokens, or 0.
        """
        seconds = max(time.monotonic() - self._begin, 1e-9)
        self._state = f"{counted(documents, 'document')}  {documents / seconds:,.0f} docs/s"
        if text_bytes:
            rate = text_bytes / seconds
            self._state += f"  {rate / 1e6:.1f} MB/s" if rate >= 5e4 else f"  {rate / 1e3:.1f} kB/s"
        if tokens:
            self._state += f"  {tokens / 1e6 / seconds:.2f} M tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, state=self._state)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._state = f"{100 * done / max(self._total, 1):3.0f} %  {self._state}"
            if 0 < done < self._total:
                self._state += f"  {_duration(seconds * (self._total - done) / done)} left"
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        print(f"{self._label}: {self._state}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{round(seconds)} s" if minutes < 2 else f"{minutes // 60}:{minutes % 60:02d} h"


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


# Called with the task and, of that task so far, source bytes, documents, tokens and text bytes.
type ProgressCallback = Callable[[int, int, int, int, int], None]
_on_progress: ProgressCallback | None = None


def report_progress_to(callback: ProgressCallback | None) -> None:
    """Set the callback for progress of tasks in this process; None: none."""
    global _on_progress
    _on_progress = callback


def tell_progress(
    rank: int, source_bytes: int, documents: int, tokens: int, text_bytes: int
) -> None:
    """Report how far a task is to the callback of this process, if there is one.

    Args:
        rank: The task.
        source_bytes: Bytes of input read.
        documents: Documents written.
        tokens: Tokens written.
        text_bytes: Bytes of text read.
    """
    if _on_progress is not None:
        _on_progress(rank, source_bytes, documents, tokens, text_bytes)
