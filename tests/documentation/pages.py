"""What the documentation tells a reader to type or to save, in the order of its pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from runs import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.ipynb")),
]
# What a reader would type is in blocks of these languages; what is shown is in others.
SHELL = ("", "bash", "sh", "shell", "console")

_BLOCK = re.compile(r"^```([\w-]*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SAVED = re.compile(r"Save this\s+as\s+`([^`]+)`")
_ADDED = re.compile(r"[Aa]dd a\s+line\s+to\s+`([^`]+)`")
_HERE_DOCUMENT = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?")


def name_of(page: Path) -> str:
    """Path of a page in the repository."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Step:
    """One thing that a reader does.

    Attributes:
        line: Line of the page, or cell of the notebook, from 1.
        kind: `shell` (a command), `python` (a program), `save` or `append` (a file's content).
        text: The command, the program or the content.
        file: Name of the file, for `save` and `append`.
        shown: The output that the page shows of a command.
    """

    line: int
    kind: str
    text: str
    file: str = ""
    shown: str = ""


def steps_of(page: Path, small: Mapping[str, str] | None = None) -> Iterator[Step]:
    """Return the steps of a page or a notebook.

    Args:
        page: The page.
        small: Texts, and what stands in their place.
    """
    if page.suffix == ".ipynb":
        for number, text in enumerate(_cells(page), 1):
            yield from _steps_of_cell(number, _replaced(text, small or {}))
    else:
        yield from _steps_of_text(_replaced(page.read_text(), small or {}))


def text_of(page: Path) -> str:
    """The text of a page, or that of a notebook's cells of code."""
    return "".join(_cells(page)) if page.suffix == ".ipynb" else page.read_text()


def _cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code"]


def _replaced(text: str, small: Mapping[str, str]) -> str:
    for old, new in small.items():
        text = text.replace(old, new)
    return text


def _steps_of_cell(number: int, text: str) -> Iterator[Step]:
    magic, _, content = text.partition("\n")
    match magic.split():
        case ["%%bash", "-e"]:
            for _, command in commands(content):
                yield Step(number, "shell", command)
        case ["%%writefile", name]:
            yield Step(number, "save", content, name)
        case ["%%writefile", "-a", name]:
            yield Step(number, "append", content, name)
        case _:
            yield Step(number, "shell", text)


def _steps_of_text(text: str) -> Iterator[Step]:
    for match in _BLOCK.finditer(text):
        language, content = match.groups()
        line = text.count("\n", 0, match.start()) + 2
        before = text[: match.start()].rstrip().rpartition("\n\n")[2]
        saved, added = _SAVED.search(before), _ADDED.search(before)
        if language in SHELL:
            after = _BLOCK.match(text, match.end() + len("\n\n"))
            shown = after[2] if after is not None and after[1] == "text" else ""
            *first, (offset, last) = commands(content)
            for number, command in first:
                yield Step(line + number, "shell", command)
            yield Step(line + offset, "shell", last, shown=shown)
        elif saved:
            yield Step(line, "save", content, saved[1])
        elif added:
            yield Step(line, "append", content, added[1])
        elif language == "python":
            yield Step(line, "python", content)


def commands(block: str) -> Iterator[tuple[int, str]]:
    """Return the commands of a block of shell, with the number of lines before each."""
    lines = block.splitlines()
    number = 0
    while number < len(lines):
        begin = number
        while lines[number].endswith("\\") and number + 1 < len(lines):
            number += 1
        end_mark = _HERE_DOCUMENT.search(lines[number])
        if end_mark:
            number = lines.index(end_mark[1], number)
        number += 1
        command = "\n".join(lines[begin:number])
        if command.strip() and not command.lstrip().startswith("#"):
            yield begin, command


def blocks_in(page: Path, language: str) -> list[str]:
    """Return the contents of a page's blocks of a language."""
    return [text for found, text in _BLOCK.findall(page.read_text()) if found == language]
