"""`meco attach --join`: fields by key, against a dictionary."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_meco import _core
from megatron_meco.corpus import join
from megatron_meco.corpus.metadata import MetadataWriter, metadata_path, open_metadata

type Meco = Callable[..., tuple[int, str]]


def write_corpus(prefix: Path, **columns: list[str | None]) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in next(iter(columns.values())):
        builder.add_document([5, 1], [2])
    builder.finalize(f"{prefix}.idx")
    with MetadataWriter(prefix, list(columns)) as writer:
        writer.append(list(columns.values()))
    return prefix


def write_table(path: Path, **columns: list[Any]) -> Path:
    table = pa.table(columns)
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path)
    return path


@pytest.mark.parametrize("case", range(8))
def test_every_document_gets_the_values_of_its_key(
    tmp_path: Path, meco: Meco, monkeypatch: pytest.MonkeyPatch, case: int
) -> None:
    draw = random.Random(case)
    monkeypatch.setattr(join, "_ROWS_AT_ONCE", draw.choice([7, 1000]))
    monkeypatch.setattr(join, "_ROWS_PER_BATCH", draw.choice([5, 1000]))
    size = draw.choice([1, 40, 200])
    ids = [draw.choice([f"k{draw.randrange(size)}", f"k{i}"]) for i in range(size)]
    ids = [draw.choice([None, "", k]) if i % 11 == 3 else k for i, k in enumerate(ids)]
    prefix = write_corpus(tmp_path / "c", id=ids, url=[f"u{i}" for i in range(size)])
    names = [f"k{i}" for i in range(size + 20)]
    draw.shuffle(names)
    ending = draw.choice([".parquet", ".arrow"])
    # Some keys stand in both tables, and some rows have none.
    tables, halves = [], (names[: size // 2 + 5], names[size // 2 :])
    rows: list[tuple[str | None, str | None, str]] = []
    for number, half in enumerate(halves):
        keys = [None if i % 13 == 7 else k for i, k in enumerate(half)]
        topics = [draw.choice([None, f"t{k}\u00e4{number}"]) for k in keys]
        scores = [draw.random() for _ in keys]
        path = tmp_path / f"{number}{ending}"
        tables.append(write_table(path, topic=topics, id=keys, score=scores, other=keys))
        rows += zip(keys, topics, map(str, scores), strict=True)
    wanted = draw.choice(["first", "last"])
    known: dict[str, tuple[str | None, str]] = {}
    for key, *values in rows if wanted == "last" else reversed(rows):
        if key:
            known[key] = (values[0], values[1])
    words = [prefix, "--join", *tables, "--key", "id", "--metadata-fields", "score,topic"]
    status, told = meco("attach", *words, "--duplicates", wanted)
    assert status == 0, told
    found = open_metadata(prefix)
    expected = [known.get(k or "", (None, None)) for k in ids]
    assert found.column_names == ["id", "url", "score", "topic"]
    assert found["topic"].to_pylist() == [topic for topic, _ in expected]
    assert found["score"].to_pylist() == [score for _, score in expected]
    assert found["id"].to_pylist() == ids and found["url"].to_pylist()[-1] == f"u{size - 1}"
    matched, lacking = sum(k in known for k in ids), sum(not k for k in ids)
    keyed = [k for k, _, _ in rows if k]
    assert f"{matched:,} document" in told and f"{size - matched - lacking} without" in told
    assert f"{lacking} lack the key; of {len(rows)} rows" in told
    assert f" {len(known.keys() - set(ids))} match no document" in told
    doubled, without = len(keyed) - len(known), len(rows) - len(keyed)
    assert f" {doubled} are doubled, {without} lack the key" in told
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_all_columns_but_the_key_and_csv(tmp_path: Path, meco: Meco) -> None:
    prefix = write_corpus(tmp_path / "c", url=["b", "a", "x"])
    table = write_table(tmp_path / "t.csv", url=["a", "b"], n=[1, 2], topic=["t", ""])
    status, told = meco("attach", prefix, "--join", table, "--key", "url")
    assert status == 0 and "2 documents with a row of the same key, 1 without" in told
    found = open_metadata(prefix)
    assert found.to_pydict() == {
        "url": ["b", "a", "x"],
        "n": ["2", "1", None],
        "topic": [None, "t", None],
    }


def test_doubled_keys_are_refused_with_both_places(
    tmp_path: Path, meco: Meco, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "_ROWS_AT_ONCE", 3)
    prefix = write_corpus(tmp_path / "c", id=[str(i) for i in range(20)])
    one = write_table(tmp_path / "one.parquet", id=[str(i) for i in range(12)], t=["a"] * 12)
    two = write_table(tmp_path / "two.parquet", id=["15", "3", "3", "15"], t=["b"] * 4)
    before = metadata_path(prefix).read_bytes()
    status, told = meco("attach", prefix, "--join", one, two, "--key", "id")
    assert status == 1 and told.count("\n") <= 2
    assert "two.parquet, row 2: has the 'id' of" in told and "one.parquet, row 4; 3 rows" in told
    assert "--duplicates first or last" in told
    assert metadata_path(prefix).read_bytes() == before
    for which, value in (("first", "a"), ("last", "b")):
        words = ["--join", one, two, "--key", "id", "--duplicates", which, "--overwrite"]
        assert meco("attach", prefix, *words)[0] == 0
        assert open_metadata(prefix)["t"].to_pylist()[3] == value


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path: Path, meco: Meco) -> None:
    prefix = write_corpus(tmp_path / "c", id=["1", "2"], topic=["a", "b"])
    good = write_table(tmp_path / "t.parquet", id=["1"], topic=["z"], n=[3])
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(good.read_bytes()[:-9])
    damaged = tmp_path / "damaged.csv"
    damaged.write_text("id,n\n1,2\n3\n")
    other = write_table(tmp_path / "other.parquet", id=["7"], n=[3])
    before = metadata_path(prefix).read_bytes()
    for words, message in (
        (["--join", good], "--key: is needed to join"),
        (["--table", good, "--key", "id"], "--key: only valid with --join"),
        (["--table", good, "--duplicates", "last"], "--duplicates: only valid with --join"),
        (["--join", good, "--key", "id"], "has a field 'topic' already. Add --overwrite"),
        (["--join", good, "--key", "url"], "no field 'url' to join by; it holds: id, topic"),
        (["--join", good, "--key", "topic", "--metadata-fields", "m"], "no column 'm'"),
        (["--join", other, "--key", "topic", "--metadata-fields", "n"], "no column 'topic'"),
        (["--join", other, "--key", "id"], "no document of"),
        (["--join", good, "--key", "id", "--metadata-fields", "id"], "'id' is the key already"),
        (["--join", cut, "--key", "id", "--metadata-fields", "n"], "cut.parquet"),
        (["--join", damaged, "--key", "id"], "damaged.csv"),
        (["--join", tmp_path / "none.parquet", "--key", "id"], "no such file"),
        (["--join", f"{prefix}.metadata.arrow", "--key", "id", "--metadata-fields", "n"], ""),
    ):
        status, told = meco("attach", prefix, *words)
        assert status == 1 and message in told, (words, told)
        assert metadata_path(prefix).read_bytes() == before
    metadata_path(prefix).write_bytes(before[: len(before) // 2])
    status, told = meco("attach", prefix, "--join", good, "--key", "id", "--overwrite")
    assert status == 1 and "metadata.arrow" in told
    metadata_path(prefix).unlink()
    status, told = meco("attach", prefix, "--join", good, "--key", "id")
    assert status == 1 and "no metadata file" in told


def test_a_full_disk_is_one_error_and_nothing_changes(tmp_path: Path, meco: Meco) -> None:
    size = 3000
    prefix = write_corpus(tmp_path / "c", id=[str(i) for i in range(size)])
    table = write_table(
        tmp_path / "t.parquet", id=[str(i) for i in range(size)], n=["x" * 90] * size
    )
    before = metadata_path(prefix).read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        status, told = meco("attach", prefix, "--join", table, "--key", "id")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert status == 1 and "cannot write temporary files" in told
    assert metadata_path(prefix).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["c.bin", "c.idx", "c.metadata.arrow", "t.parquet"] or (
        "c.prepare.json" in os.listdir(tmp_path)
    )


def test_keys_that_share_half_a_hash_stay_apart(
    tmp_path: Path, meco: Meco, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_texts = _core.hash_texts

    def halved(*arrays: Any) -> Any:
        hashes = hash_texts(*arrays)
        hashes[:, 0] %= 3
        return hashes

    monkeypatch.setattr(_core, "hash_texts", halved)
    names = [str(i) for i in range(50)]
    prefix = write_corpus(tmp_path / "c", id=[*names, "60"])
    table = write_table(tmp_path / "t.parquet", id=names[::-1], n=names[::-1])
    assert meco("attach", prefix, "--join", table, "--key", "id")[0] == 0
    assert open_metadata(prefix)["n"].to_pylist() == [*names, None]
