"""`meco prepare` against datatrove's Megatron step and Megatron-LM's recipe, on real text.

The text is documentation and source code from the given folders (default: the installed Python
packages), one document per file, cut at `--document-bytes` so that documents are as long as web
pages. All read the same JSONL and use the same Llama-3 (or other) tokenizer and the same number of
processes, in alternating rounds:

- ours: the tasks of `meco prepare` and the join, from starting the workers to the finished index;
- running: the same without starting the workers, which a command does while its tokenizer loads;
- datatrove: its JsonlReader and MegatronDocumentTokenizer with as many tasks as ours has;
- recipe: what Megatron-LM's tools/preprocess_data.py does, one `encode` per line in a Pool and
  Megatron's IndexedDatasetBuilder in the parent;
- bare: gigatoken's encode_batch alone on the texts in memory, split over as many processes; as in
  "running", loading the tokenizer counts and starting the processes does not.

The slow two run on a part of the text (`--slow-mb`). Their times include the start of their
processes, which is short compared with their tokenizer. The parent's import of Megatron is left out
for all, and everything is in the page cache. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from memory import Peak

from megatron_meco.errors import MeCoError

_SUFFIXES = (".py", ".rst", ".md", ".txt", ".html", ".pyi", ".h")


def collect(folders: list[Path], path: Path, num_bytes: int, document_bytes: int) -> int:
    """Write real text as JSONL until there is enough; return its bytes of text."""
    total, seen = 0, set()
    with path.open("w") as out:
        for folder in folders:
            for source in sorted(folder.rglob("*")):
                if source.suffix not in _SUFFIXES or not source.is_file():
                    continue
                try:
                    text = source.read_text(encoding="utf-8")
                except (UnicodeDecodeError, OSError):
                    continue
                if len(text) < 200 or hash(text) in seen:
                    continue
                seen.add(hash(text))
                url = f"https://{source.relative_to(folder).parts[0]}/{source.name}"
                for begin in range(0, len(text), document_bytes):
                    part = text[begin : begin + document_bytes]
                    out.write(json.dumps({"text": part, "url": url}) + "\n")
                    total += len(part.encode())
                if total >= num_bytes:
                    return total
    return total


def head(path: Path, target: Path, num_bytes: int) -> None:
    """Copy whole lines of about `num_bytes`."""
    with path.open("rb") as file, target.open("wb") as out:
        out.writelines(file.readlines(num_bytes))


def count(path: Path) -> tuple[int, int]:
    """Return documents and bytes of text."""
    texts = [json.loads(line)["text"] for line in path.open("rb")]
    return len(texts), sum(len(text.encode()) for text in texts)


def ours(
    source: Path, tokenizer: Path, work: Path, workers: int, settings: dict[str, Any]
) -> float:
    """Run the tasks of `meco prepare` and join them."""
    from megatron_meco.corpus.documents import RejectedRecords, TaskReader
    from megatron_meco.corpus.executors import LocalExecutor
    from megatron_meco.corpus.input_files import find_files, plan_tasks
    from megatron_meco.corpus.merge import merge_tasks
    from megatron_meco.corpus.task_writer import MegatronWriter
    from megatron_meco.corpus.work_folder import make_marked_folder, write_encoder

    folder = work / "ours.unfinished"
    make_marked_folder(folder)
    write_encoder(folder, settings)
    tasks = plan_tasks(find_files([source]))
    rejected = RejectedRecords()
    steps = [
        TaskReader(tasks, "text", rejected, ("url",)),
        MegatronWriter(folder, ("url",), rejected),
    ]
    with LocalExecutor(steps, folder, len(tasks), workers) as executor:
        executor.wait_for_workers()
        begin = time.monotonic()
        executor.run()
    merge_tasks(folder, work / "ours", len(tasks))
    return time.monotonic() - begin


def datatrove(source: Path, tokenizer: Path, work: Path, workers: int, _: Any) -> None:
    """Run datatrove's own Megatron tokenizer step."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
    from loguru import logger

    logger.disable("datatrove")
    folder = work / "input"
    folder.mkdir()
    # One file per task is how datatrove shares work.
    lines = source.read_bytes().splitlines(keepends=True)
    for i in range(workers):
        (folder / f"{i}.jsonl").write_bytes(b"".join(lines[i::workers]))
    begin = time.monotonic()
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(folder)),
            MegatronDocumentTokenizer(
                str(work / "out"),
                tokenizer_name_or_path=str(tokenizer / "tokenizer.json"),
                eos_token="<|end_of_text|>",
            ),
        ],
        tasks=workers,
        workers=workers,
        logging_dir=str(work / "logs"),
    ).run()
    return time.monotonic() - begin


_recipe_tokenizer: Any


def _start_recipe(tokenizer: Path) -> None:
    global _recipe_tokenizer
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _recipe_tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))


