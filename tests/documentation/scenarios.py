"""What each page of the documentation needs to be typed on a small machine.

A page is followed from its top in an empty folder. `SCENARIOS` says what lies in that folder, which
words are replaced by smaller ones, and which commands are not run, and why. A command that no
table names is run as it stands, so a new one fails until it works.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from documentation.pages import blocks_in
from runs import MODEL, ROOT, RUN, write_pages, write_tokenizer

SMALL = "num-layers: 1\nhidden-size: 32\nffn-hidden-size: 64\nseq-length: 128\nsplit: 80,20,0\n"
DATA = "--data-path data/web --tokenizer-type HuggingFaceTokenizer --tokenizer-model tok"
FLAGS = f"{MODEL} {RUN} {DATA}".replace("\n", " ")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One page.

    Attributes:
        after: The page in whose folder this one goes on.
        given: Writes what the reader is supposed to have.
        small: Texts of the page, and what stands in their place.
        not_run: Beginnings of commands that are not run, and why. They are still checked by name.
        nightly: Beginnings of commands that take long. Only the nightly test runs them.
    """

    after: str = ""
    given: Callable[[Path], object] = lambda folder: None
    small: Mapping[str, str] = field(default_factory=dict)
    not_run: Mapping[str, str] = field(default_factory=dict)
    nightly: tuple[str, ...] = ()


def compress(path: Path) -> Path:
    """Replace a file by its gzip."""
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


def give_run_file(page: str, data: str = "data/web", tokenizer: str = "tok") -> Callable[..., None]:
    """The run file that a page shows first, made small."""

    def give(folder: Path) -> None:
        text = blocks_in(ROOT / page, "yaml")[0]
        for old, new in {
            "model: llama-1.6b": f"model: laptop-3m\ntrain-iters: 10\n{SMALL}",
            "tokenizer-model: tokenizer": "tokenizer-model: tok",
            "launch: {nproc-per-node: 8}\n": "",
        }.items():
            assert old in text, f"{page}: {old}"
            text = text.replace(old, new)
        shutil.rmtree(folder / "runs")
        (folder / "run.yaml").write_text(text)

    return give


