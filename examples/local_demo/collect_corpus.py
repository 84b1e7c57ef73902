"""Collect the demo's corpus from the Python environment that runs it: real text, no download.

Documents are the README texts of the installed distributions and the documentation strings of
their modules and classes and of the standard library's, each with one URL from the package
metadata. Sources are parsed with `ast` and never imported. Costs about half a minute on two cores;
the time goes into parsing, so what is parsed of one distribution is capped. Given up: documentation
of compiled modules (it exists only after an import) and page-exact URLs; a demo of metadata
conditioning needs hosts that are right, and those are.

    python examples/local_demo/collect_corpus.py --output demo-output/corpus.jsonl
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import re
import sys
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from megatron_meco.corpus.progress import DocumentProgress

_MIN_CHARACTERS = 200
_MAX_CHARACTERS = 20_000
_MIN_DOCUMENTED_SHARE = 0.1
# Below this a class is told together with its module.
_MIN_CLASS_CHARACTERS = 800

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "_vendor", "vendored", "idlelib", "turtledemo", "site-packages"}
)
_LICENCE = re.compile(
    r"copyright (\(c\)|\d{4}|.{0,3}\d{4})|licensed under the|permission is hereby granted|"
    r"redistribution and use in source|all rights reserved|without warrant(y|ies)|"
    r"spdx-license-identifier|terms of the .{0,40}licen[cs]e|apache.org/licenses",
    re.IGNORECASE,
)
# Badges, pictures and layout in READMEs: a line that is only mark-up, and HTML comments.
_BADGE = re.compile(r"^\s*(\[!\[|!\[|\.\. image::|\.\. \|.*\| image::|(</?\w[^>]*>\s*)+$|<img)")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
# In order of preference. Documentation hosts vary, source hosts are nearly all the same one.
_DOCUMENTATION_LABELS = ("documentation", "docs", "homepage", "home", "source", "repository")
_README_LABELS = ("homepage", "home", "source", "source code", "repository", "documentation")


@dataclass(frozen=True)
class Source:
    """One Python file to read: where it is, its module's name and the URL of its documentation."""

    path: str
    module: str
    url: str


def main() -> int:
    """Write the corpus and print what it is made of."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the JSONL file to write")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--max-source-mb",
        type=float,
        default=6.0,
        help="Python source parsed per distribution, in MB (default: %(default)s)",
    )
    parser.add_argument("--max-mb", type=float, default=0.0, help="stop at so much text; 0: all")
    args = parser.parse_args()
    begin = time.monotonic()
    print("looking for installed documentation ...", file=sys.stderr, flush=True)
    sources = [*standard_library_sources(), *installed_sources(args.max_source_mb * 1e6)]
    hosts = write_corpus(args.output, sources, args.workers, args.max_mb * 1e6)
    print_summary(args.output, hosts, time.monotonic() - begin)
    return 0


def write_corpus(path: Path, sources: list[Source], workers: int, max_bytes: float) -> Counter[str]:
    """Write every document once, in a fixed order that mixes the sources.

    Megatron splits by position: with the sources one after the other, validation would be about
    packages that training never saw.

    Args:
        path: The JSONL file; replaced when complete, never left half written.
        sources: The files to read documentation strings from.
        workers: Processes that parse.
        max_bytes: Text after which to stop; 0 for no limit.

    Returns:
        Bytes of text per host.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    lines: dict[bytes, str] = {}
    hosts: Counter[str] = Counter()
    with DocumentProgress("collect", len(sources)) as bar:
        for done, document in all_documents(sources, workers):
            bar.update(done, len(lines), hosts.total())
            key = fingerprint(document["text"])
            if key in lines:
                continue
            lines[key] = json.dumps(document, ensure_ascii=False) + "\n"
            hosts[urlsplit(document["url"]).netloc] += len(document["text"].encode())
            if max_bytes and hosts.total() >= max_bytes:
                break
    with partial.open("w", encoding="utf-8") as out:
        out.writelines(lines[key] for key in sorted(lines))
    os.replace(partial, path)
    return hosts


