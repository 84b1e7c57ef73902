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


def shown(table: Any) -> list[list[int] | None]:
    return [None if i < 0 else table.tokens_of(i).tolist() for i in table.prefix_ids.tolist()]


def test_special_tokens_and_seeds_are_part_of_what_names_a_table(tmp_path: Path) -> None:
    write(tmp_path / "c", t=["a", "b"] * 50)
    source = "{token:<s>}{t}{token:</s>}x"
    one = load(tmp_path / "c", 100, source, token_ids={"<s>": 900, "</s>": 901})
    assert shown(one)[0] == [900, ord("a"), 901, ord("x")]
    other = load(tmp_path / "c", 100, source, token_ids={"<s>": 902, "</s>": 901})
    assert shown(other)[0] == [902, ord("a"), 901, ord("x")]
    # A seed names those tables alone that depend on it.
    plain = [load(tmp_path / "c", 100, "{t}", seed=seed) for seed in (1, 2)]
    assert plain[0].identity == plain[1].identity
    for source in ("[[{t|keep=0.5}]]!", "{t|shuffled}"):
        first, second = (load(tmp_path / "c", 100, source, seed=seed) for seed in (1, 2))
        assert first.identity != second.identity
        assert shown(first) != shown(second)


def test_special_tokens_alone_need_no_metadata(tmp_path: Path) -> None:
    table = load(tmp_path / "c", 3, "{token:<s>}{token:<s>}", token_ids={"<s>": 900})
    assert shown(table) == [[900, 900]] * 3


def test_documents_that_lose_their_value_by_keep_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "c", t=["a"] * 200)
    table = load(tmp_path / "c", 200, "{t|keep=0.5}")
    assert 60 < table.documents_without_value == shown(table).count(None) < 140
