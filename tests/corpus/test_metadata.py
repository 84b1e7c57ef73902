"""The metadata side file: writing, reading and refusing others."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from megatron_meco.corpus import metadata, metadata_report
from megatron_meco.corpus.metadata import (
    MetadataWriter,
    check_row_count,
    describe_metadata,
    metadata_path,
    open_metadata,
)
from megatron_meco.errors import DataError


def _write(prefix: Path, *batches: list[list[str | None]]) -> None:
    with MetadataWriter(prefix, ["url", "topic"]) as writer:
        for batch in batches:
            writer.append(batch)


def test_rows_come_back_in_order_with_nulls(tmp_path: Path) -> None:
    _write(tmp_path / "c", [["a.org/1", None], ["x", "y"]], [["b.org"], [None]])
    table = open_metadata(tmp_path / "c")
    assert table.column_names == ["url", "topic"]
    assert table["url"].to_pylist() == ["a.org/1", None, "b.org"]
    assert table["topic"].to_pylist() == ["x", "y", None]


def test_opening_allocates_nothing_for_the_columns(tmp_path: Path) -> None:
    _write(tmp_path / "c", [["u" * 1000] * 2000, [None] * 2000])
    before = pa.total_allocated_bytes()
    table = open_metadata(tmp_path / "c")
    assert table.nbytes > 2_000_000
    assert pa.total_allocated_bytes() - before < 100_000


def test_small_appends_become_few_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "_ROWS_PER_BATCH", 10)
    _write(tmp_path / "c", *[[[str(i)], [None]] for i in range(25)])
    table = open_metadata(tmp_path / "c")
    assert table["url"].to_pylist() == [str(i) for i in range(25)]
    assert [len(chunk) for chunk in table["url"].chunks] == [10, 10, 5]


def test_the_file_appears_only_when_complete(tmp_path: Path) -> None:
    with MetadataWriter(tmp_path / "c", ["url", "topic"]) as writer:
        writer.append([["a"], ["b"]])
        assert not metadata_path(tmp_path / "c").exists()
        assert writer.temporary_path.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["c.metadata.arrow"]


def test_an_abort_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    _write(tmp_path / "c", [["old"], ["old"]])
    with pytest.raises(KeyError), MetadataWriter(tmp_path / "c", ["url"]) as writer:
        writer.append([["new"]])
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["c.metadata.arrow"]
    assert open_metadata(tmp_path / "c")["url"].to_pylist() == ["old"]


def test_a_corpus_without_rows_can_be_opened(tmp_path: Path) -> None:
    _write(tmp_path / "c")
    assert open_metadata(tmp_path / "c").num_rows == 0


@pytest.mark.parametrize("content", [None, b"", b"not arrow at all", "truncated", "numbers"])
def test_missing_and_damaged_files_are_told(tmp_path: Path, content: bytes | str | None) -> None:
    path = metadata_path(tmp_path / "c")
    if content == "truncated":
        _write(tmp_path / "c", [["a"] * 500, ["b"] * 500])
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "numbers":
        table = pa.table({"url": [1, 2]})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(DataError) as refusal:
        open_metadata(tmp_path / "c")
    assert refusal.value.where == str(path)
    assert "meco prepare" in refusal.value.remedy


def test_a_row_too_few_is_told_with_both_counts(tmp_path: Path) -> None:
    _write(tmp_path / "c", [["a"] * 1200, ["b"] * 1200])
    check_row_count(tmp_path / "c", 1200)
    with pytest.raises(DataError, match=r"1,200 rows .* 1,201 documents") as refusal:
        check_row_count(tmp_path / "c", 1201)
    assert refusal.value.where == str(metadata_path(tmp_path / "c"))


def test_every_value_is_checked_and_the_row_is_named(tmp_path: Path) -> None:
    """An offset outside the buffer once ended the process, invalid UTF-8 gave a traceback."""
    values = [f"https://host{i}.org/p\u00e4ge" for i in range(1000)]
    _write(tmp_path / "c", [values, ["t"] * 1000], [values, [None] * 1000])
    path = metadata_path(tmp_path / "c")
    good = path.read_bytes()
    table = open_metadata(tmp_path / "c")
    (offsets,) = {chunk.buffers()[1].to_pybytes() for chunk in table["url"].chunks}
    del table
    place = good.index(offsets) + 4 * 700
    for bit in (7, 20, 30, 31):
        damaged = bytearray(good)
        damaged[place + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"column 'url' is damaged at row (699|700) "):
            open_metadata(tmp_path / "c")
        assert describe_metadata(tmp_path / "c") == (["url", "topic"], 2000)
    place = good.index("host700.org/p\u00e4".encode()) + 13
    path.write_bytes(good[:place] + b"\xff" + good[place + 1 :])
    with pytest.raises(DataError, match=r"column 'url' is damaged at row 700 \(.*UTF8"):
        open_metadata(tmp_path / "c")
    path.write_bytes(good)
    assert open_metadata(tmp_path / "c")["url"].to_pylist() == values * 2


@pytest.mark.parametrize(
    ("column", "names"),
    [
        (pa.array(["a"]).dictionary_encode(), ["url"]),
        (pa.array([b"\xff"], pa.binary()), ["url"]),
        (pa.array([["a"]]), ["url"]),
        (pa.nulls(1), ["url"]),
        (pa.array(["a"]), ["url", "url"]),
    ],
)
def test_other_tables_are_told(tmp_path: Path, column: pa.Array, names: list[str]) -> None:
    table = pa.table([column] * len(names), names=names)
    with pa.ipc.new_file(str(metadata_path(tmp_path / "c")), table.schema) as writer:
        writer.write_table(table)
    for look in (open_metadata, describe_metadata):
        with pytest.raises(DataError, match=r"not strings|several columns of one name"):
            look(tmp_path / "c")


def test_importing_loads_neither_torch_nor_megatron() -> None:
    code = (
        "import sys\n"
        "from megatron_meco.corpus import encoder, merge, metadata, prepare, tokenizer, url\n"
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    root = Path(metadata.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["texts", "dictionaries", "nothing"])
def test_values_are_counted_across_batches(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(metadata_report, "_DOCUMENTS_AT_ONCE", 37)
    draw = random.Random(2)
    values = [
        None if draw.random() < 0.1 else f"v{int(draw.paretovariate(0.7)) % 99}"
        for _ in range(2000)
    ]
    parts = [pa.array(values[:700]), pa.array(values[700:])]
    if kind == "dictionaries":
        parts = [part.dictionary_encode() for part in parts]
    column = pa.chunked_array([pa.nulls(50)] if kind == "nothing" else parts)
    counts = metadata_report.count_values(column, None)
    expected = Counter(value for value in column.to_pylist() if value is not None)
    found = counts.values.to_pydict()
    assert list(zip(found["value"], found["documents"], strict=True)) == sorted(
        expected.items(), key=lambda item: (-item[1], item[0])
    )
    assert counts.is_exact and counts.without == column.null_count
