r"""Collect the demo's corpus from the Python environment that runs it: real text, no download.

Six registers of text (`registers.py`), each under the host of its project, about the same amount of
each. No document is written twice. Some pages are kept out of the corpus, for a classifier that
tells the registers apart (`steering.py`), and the pages of the last documents occur nowhere else,
so that Megatron's split by position validates on pages that training has not seen. Costs about half
a minute on two cores; the time goes into parsing, so files are parsed until there is enough. Hosts
are right; the paths of URLs name files and are not always pages.

    python examples/local_demo/collect_corpus.py --output demo-output/corpus.jsonl \
        --held-out demo-output/held-out.jsonl
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from registers import REGISTERS, Page, Register, digest, documents, pages

# What a register must have to take part.
_FEWEST_DOCUMENTS = 300
_FEWEST_REGISTERS = 2
# Shares of a register's text. Validation is a little more than the 6 % that the runs split off.
_VALIDATION = 0.07
_HELD_OUT = 0.12


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: Its text.
        url: Its page's.
        part: "train", "validation" or "held-out"; the same for all documents of a page.
    """

    text: str
    url: str
    part: str


def main() -> int:
    """Write the corpus and print what it is made of."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the JSONL file to write")
    parser.add_argument("--held-out", type=Path, required=True, help="the documents kept out of it")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--mb-each",
        type=float,
        default=2.4,
        help="text of each register, in MB, where there is so much (default: %(default)s)",
    )
    args = parser.parse_args()
    begin = time.monotonic()
    print("reading installed packages ...", file=sys.stderr, flush=True)
    found = collect(REGISTERS, int(args.mb_each * 1e6), args.workers)
    chosen = {host: group for host, group in found.items() if len(group) >= _FEWEST_DOCUMENTS}
    for host in found.keys() - chosen.keys():
        print(f"left out, too little of it is installed: {host}", file=sys.stderr)
    if len(chosen) < _FEWEST_REGISTERS:
        print("collect_corpus: error: too little text is installed here", file=sys.stderr)
        return 1
    write(args.output, args.held_out, chosen.values())
    print_summary(args.output, chosen, time.monotonic() - begin)
    return 0


def collect(
    registers: Sequence[Register], num_bytes: int, workers: int
) -> dict[str, list[Document]]:
    """Read the registers, each until there is enough, in processes of their own.

    Args:
        registers: What to read.
        num_bytes: Text of each register.
        workers: Processes.

    Returns:
        The documents by host; the same whatever the number of workers.
    """
    # A spawned worker imports this script afresh: no state of this process, no inherited threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        groups = pool.map(read_register, registers, [num_bytes] * len(registers))
        found = {register.host: group for register, group in zip(registers, groups, strict=True)}
    # A document that is in two registers says nothing about either.
    counts = Counter(
        key for group in found.values() for key in {fingerprint(d.text) for d in group}
    )
    return {
        host: [document for document in group if counts[fingerprint(document.text)] == 1]
        for host, group in found.items()
    }


def read_register(register: Register, num_bytes: int) -> list[Document]:
    """Read one register until there is enough (runs in a worker).

    Whole pages go to one part, so that no part holds the rest of another's page.

    Args:
        register: The register.
        num_bytes: Text in all.
    """
    texts: dict[bytes, tuple[str, Page]] = {}
    total = 0
    for page in pages(register):
        for text in documents(register, page):
            if texts.setdefault(fingerprint(text), (text, page)) == (text, page):
                total += len(text.encode())
        if total >= num_bytes:
            break
    found, done = [], 0
    part_of: dict[str, str] = {}
    for text, page in texts.values():
        share = done / total
        part = "held-out" if share < _HELD_OUT else "train"
        if _HELD_OUT <= share < _HELD_OUT + _VALIDATION:
            part = "validation"
        part = part_of.setdefault(page.url, part)
        found.append(Document(text=text, url=page.url, part=part))
        done += len(text.encode())
    return found


def fingerprint(text: str) -> bytes:
    """Return what two copies of a text have in common, however they are indented."""
    return digest(" ".join(text.split()))


def write(corpus: Path, held_out: Path, groups: Iterable[list[Document]]) -> None:
    """Write both files, each in an order that mixes the registers, validation at the end.

    Megatron splits by position: with the registers one after the other, validation would be about
    one that training never saw.

    Args:
        corpus: The documents to train and to validate on; replaced when complete.
        held_out: The others.
        groups: The documents of each register.
    """
    everything = sorted((d for group in groups for d in group), key=lambda d: digest(d.text))
    for path, parts in ((held_out, ["held-out"]), (corpus, ["train", "validation"])):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        with partial.open("w", encoding="utf-8") as out:
            for part in parts:
                for document in everything:
                    if document.part == part:
                        record = asdict(document)
                        del record["part"]
                        out.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(partial, path)


def print_summary(path: Path, groups: dict[str, list[Document]], seconds: float) -> None:
    """Print how much text there is of each register."""
    titles = {register.host: register.title for register in REGISTERS}
    for host, group in groups.items():
        size = sum(len(document.text.encode()) for document in group)
        print(f"  {len(group):6,} documents  {size / 1e6:4.1f} MB  {host:<18}{titles[host]}")
    print(f"written to {path} in {seconds:.0f} s")


if __name__ == "__main__":
    raise SystemExit(main())