def all_documents(sources: list[Source], workers: int) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield `(files done, document)`: the READMEs first, then the documentation of each file."""
    for document in readme_documents():
        yield 0, document
    # A spawned worker imports this script afresh: no state of this process, no inherited threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        results = pool.map(source_documents, sources, chunksize=16)
        for done, documents in enumerate(results, start=1):
            for document in documents:
                yield done, document
        pool.shutdown(cancel_futures=True)


def fingerprint(text: str) -> bytes:
    """Return a digest of a document without its title, so that a copied class counts once."""
    body = text.partition("\n")[2]
    return hashlib.blake2b(body.encode("utf-8", "replace"), digest_size=16).digest()


def readme_documents() -> Iterator[dict[str, str]]:
    """Yield the README of every installed distribution."""
    for distribution in distributions():
        metadata = distribution.metadata
        text = metadata.get("Description") or ""
        lines = _COMMENT.sub("", text).splitlines()
        text = "\n".join(line for line in lines if not _BADGE.match(line))
        text = without_licence(text)[:_MAX_CHARACTERS]
        url = project_url(distribution, _README_LABELS)
        if url and len(text) >= _MIN_CHARACTERS:
            yield document_of(text, url)


def distributions() -> list[importlib.metadata.Distribution]:
    """Return the installed distributions by name, each once."""
    found = {d.metadata["Name"]: d for d in importlib.metadata.distributions()}
    return [found[name] for name in sorted(found, key=str.lower)]


def project_url(
    distribution: importlib.metadata.Distribution, preferred_labels: tuple[str, ...]
) -> str:
    """Return the distribution's URL under the first label that it has; empty: it names none."""
    metadata = distribution.metadata
    urls: dict[str, str] = {}
    for entry in metadata.get_all("Project-URL") or []:
        label, _, url = entry.partition(",")
        urls[label.strip().lower()] = url.strip()
    urls.setdefault("homepage", (metadata.get("Home-page") or "").strip())
    for label in preferred_labels:
        if urlsplit(urls.get(label, "")).netloc:
            return urls[label]
    return ""


def installed_sources(max_source_bytes: float) -> Iterator[Source]:
    """Yield the Python files of the installed distributions, capped per distribution.

    Args:
        max_source_bytes: Source bytes of one distribution beyond which its files are left out.
    """
    for distribution in distributions():
        base = project_url(distribution, _DOCUMENTATION_LABELS)
        if not base:
            continue
        names = [str(file) for file in distribution.files or [] if is_wanted(PurePosixPath(file))]
        root = Path(str(distribution.locate_file("")))
        for name in capped(root, names, max_source_bytes):
            module = module_name(PurePosixPath(name))
            yield Source(str(root / name), module, page_url(base, module))


