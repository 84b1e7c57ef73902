"""An index is read only if its numbers are consistent with each other and with the files."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from small_corpus import EOD, random_bodies, write_corpus

from megatron_meco.corpus.index_file import check_index, open_index
from megatron_meco.errors import DataError

BODIES = random_bodies(30)
HEAD = 34


def put(form: str, place: int, value: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        struct.pack_into(form, content, place, value)

    return change


def lengths(i: int) -> int:
    return HEAD + 4 * i


def pointers(i: int) -> int:
    return HEAD + 4 * 30 + 8 * i


def bounds(i: int) -> int:
    return HEAD + 12 * 30 + 8 * i


def cut(num_bytes: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        del content[len(content) - num_bytes :]

    return change


def add_modes(content: bytearray) -> None:
    content += bytes(30)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put("<Q", 0, 0), "not an index of Megatron's"),
        (put("<Q", 9, 2), "version 2"),
        (put("<B", 17, 7), "token type 7"),
        (put("<B", 17, 99), "token type 99"),
        (put("<B", 17, 4), "the index promises"),
        (put("<Q", 18, 31), "its header promises"),
        (put("<Q", 18, 2**64 - 1), "its header promises"),
        (put("<Q", 26, 0), "no entry for the first document"),
        (put("<i", lengths(3), -1), "sequence 3 has -1 tokens"),
        (put("<i", lengths(0), -(2**31)), "sequence 0 has -2,147,483,648 tokens"),
        (put("<i", lengths(5), 2**31 - 1), "the index promises"),
        (put("<q", pointers(0), 2), "number 0 begins at byte 2, not 0"),
        (put("<q", pointers(7), -2), "number 7 begins at byte -2, not "),
        (put("<q", pointers(29), 2**63 - 1), "number 29 begins at byte 9,223,372,036,854,775,807"),
        (put("<q", bounds(0), 1), "entry 0 of 31 is 1, of 30 sequences"),
        (put("<q", bounds(4), 9), "entry 5 of 31 is 5 after 9, of 30 sequences"),
        (put("<q", bounds(30), 29), "entry 30 of 31 is 29"),
        (put("<q", bounds(8), -1), "entry 8 of 31 is -1"),
        (cut(1), "its header promises"),
        (cut(900), "not an index|its header promises"),
        (cut(10**6), "not an index"),
        (add_modes, "multimodal"),
    ],
)
def test_what_is_wrong_is_told(
    tmp_path: Path, change: Callable[[bytearray], None], told: str
) -> None:
    prefix = write_corpus(tmp_path / "c", BODIES)
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    with pytest.raises(DataError, match=told) as refusal:
        check_index(prefix)
    assert refusal.value.where in (f"{prefix}.idx", f"{prefix}.bin")
    assert "repare" in refusal.value.remedy or "text-only" in refusal.value.remedy


@pytest.mark.parametrize("change", [-1, 1, -100, None])
def test_a_token_file_of_another_size(tmp_path: Path, change: int | None) -> None:
    prefix = write_corpus(tmp_path / "c", BODIES)
    path = Path(f"{prefix}.bin")
    content = path.read_bytes()
    half = content[: len(content) // 2]
    path.write_bytes(half if change is None else (content + b"x")[: len(content) + change])
    with pytest.raises(DataError, match=r"c\.bin: [\d,]+ bytes, the index promises [\d,]+"):
        open_index(prefix)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("sequences_each", [1, 3])
def test_whole_ones_are_read(tmp_path: Path, dtype: Any, sequences_each: int) -> None:
    """With empty sequences: a document of one token is cut into three parts."""
    small = [[min(token, 250) for token in body] for body in BODIES]
    prefix = write_corpus(tmp_path / "c", small, dtype=dtype, sequences_each=sequences_each)
    index = check_index(prefix)
    assert index.num_documents == len(small)
    places = index.bounds(0, len(small))
    for body, begin, end in zip(small, places[:-1], places[1:], strict=True):
        assert index.tokens[begin:end].tolist() == body


def test_what_megatron_merges_is_whole(tmp_path: Path) -> None:
    parts = [
        write_corpus(tmp_path / name, random_bodies(20, seed=i)) for i, name in enumerate("ab")
    ]
    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.uint16)
    for part in [*parts, parts[0]]:
        builder.add_index(part)
    builder.end_document()  # one without sequences
    builder.finalize(str(tmp_path / "c.idx"))
    assert check_index(tmp_path / "c").num_documents == 61


def test_a_corpus_without_documents(tmp_path: Path) -> None:
    IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.uint16).finalize(
        str(tmp_path / "c.idx")
    )
    assert check_index(tmp_path / "c").num_documents == 0


def test_files_of_two_corpora(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "a", BODIES)
    write_corpus(tmp_path / "b", [*BODIES[1:], [300, EOD]])
    shutil.copy(tmp_path / "b.bin", f"{one}.bin")
    with pytest.raises(DataError, match="the index promises"):
        check_index(one)
