"""`meco attach` on corpora that Megatron's own tool would have written."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer

from megatron_meco.corpus.metadata import metadata_path, open_metadata

type Meco = Callable[..., tuple[int, str]]

RECORDS = [
    {"text": f"page {i} of the text", "url": f"https://h{i}.org", "meta": {"score": i / 4}}
    for i in range(60)
]
FLAGS = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model"]


@pytest.fixture
def corpus(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Path]:
    """Return a function that has Megatron's builder write the texts, between ids of choice."""

    def write(before: tuple[int, ...] = (), after: tuple[int, ...] = (1,)) -> Path:
        tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
        tokenizer.no_truncation()
        builder = IndexedDatasetBuilder(str(tmp_path / "old.bin"), dtype=np.uint16)
        for record in RECORDS:
            ids = tokenizer.encode(str(record["text"]), add_special_tokens=False).ids
            builder.add_document([*before, *ids, *after], [len(before) + len(ids) + len(after)])
        builder.finalize(str(tmp_path / "old.idx"))
        return tmp_path / "old"

    return write


@pytest.mark.parametrize(("before", "after"), [((), (1,)), ((0,), (1,)), ((), ())])
def test_from_the_original_files(
    corpus: Callable[..., Path],
    write_jsonl: Callable[..., Path],
    tokenizer_folder: Path,
    meco: Meco,
    before: tuple[int, ...],
    after: tuple[int, ...],
) -> None:
    prefix = corpus(before, after)
    one = write_jsonl(*RECORDS[:25], b"{broken", name="one.jsonl")
    two = write_jsonl(*RECORDS[25:], name="two.jsonl")
    words = [prefix, "--from", one, two, "--metadata-fields", "url,meta.score"]
    words += [*FLAGS, tokenizer_folder, "--verify-documents", 20]
    tokens = Path(f"{prefix}.bin").read_bytes()
    status, told = meco("attach", *words)
    assert status == 0 and "60 rows (20 of them tokenised again and equal)" in told
    table = open_metadata(prefix)
    assert table["url"].to_pylist() == [record["url"] for record in RECORDS]
    assert table["meta.score"].to_pylist() == [str(i / 4) for i in range(60)]
    assert Path(f"{prefix}.bin").read_bytes() == tokens
    status, told = meco("attach", *words)
    assert status == 1 and "--overwrite" in told
    assert meco("attach", *words, "--overwrite")[0] == 0


def test_other_files_and_another_tokenizer_are_refused(
    corpus: Callable[..., Path],
    write_jsonl: Callable[..., Path],
    tokenizer_folder: Path,
    tokenizer_without_eos: Path,
    meco: Meco,
) -> None:
    prefix = corpus()
    flags = [*FLAGS, tokenizer_folder]
    swapped = list(RECORDS)
    swapped[33], swapped[34] = swapped[34], swapped[33]
    for records, expected in (
        (swapped, "document 33 is not what the tokenizer makes of"),
        (RECORDS[:-1], "59 documents in the input, 60 in the corpus"),
        ([*RECORDS, RECORDS[0]], "more than 60 documents"),
    ):
        source = write_jsonl(*records)
        status, told = meco("attach", prefix, "--from", source, *flags)
        assert status == 1 and expected in told, told
        assert not metadata_path(prefix).exists()
    status, told = meco("attach", prefix, "--from", source)
    assert status == 1 and "--tokenizer-type" in told
    status, told = meco("attach", prefix, "--from", source, *FLAGS, tokenizer_without_eos)
    assert status == 1 and "end-of-document" in told
    assert sorted(path.name for path in prefix.parent.glob("old*")) == ["old.bin", "old.idx"]


@pytest.mark.parametrize("kind", ["parquet", "stream", "file", "csv"])
def test_from_a_table(corpus: Callable[..., Path], tmp_path: Path, meco: Meco, kind: str) -> None:
    prefix = corpus()
    ids = [f"{i:03d}" for i in range(60)]
    columns: dict[str, Any] = {"url": [r["url"] for r in RECORDS], "id": ids}
    columns["url"][7] = None
    table = pa.table(columns)
    path = tmp_path / f"table.{'arrow' if kind in ('stream', 'file') else kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "csv":
        rows = [f"{url or ''},{name}" for url, name in zip(*columns.values(), strict=True)]
        path.write_text("\n".join(["url,id", *rows]) + "\n")
    else:
        new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with new(str(path), table.schema) as out:
            out.write_table(table, max_chunksize=13)
    status, told = meco("attach", prefix, "--table", path, "--metadata-fields", "id,url")
    assert status == 0 and "60 rows" in told, told
    attached = open_metadata(prefix)
    assert attached["id"].to_pylist() == ids
    assert attached["url"].to_pylist() == columns["url"]


