"""Errors that a user can act on.

Every refusal of this package is a `MeCoError`: one message that says what is wrong, where (flag,
file, line or value) and what to do about it. Command-line entry points print the message alone and
exit with status 1; a stack trace is reserved for our own mistakes. Costs nothing; what was given up
is catching broad exception types anywhere, so an unforeseen failure stays loud.
"""

from __future__ import annotations


class MeCoError(ValueError):
    """A refusal with a remedy.

    Args:
        what: What is wrong, with the offending value.
        where: The flag, file, line or field that it was found in.
        remedy: What the user can do about it.
    """

    def __init__(self, what: str, *, where: str, remedy: str) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(f"{where}: {what}. {remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the three parts when an error crosses a process border (worker pools pickle it)."""
        return (_rebuild, (type(self), self.what, self.where, self.remedy))


def _rebuild(cls: type[MeCoError], what: str, where: str, remedy: str) -> MeCoError:
    return cls(what, where=where, remedy=remedy)


class FlagError(MeCoError):
    """A flag (or the configuration field behind it) that cannot be honoured."""


class DataError(MeCoError):
    """A corpus, metadata file or cache that does not hold what it should."""
