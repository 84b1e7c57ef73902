"""`meco tokenizer train`: a folder that Megatron, transformers and `meco prepare` read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from runs import write_pages

from megatron_meco import cli

BAD = ["{broken", '{"url": "a"}', '{"text": null}', '{"text": "  "}', "[1]"]


def train(*arguments: object) -> int:
    return cli.main(["tokenizer", "train", *map(str, arguments)])


def test_a_corpus_becomes_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = write_pages(tmp_path / "pages.jsonl", 400)
    packed = tmp_path / "more.jsonl.gz"
    packed.write_bytes(gzip.compress("\n".join(BAD).encode()))
    folder = tmp_path / "tok"
    assert train(pages, packed, "--vocab-size", 300, "--output", folder) == 0
    out = capsys.readouterr().out
    assert "documents  400\n" in out
    assert "tokens     300 (0 <|begin_of_text|>, 1 <|end_of_text|>)\n" in out
    # As `meco prepare` counts them.
    for reason in ("broken JSON", "'text' missing", "'text' null", "'text' empty"):
        assert f"rejected   1 line: {reason}\n" in out
    assert "rejected   1 line: not a JSON object\n" in out

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 300)
    for text in ("the red fox", " \n\t\u4f60\u597d \U0001f600 it's\r\n", "<|end_of_text|"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("brown white")) < 6
    output = tmp_path / "corpus"
    arguments = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder)]
    assert cli.main(["prepare", str(pages), "--output", str(output), *arguments]) == 0
    manifest = json.loads(Path(f"{output}.prepare.json").read_text())
    assert "400" in json.dumps(manifest)


def test_the_same_corpus_gives_the_same_tokenizer(tmp_path: Path) -> None:
    pages = write_pages(tmp_path / "pages.jsonl", 100)
    for name in ("a", "b"):
        assert train(pages, "--vocab-size", 290, "--output", tmp_path / name) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_small_corpus_gives_fewer_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": {"text": "ab ab"}}\n')
    arguments = ("--vocab-size", 5000, "--text-field", "body.text")
    assert train(tmp_path / "a.jsonl", *arguments, "--output", tmp_path / "t") == 0
    assert "note: the corpus has no more than 260 tokens to learn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ('{"text": "a"}', ["--vocab-size", "257"], "--vocab-size 257: must be 258"),
        ('{"text": "a"}', ["--vocab-size", "-1"], "--vocab-size -1: must be 258"),
        ('{"text": "a"}', ["--vocab-size", str(10**12)], "must be 258"),
        ('{"page": "a"}', ["--vocab-size", "300"], "hold no document (1 'text' missing)"),
        ("", ["--vocab-size", "300"], "hold no document (they are empty)"),
        ("{bad\n", ["--vocab-size", "300", "--strict"], "a.jsonl, line 1: broken JSON"),
        ('{"text": "a"}', ["--vocab-size", "300", "--output", "."], "exists already"),
        ('{"text": "a"}', ["--vocab-size", "300", "--text-field", ""], "--text-field"),
        (None, ["--vocab-size", "300"], "a.jsonl"),
    ],
)
def test_refusals_leave_nothing_behind(
    text: str | None,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "a.jsonl"
    if text is not None:
        path.write_text(text)
    before = sorted(tmp_path.iterdir())
    assert train(path, "--output", tmp_path / "t", *arguments) == 1
    err = capsys.readouterr().err
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("meco: error: ")]) == 1
    assert sorted(tmp_path.iterdir()) == before
