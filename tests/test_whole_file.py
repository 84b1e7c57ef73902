"""Files that appear whole or not at all, whatever happens to their writer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_meco.errors import DataError, MeCoError
from megatron_meco.whole_file import unfinished_files, whole_file, whole_folder

ROOT = Path(__file__).resolve().parents[1]


def refuse(reason: str) -> DataError:
    return DataError(f"cannot be written ({reason})", where="--flag", remedy="Do something.")


def write(path: Path, content: bytes) -> None:
    with whole_file(path, refuse) as file:
        file.write(content)


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x[1].json"
    write(path, b"old")
    with whole_file(path, refuse) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        assert len(unfinished_files(path)) == 1
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == [path.name]


def test_the_content_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, steps = tmp_path / "x", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("renamed"), replace(*names)))
    write(path, b"12345")
    assert steps == [5, "renamed"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_killed_writer_leaves_the_old_file(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "x"
    write(path, b"old")
    code = f"""
import os, pathlib
from megatron_meco.errors import DataError
from megatron_meco.whole_file import whole_file
os.{moment} = lambda *args: os.kill(os.getpid(), {signal.SIGKILL:d})
with whole_file(pathlib.Path({str(path)!r}), DataError) as file:
    file.write(b"new")
"""
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ROOT})
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    (left,) = unfinished_files(path)
    assert sorted(tmp_path.iterdir()) == sorted([path, left])
    # What it left is in nobody's way.
    write(path, b"newer")
    assert path.read_bytes() == b"newer"


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_leaves_the_old_file_alone(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "x"
    write(path, b"old")
    with pytest.raises(type(error)) as raised, whole_file(path, refuse) as file:
        file.write(b"new")
        raise error
    assert raised.value is error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError) as raised:
        write(path, b"new")
    expected = "--flag: cannot be written (No space left on device). Do something."
    assert str(raised.value) == expected
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_its_place_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match=r"cannot be written \(Is a directory\)\. Do something\.$"):
        write(tmp_path / "x", b"new")
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match=r"cannot be written \(Permission denied\)"):
        write(tmp_path / "x", b"new")


def test_each_user_of_it_names_its_flag_and_remedy(tmp_path: Path) -> None:
    from megatron_meco.corpus.work_folder import write_synced
    from megatron_meco.data.array_file import write_arrays
    from megatron_meco.inference.output_file import write_json

    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "no-such" / "x", "No such file or directory"),
        (tmp_path / "file" / "x", "Not a directory"),
    ):
        with pytest.raises(MeCoError) as arrays:
            write_arrays(path, "plan", {}, {})
        with pytest.raises(MeCoError) as synced:
            write_synced(path, "text")
        with pytest.raises(MeCoError) as results:
            write_json(path, {})
        assert [str(raised.value) for raised in (arrays, synced, results)] == [
            f"--data-cache-path: cannot write the plan to {path} ({reason}). "
            "Give a folder that this user can write to, with room enough.",
            f"{path}: cannot be written ({reason}). "
            "Free space, or choose another --output; finished work is kept.",
            f"--output {path}: cannot be written ({reason}). "
            "Name a file with enough space that you may write.",
        ]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "x", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~umask


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with whole_file(path, refuse) as one:
        one.write(b"one")
        write(path, b"two")
        assert path.read_bytes() == b"two"
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "folder"
    with whole_folder(path, refuse) as folder:
        (folder / "x").write_bytes(b"1")
        assert not path.exists()
    assert (path / "x").read_bytes() == b"1" and os.listdir(path.parent) == ["folder"]
    with pytest.raises(DataError, match="File exists"), whole_folder(path, refuse):
        pass
    (path / "x").unlink()
    with pytest.raises(DataError, match="File exists"), whole_folder(path, refuse):
        pass
    with pytest.raises(KeyError), whole_folder(tmp_path / "other", refuse) as folder:
        (folder / "x").write_bytes(b"1")
        raise KeyError

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(DataError, match="No space left"),
        whole_folder(path / "y", refuse) as folder,
    ):
        (folder / "x").write_bytes(b"1")
    assert os.listdir(tmp_path) == ["deep"] and os.listdir(path) == []


def test_there_is_one_way_to_write_a_corpus() -> None:
    """Names made of process numbers meet on a folder that several nodes share."""
    for path in (ROOT / "megatron_meco" / "corpus").glob("*.py"):
        assert "getpid" not in path.read_text(), path
