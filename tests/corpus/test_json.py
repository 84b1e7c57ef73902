"""`--json` of the commands that make and check a corpus: one object, with the table's numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import write_pages

from megatron_meco.cli import main

FIXTURE = Path(__file__).with_name("mds")


def told(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == status
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)
    return found


def test_verify(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = Path(corpus).with_name("pages.jsonl")
    found = told(capsys, "verify", corpus, "--against", pages)
    assert found["is_right"] is True and all(check["is_right"] for check in found["checks"])
    main(["verify", corpus, "--against", str(pages)])
    table = capsys.readouterr().out.splitlines()
    assert table == [f"ok     {check['name']}: {check['told']}" for check in found["checks"]]
    for path in Path(corpus).parent.glob("pages.*"):
        shutil.copy(path, tmp_path)
    with (tmp_path / "pages.bin").open("r+b") as file:
        file.write(b"\x01\x00")
    found = told(capsys, "verify", tmp_path / "pages", status=1)
    assert found["is_right"] is False
    assert not all(check["is_right"] for check in found["checks"])


def test_attach(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in Path(corpus).parent.glob("pages.*"):
        shutil.copy(path, tmp_path)
    pages = [json.loads(line) for line in (tmp_path / "pages.jsonl").read_text().splitlines()]
    urls = [page["url"] for page in pages]
    table = pa.table({"url": urls, "topic": ["t"] * len(urls)})
    pq.write_table(table.slice(0, 299), tmp_path / "topics.parquet")
    join = ["--join", tmp_path / "topics.parquet", "--key", "url"]
    found = told(capsys, "attach", tmp_path / "pages", *join)
    assert (found["documents"], found["matched"], found["rows"]) == (300, 299, 299)
    assert found["files"] == [f"{tmp_path}/pages.metadata.arrow"]
    pq.write_table(table, tmp_path / "all.parquet")
    words = ["--table", tmp_path / "all.parquet", "--overwrite"]
    assert told(capsys, "attach", tmp_path / "pages", *words)["documents"] == 300


def test_import_mds(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output", tmp_path / "c", "--tokenizer-type", "HuggingFaceTokenizer"]
    words += ["--tokenizer-model", tokenizer_folder, "--workers", 1]
    found = told(capsys, "import-mds", FIXTURE / "authors", *words)
    assert found["documents"] == 40 and found["tokens"] > 40
    assert all(Path(path).is_file() for path in found["files"])


def test_tokenizer_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = write_pages(tmp_path / "pages.jsonl", 30)
    words = ["--vocab-size", "300", "--output", tmp_path / "tokenizer"]
    found = told(capsys, "tokenizer", "train", pages, *words)
    assert (found["documents"], found["vocab_size"]) == (30, 300)
    assert found["folder"] == str(tmp_path / "tokenizer")
