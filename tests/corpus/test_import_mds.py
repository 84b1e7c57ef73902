"""`meco import-mds` on what mosaicml-streaming wrote (mds/write_fixture.py), and on damage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_meco import cli
from megatron_meco.corpus import import_mds as import_module
from megatron_meco.corpus.mds import ids_decoder
from megatron_meco.corpus.metadata import open_metadata
from megatron_meco.errors import DataError

FIXTURE = Path(__file__).with_name("mds")
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
EOD, BOS = 1, 0

type Import = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> Import:
    """Return a function that runs the command and returns its status and output."""

    def run_with(*words: object, output: str = "out", workers: int = 1) -> tuple[int, str]:
        capsys.readouterr()
        fixed = ["--output", tmp_path / output / "c", "--workers", workers]
        fixed += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder]
        status = cli.main(["import-mds", *map(str, [*words, *fixed])])
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return status, told.out + told.err

    return run_with


def _documents(prefix: Path) -> list[list[int]]:
    data = IndexedDataset(str(prefix))
    assert data.index.dtype == np.uint16
    return [tokens.tolist() for tokens in data]


@pytest.mark.parametrize(
    ("name", "flags"),
    [("authors", ()), ("zstd", ()), ("bytes", ("--token-dtype", "uint16"))],
)
def test_what_the_package_wrote_is_what_megatron_reads(
    run: Import, tmp_path: Path, name: str, flags: tuple[str, ...]
) -> None:
    status, told = run(FIXTURE / name, *flags)
    assert status == 0 and "40 documents" in told
    prefix = tmp_path / "out" / "c"
    assert _documents(prefix) == [[*ids, EOD] for ids, _ in EXPECTED]
    assert open_metadata(prefix)["url"].to_pylist() == [url for _, url in EXPECTED]
    assert cli.main(["verify", str(prefix)]) == 0
    assert cli.main(["verify", str(prefix), "--against", "x.jsonl"]) == 1
    assert run(FIXTURE / name, *flags)[0] == 1, "never over a corpus that is there"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "c.bin",
        "c.idx",
        "c.metadata.arrow",
        "c.prepare.json",
    ]


def test_numbers_as_metadata_and_none_at_all(run: Import, tmp_path: Path) -> None:
    assert run(FIXTURE / "zstd", "--metadata-fields", "score,length")[0] == 0
    table = open_metadata(tmp_path / "out" / "c")
    assert table["score"].to_pylist() == [str(i / 8) for i in range(40)]
    assert table["length"].to_pylist() == [str(len(ids)) for ids, _ in EXPECTED]
    assert run(FIXTURE / "zstd", "--metadata-fields", "", output="none")[0] == 0
    assert not (tmp_path / "none" / "c.metadata.arrow").exists()


def test_folders_of_folders_in_order_with_several_workers(
    run: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module, "_TASK_BYTES", 3000)
    for number, part in enumerate(("zstd", "authors")):
        shutil.copytree(FIXTURE / part, tmp_path / "parts" / f"{number}-{part}")
    assert run(tmp_path / "parts", output="one")[0] == 0
    assert run(tmp_path / "parts", output="two", workers=2)[0] == 0
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert _documents(tmp_path / "one" / "c") == [[*ids, EOD] for ids, _ in EXPECTED * 2]
    # One index over all of them, as the authors' script merges it, with paths into the folders.
    shards = []
    for folder in sorted((tmp_path / "parts").iterdir()):
        for shard in json.loads((folder / "index.json").read_text())["shards"]:
            for data in filter(None, (shard["raw_data"], shard["zip_data"])):
                data["basename"] = f"{folder.name}/{data['basename']}"
            shards.append(shard)
    (tmp_path / "parts" / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    assert run(tmp_path / "parts", output="merged")[0] == 0
    one, merged = (tmp_path / name / "c.bin" for name in ("one", "merged"))
    assert one.read_bytes() == merged.read_bytes()


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes one shard of hand-made rows."""

    def write(*rows: list[int], encoding: str = "ndarray:int64", **changes: Any) -> Path:
        folder = tmp_path / "shards"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        stored = [bytes([1 << 2 | 1]) + np.uint16(len(ids)).tobytes() for ids in rows]
        stored = [
            s + np.array(ids, np.int64).tobytes() for s, ids in zip(stored, rows, strict=True)
        ]
        values = [np.uint32([len(s), 1]).tobytes() + s + b"u" for s in stored]
        begin = 4 * (len(rows) + 2)
        offsets = np.cumsum([begin, *map(len, values)]).astype(np.uint32)
        raw = np.uint32(len(rows)).tobytes() + offsets.tobytes() + b"".join(values)
        (folder / "a.mds").write_bytes(raw)
        shard = {
            "format": "mds",
            "version": 2,
            "compression": None,
            "column_names": ["input_ids", "url"],
            "column_encodings": [encoding, "str"],
            "column_sizes": [None, None],
            "samples": len(rows),
            "raw_data": {"basename": "a.mds", "bytes": len(raw), "hashes": {}},
            "zip_data": None,
            **changes,
        }
        (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
        return folder

    return write


def test_bos_and_eod_around_a_row_and_rows_without_ids(
    run: Import, shards: Callable[..., Path], tmp_path: Path
) -> None:
    status, told = run(shards([5, 6], [BOS, 5, 6], [5, 6, EOD], [BOS, 7, EOD], [], [BOS, EOD]))
    assert status == 0 and "2 rows: no tokens" in told
    assert _documents(tmp_path / "out" / "c") == [[5, 6, EOD]] * 3 + [[7, EOD]]
    lines = (tmp_path / "out" / "c.rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [5, 6]


@pytest.mark.parametrize(
    ("rows", "changes", "told"),
    [
        ([[5], [6, 100_000]], {}, "row 2: id 100000, the vocabulary ends at"),
        ([[5], [-3, 6]], {}, "row 2: id -3"),
        ([[5, EOD, 6]], {}, "row 1: EOD 1 inside"),
        ([[5, BOS, 6]], {}, "row 1: BOS 0 inside"),
        ([[5]], {"encoding": "ndarray:float32"}, "holds no token ids"),
        ([[5]], {"encoding": "pkl"}, "holds no token ids"),
        ([[5]], {"encoding": "bytes"}, "--token-dtype"),
        ([[5]], {"encoding": "ndarray:int16"}, "row 1: cannot be read (an array of 1 ids"),
        ([[5]], {"column_names": ["tokens", "url"]}, "no column 'input_ids'; there are tokens"),
        ([[5]], {"column_names": ["input_ids", "uri"]}, "no column 'url'"),
        ([[5]], {"column_encodings": ["ndarray:int64", "pkl"]}, "cannot be kept as text"),
        ([[5]], {"column_sizes": [None, 8]}, "row 1: its columns do not fill it"),
        ([[5]], {"samples": 2}, "does not begin with the 2 rows"),
        ([[5]], {"samples": "x"}, "not a readable index"),
        ([[5]], {"samples": True}, "not a readable index"),
        ([[5]], {"samples": 2**70}, "not a readable index"),
        ([[5]], {"column_names": [1, "url"]}, "names, encodings or hashes that are not strings"),
        ([[5]], {"column_encodings": ["ndarray:int64", None]}, "names, encodings or hashes"),
        ([[5]], {"column_encodings": ["ndarray:int64", "int32"]}, "1 bytes for a number of 4"),
        ([[5]], {"raw_data": {"basename": "a.mds", "bytes": 2**39}}, "the index promises 549,755"),
        (
            [[5]],
            {"raw_data": {"basename": "a.mds", "bytes": 32, "hashes": {"xxh64": "0" * 16}}},
            "xxh64 is 3a70681c338d2388",
        ),
        ([[5]], {"format": "json"}, "not a readable index"),
        ([[5]], {"raw_data": {"basename": "../a.mds", "bytes": 1}}, "outside the folder"),
        ([[5]], {"raw_data": {"basename": "b.mds", "bytes": 1}}, "cannot be read"),
        ([], {}, "no documents"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(
    run: Import,
    shards: Callable[..., Path],
    tmp_path: Path,
    rows: list[list[int]],
    changes: dict[str, Any],
    told: str,
) -> None:
    status, said = run(shards(*rows, **changes))
    assert status == 1 and told in said, said
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_an_index_that_is_nested_without_end(run: Import, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("[" * 100_000)
    status, told = run(tmp_path)
    assert status == 1 and "not a readable index of MDS shards" in told


def test_every_byte_that_changes_is_noticed(run: Import, tmp_path: Path) -> None:
    """Cut short, lengthened, changed, or compressed anew with other content behind the hashes."""
    source = tmp_path / "shards"
    for damage, told in (
        (lambda data: data[:-1], "the index promises"),
        (lambda data: data + b"x", "the index promises"),
        (lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:], "sha1 is"),
    ):
        shutil.copytree(FIXTURE / "zstd", source)
        path = source / "shard.00003.mds.zstd"
        path.write_bytes(damage(path.read_bytes()))
        status, said = run(source)
        assert status == 1 and told in said and "shard.00003" in said
        shutil.rmtree(source)
    for content, told in (
        (b"not zstd at all", "cannot be unpacked"),
        (zstandard.ZstdCompressor().compress(bytes(1 << 24)), "does not unpack to"),
    ):
        shutil.copytree(FIXTURE / "zstd", source)
        index = json.loads((source / "index.json").read_text())
        index["shards"][0]["zip_data"].update(bytes=len(content), hashes={})
        (source / "index.json").write_text(json.dumps(index))
        (source / "shard.00000.mds.zstd").write_bytes(content)
        status, said = run(source)
        assert status == 1 and told in said
        shutil.rmtree(source)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_stopped_import_goes_on(
    run: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module, "_TASK_BYTES", 1000)
    source = tmp_path / "shards"
    shutil.copytree(FIXTURE / "authors", source)
    last = source / "shard.00003.mds"
    whole = last.read_bytes()
    last.write_bytes(whole[:-9])
    status, told = run(source)
    assert status == 1 and "3 of 4 tasks are finished" in told
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["c.unfinished"]
    assert "unfinished preparation of something else" in run(FIXTURE / "zstd")[1]
    last.write_bytes(whole)
    # What is finished is not read again.
    (source / "shard.00000.mds").write_bytes(b"")
    assert run(source)[0] == 0
    assert _documents(tmp_path / "out" / "c") == [[*ids, EOD] for ids, _ in EXPECTED]


def test_a_length_that_is_another_is_refused(run: Import, tmp_path: Path) -> None:
    source = tmp_path / "shards"
    shutil.copytree(FIXTURE / "authors", source)
    index = json.loads((source / "index.json").read_text())
    index["shards"][0]["raw_data"]["hashes"] = {}
    (source / "index.json").write_text(json.dumps(index))
    path = source / "shard.00000.mds"
    raw = bytearray(path.read_bytes())
    begin = int.from_bytes(raw[4:8], "little")
    ids_bytes = int.from_bytes(raw[begin : begin + 4], "little")
    raw[begin + 8 + ids_bytes] += 1
    path.write_bytes(raw)
    status, told = run(source)
    assert status == 1 and "row 1: 1 ids, not the 2 of its length" in told


def test_arrays_in_every_form_of_the_format() -> None:
    ids = np.array([3, 4, 5], np.int32)
    dynamic, static = bytes([33]) + b"\x04\x03", b"\x04\x03"
    for encoding, stored in (
        ("ndarray", dynamic + ids.tobytes()),
        ("ndarray:int32", static + ids.tobytes()),
        ("ndarray:int32:3", ids.tobytes()),
        ("ndarray:int32", b"\x05\x03\x00" + ids.tobytes()),
    ):
        assert ids_decoder(encoding, None)(memoryview(stored)).tolist() == [3, 4, 5]
    for stored in (
        b"",
        b"\x42\x04\x03",
        bytes([33, 8, 1, 3]),
        dynamic + ids.tobytes()[:-4],
        b"\x21",
    ):
        with pytest.raises(ValueError, match="array"):
            ids_decoder("ndarray", None)(memoryview(stored))


def test_a_folder_without_shards(run: Import, tmp_path: Path) -> None:
    status, told = run(tmp_path)
    assert status == 1 and "no index.json" in told
    with pytest.raises(DataError):
        import_module.find_indices(str(tmp_path / "none"))


def test_linked_folders_are_imported_and_what_is_left_out_is_said(
    run: Import, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    shutil.copytree(FIXTURE / "authors", parts / "0")
    shutil.copytree(FIXTURE / "zstd", tmp_path / "elsewhere" / "deep")
    (parts / "1").symlink_to(tmp_path / "elsewhere")
    (parts / "1-again").symlink_to(tmp_path / "elsewhere")
    (parts / "loop").symlink_to(parts)
    status, told = run(parts)
    assert status == 0 and "80 documents" in told and "warning" not in told
    shutil.copy(parts / "0" / "shard.00000.mds", parts / "0" / "shard.00099.mds")
    status, told = run(parts, parts / "0", output="again")
    assert "1 shard in no index.json, first" in told and "shard.00099.mds" in told
    assert status == 0 and "warning: 1 file given more than once" in told
    (tmp_path / "elsewhere" / "deep" / "index.json").unlink()
    status, told = run(parts, output="third")
    assert status == 1 and "shards without their index.json" in told


def test_a_pipe_in_place_of_a_shard_or_an_index(run: Import, tmp_path: Path) -> None:
    for name in ("shard.00000.mds", "index.json"):
        source = tmp_path / name
        shutil.copytree(FIXTURE / "authors", source)
        (source / name).unlink()
        os.mkfifo(source / name)
        status, told = run(source)
        assert status == 1 and "not a plain file" in told


def test_shards_are_never_written_over(run: Import, tmp_path: Path) -> None:
    source = tmp_path / "out"
    shutil.copytree(FIXTURE / "authors", source)
    index = json.loads((source / "index.json").read_text())
    data = index["shards"][0]["raw_data"]
    (source / data["basename"]).rename(source / "c.bin")
    content = (source / "c.bin").read_bytes()
    data["basename"] = "c.bin"
    (source / "index.json").write_text(json.dumps(index))
    status, told = run(source, "--overwrite")
    assert status == 1 and "is also an input" in told
    assert (source / "c.bin").read_bytes() == content
