"""The demo's corpus, collected from packages that the tests write."""

from __future__ import annotations

import importlib.metadata
import json
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from examples.local_demo import collect_corpus

LICENCE = "Licensed under the Apache License; you may not use this file except in compliance."


def sentences(topic: str, number: int = 12) -> str:
    return " ".join(f"Sentence {i} of the documentation of {topic}." for i in range(number))


def write_package(site: Path, name: str, *, url_label: str, url: str) -> None:
    """Write an installed distribution: its metadata, two modules, a test, a shared docstring."""
    package = site / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f'"""{sentences(name)}\n\n{LICENCE}\n"""\n')
    (package / "tools.py").write_text(
        f'def useful(a, b):\n    """{sentences(name + " tools")}"""\n\n\n'
        f'class Shared:\n    """{sentences("a class that was copied", 30)}"""\n'
    )
    (package / "broken.py").write_text('"""' + sentences("broken") + '"""\nthis is no Python\n')
    (package / "tests").mkdir()
    (package / "tests" / "test_it.py").write_text(f'"""{sentences("tests")}"""\n')
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nProject-URL: {url_label}, {url}\n\n"
        f"# {name}\n\n[![badge](https://img.example.org)](x)\n\n"
        f"{sentences('the README of ' + name)}\n"
    )
    files = ["__init__.py", "tools.py", "broken.py", "tests/test_it.py"]
    (info / "RECORD").write_text("".join(f"{name}/{file},,\n" for file in files))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site-packages"
    write_package(site, "alpha", url_label="Documentation", url="https://alpha.example.org/docs/")
    write_package(site, "beta", url_label="Source", url="https://github.com/someone/beta")
    install(site, monkeypatch)
    return site


def install(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the distributions in a folder the only ones that are installed."""
    found = list(importlib.metadata.distributions(path=[str(site)]))
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)


def collect(path: Path, workers: int = 1) -> list[dict[str, str]]:
    sources = list(collect_corpus.installed_sources(1e6))
    collect_corpus.write_corpus(path, sources, workers, 0)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_document_has_text_and_one_url(site: Path, tmp_path: Path) -> None:
    documents = collect(tmp_path / "corpus.jsonl")
    assert all(document.keys() == {"text", "url"} for document in documents)
    parts = [urlsplit(document["url"]) for document in documents]
    assert {part.scheme for part in parts} == {"https"}
    assert {part.netloc for part in parts} == {"alpha.example.org", "github.com"}


def test_what_is_collected_and_what_is_not(site: Path, tmp_path: Path) -> None:
    documents = collect(tmp_path / "corpus.jsonl")
    urls = {document["text"].split("\n")[0]: document["url"] for document in documents}
    assert urls["# alpha"] == "https://alpha.example.org/docs/"
    assert urls["alpha.tools"] == "https://alpha.example.org/docs/alpha/tools"
    assert urls["beta.tools"] == "https://github.com/someone/beta/blob/main/beta/tools.py"
    everything = "".join(document["text"] for document in documents)
    assert "documentation of alpha tools" in everything
    for unwanted in ("documentation of tests", "documentation of broken", LICENCE, "badge"):
        assert unwanted not in everything


def test_a_copied_class_counts_once(site: Path, tmp_path: Path) -> None:
    documents = collect(tmp_path / "corpus.jsonl")
    bodies = [document["text"].partition("\n")[2] for document in documents]
    assert len(set(bodies)) == len(bodies)
    assert sum("a class that was copied" in body for body in bodies) == 1


def test_the_file_does_not_depend_on_the_workers(site: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{workers}.jsonl" for workers in (1, 2)]
    for workers, file in enumerate(files, start=1):
        collect(file, workers)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not list(tmp_path.glob("*.tmp*"))


def test_sources_are_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation takes the end of the file, which must not be one package."""
    for letter in "abcdefgh":
        url = f"https://{letter}.example.org"
        write_package(tmp_path / "site", letter * 3, url_label="Homepage", url=url)
    install(tmp_path / "site", monkeypatch)
    hosts = [urlsplit(d["url"]).netloc for d in collect(tmp_path / "corpus.jsonl")]
    neighbours = sum(a == b for a, b in pairwise(hosts))
    assert neighbours < len(hosts) / 2
