"""`PREFIX.prepare.json`: valid or refused, and its checksums."""

from __future__ import annotations

import json
import math
import random
import zlib
from pathlib import Path
from typing import Any

import pytest

from megatron_meco.corpus import manifest
from megatron_meco.corpus.manifest import (
    check_checksum,
    checksum_of,
    manifest_path,
    note_checksum,
    read_manifest,
)
from megatron_meco.corpus.metadata import METADATA_SUFFIX, replace_metadata
from megatron_meco.errors import DataError

GOOD: dict[str, Any] = {
    "format": 3,
    "text_field": "text",
    "metadata_fields": ["url"],
    "tokenizer": {"type": "T", "model": None, "extra": {}, "vocab_size": 300, "eod": 1},
    "sentences": None,
    "documents": 3,
    "tokens": 9,
    "crc32": {".idx": "3610a686"},
}
SENTENCES = {
    "language": "english",
    "abbreviations": "e.g",
    "sentence_starters": "",
    "collocations": "",
    "orthographic_contexts": {"12": "a b"},
}


def write(prefix: Path, content: Any) -> Path:
    manifest_path(prefix).write_text(content if isinstance(content, str) else json.dumps(content))
    return prefix


def test_none_and_whole_ones(tmp_path: Path) -> None:
    assert read_manifest(tmp_path / "c") == {}
    for changes in ({}, {"sentences": SENTENCES}, {"more": [1]}):
        assert read_manifest(write(tmp_path / "c", {**GOOD, **changes})) == {**GOOD, **changes}
    # A pipeline of one's own says no more.
    few = {key: GOOD[key] for key in ("documents", "tokens", "crc32")}
    assert read_manifest(write(tmp_path / "c", few)) == few


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "1", '"x"', "[" * 100_000, "\udc00".encode("utf-8", "replace")),
        *({k: v for k, v in GOOD.items() if k != key} for key in ("documents", "tokens", "crc32")),
        *({k: v for k, v in GOOD.items() if k != key} for key in ("tokenizer", "metadata_fields")),
        *({**GOOD, "documents": value} for value in (-1, 2.0, True, None, "3", 2**63, math.nan)),
        *({**GOOD, "crc32": value} for value in (None, [], {".idx": 5}, {".idx": "xyz"})),
        {**GOOD, "crc32": {"/../../dev/zero": "00000000"}},
        *({**GOOD, "metadata_fields": value} for value in (None, "url", [1], {"url": 1})),
        *({**GOOD, "tokenizer": value} for value in (None, [], {"type": 3}, {"model": "x"})),
        {**GOOD, "tokenizer": {**GOOD["tokenizer"], "eod": "1"}},
        {**GOOD, "tokenizer": {**GOOD["tokenizer"], "vocab_size": -5}},
        {**GOOD, "tokenizer": {**GOOD["tokenizer"], "extra": []}},
        {**GOOD, "sentences": {**SENTENCES, "language": "klingon"}},
        {**GOOD, "sentences": {**SENTENCES, "orthographic_contexts": {"x": "a"}}},
        {**GOOD, "sentences": {**SENTENCES, "abbreviations": None}},
        {**GOOD, "sentences": "english"},
    ],
    ids=lambda content: str(content)[:30],
)
def test_everything_else_is_refused(tmp_path: Path, content: Any) -> None:
    content = content.decode() if isinstance(content, bytes) else content
    with pytest.raises(DataError, match=r"c\.prepare\.json: .*prepare again"):
        read_manifest(write(tmp_path / "c", content))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    manifest_path(tmp_path / "c").write_bytes(b'{"documents": "\xff"}')
    with pytest.raises(DataError, match=r"c\.prepare\.json"):
        read_manifest(tmp_path / "c")


def test_a_file_is_compared_with_what_was_noted(tmp_path: Path) -> None:
    prefix = tmp_path / "c"
    index = Path(f"{prefix}.idx")
    index.write_bytes(b"hello")
    check_checksum(prefix, ".idx")  # nothing was noted
    write(prefix, GOOD)
    check_checksum(prefix, ".idx")
    check_checksum(prefix, ".metadata.arrow")
    index.write_bytes(b"hellp")
    with pytest.raises(DataError, match=r"c\.idx: its CRC-32 is \w{8}, .* says 3610a686"):
        check_checksum(prefix, ".idx")
    note_checksum(prefix, ".idx")
    check_checksum(prefix, ".idx")
    assert {**read_manifest(prefix), "crc32": GOOD["crc32"]} == GOOD
    index.unlink()
    with pytest.raises(DataError, match=r"c\.idx: cannot be read"):
        check_checksum(prefix, ".idx")


@pytest.mark.parametrize("num_bytes", [0, 1, 99, 100, 101, 1000, 12_345])
def test_parts_have_the_checksum_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    monkeypatch.setattr(manifest, "_PART_BYTES", 100)
    monkeypatch.setattr(manifest, "_READ_BYTES", 30)
    content = random.Random(num_bytes).randbytes(num_bytes)
    (tmp_path / "file").write_bytes(content)
    assert checksum_of(tmp_path / "file") == f"{zlib.crc32(content):08x}"


def test_metadata_that_is_replaced_is_noted(tmp_path: Path) -> None:
    prefix = write(tmp_path / "c", {**GOOD, "crc32": {METADATA_SUFFIX: "00000000"}})
    with replace_metadata(prefix, ["url"]) as writer:
        writer.append([["a"]])
    check_checksum(prefix, METADATA_SUFFIX)
    assert read_manifest(prefix)["crc32"].keys() == {METADATA_SUFFIX}
    # A damaged manifest is told before anything is replaced.
    before = Path(f"{prefix}{METADATA_SUFFIX}").read_bytes()
    write(prefix, "{")
    with pytest.raises(DataError), replace_metadata(prefix, ["url"]) as writer:
        writer.append([["b"]])
    assert Path(f"{prefix}{METADATA_SUFFIX}").read_bytes() == before
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["c.metadata.arrow", "c.prepare.json"]
