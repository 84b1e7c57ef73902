"""`meco verify` and `meco metadata` on whole and on damaged corpora."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.mutations import Index
from small_corpus import write_corpus

from megatron_meco.corpus import input_files
from megatron_meco.corpus.index_file import check_index
from megatron_meco.corpus.metadata import metadata_path, open_metadata
from megatron_meco.corpus.metadata_report import report_metadata
from megatron_meco.corpus.prepare import PrepareConfig, prepare
from megatron_meco.errors import DataError
from megatron_meco.show.corpus_facts import corpus_facts

type Meco = Callable[..., tuple[int, str]]

RECORDS: list[Any] = [
    {"text": f"page {i} of the text \u00e9", "url": f"https://h{i % 3}.org/{i}", "score": i / 8}
    for i in range(90)
]
RECORDS[50] = b"{broken"
RECORDS[70] = {"text": "without the others", "url": None}
LINES = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in RECORDS]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The folder of a corpus and of what it was made of."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "input.jsonl").write_bytes(b"".join(line + b"\n" for line in LINES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_files, "_MIN_TASK_BYTES", 1500)
        prepare(
            PrepareConfig(
                inputs=(folder / "input.jsonl",),
                output=folder / "out" / "corpus",
                tokenizer_type="HuggingFaceTokenizer",
                tokenizer_model=str(tokenizer_folder),
                metadata_fields=("url", "score", "file_path"),
            )
        )
    return folder


@pytest.fixture
def corpus(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, Path]]:
    """A corpus and what it was made of; both may be changed."""
    monkeypatch.setattr(input_files, "_MIN_TASK_BYTES", 1500)
    shutil.copytree(prepared / "out", tmp_path / "out")
    source = prepared / "input.jsonl"
    content = source.read_bytes()
    yield tmp_path / "out" / "corpus", source
    source.write_bytes(content)


def test_a_whole_corpus(corpus: tuple[Path, Path], meco: Meco) -> None:
    prefix, source = corpus
    status, told = meco("verify", prefix, "--against", source)
    assert status == 0 and "WRONG" not in told
    assert "89 documents are equal" in told and "CRC-32 .bin" in told
    # What Megatron's own tool wrote has no manifest.
    Path(f"{prefix}.prepare.json").unlink()
    status, told = meco("verify", prefix)
    assert status == 0 and "EOD: not known" in told
    assert meco("verify", prefix, "--against", source)[0] == 1
    assert "1 ends every document" in meco("verify", prefix, "--eod", 1)[1]
    assert meco("verify", prefix, "--eod", 7)[0] == 1


@pytest.mark.parametrize(
    ("suffix", "place", "told"),
    [
        (".bin", -2, "89 more of|document does not end in"),
        (".bin", 10, "CRC-32 .bin"),
        (".bin", 11, "largest id"),
        (".idx", 40, "index promises"),
        (".idx", 34 + 4 * 89 + 9, "do not lie one after the other"),
        (".idx", -1, "do not cover"),
        (".idx", 2, "not an index"),
        (".idx", None, "its header promises"),
        (".bin", None, "the index promises"),
        (".metadata.arrow", None, "Arrow"),
    ],
)
def test_damage_is_found(
    corpus: tuple[Path, Path], meco: Meco, suffix: str, place: int | None, told: str
) -> None:
    path = Path(f"{corpus[0]}{suffix}")
    content = bytearray(path.read_bytes())
    if place is None:
        del content[-3:]
    else:
        content[place] ^= 0x01 if place == 10 else 0x55
    path.write_bytes(content)
    status, found = meco("verify", corpus[0])
    assert status == 1
    assert any(part in found for part in told.split("|")), found
    assert "Traceback" not in found


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"documents": "many"}'])
def test_a_malformed_manifest_is_told(corpus: tuple[Path, Path], meco: Meco, content: str) -> None:
    prefix, source = corpus
    Path(f"{prefix}.prepare.json").write_text(content)
    for words in ([], ["--against", source]):
        status, told = meco("verify", prefix, *words)
        assert status == 1 and told.startswith(f"meco: error: {prefix}.prepare.json: ")


def test_ids_below_zero_are_found(tmp_path: Path, meco: Meco) -> None:
    prefix = write_corpus(tmp_path / "c", [[5, -2, 1], [6, 1]], dtype=np.int32)
    noted = {"documents": 2, "tokens": 5, "crc32": {}}
    noted["tokenizer"] = {"type": "T", "model": None, "vocab_size": 10, "eod": 1}
    (tmp_path / "c.prepare.json").write_text(json.dumps(noted))
    status, told = meco("verify", prefix)
    assert status == 1 and "WRONG  vocabulary: smallest id -2, largest id 6" in told


def test_other_files_are_told_by_document(corpus: tuple[Path, Path], meco: Meco) -> None:
    prefix, source = corpus
    lines = source.read_bytes().splitlines(keepends=True)
    for number, old, new, told in (
        (61, b"page 60", b"page 61", "document 59 differs from"),
        (81, b"https://h2.org/80", b"https://h2.org/81", "'url' is 'https://h2.org/80'"),
    ):
        changed = list(lines)
        assert old in changed[number - 1]
        changed[number - 1] = changed[number - 1].replace(old, new)
        source.write_bytes(b"".join(changed))
        status, found = meco("verify", prefix, "--against", source)
        assert status == 1 and told in found and f"line {number}:" in found, found
    source.write_bytes(b"".join(lines[:-1]))
    assert "give 88 documents" in meco("verify", prefix, "--against", source)[1]
    source.write_bytes(b"".join([*lines, lines[0]]))
    assert "no such document" in meco("verify", prefix, "--against", source)[1]


def test_metadata_is_summed_up(corpus: tuple[Path, Path], meco: Meco) -> None:
    status, told = meco("metadata", corpus[0], "--top", 2)
    assert status == 0
    assert "url: 98.88 % of documents, 88 distinct values" in told and "3 distinct hosts" in told
    report = json.loads(meco("metadata", corpus[0], "--json")[1])
    assert report["documents"] == 89
    url, score, file_path = report["fields"]
    hosts = [(f"h{i}.org", n / 89) for i, n in ((0, 30), (2, 29), (1, 29))]
    assert sorted(map(tuple, url["most_frequent_hosts"])) == sorted(hosts)
    index = check_index(corpus[0])
    lengths = np.diff(index.bounds(0, 89))
    urls = open_metadata(corpus[0])["url"].to_pylist()
    shares = [
        sum(n for n, u in zip(lengths.tolist(), urls, strict=True) if u and f"//{name}/" in u)
        / lengths.sum()
        for name, _ in url["most_frequent_hosts"]
    ]
    assert url["tokens_of_hosts"] == pytest.approx(shares) and 0.9 < sum(shares) < 1
    assert f"{100 * shares[0]:.3f} %" in told and "tokens" in told
    assert (score["present"], score["distinct"]) == (88 / 89, 88)
    assert score["most_frequent_hosts"] is None
    assert file_path["most_frequent"] == [[str(corpus[1]), 1.0]]
    status, told = meco("metadata", "/no/such")
    assert status == 1 and "no metadata file" in told


def test_a_manifest_that_is_none_is_one_error(corpus: tuple[Path, Path], meco: Meco) -> None:
    prefix, source = corpus
    path = Path(f"{prefix}.prepare.json")
    manifest = json.loads(path.read_text())
    contents = [b"", b"{", b"[]", b"5", b"{}", b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe"]
    contents += [b'{"documents": ' + b"9" * 5000 + b"}", path.read_bytes()[:-3]]
    read_by_all = {"documents", "tokens", "crc32", "tokenizer", "metadata_fields", "text_field"}
    for key in sorted(read_by_all | {"sentences", "format", "sequences", "rejected"}):
        wrong = [
            "x",
            -1,
            True,
            1.5,
            10**30,
            [[1]],
            {"a": "b"},
            *([None] if key != "sentences" else []),
        ]
        for value in wrong:
            if not (key == "text_field" and value == "x"):
                contents.append(json.dumps({**manifest, key: value}).encode())
    contents.append(json.dumps({**manifest, "crc32": {"/../../x": "00000000"}}).encode())
    for content in contents:
        path.write_bytes(content)
        status, told = meco("verify", prefix)
        assert status == 1 and told.startswith(f"meco: error: {path}: "), (content[:200], told)
        assert told.count("\n") == 1
    path.unlink()
    os.mkfifo(path)
    assert "is no plain file" in meco("verify", prefix)[1]
    path.unlink()
    metadata = Path(f"{prefix}.metadata.arrow")
    metadata.unlink()
    os.mkfifo(metadata)
    status, told = meco("verify", prefix)
    assert status == 1 and "WRONG  metadata: no file" in told
    assert "no plain file" in meco("metadata", prefix)[1]
    assert source.is_file()


def test_one_of_a_thing_and_rates_of_what_there_is(
    tmp_path: Path, tokenizer_folder: Path, write_jsonl: Callable[..., Path], meco: Meco
) -> None:
    source, prefix = write_jsonl({"text": "one page of text", "url": "a.org"}), tmp_path / "one"
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder]
    told = meco("prepare", source, "--output", prefix, *tokenizer)[1]
    told += meco("verify", prefix, "--against", source)[1]
    Path(f"{prefix}.metadata.arrow").unlink()
    told += meco("attach", prefix, "--from", source, *tokenizer)[1]
    told += meco("metadata", prefix)[1]
    assert not re.search(
        r"(?<![\d,.])1 (documents|rows|tokens|sequences|texts|distinct values|distinct hosts)", told
    )
    assert "1 document of 1 sequence" in told and "1 document is equal" in told
    rates = [line for line in told.splitlines() if "docs/s" in line]
    assert len(rates) == 3 and all("kB/s" in line or "MB/s" in line for line in rates)
    assert not any("  0.0 MB/s" in line for line in rates) and "CUDA" not in told


def test_metadata_and_show_refuse_an_index_that_moved_a_border(corpus: tuple[Path, Path]) -> None:
    """Its numbers agree with one another, and two documents have other lengths."""
    prefix = corpus[0]
    index = Index(Path(f"{prefix}.idx").read_bytes())
    index.lengths[3] += 2
    index.lengths[4] -= 2
    index.set_pointers()
    Path(f"{prefix}.idx").write_bytes(index.content())
    check_index(prefix)
    for look in (report_metadata, corpus_facts):
        with pytest.raises(DataError, match="its CRC-32 is") as refusal:
            look(str(prefix), 10)
        assert refusal.value.where == f"{prefix}.idx"


def test_metadata_and_show_refuse_values_that_were_changed(corpus: tuple[Path, Path]) -> None:
    prefix = corpus[0]
    path = metadata_path(prefix)
    content = path.read_bytes()
    assert b"https://h2.org/2" in content
    path.write_bytes(content.replace(b"https://h2.org/2", b"https://h9.org/2"))
    open_metadata(prefix)
    for look in (report_metadata, corpus_facts):
        with pytest.raises(DataError, match="its CRC-32 is") as refusal:
            look(str(prefix), 10)
        assert refusal.value.where == str(path)
