"""The documentation: commands parse, links lead somewhere, quoted messages are the code's."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_meco.cli import COMMANDS, command_parser
from megatron_meco.run.run_file import read_run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
names = [str(page.relative_to(ROOT)) for page in PAGES]

# Blocks of code, with what stands before the fence.
_BLOCK = re.compile(r"^```([\w-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`[^`\n]*`")


def blocks(page: Path, *languages: str) -> Iterator[str]:
    for language, text in _BLOCK.findall(page.read_text()):
        if language in languages:
            yield text


def commands(page: Path) -> list[str]:
    """The `meco` command lines in the blocks of a page."""
    text = "".join(blocks(page, "", "bash", "sh"))
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    parts = [part.strip() for line in lines for part in line.split(" && ")]
    return [part for part in parts if part.startswith("meco ")]


def mentions(page: Path) -> list[str]:
    """What a page's prose says of commands, such as `meco plan --build`."""
    code = _CODE.findall(_BLOCK.sub("", page.read_text()))
    return [said.strip("`") for said in code if re.match(r"`meco [a-z]", said)]


@functools.cache
def parser_of(name: str) -> argparse.ArgumentParser:
    return command_parser(name)


def options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from options_of(inner)


@functools.cache
def training_flags() -> frozenset[str]:
    schema = json.loads((ROOT / "megatron_meco/run/schema.json").read_text())
    return frozenset(f"--{key}" for key in schema["properties"])


def mistake(line: str) -> str:
    """What is wrong with a command line, or nothing. Bare dots stand for flags left out."""
    words = shlex.split(re.sub(r" \.\.\.(?= |$)", "", line), comments=True)[1:]
    name, arguments = words[0], words[1:]
    if name not in COMMANDS:
        return f"no command {name}"
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            _, unknown = parser_of(name).parse_known_args(arguments)
    except SystemExit:
        return told.getvalue()
    if COMMANDS[name].takes_training_flags:
        unknown = [
            word for word in unknown if word.startswith("--") and word not in training_flags()
        ]
    return " ".join(unknown)


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_command_parses(page: Path) -> None:
    for line in commands(page):
        assert not mistake(line), f"{line}: {mistake(line)}"


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_commands_and_options_in_prose_exist(page: Path) -> None:
    for said in mentions(page):
        name, *words = said.split()[1:]
        assert name in COMMANDS, said
        known = set(options_of(parser_of(name)))
        if COMMANDS[name].takes_training_flags:
            known |= training_flags()
        assert {word for word in words if word.startswith("-")} <= known, said


@pytest.mark.parametrize(
    "line",
    [
        "meco train run.yaml --dry-rum",
        "meco prepare pages.jsonl --output x",
        "meco tokenizer train pages.jsonl --output x --vocab-size many",
        "meco exprot --load a --output b",
        "meco plan --data-path x --meco-templat y",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    assert mistake(line)


def test_there_are_commands_to_check() -> None:
    assert len({line for page in PAGES for line in commands(page)}) > 30
    assert len({said for page in PAGES for said in mentions(page)}) > 20


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = _BLOCK.sub("", page.read_text())
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_CODE.sub("", _BLOCK.sub("", page.read_text()))):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name Python objects."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def test_the_site_has_every_page() -> None:
    def pages(node: object) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        elif isinstance(node, list):
            for one in node:
                yield from pages(one)
        elif isinstance(node, dict):
            for one in node.values():
                yield from pages(one)

    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=_Loader)
    named = list(pages(settings["nav"]))
    assert sorted(named) == sorted(page.name for page in PAGES[1:])
    assert settings["theme"]["font"] is False, "fonts would be fetched from elsewhere"


@pytest.mark.parametrize("page", PAGES[1:], ids=names[1:])
def test_lists_are_lists_on_the_site(page: Path) -> None:
    # Python-Markdown, unlike GitHub, wants an empty line before a list.
    before = ""
    for line in _BLOCK.sub("", page.read_text()).splitlines():
        if re.match(r"(-|\d+\.) ", line):
            ok = not before or re.match(r"(-|\d+\.) |  ", before)
            assert ok, f"{page.name}: no empty line before {line!r}"
        before = line


@functools.cache
def messages() -> list[str]:
    """The texts in the package's code; NUL stands for a value."""
    found = []
    for path in sorted((ROOT / "megatron_meco").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "\0"
                        for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_quoted_messages_are_those_of_the_code() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text().split("## Installation")[1]
    quoted = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
    assert len(quoted) > 30
    for message in quoted:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("...")), re.DOTALL)
        assert any(pattern.search(said.replace("\0", " ")) for said in messages()), message


def test_run_files_are_read(tmp_path: Path) -> None:
    files = [text for page in PAGES for text in blocks(page, "yaml") if re.match(r"model:", text)]
    assert len(files) >= 5
    for number, text in enumerate(files):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        assert read_run(path, []), text
