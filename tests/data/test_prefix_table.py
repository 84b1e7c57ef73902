"""Prefix tables: numbering, caching, what makes a new one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from megatron_meco.data import prefix_table
from megatron_meco.data.prefix_table import load_prefix_table
from megatron_meco.data.template import Template
from megatron_meco.errors import DataError, FlagError


def write(prefix: Path, **columns: list[str | None]) -> None:
    table = pa.table({k: pa.array(v, pa.string()) for k, v in columns.items()})
    with pa.ipc.new_file(f"{prefix}.metadata.arrow", table.schema) as writer:
        writer.write_table(table)


def encode(texts: list[str]) -> list[list[int] | None]:
    return [[ord(c) for c in text] for text in texts]


def load(prefix: Path, num_documents: int, source: str = "{url.host}", **changes: Any) -> Any:
    options: dict[str, Any] = {
        "encode_batch": encode,
        "tokenizer_identity": "letters",
        "max_prefix_tokens": 20,
        "cache_folder": prefix.parent / "cache",
    }
    return load_prefix_table(
        str(prefix), num_documents, Template.parse(source), **{**options, **changes}
    )


def test_each_distinct_prefix_once_across_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_table, "_ROWS_PER_BATCH", 3)
    monkeypatch.setattr(prefix_table, "_TEXTS_PER_CALL", 2)
    hosts = ["a.org", "b.org", None, "a.org", "c.org", "b.org", "x" * 30 + ".org", "a.org"]
    write(tmp_path / "c", url=[h and f"http://{h}/" for h in hosts])
    table = load(tmp_path / "c", 8)
    shown = [
        None if i < 0 else "".join(map(chr, table.tokens_of(i))) for i in table.prefix_ids.tolist()
    ]
    assert shown == ["a.org", "b.org", None, "a.org", "c.org", "b.org", None, "a.org"]
    assert len(table.prefix_offsets) == 5  # the long one is kept, and not used
    assert (table.documents_without_value, table.documents_with_long_prefix) == (1, 1)


def test_many_batches_on_all_cores_give_the_table_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = [f"h{i * i % 71}.org" for i in range(2000)]
    write(tmp_path / "c", url=[f"http://{h}/{i}" for i, h in enumerate(hosts)])
    source = "{url.host|top=50%}"
    one = load(tmp_path / "c", 2000, source)
    monkeypatch.setattr(prefix_table, "_ROWS_PER_BATCH", 7)
    many = load(tmp_path / "c", 2000, source, cache_folder=tmp_path / "other")
    assert len(np.unique(one.prefix_ids)) > 5
    for name in ("prefix_ids", "prefix_tokens", "prefix_offsets"):
        assert np.array_equal(getattr(one, name), getattr(many, name))


def test_the_cache_is_used_and_not_used_when_anything_changed(tmp_path: Path) -> None:
    write(tmp_path / "c", url=["http://a.org", "http://b.org"])
    calls = []

    def counting(texts: list[str]) -> list[list[int] | None]:
        calls.append(texts)
        return encode(texts)

    for _ in range(2):
        load(tmp_path / "c", 2, encode_batch=counting)
    assert len(calls) == 1
    load(tmp_path / "c", 2, "{url}", encode_batch=counting)
    load(tmp_path / "c", 2, tokenizer_identity="others", encode_batch=counting)
    load(tmp_path / "c", 2, max_prefix_tokens=3, encode_batch=counting)
    assert len(calls) == 4
    # An edit that keeps the size of the file.
    time.sleep(0.01)
    write(tmp_path / "c", url=["http://a.org", "http://c.org"])
    table = load(tmp_path / "c", 2, encode_batch=counting)
    assert len(calls) == 5
    assert bytes(table.tokens_of(1).astype(np.uint8)) == b"c.org"


def test_a_tokenizer_that_refuses_text(tmp_path: Path) -> None:
    write(tmp_path / "c", url=["http://a.org"])
    with pytest.raises(FlagError, match=r"cannot encode the prefix 'a\.org'"):
        load(tmp_path / "c", 1, encode_batch=lambda texts: [None for _ in texts])


def test_row_counts_must_agree(tmp_path: Path) -> None:
    write(tmp_path / "c", url=["http://a.org"])
    with pytest.raises(DataError, match="1 rows of metadata for 2 documents"):
        load(tmp_path / "c", 2)
