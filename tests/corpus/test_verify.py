"""`meco verify` and `meco metadata` on whole and on damaged corpora."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_corpus import write_corpus

from megatron_meco import cli
from megatron_meco.corpus import sources
from megatron_meco.corpus.prepare import PrepareConfig, prepare

RECORDS: list[Any] = [
    {"text": f"page {i} of the text \u00e9", "url": f"https://h{i % 3}.org/{i}", "score": i / 8}
    for i in range(90)
]
RECORDS[50] = b"{broken"
RECORDS[70] = {"text": "without the others", "url": None}


@pytest.fixture
def corpus(
    tmp_path: Path,
    tokenizer_folder: Path,
    write_jsonl: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Path, Path]:
    """A corpus and what it was made of."""
    monkeypatch.setattr(sources, "_MIN_TASK_BYTES", 1500)
    source, prefix = write_jsonl(*RECORDS), tmp_path / "out" / "corpus"
    prepare(
        PrepareConfig(
            inputs=(source,),
            output=prefix,
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(tokenizer_folder),
            metadata_fields=("url", "score", "file_path"),
        )
    )
    return prefix, source


def _meco(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    capsys.readouterr()
    status = cli.main([str(word) for word in words])
    told = capsys.readouterr()
    return status, told.out + told.err


def test_a_whole_corpus(corpus: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    prefix, source = corpus
    status, told = _meco(capsys, "verify", prefix, "--against", source)
    assert status == 0 and "WRONG" not in told
    assert "89 documents are equal" in told and "CRC-32 .bin" in told
    # What Megatron's own tool wrote has no manifest.
    Path(f"{prefix}.prepare.json").unlink()
    status, told = _meco(capsys, "verify", prefix)
    assert status == 0 and "EOD: not known" in told
    assert _meco(capsys, "verify", prefix, "--against", source)[0] == 1
    assert "1 ends every document" in _meco(capsys, "verify", prefix, "--eod", 1)[1]
    assert _meco(capsys, "verify", prefix, "--eod", 7)[0] == 1


@pytest.mark.parametrize(
    ("suffix", "place", "told"),
    [
        (".bin", -2, "89 more of|do not end in"),
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
    corpus: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    suffix: str,
    place: int | None,
    told: str,
) -> None:
    path = Path(f"{corpus[0]}{suffix}")
    content = bytearray(path.read_bytes())
    if place is None:
        del content[-3:]
    else:
        content[place] ^= 0x01 if place == 10 else 0x55
    path.write_bytes(content)
    status, found = _meco(capsys, "verify", corpus[0])
    assert status == 1
    assert any(part in found for part in told.split("|")), found
    assert "Traceback" not in found


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"documents": "many"}'])
def test_a_malformed_manifest_is_told(
    corpus: tuple[Path, Path], capsys: pytest.CaptureFixture[str], content: str
) -> None:
    prefix, source = corpus
    Path(f"{prefix}.prepare.json").write_text(content)
    for words in ([], ["--against", source]):
        status, told = _meco(capsys, "verify", prefix, *words)
        assert status == 1 and told.startswith(f"meco: error: {prefix}.prepare.json: ")


def test_ids_below_zero_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_corpus(tmp_path / "c", [[5, -2, 1], [6, 1]], dtype=np.int32)
    noted = {"documents": 2, "tokens": 5, "crc32": {}}
    noted["tokenizer"] = {"type": "T", "model": None, "vocab_size": 10, "eod": 1}
    (tmp_path / "c.prepare.json").write_text(json.dumps(noted))
    status, told = _meco(capsys, "verify", prefix)
    assert status == 1 and "WRONG  vocabulary: smallest id -2, largest id 6" in told


def test_other_files_are_told_by_document(
    corpus: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
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
        status, found = _meco(capsys, "verify", prefix, "--against", source)
        assert status == 1 and told in found and f"line {number}:" in found, found
    source.write_bytes(b"".join(lines[:-1]))
    assert "give 88 documents" in _meco(capsys, "verify", prefix, "--against", source)[1]
    source.write_bytes(b"".join([*lines, lines[0]]))
    assert "no such document" in _meco(capsys, "verify", prefix, "--against", source)[1]


def test_metadata_is_summed_up(
    corpus: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    status, told = _meco(capsys, "metadata", corpus[0], "--top", 2)
    assert status == 0
    assert "url: 98.88 % of documents, 88 distinct values" in told and "3 distinct hosts" in told
    report = json.loads(_meco(capsys, "metadata", corpus[0], "--json")[1])
    assert report["documents"] == 89
    url, score, file_path = report["fields"]
    hosts = [(f"h{i}.org", n / 89) for i, n in ((0, 30), (2, 29), (1, 29))]
    assert sorted(map(tuple, url["most_frequent_hosts"])) == sorted(hosts)
    assert (score["present"], score["distinct"]) == (88 / 89, 88)
    assert score["most_frequent_hosts"] is None
    assert file_path["most_frequent"] == [[str(corpus[1]), 1.0]]
    status, told = _meco(capsys, "metadata", "/no/such")
    assert status == 1 and "no metadata file" in told
