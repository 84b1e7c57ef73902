"""Read YAML in its plainest form: keys with scalars, lists or keys, each with its line.

PyYAML finds the structure (its events, nothing is constructed); what a scalar means is left to the
reader of the value, who knows its type. So `1e-4`, `010`, `on` and `1:30` mean the same with every
version of YAML, or are refused. Anchors, tags, several documents, deep nesting, files that are not
plain or larger than 1 MiB are refused, each in one line.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_meco.errors import MeCoError

_LARGEST = 1 << 20
_DEEPEST = 4
_END_OF_TEXT = "unexpected end of stream"
_END_OF_TOKENS = "but got '<stream end>'"
_NO_COLON = "could not find expected ':'"
# What PyYAML says, what it means in a run file, and the remedy.
_PROBLEMS = (
    (
        "'\\t' that cannot start",
        "a tab, where YAML wants spaces",
        "Indent with spaces.",
    ),
    (
        "mapping values are not allowed",
        "a colon where no key can stand",
        "Quote a value that holds `: `, as in meco-template: 'URL: {url.host}\\n\\n'; or mend the "
        "indentation.",
    ),
    (_NO_COLON, "a line that is not `key: value`", "Write `key: value`."),
    ("found unknown escape", "a backslash that YAML does not know", "Use single quotes."),
    ("that cannot start any token", None, "Quote the value."),
    (_END_OF_TEXT, "a quote that is not closed", "Close it."),
    (_END_OF_TOKENS, "a bracket or brace that is not closed", "Close it."),
    (
        "expected <block end>",
        "more text behind a closed quote, bracket or brace",
        "Quote the whole value.",
    ),
    (
        "sequence entries are not allowed",
        "a dash where no list can begin",
        "Quote the value, or write each item of a list on a line of its own.",
    ),
)


class RunFileError(MeCoError):
    """A run file that does not say what to run; `where` is `FILE:LINE`."""


@dataclass(frozen=True)
class Scalar:
    """A value.

    Attributes:
        text: As it is written, without quotes.
        plain: Whether it has no quotes, so that `true` is a boolean and `3` a number.
        line: Where it begins, from 1; 0 for a value from the command line.
    """

    text: str
    plain: bool
    line: int


@dataclass(frozen=True)
class Items:
    """A list, and its line."""

    items: tuple[Node, ...]
    line: int


@dataclass(frozen=True)
class Entries:
    """Keys and their values in order, and the line of the first."""

    entries: tuple[tuple[Scalar, Node], ...]
    line: int


type Node = Scalar | Items | Entries


def read_text(path: Path) -> str:
    """Read a file that a person wrote.

    Args:
        path: A plain file of UTF-8, at most 1 MiB.

    Raises:
        RunFileError: It is none, or cannot be read.
    """
    where = str(path)
    try:
        mode = os.stat(path).st_mode
        data = b""
        # A pipe would be waited for.
        if stat.S_ISREG(mode):
            with path.open("rb") as file:
                data = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RunFileError(
            f"cannot be read ({reason})", where=where, remedy="Name a YAML file."
        ) from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a plain file"
        raise RunFileError(f"is {kind}", where=where, remedy="Name a YAML file.")
    if len(data) > _LARGEST:
        raise RunFileError(
            f"is larger than {_LARGEST:,} bytes, so it is no run file",
            where=where,
            remedy="Name the file that describes the run, not its data.",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RunFileError(
            "is not text in UTF-8", where=f"{path}:{line}", remedy="Save the file as UTF-8."
        ) from None


def parse(text: str, name: str) -> Entries:
    """Parse what `read_text` gave.

    Args:
        text: YAML: keys with values.
        name: The file, for messages.

    Raises:
        RunFileError: It is no YAML, or YAML beyond the plain form.
    """
    try:
        root = _Parser(yaml.parse(text, Loader=yaml.SafeLoader), name).root()
    except RunFileError:
        raise
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RunFileError(
            f"an unprintable character (code {_code(error.character):#x})",
            where=f"{name}:{line}",
            remedy="Take it out.",
        ) from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, name) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise RunFileError(f"is not YAML ({error})", where=name, remedy="Mend it.") from None
    if root is None:
        raise RunFileError("holds no key", where=name, remedy="Write one `key: value` a line.")
    if not isinstance(root, Entries):
        kind = "a list" if isinstance(root, Items) else "one value"
        raise RunFileError(
            f"is {kind}, not keys with values",
            where=f"{name}:{root.line}",
            remedy="Write one `key: value` a line.",
        )
    return root


def parse_value(text: str, name: str) -> Node | None:
    """Parse the value of `--set key=value`, written as in a file; None where it is empty.

    Raises:
        RunFileError: It is no YAML.
    """
    try:
        return _Parser(yaml.parse(text, Loader=yaml.SafeLoader), name, in_file=False).root()
    except RunFileError:
        raise
    except yaml.reader.ReaderError:
        problem, remedy = "an unprintable character", "Take it out."
    except yaml.MarkedYAMLError as error:
        problem, remedy = _explain(error)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        problem, remedy = f"is not YAML ({error})", "Write the value as in the file."
    raise RunFileError(problem, where=name, remedy=remedy)


class _Parser:
    """Builds nodes from PyYAML's events, one level of Python calls for each level of nesting."""

    def __init__(self, events: Iterator[yaml.Event], name: str, *, in_file: bool = True) -> None:
        self._events = events
        self._name = name
        self._in_file = in_file

    def _line(self, event: yaml.Event) -> int:
        return event.start_mark.line + 1 if self._in_file else 0

    def _place(self, line: int) -> str:
        return f"{self._name}:{line}" if self._in_file else self._name

    def root(self) -> Node | None:
        """The one document; None for an empty one."""
        found: Node | None = None
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._error(event, "a second document (`---`)", "Write one run a file.")
                found = self._node(next(self._events), 1)
        if isinstance(found, Scalar) and found.plain and not found.text:
            return None
        return found

    def _node(self, event: yaml.Event, depth: int) -> Node:
        line = self._line(event)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise self._error(event, "anchors and aliases (& and *)", "Write the value out.")
        # PyYAML tags a quoted scalar `!` in some places and leaves it in others.
        if getattr(event, "tag", None) not in (None, "!"):
            raise self._error(event, f"the tag {event.tag}", "Write the plain value.")
        if isinstance(event, yaml.ScalarEvent):
            plain = event.style is None
            if plain and event.end_mark.line != event.start_mark.line:
                raise self._error(
                    event,
                    "a value without quotes that goes on over several lines",
                    "Write it on one line, or quote it.",
                    allowed=False,
                )
            return Scalar(event.value, plain, line)
        if depth >= _DEEPEST:
            raise self._error(
                event, f"more than {_DEEPEST - 1} levels of nesting", "Write it flat."
            )
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            for inner in iter(lambda: next(self._events), None):
                if isinstance(inner, yaml.SequenceEndEvent):
                    break
                items.append(self._node(inner, depth + 1))
            return Items(tuple(items), line)
        return self._entries(line, depth)

    def _entries(self, line: int, depth: int) -> Entries:
        entries: list[tuple[Scalar, Node]] = []
        lines: dict[str, int] = {}
        for event in iter(lambda: next(self._events), None):
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self._node(event, depth + 1)
            if not isinstance(key, Scalar):
                raise self._error(
                    event,
                    "a key that is a list or keys itself",
                    "Quote a value that begins with a bracket or brace.",
                    allowed=False,
                )
            if key.text == "<<" and key.plain:
                raise self._error(event, "merged keys (<<)", "Write the keys out.")
            same = key.text.replace("_", "-")
            if same in lines:
                raise RunFileError(
                    f"{key.text} is given twice, first on line {lines[same]}",
                    where=self._place(key.line),
                    remedy="Keep one of them.",
                )
            lines[same] = key.line
            entries.append((key, self._node(next(self._events), depth + 1)))
        return Entries(tuple(entries), line)

    def _error(
        self, event: yaml.Event, what: str, remedy: str, *, allowed: bool = True
    ) -> RunFileError:
        return RunFileError(
            f"{what}, which a run file does not have" if allowed else what,
            where=self._place(self._line(event)),
            remedy=remedy,
        )


def _syntax_error(error: yaml.MarkedYAMLError, name: str) -> RunFileError:
    problem, remedy = _explain(error)
    # What is not closed is found missing at the end of the file; it begins elsewhere.
    late = any(text in str(error.problem) for text in (_END_OF_TEXT, _END_OF_TOKENS, _NO_COLON))
    begun = late and error.context_mark is not None
    mark = error.context_mark if begun else error.problem_mark
    where = name if mark is None else f"{name}:{mark.line + 1}"
    return RunFileError(problem, where=where, remedy=remedy)


def _explain(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    told = " ".join(str(error.problem or error.context or "is not YAML").split())
    for text, what, remedy in _PROBLEMS:
        if text in told:
            return what or told, remedy
    return f"is not YAML ({told})", "Mend the line, or quote the value."


def _code(character: object) -> int:
    return ord(character) if isinstance(character, str) else int(str(character))
