"""A corpus is checked when it is opened, once for each data cache, and before Megatron maps it."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from small_corpus import EOD, random_bodies, write_corpus

from megatron_meco import cli
from megatron_meco.corpus.manifest import checksum_of
from megatron_meco.data import corpora
from megatron_meco.data.corpora import check_files
from megatron_meco.errors import DataError


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The corpora that were read in full, in turn."""
    seen: list[str] = []
    check = corpora.check_index

    def counted(prefix: str) -> Any:
        seen.append(prefix)
        return check(prefix)

    monkeypatch.setattr(corpora, "check_index", counted)
    return seen


def overwrite(path: Path, place: int, form: str, value: int, keep_time: bool = False) -> None:
    times, content = os.stat(path), bytearray(path.read_bytes())
    struct.pack_into(form, content, place, value)
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_check_is_remembered_with_the_file_it_was_of(tmp_path: Path, checked: list[str]) -> None:
    prefix, cache = write_corpus(tmp_path / "c", random_bodies(40)), tmp_path / "cache"
    for _ in range(3):
        check_files(prefix, cache)
    assert len(checked) == 1
    check_files(prefix, tmp_path / "another cache")
    assert len(checked) == 2
    # The same bytes at another time; then a bit that a disk changed, at the same time.
    os.utime(f"{prefix}.idx", ns=(1, 1))
    check_files(prefix, cache)
    assert len(checked) == 3
    overwrite(Path(f"{prefix}.idx"), 34 + 4 * 40 + 8 * 5, "<q", 7, keep_time=True)
    for number in (4, 5):
        with pytest.raises(DataError, match=r"c\.idx: .*number 5 begins at byte 7"):
            check_files(prefix, cache)
        assert len(checked) == number


def test_a_token_file_that_is_cut_later_is_told(tmp_path: Path, checked: list[str]) -> None:
    prefix, cache = write_corpus(tmp_path / "c", random_bodies(40)), tmp_path / "cache"
    check_files(prefix, cache)
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(os.path.getsize(f"{prefix}.bin") - 1)
    with pytest.raises(DataError, match=r"c\.bin: .*the index promises"):
        check_files(prefix, cache)


def test_what_no_rule_tells_the_noted_checksum_does(tmp_path: Path) -> None:
    """Two sequences change documents: every number agrees, and a document is another."""
    bodies = [[300, 301, EOD, 302, 303, EOD]] * 20
    prefix, cache = write_corpus(tmp_path / "c", bodies, sequences_each=2), tmp_path / "cache"
    noted = {"documents": 20, "tokens": 120, "crc32": {".idx": checksum_of(tmp_path / "c.idx")}}
    (tmp_path / "c.prepare.json").write_text(json.dumps(noted))
    check_files(prefix, cache)
    overwrite(tmp_path / "c.idx", 34 + 12 * 40 + 8 * 3, "<q", 7)
    with pytest.raises(DataError, match=r"c\.idx: its CRC-32 is .*c\.prepare\.json says"):
        check_files(prefix, cache)
    (tmp_path / "c.prepare.json").unlink()
    check_files(prefix, cache)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(tmp_path: Path, checked: list[str]) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    for _ in range(2):
        check_files(write_corpus(tmp_path / "c", random_bodies(4)), tmp_path / "cache")
    assert len(checked) == 2


LENGTHS, POINTERS = 34, 34 + 4 * 300


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (("idx", LENGTHS + 40, "<i", -5), "sequence 10 has -5 tokens"),
        (("idx", LENGTHS + 40, "<i", 2**31 - 1), "the index promises"),
        (("idx", POINTERS + 80, "<q", -2), "number 10 begins at byte -2"),
        (("idx", POINTERS + 80, "<q", 3), "number 10 begins at byte 3"),
        (("idx", None, "", 300), "its header promises"),
        (("idx", None, "", 6030), "not an index"),
        (("bin", None, "", 1), "the index promises"),
        (("bin", None, "", 4000), "the index promises"),
        (("bin", 0, "<H", 60_000), "token id 60000, outside the vocabulary"),
    ],
)
@pytest.mark.parametrize("name", ["plan", "inspect"])
def test_the_commands_tell_it_in_one_line(
    corpus: str,
    tokenizer_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: tuple[str, int | None, str, int],
    told: str,
) -> None:
    suffix, place, form, value = damage
    # The places of the numbers count on it.
    assert struct.unpack("<QQ", Path(f"{corpus}.idx").read_bytes()[18:34]) == (300, 301)
    for each in ("idx", "bin", "metadata.arrow"):
        (tmp_path / f"c.{each}").write_bytes(Path(f"{corpus}.{each}").read_bytes())
    path = tmp_path / f"c.{suffix}"
    if place is None:
        path.write_bytes(path.read_bytes()[:-value])
    else:
        overwrite(path, place, form, value)
    flags = f"""
        --data-path {tmp_path / "c"} --tokenizer-type HuggingFaceTokenizer
        --tokenizer-model {tokenizer_folder} --seq-length 64 --train-iters 10
        --global-batch-size 4
    """
    assert cli.main([name, *flags.split()]) == 1
    err = capsys.readouterr().err
    assert told in err and f"{tmp_path / 'c'}" in err
    assert [line for line in err.splitlines() if line.startswith("meco: error: ")] == [
        err.strip().splitlines()[-1]
    ]