def give_data(folder: Path) -> None:
    """Inputs of every kind that docs/data.md names, and a corpus without metadata."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq
    import zstandard

    from megatron_meco.cli import main

    for name in ("crawl", "bucket/pages", "pages", "data"):
        (folder / name).mkdir(parents=True)
    write_pages(folder / "crawl" / "a.jsonl", 40)
    more = write_pages(folder / "more.jsonl", 30)
    more.with_suffix(".jsonl.zst").write_bytes(zstandard.compress(more.read_bytes()))
    write_tokenizer(folder / "TOKENIZER")
    shutil.copytree(folder / "TOKENIZER", folder / "my-llama3")
    shutil.copytree(ROOT / "tests" / "corpus" / "mds" / "authors", folder / "DCLM-unpacked")
    rows = [json.loads(line) for line in more.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["topic"] = f"t{number % 3}"
        row["meta"] = {"score": number / 8}
    pq.write_table(pa.Table.from_pylist(rows), folder / "bucket" / "pages" / "b.parquet")
    prose = [{**row, "text": "the fox and the dog " * 20} for row in rows]
    pq.write_table(pa.Table.from_pylist(prose), folder / "pages" / "c.parquet")
    pages = folder / "pages.jsonl"
    pages.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--metadata-fields=", "--tokenizer-type", "HuggingFaceTokenizer", "--workers", "1"]
    for name in ("old", "older"):
        output = ["--output", f"{folder}/data/{name}", "--tokenizer-model", f"{folder}/TOKENIZER"]
        assert main(["prepare", str(pages), *words, *output]) == 0
    compress(pages)
    urls = pa.table({"url": [row["url"] for row in rows]})
    pq.write_table(urls, folder / "urls.parquet")
    known = [json.loads(x)["url"] for x in (folder / "crawl/a.jsonl").read_text().splitlines()]
    scores = [str(n) for n in range(len(known))]
    joined = pa.table({"url": known, "topic": scores, "score": scores})
    pq.write_table(joined, folder / "annotations.parquet")


def give_uses_of_a_model(folder: Path) -> None:
    """Texts, tasks, a scorer and a checkpoint for docs/inference.md."""
    from inference.local_tasks import write_tasks

    for name in ("some-llama", "my-llama"):
        shutil.copytree(folder / "model", folder / name)
    shutil.rmtree(folder / "my-llama")
    shutil.copytree(folder / "runs" / "run", folder / "checkpoints")
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    (folder / "urls.txt").write_text("url=https://animals.example.org\nnumbers.example.net\n")
    for name, lines in (("article.txt", 1), ("questions.txt", 8)):
        (folder / name).write_text("the fox and the dog\n" * lines)
    pages = write_pages(folder / "pages.jsonl", 40).read_text().splitlines(keepends=True)
    (folder / "held-out.jsonl").write_text("".join(pages[:30]))
    (folder / "pages.jsonl").write_text("".join(pages[:3]))
    scorer = "def my_function(texts):\n    return [len(text) / 100 for text in texts]\n"
    (folder / "my_module.py").write_text(scorer)


def give_runs_to_show(folder: Path) -> None:
    """Models of two iterations and two logs for docs/show.md."""
    shutil.copytree(folder / "model", folder / "model-900")
    for name in ("meco", "baseline"):
        shutil.copy(folder / "runs" / "run" / "logs" / "001" / "log.txt", folder / f"{name}.log")


def give_a_corpus_with_context(folder: Path) -> None:
    """README.md's corpus, and its tokenizer with two further tokens."""
    from tokenizers import Tokenizer

    for suffix in (".bin", ".idx", ".metadata.arrow"):
        shutil.copy(folder / "data" / f"web{suffix}", folder / "data" / f"my-corpus{suffix}")
    shutil.copytree(folder / "tok", folder / "data" / "my-tokenizer")
    file = str(folder / "data" / "my-tokenizer" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.add_special_tokens(["<|context_begin|>", "<|context_end|>"])
    tokenizer.save(file)


def give_fineweb(folder: Path) -> None:
    """A data set whose records look like FineWeb's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = random.Random(1)
    rows = [
        {"text": " ".join(draw.choices(["the", "fox", "dog"], k=30)), "url": f"https://a.org/{n}"}
        for n in range(60)
    ]
    (folder / "fineweb-sample").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "fineweb-sample" / "000.parquet")


_DEMOS = "takes minutes to hours; the suite and other tests run its parts"
_SETS_UP = "sets up the environment that runs this test"
_DOWNLOADS = "downloads from a package index"
_GPUS = "needs a host with GPUs"

_TUTORIAL = Scenario(
    given=give_fineweb,
    small={
        'library.glob("**/*.py")': 'library.glob("[jw]s*/*.py")',
        # Short ones, so that a small validation split has several of each host.
        "if text.strip():": "text = text[:500]\n            if text.strip():",
        "--vocab-size 4096": "--vocab-size 400",
        "train-iters: 1000": "train-iters: 10\n" + SMALL.replace("80,20,0", "50,50,0"),
        "hf://datasets/HuggingFaceFW/fineweb/sample/10BT": "fineweb-sample",
        "--workers 16": "--workers 1",
        "-o run.html": "--max-new-tokens 4 -o run.html",
    },
    not_run={"make ": _SETS_UP, "source ": _SETS_UP},
    nightly=("meco train", "meco watch", "meco export", "meco generate", "meco show"),
)

SCENARIOS = {
    "README.md": Scenario(
        given=lambda folder: compress(write_pages(folder / "pages.jsonl")),
        small={
            "--vocab-size 32000": "--vocab-size 300",
            "train-iters: 1000": f"train-iters: 10\n{SMALL}",
        },
        not_run={"make ": _DEMOS, "source ": _SETS_UP},
    ),
    "CONTRIBUTING.md": Scenario(not_run={"make ": _DEMOS}),
    "docs/index.md": Scenario(
        after="README.md",
        given=give_run_file("docs/index.md"),
        not_run={"make ": _DEMOS},
        nightly=("meco train",),
    ),
    "docs/run-file.md": Scenario(
        after="README.md",
        given=give_run_file("docs/run-file.md"),
        nightly=("meco train run.yaml  ", "meco watch"),
    ),
    "docs/show.md": Scenario(
        after="README.md",
        given=give_runs_to_show,
        small={"-o run.html\nmeco show --log": "--max-new-tokens 4 -o run.html\nmeco show --log"},
    ),
    "docs/data.md": Scenario(
        given=give_data,
        small={
            "s3://bucket/": "bucket/",
            "--workers 16": "--workers 1",
            "--workers 8": "--workers 1",
            "tasks=64, workers=8": "tasks=2, workers=1",
            "num_tasks=64": "num_tasks=2",
            # The corpus's name is taken by the first of two ways to do the same.
            '"data/web"': '"data/filtered"',
            "meco attach data/old --table": "meco attach data/older --table",
        },
    ),
    "docs/packing.md": Scenario(
        small={
            "--documents 1e6": "--documents 1e4",
            "--train-samples 140000": "--train-samples 1400",
        }
    ),
    "docs/training.md": Scenario(
        small={
            "examples/train_llama_1.6b.sh\nMECO_CONDITIONING": (
                "examples/train_llama_1.6b.sh --dry-run\nMECO_CONDITIONING"
            ),
            "MECO_DATA_PATH=data/web ... examples/train_llama_1.6b.sh ": (
                "MECO_DATA_PATH=data/web examples/train_llama_1.6b.sh --dry-run "
            ),
        },
        not_run={"sbatch ": "needs Slurm; test_launchers.py runs the script"},
        nightly=("MECO_",),
    ),
    "docs/context-parallel.md": Scenario(
        after="README.md",
        small={
            "--nproc-per-node 8": "--nproc-per-node 2",
            "<the run's flags>": FLAGS,
            "--seq-length 32768": "--seq-length 64",
            "--tensor-model-parallel-size 2 --sequence-parallel ": "",
            "--context-parallel-size 4": "--context-parallel-size 2",
        },
        nightly=("torchrun",),
    ),
    "docs/parallelism.md": Scenario(
        after="README.md",
        small={
            # A conditioned run first, which the page takes for granted.
            "torchrun ... ": (
                f"torchrun --nproc-per-node 1 examples/pretrain_gpt.py {FLAGS} --meco "
                "--save RUN --save-interval 4\ntorchrun --nproc-per-node 1 "
            ),
            "<the flags of the conditioned run>": f"{FLAGS} --save-interval 4",
            "RUN/iter_0010000": "RUN/iter_0000004",
            "--meco-branch-iters 1000 [--meco-branch-lr decay]": (
                "--meco-branch-iters 2 --meco-branch-lr decay"
            ),
        },
        nightly=("torchrun",),
    ),
    "docs/inference.md": Scenario(
        after="README.md",
        given=give_uses_of_a_model,
        small={
            "torchrun ... ": "torchrun --nproc-per-node 1 ",
            " --meco ...": f" --meco {FLAGS}",
            '"The llama is" --seed': '"The llama is" --max-new-tokens 4 --seed',
            "--tasks openbookqa commonsense_qa": (
                "--tasks local_choice --include-path tasks --limit 4"
            ),
            "--tasks paper --batch-size 32": (
                "--tasks local_choice --include-path tasks --limit 4 --batch-size 2"
            ),
            "--task openbookqa --limit 400": "--task local_choice --include-path tasks --limit 8",
            "--top 20 --text": "--top 2 --text",
            "--scorer detoxify": "--scorer my_module:my_function",
            "--output toxicity": "--num-samples 4 --max-new-tokens 16 --output toxicity",
            "--output samples": "--num-samples 4 --max-new-tokens 16 --output samples",
        },
        not_run={"pip ": _DOWNLOADS},
        nightly=("torchrun",),
    ),
    "docs/other_trainers.md": Scenario(
        after="README.md",
        small={
            '"corpus/pages"': '"data/web"',
            '"tokenizer"': '"tok"',
            "sequence_length=8192": "sequence_length=64",
            "num_steps=1000": "num_steps=2",
            "global_batch_size=64": "global_batch_size=32",
            "num_workers=2": "num_workers=0",
        },
    ),
    "docs/tutorial.md": _TUTORIAL,
    # The same text without what larger machines do; one of the two is enough for every day.
    "examples/tutorial.ipynb": replace(
        _TUTORIAL,
        small={
            old: new
            for old, new in _TUTORIAL.small.items()
            if not old.startswith(("hf:", "--workers"))
        },
        not_run={"import os": _SETS_UP},
        nightly=("python", "meco"),
    ),
    "examples/recipes/README.md": Scenario(
        after="README.md",
        given=give_a_corpus_with_context,
        small={
            "--set data-path": (
                "--set train-iters=4 --set global-batch-size=8 --set seq-length=64 "
                "--set split=80,20,0 --set data-path"
            ),
        },
    ),
    "benchmarks/gpu/README.md": Scenario(not_run={"make ": _GPUS, "sh ": _DOWNLOADS}),
    "benchmarks/study/README.md": Scenario(not_run={"make ": _DEMOS}),
}
