"""What `meco plan` advises, and what `meco inspect` says of plain documents and of tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import write_tokenizer

from megatron_meco.cli import main

LENGTH = 64


def make_flags(folder: Path, texts: list[tuple[str, str | None]], *more: str) -> list[str]:
    pages = folder / "pages.jsonl"
    with pages.open("w") as file:
        for text, url in texts:
            file.write(json.dumps({"text": text, "url": url}) + "\n")
    tokenizer = str(write_tokenizer(folder / "tokenizer"))
    arguments = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
    output = str(folder / "pages")
    assert main(["prepare", str(pages), "--output", output, *arguments]) == 0
    run = f"--seq-length {LENGTH} --split 100,0,0 --global-batch-size 4 --eval-iters 0"
    return ["--data-path", output, *arguments, *run.split(), *more]


def advice(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["plan", *flags, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["advice"]
    assert main(["plan", *flags]) == 0
    shown = capsys.readouterr().out
    for line in lines:
        assert "".join(line.split()) in "".join(shown.split())
    return "\n".join(lines)


def test_discarded_tokens_name_what_would_keep_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [("the quick brown fox " * 60, f"https://a.org/{i}") for i in range(400)]
    flags = make_flags(tmp_path, long, "--train-iters", "20")
    text = advice(flags, capsys)
    assert "conditioned: 79 % of the documents' tokens are discarded" in text
    assert "meco-packing split 4 %, meco-packing best-fit 0 %" in text
    assert "cooldown: it has 40 documents" in text and "conditioned: it has" not in text
    assert "of the documents' tokens" not in advice([*flags, "--meco-packing", "best-fit"], capsys)


def test_documents_that_do_not_suffice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = [("the quick brown fox", f"https://a.org/{i}") for i in range(200)]
    flags = make_flags(tmp_path, short, "--train-iters", "60", "--meco-packing", "split")
    text = advice(flags, capsys)
    assert "cooldown: its 20 documents are shown up to" in text
    assert "a larger meco-cooldown-documents (now 20 documents)" in text
    assert "prefixes are " in text and "of the conditioned tokens" in text
    assert "are shown up to" not in advice([*flags, "--train-iters", "2"], capsys)


def test_prefixes_that_are_long_or_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts: list[tuple[str, str | None]] = [
        ("the fox", f"https://a.org/{'x' * (100 if i % 4 else 2)}") for i in range(200)
    ]
    texts += [("the fox", None)] * 50
    template = ["--meco-template", "{url}", "--train-iters", "5"]
    text = advice(make_flags(tmp_path, texts, *template), capsys)
    assert "60.00 % of the documents have a prefix of more than 32 tokens" in text
    assert "20.00 % of the documents lack a value" in text


def test_a_good_plan_needs_no_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = [
        ("the quick brown fox and the lazy dog " * 2, f"https://a.org/{i}") for i in range(5000)
    ]
    flags = ["--train-iters", "100", "--meco-packing", "split", "--meco-template", "{url.host} "]
    assert advice(make_flags(tmp_path, pages, *flags), capsys) == ""


@pytest.fixture
def mixed(tmp_path: Path) -> list[str]:
    texts: list[tuple[str, str | None]] = [
        ("the fox", "https://a.org/1"),
        ("the dog", None),
        ("the cat", "https://a.org/" + "x" * 100),
    ] * 40
    return make_flags(tmp_path, texts, "--meco-template", "{url}", "--train-iters", "10")


def test_inspect_says_why_a_document_is_plain(
    mixed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def reasons(*more: str) -> set[str | None]:
        capsys.readouterr()
        assert main(["inspect", *mixed, "--json", *more]) == 0
        return {d["plain_because"] for d in json.loads(capsys.readouterr().out)["documents"]}

    long = "its prefix is longer than 32 tokens (meco-max-prefix-tokens)"
    assert reasons() == {None, "it has no url", long}
    assert reasons("--sample", "39") == {"the cooldown has no prefixes"}
    assert "meco-plain-fraction 0.99 drew it" in reasons("--meco-plain-fraction", "0.99")
    assert reasons("--meco-template", "[[{url}]]") == {
        None,
        "all groups of the template lack a value",
        long,
    }
    dropped = "keep or shuffled left it without a value"
    assert reasons("--meco-template", "{url.host|keep=0}") == {"it has no url.host", dropped}
    assert reasons("--meco-template", "[[{url.host|keep=0}]]{url.suffix}") == {
        None,
        "it has no url.suffix",
        "the pack ends before its prefix",
    }
    assert main(["inspect", *mixed]) == 0
    assert "plain: it has no url" in " ".join(capsys.readouterr().out.split())


def test_inspect_shows_tokens(mixed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", *mixed, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert main(["inspect", *mixed, "--tokens"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    rows = [row for row in rows if row]
    assert [int(row[0]) for row in rows] == list(range(LENGTH))
    assert [int(row[3]) for row in rows] == report["tokens"]
    assert [float(row[-1] == "yes") for row in rows] == report["loss_mask"]
    head = sum(d["prefix_tokens"] for d in report["documents"]) + len(report["documents"])
    assert sum(row[2] == "prefix" for row in rows) == head
