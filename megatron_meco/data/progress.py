"""How far a long build of a cache is: a bar on a terminal, else a line now and then.

Nothing is said for the first three seconds, which is all that most builds take.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import Progress


class BuildProgress:
    """Says on stderr how far a build is.

    Args:
        label: What is built.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._next = time.monotonic() + 3.0
        self._bar: Progress | None = None

    def __enter__(self) -> BuildProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, share: float) -> None:
        """Note that `share` of the work is done, between 0 and 1."""
        now = time.monotonic()
        if now < self._next:
            return
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = Progress(console=Console(stderr=True), transient=True)
                self._bar.add_task(self._label, total=1.0)
                self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=share)
        else:
            self._next = now + 10.0
            print(f"{self._label}: {100 * share:.0f} %", file=sys.stderr, flush=True)
