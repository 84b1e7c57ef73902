r"""A prefix table of many documents against the bare tokenizer, and its memory.

The metadata is synthetic: `https://` URLs of about 60 characters, all different (or, with
`--template '{url.host}\n'`, `--hosts` different hosts). In one run, in alternating rounds:

- table: `load_prefix_table` from the metadata file to the opened table, on all cores: checking the
  metadata, rendering, numbering, tokenising, writing, and reading it all once more;
- bare: gigatoken on lists of the distinct prefixes, already in memory, with as many threads.

Both are given as text/s, by the clock and by processor time, which other work on the machine
disturbs less. `tokenising` is the table's calls of the tokenizer alone. Memory is what the table
adds to the process's anonymous pages (mapped files are the system's cache), looked at every 50 ms.
Prints one line of JSON. Wants the extra `llama3`, or a `--tokenizer` folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from memory import Peak
from tokenizers import Tokenizer

from megatron_meco.corpus.encoder import GigatokenEncoder, fast_encoder
from megatron_meco.corpus.metadata import MetadataWriter, open_metadata
from megatron_meco.corpus.tokenizer import HuggingFaceEncoder
from megatron_meco.data.prefix_table import load_prefix_table
from megatron_meco.data.template import Template

TEXT = """news article blog product item view index category health world sports wiki forum thread
politics review recipe travel local science games music video photo story guide archive"""
WORDS = pa.array(TEXT.split())
ROWS = 1 << 18
MOST_BARE = 2_000_000


def write_metadata(prefix: Path, num_documents: int, num_hosts: int) -> None:
    """Write URLs in batches."""
    draw = np.random.default_rng(0)
    with MetadataWriter(prefix, ["url"]) as writer:
        for begin in range(0, num_documents, ROWS):
            size = min(ROWS, num_documents - begin)
            # Squared: some hosts have many documents.
            hosts = (draw.random(size) ** 2 * num_hosts).astype(np.int64)
            parts = [WORDS.take(pa.array(draw.integers(0, len(WORDS), size))) for _ in range(3)]
            number = pa.array(np.arange(begin, begin + size)).cast(pa.string())
            urls = pc.binary_join_element_wise(
                "https://www.", parts[0], pa.array(hosts).cast(pa.string()), ".com/", parts[1], "/",
                parts[2], "-", number, ".html", ""
            )  # fmt: skip
            writer.append_batch(pa.RecordBatch.from_arrays([urls], names=["url"]))


def _anonymous() -> int:
    """Anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


class Timed:
    """An encoder that adds up the processor time of its calls, over all threads."""

    def __init__(self, encoder: GigatokenEncoder) -> None:
        self._encoder = encoder
        self._lock = threading.Lock()
        self.seconds = 0.0
        self.num_bytes = 0

    def encode(self, texts: Any) -> Any:
        """As the encoder."""
        begin = time.thread_time()
        result = self._encoder.encode(texts)
        took = time.thread_time() - begin
        with self._lock:
            self.seconds += took
            self.num_bytes += pc.sum(pc.binary_length(texts)).as_py()
        return result


def bare(encoders: list[GigatokenEncoder], texts: list[list[str]]) -> tuple[float, float]:
    """Clock and processor seconds of the tokenizer alone, a thread for each list."""
    clock, processor = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(lambda pair: pair[0].encode(pair[1]), zip(encoders, texts, strict=True)))
    return time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=float, default=1e7)
    parser.add_argument("--hosts", type=float, help="default: a tenth of the documents")
    parser.add_argument("--template", default=r"URL: {url}\n\n")
    parser.add_argument("--tokenizer", type=Path, help="default: Llama 3 of llama-models")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", help="where the files are written, and removed again")
    args = parser.parse_args()
    num_documents = int(args.documents)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        scratch = Path(folder)
        tokenizer = args.tokenizer or scratch / "llama3"
        if args.tokenizer is None:
            from megatron_meco.corpus.llama3 import write_llama3_tokenizer

            write_llama3_tokenizer(tokenizer)
        exact = HuggingFaceEncoder(Tokenizer.from_file(f"{tokenizer}/tokenizer.json").to_str())
        prefix = scratch / "corpus"
        write_metadata(prefix, num_documents, int(args.hosts or max(1, num_documents // 10)))
        print(json.dumps(measure(args, scratch, prefix, num_documents, exact)))


def measure(
    args: argparse.Namespace, scratch: Path, prefix: Path, num_documents: int, exact: Any
) -> dict[str, Any]:
    """Alternate between the table and the bare tokenizer."""
    template = Template.parse(args.template)
    threads = len(os.sched_getaffinity(0))
    lists = list(_some_texts(template, prefix, threads))
    bare_bytes = sum(len(text.encode()) for part in lists for text in part)
    encoders = [GigatokenEncoder(exact.serialized) for _ in lists]
    rates: dict[str, list[float]] = {"bare": [], "bare_cpu": [], "table": [], "table_cpu": []}
    rates["tokenising_cpu"] = []
    peak = 0
    for number in range(args.rounds):
        # Twice: the first call of an encoder fills its caches, as a long run has them.
        took = [bare(encoders, lists) for _ in range(2)][1]
        rates["bare"].append(bare_bytes / took[0])
        rates["bare_cpu"].append(bare_bytes / took[1])
        timed: list[Timed] = []

        def choose(sample: list[str], timed: list[Timed] = timed) -> Any:
            found = fast_encoder(exact, sample)
            assert found is not None, "gigatoken gives other ids"
            timed.append(Timed(found))
            return timed[-1]

        clock, processor = time.perf_counter(), time.process_time()
        with Peak(_anonymous, 0.05) as memory:
            table = load_prefix_table(
                str(prefix),
                num_documents,
                template,
                exact.encode_batch,
                "bench",
                10**6,
                scratch / f"cache{number}",
                fast_encoder=choose,
            )
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
        peak = max(peak, memory.bytes - memory.before)
        num_bytes, seconds = (timed[0].num_bytes, timed[0].seconds) if timed else (0, 1.0)
        rates["table"].append(num_bytes / clock)
        rates["table_cpu"].append(num_bytes / processor)
        rates["tokenising_cpu"].append(num_bytes / seconds)
        result = {
            "documents": num_documents,
            "distinct": len(table.prefix_offsets) - 1,
            "tokens": len(table.prefix_tokens),
            "seconds": round(clock, 1),
            "cpu_seconds": round(processor, 1),
        }
        del table
        for file in (scratch / f"cache{number}").iterdir():
            file.unlink()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        **result,
        "threads": threads,
        "mb_per_s": {name: round(rate / 1e6, 1) for name, rate in medians.items()},
        "table_share_of_bare": round(medians["table"] / medians["bare"], 2),
        "table_share_of_bare_cpu": round(medians["table_cpu"] / medians["bare_cpu"], 2),
        "tokenising_share_of_bare_cpu": round(medians["tokenising_cpu"] / medians["bare_cpu"], 2),
        "peak_bytes_per_document": round(peak / num_documents, 1),
        "peak_mib": round(peak / 2**20),
    }


def _some_texts(template: Template, prefix: Path, threads: int) -> Iterator[list[str]]:
    """Distinct prefixes of the first documents, in a list for each thread."""
    table = open_metadata(prefix).slice(0, MOST_BARE)
    texts = template.render(table, "metadata").drop_null().unique().to_pylist()
    for number in range(threads):
        yield texts[number::threads]


if __name__ == "__main__":
    main()