def test_tables_that_do_not_fit(corpus: Callable[..., Path], tmp_path: Path, meco: Meco) -> None:
    prefix, path = corpus(), tmp_path / "table.parquet"
    pq.write_table(pa.table({"url": ["a"] * 59}), path)
    for words, expected in (
        ([path], "59 documents in the input, 60 in the corpus"),
        ([path, path], "118 documents"),
        ([path, "--metadata-fields", "topic"], "no column 'topic'; there are url"),
        ([path, "--metadata-fields", "url,url"], "repeated"),
        ([tmp_path / "nothing.csv"], "no such file"),
        ([prefix.with_suffix(".bin")], "not a kind of table"),
    ):
        status, told = meco("attach", prefix, "--table", *words)
        assert status == 1 and expected in told, told
    path.write_bytes(path.read_bytes()[:-9])
    assert "cannot be read" in meco("attach", prefix, "--table", path)[1]
    assert not metadata_path(prefix).exists()
    assert json.dumps(sorted(p.name for p in tmp_path.glob("old*"))) == '["old.bin", "old.idx"]'


@pytest.mark.parametrize("moment", ["write", "fsync"])
def test_a_full_disk_is_one_error_and_leaves_nothing(
    corpus: Callable[..., Path],
    write_jsonl: Callable[..., Path],
    tokenizer_folder: Path,
    meco: Meco,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    prefix, source = corpus(), write_jsonl(*RECORDS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if moment == "fsync":
        monkeypatch.setattr("os.fsync", full)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        status, told = meco("attach", prefix, "--from", source, *FLAGS, tokenizer_folder)
    finally:
        monkeypatch.undo()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1 and "cannot be written (" in told and told.count("\n") <= 2, told
    assert f"{metadata_path(prefix)}: " in told and "Traceback" not in told
    left = [name for name in os.listdir(prefix.parent) if "old" in name]
    assert sorted(left) == ["old.bin", "old.idx"]


def test_metadata_that_is_not_ours_and_inputs_are_not_replaced(
    corpus: Callable[..., Path], tmp_path: Path, meco: Meco
) -> None:
    prefix = corpus()
    target, table = metadata_path(prefix), tmp_path / "t.csv"
    table.write_text("url\n" + "u\n" * 60)
    theirs = pa.table({"url": ["a"]})
    with pa.ipc.new_file(str(target), theirs.schema) as out:
        out.write_table(theirs)
    for content in (target.read_bytes(), b"", b"notes"):
        target.write_bytes(content)
        status, told = meco("attach", prefix, "--table", table, "--overwrite")
        assert status == 1 and "is not metadata that this package wrote" in told
        assert target.read_bytes() == content
    target.unlink()
    assert meco("attach", prefix, "--table", table)[0] == 0
    own, link = target.read_bytes(), tmp_path / "link.arrow"
    os.link(target, link)
    for given in (target, link):
        status, told = meco("attach", prefix, "--table", given, "--overwrite")
        assert status == 1 and "is also an input" in told and target.read_bytes() == own


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("url\n" + "u\n" * 59 + "u", "may be cut short"),
        ("url\n" + "u\n" * 59 + '"u\n', "ends inside quotes"),
        ("url,x\n" + "u,1\n" * 59 + "u\n", "row 60: not as many fields"),
        ("url\n" + "u\n" * 59 + "\udcff\n", "row 60: invalid UTF-8"),
    ],
)
def test_a_table_that_is_cut_or_damaged(
    corpus: Callable[..., Path], tmp_path: Path, meco: Meco, content: str, told: str
) -> None:
    prefix, table = corpus(), tmp_path / "t.csv"
    table.write_text(content, encoding="utf-8", errors="surrogateescape")
    status, said = meco("attach", prefix, "--table", table)
    assert status == 1 and told in said and not metadata_path(prefix).exists()


def test_a_csv_table_means_what_it_did(
    corpus: Callable[..., Path], tmp_path: Path, meco: Meco
) -> None:
    prefix, table = corpus(), tmp_path / "t.csv"
    rows = ["NA", "null", '""', '"in\r\ntwo"', "007", "x" * 2_000_000, *["u"] * 54]
    table.write_text("\ufeffurl\n" + "\n".join(rows) + "\n\n", encoding="utf-8", newline="")
    assert meco("attach", prefix, "--table", table)[0] == 0
    values = open_metadata(prefix)["url"].to_pylist()
    assert values[:5] == [None, None, None, "in\r\ntwo", "007"] and len(values[5]) == 2_000_000
