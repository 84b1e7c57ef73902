"""The cache format: whole or not at all, damage told and never read."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatron_meco.data import array_file
from megatron_meco.data.array_file import (
    ArraySpool,
    check_once,
    load_or_build,
    open_arrays,
    write_arrays,
)
from megatron_meco.errors import DataError

ARRAYS = {
    "a": np.arange(10, dtype=np.int64),
    "empty": np.zeros(0, np.int32),
    "b": np.arange(7, dtype=np.int32),
}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.meco"
    write_arrays(path, "thing", {"n": 1}, ARRAYS)
    opened = open_arrays(path, "thing")
    assert opened.header == {"n": 1}
    for name, array in ARRAYS.items():
        assert np.array_equal(opened.arrays[name], array)
        assert opened.arrays[name].dtype == array.dtype
        assert not opened.arrays[name].flags.writeable or array.size == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.meco"]


def test_every_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.meco"
    write_arrays(path, "thing", {"n": 1}, ARRAYS)
    good = path.read_bytes()
    header_end = good.index(b"}}") + 2
    for length in (0, 5, 20, header_end - 3, header_end + 1, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(DataError, match=r"x\.meco.*Delete it"):
            open_arrays(path, "thing")
    for position in range(0, header_end, 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(DataError, match="damaged"):
            open_arrays(path, "thing")
    path.write_bytes(good + b"x")
    with pytest.raises(DataError, match="bytes"):
        open_arrays(path, "thing")
    path.write_bytes(good)
    with pytest.raises(DataError, match="it holds a thing, not a plan"):
        open_arrays(path, "plan")


def test_every_bit_of_the_arrays_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.meco"
    write_arrays(path, "thing", {"n": 1}, ARRAYS)
    good = path.read_bytes()
    (begin,) = {good.index(ARRAYS["a"].tobytes())}
    assert len(good) - begin == 192
    for bit in range(8 * (len(good) - begin)):
        damaged = bytearray(good)
        damaged[begin + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"x\.meco.*arrays do not match.*Delete it"):
            open_arrays(path, "thing")
    path.write_bytes(good[:begin] + bytes(192))
    with pytest.raises(DataError, match="arrays do not match"):
        open_arrays(path, "thing")


def test_a_file_under_the_name_of_another_is_told(tmp_path: Path) -> None:
    write_arrays(tmp_path / "x.meco", "thing", {}, ARRAYS)
    os.rename(tmp_path / "x.meco", tmp_path / "y.meco")
    with pytest.raises(DataError, match=r"y\.meco.*belongs under the name x\.meco"):
        open_arrays(tmp_path / "y.meco", "thing")


def test_a_file_of_the_earlier_version_is_built_again(tmp_path: Path) -> None:
    path = tmp_path / "x.meco"
    path.write_bytes(b"MECO-ARRAYS 1\n0 0\n")
    for _ in range(2):
        opened = load_or_build(path, "thing", lambda: ({}, ARRAYS))
        assert np.array_equal(opened.arrays["a"], ARRAYS["a"])
        assert path.read_bytes().startswith(b"MECO-ARRAYS 2\n")


def test_a_check_is_run_until_it_succeeds_and_its_record_is_whole(tmp_path: Path) -> None:
    path, runs = tmp_path / "cache" / "x.meco", []

    def check() -> None:
        runs.append(len(runs))
        if len(runs) == 1:
            raise DataError("no", where="here", remedy="None.")

    with pytest.raises(DataError):
        check_once(path, "check", check)
    for _ in range(3):
        check_once(path, "check", check)
    assert len(runs) == 2
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        check_once(path, "check", check)
    assert len(runs) == 3
    # Where nothing can be written it is run each time.
    for _ in range(2):
        check_once(path / "below a file" / "x.meco", "check", check)
    assert len(runs) == 5


def with_header(content: object) -> bytes:
    """A file whose header has a right checksum, whatever it says, before 192 bytes of arrays."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    head = b"MECO-ARRAYS 2\n" + hashlib.blake2b(body, digest_size=16).hexdigest().encode()
    head += b" " + str(len(body)).encode() + b"\n" + body
    return head + b" " * (-len(head) % 64) + bytes(192)


