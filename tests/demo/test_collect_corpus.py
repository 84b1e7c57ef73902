"""The demo's corpus, collected from packages that the tests write."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import collect_corpus
import pytest
import registers
from registers import Register

LICENCE = "Licensed under the Apache License; you may not use this file except in compliance."
SHARED = "A class that was copied."


def sentences(topic: str, number: int = 12) -> str:
    return " ".join(f"Sentence {i} of the documentation of {topic}." for i in range(number))


def write_package(site: Path, name: str) -> None:
    """Write an installed distribution: its metadata, modules, a test, a shared docstring."""
    package = site / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f'"""{sentences(name)}\n\n{LICENCE}\n"""\n')
    body = "\n".join(f"    total += a * {i}" for i in range(30))
    (package / "tools.py").write_text(
        f'def useful(a, total):\n    """{sentences(name + " tools")}"""\n{body}\n\n\n'
        f'class Shared:\n    """{SHARED} {sentences("a copy")}"""\n'
    )
    (package / "broken.py").write_text('"""' + sentences("broken") + '"""\nthis is no Python\n')
    (package / "tests").mkdir()
    (package / "tests" / "test_it.py").write_text(f'"""{sentences("tests")}"""\n')
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\n"
        f"# {name}\n\n[![badge](https://img.example.org)](x)\n\n<!-- a comment -->\n\n"
        f"{sentences('the README of ' + name)}\n"
    )
    (info / "RECORD").write_text(f"{name}/__init__.py,,\n")


def documentation_of(name: str) -> Register:
    return Register(
        host=f"{name}.example.org",
        title=f"documentation of {name}",
        url=f"https://{name}.example.org/docs/{{path}}",
        read=registers.documentation,
        distribution=name,
        folder=name,
    )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site-packages"
    for name in ("alpha", "beta"):
        write_package(site, name)
    found = list(importlib.metadata.distributions(path=[str(site)]))
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    # A worker is a fresh process, which gets the path and not what is patched here.
    monkeypatch.syspath_prepend(str(site))
    return site


def texts_of(register: Register) -> dict[str, str]:
    """All text of a register by URL."""
    return {
        page.url: "\n".join(registers.documents(register, page))
        for page in registers.pages(register)
    }


def test_documentation_is_collected_and_nothing_else(site: Path) -> None:
    texts = texts_of(documentation_of("alpha"))
    assert "documentation of alpha tools" in texts["https://alpha.example.org/docs/tools"]
    assert "documentation of alpha." in texts["https://alpha.example.org/docs/__init__"]
    everything = "".join(texts.values())
    for unwanted in ("documentation of tests", "documentation of broken", LICENCE, "total +="):
        assert unwanted not in everything


def test_code_is_collected_without_its_documentation(site: Path) -> None:
    code = replace(documentation_of("alpha"), read=registers.code)
    text = texts_of(code)["https://alpha.example.org/docs/tools"]
    assert "total += a * 29" in text
    assert "documentation of" not in text


def test_readmes_are_collected_without_badges_and_comments(site: Path) -> None:
    readmes = replace(
        documentation_of("alpha"),
        url="https://pypi.org/project/{name}/",
        read=registers.readme,
        distribution=None,
    )
    texts = texts_of(readmes)
    assert texts.keys() == {f"https://pypi.org/project/{name}/" for name in ("alpha", "beta")}
    assert "the README of beta" in texts["https://pypi.org/project/beta/"]
    for unwanted in ("badge", "a comment"):
        assert unwanted not in "".join(texts.values())


def test_only_sessions_are_worked_examples() -> None:
    source = f'"""{sentences("prose")}\n\n>>> 1 + 1\n2\n\nMore prose.\n\n>>> 2 + 2\n4\n"""\n'
    assert list(registers.worked_examples(source)) == [">>> 1 + 1\n2\n\n>>> 2 + 2\n4"]


@pytest.mark.parametrize("length", [50, 199, 200, 699, 700, 701, 5000])
def test_no_document_is_too_long_or_too_short(length: int) -> None:
    text = "\n\n".join(["x" * 300, "y" * length, "z" * 300])
    found = registers.pieces(text)
    assert found
    assert all(200 <= len(piece) <= 700 for piece in found)


def test_a_missing_distribution_has_no_pages() -> None:
    assert registers.pages(documentation_of("never-installed")) == []


def test_a_text_that_two_registers_have_is_in_neither(site: Path) -> None:
    found = collect_corpus.collect([documentation_of("alpha"), documentation_of("beta")], 10**6, 1)
    assert all(found.values())
    everything = [document.text for group in found.values() for document in group]
    assert not any(SHARED in text for text in everything)
    assert len(set(everything)) == len(everything)


def test_a_text_counts_once_in_its_register(site: Path) -> None:
    (site / "alpha" / "copy.py").write_text((site / "alpha" / "tools.py").read_text())
    found = collect_corpus.read_register(documentation_of("alpha"), 10**6)
    assert sum(SHARED in document.text for document in found) == 1


def test_the_files_do_not_depend_on_the_workers(site: Path, tmp_path: Path) -> None:
    contents = []
    for workers in (1, 2):
        paths = [tmp_path / f"{name}-{workers}.jsonl" for name in ("corpus", "held-out")]
        registers_found = [documentation_of("alpha"), documentation_of("beta")]
        collect_corpus.write(
            *paths, collect_corpus.collect(registers_found, 10**6, workers).values()
        )
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]
    assert not list(tmp_path.glob("*.tmp*"))


def many(host: str, number: int = 200) -> list[collect_corpus.Document]:
    """Documents of a register as `read_register` divides them, one page each."""
    shares = [0.12, 0.19]
    return [
        collect_corpus.Document(
            text=sentences(f"{host} {i}"),
            url=f"https://{host}/{i}",
            part=["held-out", "validation", "train"][sum(i / number >= share for share in shares)],
        )
        for i in range(number)
    ]


def test_every_document_has_text_and_one_url(tmp_path: Path) -> None:
    groups = [many("a.example.org"), many("b.example.org")]
    corpus, held_out = tmp_path / "corpus.jsonl", tmp_path / "held-out.jsonl"
    collect_corpus.write(corpus, held_out, groups)
    documents = [json.loads(line) for line in corpus.read_text().splitlines()]
    kept_out = [json.loads(line) for line in held_out.read_text().splitlines()]
    assert all(document.keys() == {"text", "url"} for document in documents + kept_out)
    assert {d["url"] for d in documents}.isdisjoint(d["url"] for d in kept_out)
    assert len(documents) + len(kept_out) == 400
    parts = [urlsplit(document["url"]) for document in documents]
    assert {part.scheme for part in parts} == {"https"}
    assert {part.netloc for part in parts} == {"a.example.org", "b.example.org"}


def test_registers_are_mixed_and_validation_is_last(tmp_path: Path) -> None:
    """Validation takes the end of the file, which must not be one register."""
    groups = [many(f"{letter}.example.org") for letter in "abcdefgh"]
    corpus = tmp_path / "corpus.jsonl"
    collect_corpus.write(corpus, tmp_path / "held-out.jsonl", groups)
    urls = [json.loads(line)["url"] for line in corpus.read_text().splitlines()]
    hosts = [urlsplit(url).netloc for url in urls]
    assert sum(a == b for a, b in pairwise(hosts)) < len(hosts) / 2
    validation = {d.url for group in groups for d in group if d.part == "validation"}
    assert set(urls[-len(validation) :]) == validation


def test_the_documents_of_a_page_stay_together(site: Path) -> None:
    """Otherwise validation and the classifier would see the rest of pages of the training."""
    long = "\n\n".join(sentences(f"part {i}") for i in range(40))
    (site / "alpha" / "long.py").write_text(f'"""{long}"""\n')
    found = collect_corpus.read_register(documentation_of("alpha"), 10**6)
    parts: dict[str, set[str]] = {}
    for document in found:
        parts.setdefault(document.url, set()).add(document.part)
    assert all(len(of_page) == 1 for of_page in parts.values())
