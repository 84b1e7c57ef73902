"""The largest memory that something takes while a block runs, looked at often."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Peak:
    """Keeps the largest of what `measure` returns inside the block.

    Args:
        measure: Bytes at this moment.
        seconds: Between two looks.

    Attributes:
        bytes: The largest so far; the first look is at the beginning of the block.
        before: What the first look saw.
    """

    def __init__(self, measure: Callable[[], int], seconds: float) -> None:
        self._measure, self._seconds = measure, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Peak:
        """Begin to look."""
        self.before = self.bytes = self._measure()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(self._seconds):
            self.bytes = max(self.bytes, self._measure())