def standard_library_sources() -> Iterator[Source]:
    """Yield the standard library's Python files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = PurePosixPath(path.relative_to(root).as_posix())
        if is_wanted(name):
            module = module_name(name)
            page = ".".join(part for part in module.split(".") if not part.startswith("_"))
            url = f"https://docs.python.org/3/library/{page or 'index'}.html"
            yield Source(str(path), module, url)


def is_wanted(name: PurePosixPath) -> bool:
    """Say whether a file is documentation-bearing source: Python, no tests, no bundled copies."""
    return (
        name.suffix == ".py" and _SKIPPED_FOLDERS.isdisjoint(name.parts) and ".." not in name.parts
    )


def capped(root: Path, names: list[str], max_bytes: float) -> list[str]:
    """Return as many of the files as fit, spread over the whole package rather than its first."""
    chosen, total = [], 0
    for name in sorted(names, key=lambda name: hashlib.sha1(name.encode()).digest()):
        try:
            total += (root / name).stat().st_size
        except OSError:
            # Listed by the distribution but removed since.
            continue
        if total > max_bytes:
            break
        chosen.append(name)
    return sorted(chosen)


def module_name(name: PurePosixPath) -> str:
    """Return the dotted name of the module in a file."""
    parts = list(name.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def page_url(base: str, module: str) -> str:
    """Return a URL for a module's documentation below the project's own."""
    base = base.partition("#")[0].rstrip("/").removesuffix("/index.html").removesuffix(".git")
    path = module.replace(".", "/")
    code_hosts = ("github.com", "gitlab.com", "codeberg.org")
    is_repository = urlsplit(base).netloc.removeprefix("www.") in code_hosts
    if is_repository and len(urlsplit(base).path.strip("/").split("/")) == 2:
        return f"{base}/blob/main/{path}.py"
    return f"{base}/{path}"


def source_documents(source: Source) -> list[dict[str, str]]:
    """Return the documents in one Python file (runs in a worker).

    Args:
        source: The file.

    Returns:
        The module's documents and one for each class that says enough by itself.
    """
    try:
        text = Path(source.path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    # Parsing is what costs: a file that is nearly all code is left out unparsed.
    if sum(map(len, text.split('"""')[1::2])) < _MIN_DOCUMENTED_SHARE * len(text):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    return [document_of(part, source.url) for part in module_texts(tree, source.module)]


def module_texts(tree: ast.Module, module: str) -> list[str]:
    """Return the texts of one module: its own pieces together, large classes apart."""
    pieces = [docstring_of(tree), *function_pieces(tree.body)]
    texts = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        members = [docstring_of(node), *function_pieces(node.body)]
        if sum(map(len, members)) < _MIN_CLASS_CHARACTERS:
            pieces += [f"class {node.name}\n\n{part}" for part in members[:1] if part]
            pieces += members[1:]
        else:
            texts += grouped(f"{module}.{node.name}", members)
    return grouped(module, pieces) + texts


def function_pieces(body: list[ast.stmt]) -> list[str]:
    """Return `signature, documentation` of every documented function directly in a body."""
    pieces = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documentation = docstring_of(node)
            if len(documentation) > 40:
                names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
                pieces.append(f"{node.name}({', '.join(names)})\n\n{documentation}")
    return pieces


def docstring_of(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> str:
    """Return a node's documentation without licence paragraphs, or an empty string."""
    documentation = ast.get_docstring(node, clean=False)
    return without_licence(inspect.cleandoc(documentation)) if documentation else ""


def without_licence(text: str) -> str:
    """Return a text without the paragraphs that only grant rights."""
    kept = [part for part in re.split(r"\n\s*\n", text) if not _LICENCE.search(part)]
    return "\n\n".join(kept).strip()


def grouped(title: str, pieces: list[str]) -> list[str]:
    """Join pieces under a title into texts of a reasonable size."""
    texts: list[str] = []
    current = ""
    for piece in filter(None, pieces):
        if current and len(current) + len(piece) > _MAX_CHARACTERS:
            texts.append(current)
            current = ""
        current = f"{current}\n\n{piece}" if current else piece
    texts.append(current)
    whole = [f"{title}\n\n{text[:_MAX_CHARACTERS]}" for text in texts]
    return [text for text in whole if len(text) >= _MIN_CHARACTERS]


def document_of(text: str, url: str) -> dict[str, str]:
    """Return one line of the corpus, free of what UTF-8 cannot carry."""
    return {"text": text.encode("utf-8", "replace").decode(), "url": url}


def print_summary(path: Path, hosts: Counter[str], seconds: float) -> None:
    """Print counts and the hosts that most text comes from."""
    with path.open("rb") as lines:
        documents = sum(1 for _ in lines)
    total = hosts.total()
    print(f"{documents:,} documents, {total / 1e6:.1f} MB of text, {len(hosts)} hosts")
    for host, size in hosts.most_common(12):
        print(f"  {100 * size / total:5.1f} %  {host}")
    print(f"written to {path} in {seconds:.0f} s")


if __name__ == "__main__":
    raise SystemExit(main())
