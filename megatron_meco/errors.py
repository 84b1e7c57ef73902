"""Errors that a user can act on.

Every refusal is a `MeCoError`: one message that says what is wrong, where (flag, file, line or
value) and what to do about it. Command-line entry points print only the message and exit with
status 1; a stack trace means a bug in this package.
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

    # `where` and `remedy` have defaults because Megatron re-raises errors of module constructors as
    # `type(error)(text)`. `original` finds the first error.
    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(f"{where}: {what}. {remedy}" if where else what)

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the three parts when a worker pool pickles the error."""
        return (_rebuild, (type(self), self.what, self.where, self.remedy))

    def original(self) -> MeCoError:
        """Return the error that was raised first, if this one repeats it."""
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
    """A flag, or its configuration field, with a value that cannot be used."""


class DataError(MeCoError):
    """A corpus, metadata file or cache with wrong or damaged content."""


def show_refusals_in_one_line() -> None:
    """Print an uncaught `MeCoError` of this process as one line, on rank 0; exit with status 1."""
    stock = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, MeCoError):
            stock(kind, error, traceback)
        elif os.environ.get("RANK", "0") == "0":
            print(f"meco: error: {error.original()}", file=sys.stderr, flush=True)

    sys.excepthook = hook