def _encode_line(line: bytes) -> tuple[list[int], list[int]]:
    ids = _recipe_tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)
    ids.append(_recipe_tokenizer.eos_token_id)
    return ids, [len(ids)]


def recipe(source: Path, tokenizer: Path, work: Path, workers: int, _: Any) -> None:
    """Do what Megatron-LM's tools/preprocess_data.py does."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(work / "recipe.bin"), dtype=np.int32)
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start_recipe, (tokenizer,)) as pool, source.open("rb") as file:
        for ids, lengths in pool.imap(_encode_line, file, 32):
            builder.add_document(ids, lengths)
    builder.finalize(str(work / "recipe.idx"))


def _bare(source: Path, serialized: str, worker: int, workers: int, queue: Any) -> None:
    from megatron_meco.corpus.encoder import GigatokenEncoder

    texts = [json.loads(line)["text"] for line in source.open("rb")][worker::workers]
    begin = time.monotonic()
    encoder = GigatokenEncoder(serialized)
    for i in range(0, len(texts), 1000):
        encoder.encode(texts[i : i + 1000])
    queue.put((begin, time.monotonic()))


def bare(source: Path, tokenizer: Path, work: Path, workers: int, settings: Any) -> float:
    """Return the seconds that the tokenizer alone takes."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_bare, args=(source, settings["serialized"], i, workers, queue))
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    # Processes of unequal start: the sum of what each did in its own time is the rate together.
    spans = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return statistics.mean(end - begin for begin, end in spans)


def _resident_of_children() -> int:
    """Resident memory of this process's children together."""
    total = 0
    for child in psutil.Process().children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.Error:
            continue
    return total


def main() -> int:
    """Run all rounds and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = functools.partial(parser.add_argument)
    add("--tokenizer", type=Path, help="a Hugging Face folder; default: Llama 3 of llama-models")
    add("--folder", type=Path, action="append", help="where the text is; default: this Python's")
    add("--mb", type=float, default=220, help="megabytes of text; default: %(default)s")
    add("--slow-mb", type=float, default=40, help="for the slow two; default: %(default)s")
    add("--document-bytes", type=int, default=4000, help="default: %(default)s")
    add("--workers", type=int, default=os.cpu_count(), help="default: %(default)s")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="bench-prepare-"))
    try:
        result = measure(args, scratch)
    except MeCoError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(scratch)
    print(json.dumps(result))
    return 0


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return medians, ratios and what they were measured on."""
    from megatron_meco.corpus.encoder import build_encoder
    from megatron_meco.corpus.llama3 import write_llama3_tokenizer

    tokenizer = args.tokenizer or scratch / "llama3"
    if args.tokenizer is None:
        write_llama3_tokenizer(tokenizer)
    source, part = scratch / "text.jsonl", scratch / "part.jsonl"
    folders = args.folder or [Path(psutil.__file__).parents[1]]
    collect(folders, source, int(args.mb * 1e6), args.document_bytes)
    head(source, part, int(args.slow_mb * 1e6))
    settings = build_encoder("HuggingFaceTokenizer", str(tokenizer))
    inputs = {ours: source, bare: source, datatrove: part, recipe: part}
    sizes = {path: count(path) for path in (source, part)}
    seconds: dict[str, list[float]] = {run.__name__: [] for run in inputs} | {"running": []}
    peak = 0
    for _ in range(args.rounds):
        for run, path in inputs.items():
            work = scratch / "work"
            work.mkdir()
            begin = time.monotonic()
            with Peak(_resident_of_children, 0.1) as memory:
                told = run(path, tokenizer, work, args.workers, settings)
            if run is ours:
                peak = max(peak, memory.bytes)
            if run is ours:
                seconds["running"].append(told)
                told = None
            seconds[run.__name__].append(told or time.monotonic() - begin)
            print(run.__name__, f"{seconds[run.__name__][-1]:.2f} s", file=sys.stderr)
            shutil.rmtree(work)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {
        run.__name__: sizes[path][1] / 1e6 / medians[run.__name__] for run, path in inputs.items()
    }
    rates["running"] = sizes[source][1] / 1e6 / medians["running"]
    return {
        "text_mb": round(sizes[source][1] / 1e6, 1),
        "documents": sizes[source][0],
        "workers": args.workers,
        "rounds": args.rounds,
        "encoder": settings["kind"],
        "mb_per_s": {name: round(rate, 2) for name, rate in rates.items()},
        "documents_per_s": round(sizes[source][0] / medians["ours"]),
        "times_datatrove": round(rates["ours"] / rates["datatrove"], 1),
        "times_recipe": round(rates["ours"] / rates["recipe"], 1),
        "share_of_bare": round(rates["running"] / rates["bare"], 2),
        "workers_peak_mib": round(peak / 2**20),
        "parent_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


if __name__ == "__main__":
    sys.exit(main())
