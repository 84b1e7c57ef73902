"""The arms of published papers: each run file plans, and its samples are what it says."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, write_tokenizer

from megatron_meco.cli import main

FOLDER = ROOT / "examples" / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TOKENS = ["<|context_begin|>", "<|context_end|>", "<repo_name>", "<file_sep>"]
TOKENS += [f"<s{i}>" for i in range(1, 6)]
NUM_DOCUMENTS = 1200

Row = dict[str, Any]


def context(text: str) -> str:
    return f"<|context_begin|>{text}<|context_end|>"


# The prefixes that a document may have in the conditioned phase, and the share of documents that
# have the first of them; None: no prefix.
PREFIXES: dict[str, Callable[[Row], tuple[list[str | None], float]]] = {
    "meco": lambda row: ([f"URL: {row['url'].split('/')[2]}\n\n"], 1.0),
    "late-start": lambda row: ([f"URL: {row['url'].split('/')[2]}\n\n"], 1.0),
    "delimited-url": lambda row: (
        [context(row["url"].removeprefix("https://")), context("")],
        0.9,
    ),
    "quality-bins": lambda row: (
        [context(str(math.floor(10 * row["score"]))), context("")],
        0.9,
    ),
    "appended": lambda row: ([None], 1.0),
    "meta-tokens": lambda row: (["<s1><s2><s3><s4><s5>", None], 0.9),
    "repository-half": lambda row: (
        [f"<repo_name>{row['repo']}<file_sep>{row['path']}\n", None],
        0.5,
    ),
}
SUFFIXES: dict[str, Callable[[Row], str]] = {
    "appended": lambda row: f"\nQuality: {math.floor(row['score'])}",
}
# Steps of ten before metadata, and before the cooldown.
PHASES = {"meco": (0, 9), "late-start": (2, 9)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """Documents with all fields of the recipes, and a tokenizer with all their special tokens."""
    from tokenizers import Tokenizer

    from megatron_meco.corpus.prepare import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("recipes")
    write_tokenizer(folder / "tokenizer")
    file = folder / "tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(TOKENS)
    tokenizer.save(str(file))
    draw = random.Random(5)
    rows = [
        {
            "text": " ".join(
                draw.choice(["the", "fox", "dog"]) for _ in range(draw.randint(3, 30))
            ),
            "url": f"https://{draw.choice('abc')}.org/{i}",
            "score": draw.choice([0.25, 0.5, 0.75, 1.5]),
            "repo": f"owner/name{i % 40}",
            "path": f"src/{i}.py",
        }
        for i in range(NUM_DOCUMENTS)
    ]
    (folder / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(
        PrepareConfig(
            inputs=(folder / "pages.jsonl",),
            output=folder / "pages",
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(folder / "tokenizer"),
            metadata_fields=("url", "score", "repo", "path"),
        )
    )
    return folder, rows


def ask(
    capsys: pytest.CaptureFixture[str], command: str, name: str, folder: Path, *words: str
) -> dict[str, Any]:
    """`meco plan` or `meco inspect` of a recipe, made small."""
    small = {
        "data-path": f"{folder}/pages",
        "tokenizer-model": f"{folder}/tokenizer",
        "seq-length": 512,
        "train-iters": 10,
        "global-batch-size": 4,
        "eval-interval": 10,
        "eval-iters": 0,
        "split": "100,0,0",
    }
    sets = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    assert main([command, str(FOLDER / f"{name}.yaml"), *sets, *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_each_recipe_has_its_source_and_its_test() -> None:
    assert sorted(PREFIXES) == NAMES
    readme = (FOLDER / "README.md").read_text()
    for name in NAMES:
        text = (FOLDER / f"{name}.yaml").read_text()
        assert "arXiv 2" in text and ("Differs from the paper:" in text), name
        paper = text.partition("arXiv ")[2][:10]
        assert f"[{name}.yaml]({name}.yaml) | arXiv {paper}" in readme


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe(
    name: str, corpus: tuple[Path, list[Row]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows = corpus
    start, switch = PHASES.get(name, (0, 10))
    report = ask(capsys, "plan", name, folder)
    assert (report.get("start_iteration", 0), report["switch_iteration"]) == (start, switch)
    assert report["documents_with_long_prefix"] == 0
    suffix_of = SUFFIXES.get(name, lambda row: "")
    first = []
    for sample in range(4 * start, 4 * switch, 8):
        pack = ask(capsys, "inspect", name, folder, "--sample", str(sample))
        assert pack["phase"] == "conditioned"
        *whole, last = pack["documents"]
        for document, bound in zip(whole, pack["cu_seqlens"], strict=False):
            allowed, share = PREFIXES[name](rows[document["document"]])
            assert document["prefix"] in allowed
            first.append(document["prefix"] == allowed[0])
            assert document.get("suffix") == (suffix_of(rows[document["document"]]) or None)
            # Behind BOS: in the loss or not.
            in_loss = pack["loss_mask"][bound : bound + document["prefix_tokens"]]
            assert set(in_loss) <= {1.0 if name == "repository-half" else 0.0}
        assert last["document"] < NUM_DOCUMENTS
    assert len(first) > 30
    assert sum(first) / len(first) == pytest.approx(share, abs=0.25 if share < 1 else 0)
    for sample in (*range(0, 4 * start, 7), *range(4 * switch, 40, 3)):
        pack = ask(capsys, "inspect", name, folder, "--sample", str(sample))
        assert pack["phase"] == ("plain" if sample < 4 * start else "cooldown")
        assert all(document["prefix"] is None for document in pack["documents"])
