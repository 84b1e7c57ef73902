"""Six registers of text that every Python environment of this project holds, and how to read them.

A register is text of one kind from one project, found under one host: C++ headers, Python code,
reference documentation, worked examples, model documentation, READMEs. Files are read and parsed,
never imported. A file becomes documents of at most `MAX_CHARACTERS`, cut at blank lines, without
licence paragraphs. The host of a URL is right; its path names the file.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MIN_CHARACTERS = 200
MAX_CHARACTERS = 700

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "_vendor", "vendored", "idlelib", "turtledemo", "site-packages"}
)
# Tables of characters, and thousands of headers that differ in one name.
_SKIPPED_FOLDERS_OF = {"": frozenset({"encodings", "pydoc_data"}), "torch": frozenset({"ops"})}
_LICENCE = re.compile(
    r"copyright (\(c\)|\d{4}|.{0,3}\d{4})|licensed under the|permission is hereby granted|"
    r"redistribution and use in source|all rights reserved|without warrant(y|ies)|"
    r"spdx-license-identifier|terms of the .{0,40}licen[cs]e|apache.org/licenses",
    re.IGNORECASE,
)
# Badges, pictures and layout in READMEs: a line that is only mark-up, and HTML comments.
_BADGE = re.compile(r"^\s*(\[!\[|!\[|\.\. image::|\.\. \|.*\| image::|(</?\w[^>]*>\s*)+$|<img)")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


@dataclass(frozen=True)
class Register:
    """A kind of text and where it is found.

    Attributes:
        host: The host of its URLs.
        title: What it is, for people.
        url: The URL of a page; `{path}` is the file's path without suffix, `{file}` with it,
            `{name}` the distribution's name.
        read: From a file's text to the text of the register in it.
        distribution: Whose files; empty: the standard library's; None: READMEs of all.
        folder: The folder below the distribution's own that holds them.
        suffix: Of its files.
    """

    host: str
    title: str
    url: str
    read: Callable[[str], Iterator[str]]
    distribution: str | None
    folder: str = ""
    suffix: str = ".py"


@dataclass(frozen=True)
class Page:
    """One file or README: its URL and how to read its documents.

    Attributes:
        host: The register's.
        url: The page's.
        path: The file, or None for a README.
        text: A README's text.
    """

    host: str
    url: str
    path: Path | None = None
    text: str = ""


def whole(text: str) -> Iterator[str]:
    """Yield a text as it is."""
    yield text


def code(text: str) -> Iterator[str]:
    """Yield Python code without its documentation strings."""
    lines: list[str | None] = list(text.splitlines())
    for node, _ in _documented(text):
        string = node.body[0]
        lines[string.lineno - 1 : string.end_lineno] = [None] * (
            (string.end_lineno or string.lineno) - string.lineno + 1
        )
    yield "\n".join(line for line in lines if line is not None)


def documentation(text: str) -> Iterator[str]:
    """Yield the documentation strings in Python code."""
    for _, string in _documented(text):
        yield string


def worked_examples(text: str) -> Iterator[str]:
    """Yield the paragraphs of documentation strings that are sessions with the interpreter."""
    for _, string in _documented(text):
        yield "\n\n".join(part for part in paragraphs(string) if part.lstrip().startswith(">>>"))


def readme(text: str) -> Iterator[str]:
    """Yield a README without badges and comments."""
    lines = _COMMENT.sub("", text).splitlines()
    yield "\n".join(line for line in lines if not _BADGE.match(line))


REGISTERS = (
    Register(
        host="github.com",
        title="Python code (the standard library)",
        url="https://github.com/python/cpython/blob/main/Lib/{file}",
        read=code,
        distribution="",
    ),
    Register(
        host="docs.pytorch.org",
        title="C++ headers (PyTorch)",
        url="https://docs.pytorch.org/cppdocs/{file}",
        read=whole,
        distribution="torch",
        folder="torch/include",
        suffix=".h",
    ),
    Register(
        host="docs.scipy.org",
        title="reference documentation (SciPy)",
        url="https://docs.scipy.org/doc/scipy/{path}",
        read=documentation,
        distribution="scipy",
        folder="scipy",
    ),
    Register(
        host="docs.sympy.org",
        title="worked examples (SymPy)",
        url="https://docs.sympy.org/latest/{path}",
        read=worked_examples,
        distribution="sympy",
        folder="sympy",
    ),
    Register(
        host="huggingface.co",
        title="model documentation (transformers)",
        url="https://huggingface.co/docs/transformers/{path}",
        read=documentation,
        distribution="transformers",
        folder="transformers",
    ),
    Register(
        host="pypi.org",
        title="READMEs (installed packages)",
        url="https://pypi.org/project/{name}/",
        read=readme,
        distribution=None,
    ),
)


def pages(register: Register) -> list[Page]:
    """Return the pages of a register that are on this machine, in an order that looks random.

    The order is that of a hash of the URL: the same on every machine, and a part of it is spread
    over the whole project.
    """
    if register.distribution is None:
        found = [
            Page(
                register.host,
                register.url.format(name=name),
                text=distribution.metadata.get("Description") or "",
            )
            for name, distribution in installed().items()
        ]
    else:
        found = [
            Page(
                register.host,
                register.url.format(path=file.with_suffix("").as_posix(), file=file.as_posix()),
                path,
            )
            for file, path in _files(register)
        ]
    return sorted(found, key=lambda page: digest(page.url))


def documents(register: Register, page: Page) -> list[str]:
    """Return the documents of a page; none where it cannot be read."""
    text = page.text
    if page.path is not None:
        try:
            text = page.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return []
    try:
        parts = list(register.read(text))
    except (SyntaxError, ValueError, RecursionError):
        return []
    return [piece for part in parts for piece in pieces(part)]


def pieces(text: str) -> list[str]:
    """Cut a text at blank lines into documents of a reasonable length.

    Args:
        text: The text.

    Returns:
        Documents of `MIN_CHARACTERS` to `MAX_CHARACTERS`, free of what UTF-8 cannot carry; shorter
        rests are left out, and paragraphs that are longer are cut.
    """
    found = [""]
    for part in paragraphs(text):
        if _LICENCE.search(part):
            continue
        if found[-1] and len(found[-1]) + len(part) + 2 > MAX_CHARACTERS:
            found.append("")
        found[-1] = f"{found[-1]}\n\n{part}" if found[-1] else part
    whole = [piece[:MAX_CHARACTERS].encode("utf-8", "replace").decode() for piece in found]
    return [piece for piece in whole if len(piece) >= MIN_CHARACTERS]


def paragraphs(text: str) -> list[str]:
    """Return what stands between blank lines."""
    return [part.rstrip() for part in re.split(r"\n(?:[ \t]*\n)+", text) if part.strip()]


def installed() -> dict[str, importlib.metadata.Distribution]:
    """Return the installed distributions by name."""
    found = {d.metadata["Name"]: d for d in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(filter(None, found), key=str.lower)}


def digest(text: str) -> bytes:
    """Return a number that looks random and is the same everywhere."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def is_wanted(file: PurePosixPath, distribution: str = "") -> bool:
    """Say whether a file is a source of text: no tests, no bundled copies, no tables."""
    parts = set(file.parts)
    skipped = _SKIPPED_FOLDERS | _SKIPPED_FOLDERS_OF.get(distribution, frozenset())
    return parts.isdisjoint(skipped) and ".." not in parts


def _files(register: Register) -> Iterator[tuple[PurePosixPath, Path]]:
    """Yield (path inside the register's folder, path on this machine)."""
    assert register.distribution is not None
    if not register.distribution:
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        distribution = installed().get(register.distribution)
        if distribution is None:
            return
        root = Path(str(distribution.locate_file(register.folder)))
    for path in root.rglob(f"*{register.suffix}"):
        file = PurePosixPath(path.relative_to(root).as_posix())
        if is_wanted(file, register.distribution):
            yield file, path


def _documented(
    text: str,
) -> Iterator[tuple[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Yield (node, documentation) of all that is documented in Python code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            string = ast.get_docstring(node)
            if string:
                yield node, string