def test_hostile_headers_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.meco"
    entry = {"dtype": "<i8", "shape": [10], "offset": 0}
    good = {"kind": "thing", "name": "x.meco", "header": {}, "arrays": {"a": entry}, "bytes": 192}
    good["xxh3"] = xxhash.xxh3_128(bytes(192)).hexdigest()
    path.write_bytes(with_header(good))
    assert open_arrays(path, "thing").arrays["a"].tolist() == [0] * 10
    values = [-1, 1, 2**62, 2**80, 1.5, None, "x", [], [-1], [1.5], ["x"], [2**60], [3, -1], [9, 9]]
    entries = [{**entry, key: value} for key in entry for value in [*values, "|O", "<i2", "<f8"]]
    files: list[object] = [{**good, "arrays": {"a": e}} for e in entries if e != entry]
    files += [{k: v for k, v in good.items() if k != key} for key in good]
    files += [{**good, key: value} for key in good for value in values if key != "kind"]
    files += [[], 1, None, "a", b"{", b"\xff", b""]
    refused = 0
    for content in files:
        path.write_bytes(with_header(content))
        try:
            arrays = open_arrays(path, "thing").arrays
        except DataError as error:
            assert "Delete it" in str(error)
            refused += 1
        else:  # harmless: an empty array, or fewer numbers than there are
            assert all(array.nbytes <= 192 and array.sum() == 0 for array in arrays.values())
    assert refused > 0.9 * len(files)


def test_a_failing_builder_leaves_nothing(tmp_path: Path) -> None:
    def build() -> tuple[dict, dict]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        load_or_build(tmp_path / "x.meco", "thing", build)
    assert list(tmp_path.iterdir()) == []


def test_what_killed_builders_left_goes_after_an_hour(tmp_path: Path) -> None:
    old, busy, other = (tmp_path / name for name in (".x.meco.1a", ".x.meco.2b", ".y.meco.3c"))
    for path in (old, busy, other):
        path.write_text("")
    for path, hours in ((old, 1.1), (busy, 0.9), (other, 1.1)):
        then = time.time() - hours * 3600
        os.utime(path, (then, then))
    load_or_build(tmp_path / "x.meco", "thing", lambda: ({}, ARRAYS))
    assert sorted(p.name for p in tmp_path.iterdir()) == [busy.name, other.name, "x.meco"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="--data-cache-path"):
        load_or_build(tmp_path / "deep" / "x.meco", "thing", lambda: ({}, ARRAYS))


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--data-cache-path"):
        load_or_build(tmp_path / "file" / "x.meco", "thing", lambda: ({}, ARRAYS))


def _slow_build(log: str) -> tuple[dict, dict]:
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.3)
    return {"n": 1}, ARRAYS


def _race(path: str, log: str) -> None:
    opened = load_or_build(Path(path), "thing", lambda: _slow_build(log))
    assert np.array_equal(opened.arrays["a"], ARRAYS["a"])


def test_eight_processes_build_once(tmp_path: Path) -> None:
    path, log = tmp_path / "cache" / "x.meco", tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_race, args=(str(path), str(log))) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert len(log.read_text().split()) == 1
    assert [p.name for p in path.parent.iterdir()] == ["x.meco"]


def _endless(path: str) -> None:
    # A generator would do; an array that is larger than the pipe keeps the writer busy.
    big = {"a": np.zeros(50_000_000, np.int64)}
    while True:
        write_arrays(Path(path), "thing", {}, big)
        os.unlink(path)


def test_a_killed_writer_leaves_no_half_file_under_the_name(tmp_path: Path) -> None:
    path = tmp_path / "x.meco"
    worker = multiprocessing.get_context("spawn").Process(target=_endless, args=(str(path),))
    worker.start()
    deadline = time.time() + 60
    while not any(tmp_path.iterdir()) and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    if path.exists():
        open_arrays(path, "thing")
    left = [p for p in tmp_path.iterdir() if p != path]
    assert all(p.name.startswith(".x.meco.") for p in left)


def test_an_array_that_grew_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = ArraySpool(tmp_path, np.int32)
    assert list(tmp_path.iterdir()) == []  # nothing remains of it after a kill
    for begin in range(0, 40, 10):
        spool.append(np.arange(begin, begin + 10))
        spool.append(np.arange(0))
    write_arrays(tmp_path / "x.meco", "thing", {}, {"a": np.arange(40, dtype=np.int32)})
    expected = (tmp_path / "x.meco").read_bytes()
    monkeypatch.setattr(array_file, "_HASHED_AT_ONCE", 64)
    write_arrays(tmp_path / "x.meco", "thing", {}, {"a": spool})
    assert (tmp_path / "x.meco").read_bytes() == expected
    empty = ArraySpool(tmp_path, np.int64)
    write_arrays(tmp_path / "y.meco", "thing", {}, {"a": empty, "b": spool})
    assert open_arrays(tmp_path / "y.meco", "thing").arrays["b"].tolist() == list(range(40))
