"""Prefix tables: numbering, caching, what makes a new one."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from megatron_meco import _core
from megatron_meco.corpus.encoder import fast_encoder
from megatron_meco.corpus.text_arrays import text_buffers
from megatron_meco.corpus.tokenizer import HuggingFaceEncoder
from megatron_meco.data import prefix_table
from megatron_meco.data.prefix_table import load_prefix_table
from megatron_meco.data.template import Template
from megatron_meco.errors import DataError, FlagError
from tests.data.reference_template import frequent_values


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


def test_brackets_that_once_were_kept_name_another_table(tmp_path: Path) -> None:
    """`[[[[` was four brackets and is two; `[[...]]` was text."""
    write(tmp_path / "c", url=["http://a.org/"])
    for source in ("[[[[{url.host}", "[[{url.host}]]", "{url.host}[a]"):
        folder = tmp_path / "cache"
        load(tmp_path / "c", 1, source, cache_folder=folder)
        [written] = folder.glob("*.meco")
        key = {
            "template": source,
            "tokenizer": "letters",
            "metadata": prefix_table.file_identity(str(tmp_path / "c.metadata.arrow")),
            "max_prefix_tokens": 20,
        }
        as_before = prefix_table.digest(key) in written.name
        assert as_before == ("[a]" in source)
        written.unlink()


def test_special_tokens_alone_need_no_metadata(tmp_path: Path) -> None:
    table = load(tmp_path / "c", 3, "{token:<s>}{token:<s>}", token_ids={"<s>": 900})
    assert shown(table) == [[900, 900]] * 3


def test_documents_that_lose_their_value_by_keep_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "c", t=["a"] * 200)
    table = load(tmp_path / "c", 200, "{t|keep=0.5}")
    assert 60 < table.documents_without_value == shown(table).count(None) < 140


class Doubling:
    """Stands for gigatoken, with ids of its own from a certain text on."""

    def __init__(self, wrong_from: str = "\uffff") -> None:
        self.wrong_from = wrong_from
        self.num_texts = 0

    def encode(self, texts: pa.Array) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        self.num_texts += len(texts)
        lists = [[ord(c) + (text >= self.wrong_from) for c in text] for text in texts.to_pylist()]
        lengths = np.array([len(ids) for ids in lists], dtype=np.int64)
        return np.array([i for ids in lists for i in ids], dtype=np.uint32), lengths


@pytest.mark.parametrize(
    "source", ["{t}", "{token:<s>}a{t}{token:<s>}{token:<s>}", "{t} {t}{token:<s>}"]
)
def test_the_fast_encoder_gives_the_table_of_the_slow_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(prefix_table, "_ROWS_PER_BATCH", 50)
    monkeypatch.setattr(prefix_table, "_TEXTS_PER_CALL", 20)
    write(tmp_path / "c", t=[None if i % 9 == 4 else f"x{i * i % 301:04}" for i in range(1000)])
    options: dict[str, Any] = {"token_ids": {"<s>": 999}, "max_prefix_tokens": 12}
    slow = load(tmp_path / "c", 1000, source, cache_folder=tmp_path / "slow", **options)
    fast, wrong = Doubling(), Doubling("x0200")
    for encoder, per_check in ((fast, 7), (wrong, 1)):
        monkeypatch.setattr(prefix_table, "_TEXTS_PER_CHECK", per_check)
        cache = tmp_path / f"fast{per_check}"
        table = load(
            tmp_path / "c",
            1000,
            source,
            cache_folder=cache,
            fast_encoder=lambda _, encoder=encoder: encoder,
            **options,
        )
        [one], [other] = (tmp_path / "slow").iterdir(), cache.iterdir()
        assert one.read_bytes() == other.read_bytes()
        assert encoder.num_texts > 20
    assert shown(slow) == shown(table)


def test_few_prefixes_are_not_worth_another_encoder(tmp_path: Path) -> None:
    write(tmp_path / "c", t=["a", "b"])
    load(tmp_path / "c", 2, "{t}", fast_encoder=lambda _: pytest.fail("loaded"))


def test_gigatoken_gives_the_table_of_the_tokenizer(tmp_path: Path, tokenizer_folder: Path) -> None:
    exact = HuggingFaceEncoder((tokenizer_folder / "tokenizer.json").read_text())
    chosen: list[Any] = []

    def choose(sample: list[str]) -> Any:
        chosen.append(fast_encoder(exact, sample))
        return chosen[-1]

    write(tmp_path / "c", url=[f"http://h{i % 999}.org/{i}/p\u00e4th" for i in range(30_000)])
    options = {"encode_batch": exact.encode_batch, "token_ids": {"<s>": 3}}
    for source in ("URL: {url}", "{token:<s>}{url}"):
        slow = load(tmp_path / "c", 30_000, source, cache_folder=tmp_path / "a", **options)
        fast = load(
            tmp_path / "c",
            30_000,
            source,
            cache_folder=tmp_path / "b",
            fast_encoder=choose,
            **options,
        )
        for name in ("prefix_ids", "prefix_tokens", "prefix_offsets"):
            assert np.array_equal(getattr(slow, name), getattr(fast, name))
    assert len(chosen) == 2 and None not in chosen


@pytest.mark.parametrize(
    "filters", ["top=3", "top=40%", "min_documents=4", "top=30|min_documents=2", "top=0", "top=999"]
)
def test_frequent_values_are_counted_by_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filters: str
) -> None:
    monkeypatch.setattr(prefix_table, "_ROWS_PER_BATCH", 11)
    draw = random.Random(filters)
    values = [f"v{int(draw.paretovariate(0.8)) % 50}" for _ in range(300)]
    write(tmp_path / "c", t=values)
    [placeholder] = Template.parse(f"{{t|{filters}}}").placeholders
    kept = frequent_values(placeholder, {v: values.count(v) for v in values}).to_pylist()
    table = load(tmp_path / "c", 300, f"{{t|{filters}}}")
    expected = [v if v in kept else "unknown" for v in values]
    assert shown(table) == [[ord(c) for c in v] for v in expected]


def test_texts_are_numbered_as_they_come() -> None:
    distinct = _core.DistinctTexts()
    texts = pa.array(["b", "", None, "a", "b", None, "a\0", ""])
    ids, first_rows = distinct.number(*text_buffers(texts))
    assert ids.tolist() == [0, 1, -1, 2, 0, -1, 3, 1]
    assert first_rows.tolist() == [0, 1, 3, 6]
    ids, first_rows = distinct.number(*text_buffers(texts[3:7]))
    assert (ids.tolist(), first_rows.tolist(), len(distinct)) == ([2, 0, -1, 3], [], 4)
    with pytest.raises(ValueError, match="offsets must rise"):
        distinct.number(np.zeros(4, np.uint8), np.array([0, 3, 2], np.int32))
    with pytest.raises(ValueError, match="outside of data"):
        distinct.number(np.zeros(4, np.uint8), np.array([0, 5], np.int32))


def test_the_hash_is_murmurs() -> None:
    """Vectors of the published implementation."""
    assert _core.hash_text(b"") == (0, 0)
    assert _core.hash_text(b"hello") == (0xCBD8A7B341BD9B02, 0x5B1E906A48AE1D19)
    assert _core.hash_text(b"The quick brown fox jumps over the lazy dog") == (
        0xE34BBC7BBC071B6C,
        0x7A433CA9C49A9347,
    )


def test_more_text_than_one_array_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_table, "_MOST_BYTES_KEPT", 3)
    write(tmp_path / "c", t=["aa", "bb", "aa"])
    with pytest.raises(FlagError, match=r"\{t\} would keep 2 values of 4 bytes. Keep fewer"):
        load(tmp_path / "c", 3, "{t|top=2}")
