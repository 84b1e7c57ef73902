"""The peak of a memory measure while a block runs, by sampling."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Peak:
    """Keeps the largest value of `measure` inside the block.

    Args:
        measure: Bytes at this moment.
        seconds: Between two samples.

    Attributes:
        bytes: The largest so far; the first sample is taken at the beginning of the block.
        before: The first sample.
    """

    def __init__(self, measure: Callable[[], int], seconds: float) -> None:
        self._measure, self._seconds = measure, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Peak:
        """Begin sampling."""
        self.before = self.bytes = self._measure()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End sampling."""
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(self._seconds):
            self.bytes = max(self.bytes, self._measure())
