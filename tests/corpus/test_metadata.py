"""The metadata side file: what is written is read, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from megatron_meco.corpus import metadata
from megatron_meco.corpus.metadata import (
    MetadataWriter,
    check_row_count,
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


def test_importing_loads_neither_torch_nor_megatron() -> None:
    code = (
        "import sys\n"
        "from megatron_meco.corpus import bulk, merge, metadata, prepare, tokenizer, url\n"
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    root = Path(metadata.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
