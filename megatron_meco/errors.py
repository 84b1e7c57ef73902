"""Errors that a user can act on.

Every refusal of this package is a `MeCoError`: one message that says what is wrong, where (flag,
file, line or value) and what to do about it. Command-line entry points print the message alone and
exit with status 1; a stack trace means a fault of our own.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType


class MeCoError(ValueError):
    """A refusal with a remedy.

    Args:
        what: What is wrong, with the offending value.
        where: The flag, file, line or field that it was found in.
        remedy: What the user can do about it.
    """

    # Megatron raises errors of module constructors anew, as `type(error)(text)`: `where` and
    # `remedy` have defaults for that alone. `original` finds the error itself.
    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(f"{where}: {what}. {remedy}" if where else what)

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the three parts when an error crosses a process border (worker pools pickle it)."""
        return (_rebuild, (type(self), self.what, self.where, self.remedy))

    def original(self) -> MeCoError:
        """The error that was raised first, where this one repeats it."""
        error: BaseException | None = self
        found = self
        while error is not None:
            if isinstance(error, MeCoError) and error.where:
                found = error
            error = error.__cause__ or error.__context__
        return found


def _rebuild(cls: type[MeCoError], what: str, where: str, remedy: str) -> MeCoError:
    return cls(what, where=where, remedy=remedy)


class FlagError(MeCoError):
    """A flag (or the configuration field behind it) that cannot be honoured."""


class DataError(MeCoError):
    """A corpus, metadata file or cache that does not hold what it should."""


def show_refusals_in_one_line() -> None:
    """Have this process print an uncaught `MeCoError` as one line, on rank 0, and exit with 1."""
    stock = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, MeCoError):
            stock(kind, error, traceback)
        elif os.environ.get("RANK", "0") == "0":
            print(f"meco: error: {error.original()}", file=sys.stderr, flush=True)

    sys.excepthook = hook
