"""What may be read, overwritten or removed is decided before any work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_meco import cli
from megatron_meco.corpus import merge, outputs, work_folder
from megatron_meco.corpus import prepare as prepare_module
from megatron_meco.corpus.executors import check_workers
from megatron_meco.corpus.input_files import find_files
from megatron_meco.corpus.merge import merge_tasks
from megatron_meco.corpus.prepare import PrepareConfig, PrepareReport, prepare
from megatron_meco.corpus.work_folder import make_work_folder
from megatron_meco.errors import DataError, FlagError, MeCoError

LINE = '{"text": "a page", "url": "u"}\n'

type Run = Callable[..., PrepareReport]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(here: Path, tokenizer_folder: Path) -> Run:
    def run_with(*inputs: str, output: str = "c", **changes: Any) -> PrepareReport:
        settings = {
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": str(tokenizer_folder),
        }
        config = PrepareConfig(inputs=inputs, output=Path(output), **{**settings, **changes})
        return prepare(config)

    return run_with


def _write(path: str, content: str = LINE) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content)
    return path


def _all(folder: str = ".") -> dict[str, bytes | None]:
    """The content of every file below a folder; None for folders and special files."""
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }


def _refused(run: Run, *inputs: str, match: str, **changes: Any) -> None:
    """Check that the run is refused and changes nothing."""
    before = _all()
    with pytest.raises(MeCoError, match=match) as told:
        run(*inputs, **changes)
    assert _all() == before and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("", "is empty"),
        (" ", "is empty"),
        ("s3://bucket/x", "is a URL"),
        ("file:///x", "is a URL"),
        ("folder/", "is a folder"),
        ("..", "is a folder"),
        ("x.bin", "ends in .bin"),
        ("x.metadata.arrow", "ends in .metadata.arrow"),
        ("x.unfinished", "ends in .unfinished"),
        ("x" * 250, "too long"),
        ("x\udcff", "not UTF-8"),
    ],
)
@pytest.mark.parametrize("command", ["prepare", "import-mds"])
def test_outputs_that_are_none(
    here: Path, capsys: pytest.CaptureFixture[str], command: str, output: str, told: str
) -> None:
    words = [command, _write("in.jsonl"), "--output", output, "--tokenizer-type", "NullTokenizer"]
    assert cli.main(words) == 1
    said = capsys.readouterr()
    assert "--output" in said.err and told in said.err and said.err.count("\n") == 1
    assert os.listdir() == ["in.jsonl"]


@pytest.mark.parametrize("command", ["attach", "verify", "metadata", "tokenizer"])
def test_names_that_are_none(here: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    fixed = {"attach": ["--table", "x.csv"], "tokenizer": []}.get(command, [])
    for name, told in (
        ("", "is empty"),
        (" \t", "is empty"),
        ("gs://x/y", "is a URL"),
        ("\udcff", "not UTF-8"),
        ("x" * 250, "too long"),
    ):
        words = [command, *(["llama3"] if command == "tokenizer" else []), name, *fixed]
        assert cli.main(words) == 1
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1, said
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("command", "flags", "told"),
    [
        ("prepare", ["--workers", "0"], "0 workers"),
        ("prepare", ["--workers", "1000000000"], "1,000,000,000 workers"),
        ("prepare", ["--text-field", " "], "--text-field"),
        ("prepare", ["--metadata-fields", "\udcff"], "not UTF-8"),
        ("prepare", ["--vocab-size", "0"], "--vocab-size: 0 tokens"),
        ("prepare", ["--vocab-size", "9" * 20], "--vocab-size"),
        ("prepare", ["--executor", "slurm", "--executor-option", "a=" + "(" * 10**5], "time and"),
        ("import-mds", ["--workers", "-1"], "-1 workers"),
        ("import-mds", ["--ids-column", ""], "--ids-column"),
        ("attach", ["--verify-documents", "0"], "--verify-documents"),
        ("attach", ["--text-field", ""], "--text-field"),
        ("verify", ["--eod", "-1"], "--eod"),
        ("verify", ["--eod", "9" * 20], "--eod"),
        ("metadata", ["--top", "-1"], "--top"),
    ],
)
def test_values_that_cannot_be(
    here: Path, capsys: pytest.CaptureFixture[str], command: str, flags: list[str], told: str
) -> None:
    makes = ["--output", "c", "--tokenizer-type", "NullTokenizer"]
    fixed = {
        "prepare": [_write("in.jsonl"), *makes],
        "import-mds": [".", *makes],
        "attach": ["c", "--from", "in.jsonl"],
    }.get(command, ["c"])
    assert cli.main([command, *fixed, *flags]) == 1
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said, said
    assert os.listdir() == ["in.jsonl"]


def test_workers_are_a_number_of_processes() -> None:
    check_workers(64)
    check_workers(10**6, is_local=False)
    with pytest.raises(FlagError, match="nan workers"):
        check_workers(float("nan"))  # type: ignore[arg-type]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "given", ["in.bin", "./in.bin", "link", "hard", "deep/../in.bin", "to/in.bin"]
)
def test_an_input_is_never_an_output(run: Run, given: str, overwrite: bool) -> None:
    _write("in.bin")
    os.symlink("in.bin", "link")
    os.link("in.bin", "hard")
    os.mkdir("deep")
    os.symlink(".", "to")
    _refused(run, given, output="in", overwrite=overwrite, match="is also an input")
    _refused(run, given, output="to/in", overwrite=overwrite, match="is also an input")


def test_the_same_for_every_file_of_a_corpus_and_for_links_in_its_place(run: Run) -> None:
    for suffix in (".rejected.jsonl", ".metadata.arrow", ".prepare.json", ".idx"):
        _refused(run, _write(f"q{suffix}"), output="q", overwrite=True, match="is also an input")
        os.remove(f"q{suffix}")
    os.symlink(_write("in.jsonl"), "c.bin")
    _refused(run, "in.jsonl", overwrite=True, match="is also an input")


@pytest.mark.parametrize(
    "suffix", [".bin", ".idx", ".metadata.arrow", ".prepare.json", ".rejected.jsonl"]
)
def test_overwrite_replaces_only_what_a_preparation_wrote(run: Run, suffix: str) -> None:
    run(_write("in.jsonl", f"{LINE}{{\n"))
    path = Path(f"c{suffix}")
    own = path.read_bytes()
    for content in (b"", b"a user's", own[:-1] if suffix == ".bin" else own[::-1]):
        path.write_bytes(content)
        _refused(run, "in.jsonl", overwrite=True, match="--overwrite replaces only")
    path.unlink()
    path.mkdir()
    _refused(run, "in.jsonl", overwrite=True, match="--overwrite replaces only")
    path.rmdir()
    path.write_bytes(own)
    other = _write("other.jsonl", LINE * 2)
    assert run(other, overwrite=True).documents == 2
    assert not Path("c.rejected.jsonl").exists()


def test_overwrite_without_a_manifest_replaces_nothing(run: Run) -> None:
    run(_write("in.jsonl"))
    os.remove("c.prepare.json")
    _refused(run, "in.jsonl", overwrite=True, match=r"no c\.prepare\.json")


@pytest.mark.parametrize("kind", ["folder", "empty", "file", "link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_work_folder_of_others_stays(run: Run, kind: str, overwrite: bool) -> None:
    _write("in.jsonl")
    if kind == "file":
        _write("c.unfinished", "notes")
    elif kind == "link":
        os.symlink(outputs.work_folder_of(Path("d")), "c.unfinished")
        work_folder.make_marked_folder(Path("d.unfinished"))
    else:
        os.mkdir("c.unfinished")
    if kind == "folder":
        _write("c.unfinished/notes.txt", "notes")
    _refused(run, "in.jsonl", overwrite=overwrite, match="no work folder that this package made")


def test_a_work_folder_of_another_version_stays(run: Run) -> None:
    _write("in.jsonl")
    for marker in ("", "{", "[" * 100_000, '{"format": 2}', "[]", '{"format": "1"}'):
        _write("c.unfinished/meco-work-folder.json", marker)
        _refused(run, "in.jsonl", overwrite=True, match="a work folder of format")


def test_a_folder_of_ones_own_pipeline_is_no_other_either(
    here: Path, tokenizer_folder: Path
) -> None:
    tokenizer = {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(tokenizer_folder),
    }
    _write("mine/notes.txt")
    with pytest.raises(DataError, match="no work folder"):
        make_work_folder("mine", **tokenizer)
    make_work_folder("work", **tokenizer)
    make_work_folder("work", **tokenizer)
    for name in ("mine", "work"):
        with pytest.raises(DataError, match=r"no work folder|not finished"):
            merge_tasks(name, "c", 1)
    _write("c.bin")
    with pytest.raises(DataError, match="already there"):
        merge_tasks("work", "c", 1)
    assert sorted(os.listdir("mine")) == ["notes.txt"] and Path("c.bin").read_text() == LINE


def _stop_before_merging(
    monkeypatch: pytest.MonkeyPatch, run: Run, *inputs: str, **to: Any
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "merge_tasks", stop)
        run(*inputs, **to)


def test_notes_in_a_work_folder_outlive_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _write("in.jsonl")
    _stop_before_merging(monkeypatch, run, "in.jsonl")
    _write("c.unfinished/notes.txt", "notes")
    _write("c.unfinished/.task-00000.bin.0123456789ab", "of a killed writer")
    assert run("in.jsonl").documents == 1
    assert sorted(os.listdir("c.unfinished")) == ["meco-work-folder.json", "notes.txt"]
    assert run(_write("in.jsonl", LINE * 2), overwrite=True).documents == 2
    assert Path("c.unfinished/notes.txt").read_text() == "notes"


@pytest.mark.parametrize(
    "given", [("data",), ("data/*",), ("data/in.jsonl", "data/web.unfinished")]
)
def test_an_output_in_the_input_folder_goes_on_and_is_no_input(
    run: Run, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...]
) -> None:
    _write("data/in.jsonl", LINE * 3 + "{\n")
    run(*given[:1], output="elsewhere")
    _stop_before_merging(monkeypatch, run, *given[:1], output="data/web")
    assert "task-00000.json" in os.listdir("data/web.unfinished")
    assert run(*given, output="data/web").documents == 3
    first = _all("data")
    if given == ("data",):
        # With what is there now, and beside another corpus.
        assert run(*given, output="data/web", overwrite=True).documents == 3
        assert _all("data") == first
        assert run(*given, output="data/web2").documents == 3
        assert cli.main(["verify", "data/web", "--against", "data"]) == 0
    for suffix in (".bin", ".idx", ".metadata.arrow"):
        assert first[f"data/web{suffix}"] == Path(f"elsewhere{suffix}").read_bytes()


def test_the_work_itself_is_no_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _write("in.jsonl")
    _stop_before_merging(monkeypatch, run, "in.jsonl")
    record = "c.unfinished/task-00000.json"
    _refused(run, record, match="lies in the work folder")
    _refused(run, "c.unfinished", output="d", match="is the work folder")
    _refused(run, "c.unfinished", match="no file but those")


def test_a_file_that_comes_during_the_work_is_not_replaced(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merge.write_synced

    def write_and_meddle(path: Path, text: str) -> None:
        real(path, text)
        if path.name == "corpus.prepare.json":
            _write("c.bin", "a user's")

    monkeypatch.setattr(merge, "write_synced", write_and_meddle)
    with pytest.raises(DataError, match="already there"):
        run(_write("in.jsonl"))
    assert Path("c.bin").read_text() == "a user's"
    os.remove("c.bin")
    monkeypatch.setattr(merge, "write_synced", real)
    assert run("in.jsonl").documents == 1


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "shorter": lambda content: content[:-1],
    "longer": lambda content: content + b"x",
    "changed": lambda content: bytes([content[0] ^ 1]) + content[1:] if content else b"x",
    "deep": lambda content: b"[" * 100_000,
    "digits": lambda content: b'{"documents": ' + b"9" * 5000 + b"}",
    "types": lambda content: b'{"documents": "x", "lines_of_parts": 5}',
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_in_a_work_folder_is_told_or_done_anew(
    run: Run, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    _write("in.jsonl", LINE * 3 + "{\n")
    run("in.jsonl", output="whole")
    _stop_before_merging(monkeypatch, run, "in.jsonl")
    shutil.copytree("c.unfinished", "kept")
    for name in sorted(os.listdir("kept")):
        if name in ("logs", "meco-work-folder.json"):
            continue
        shutil.rmtree("c.unfinished", ignore_errors=True)
        shutil.copytree("kept", "c.unfinished")
        path = Path("c.unfinished", name)
        path.write_bytes(DAMAGE[how](path.read_bytes()))
        try:
            run("in.jsonl")
        except DataError as error:
            assert "c.unfinished" in error.where and "\n" not in str(error)
            run("in.jsonl", overwrite=name == "plan.json")
        for suffix in (".idx", ".metadata.arrow", ".rejected.jsonl"):
            assert Path(f"c{suffix}").read_bytes() == Path(f"whole{suffix}").read_bytes(), name
        if (name, how) != ("task-00000.bin", "changed"):
            # Nothing but its CRC-32 could tell that, and it is made of what is there.
            assert Path("c.bin").read_bytes() == Path("whole.bin").read_bytes(), name
        for path in outputs.output_paths(Path("c")):
            path.unlink()


@pytest.mark.parametrize("command", ["prepare", "attach", "verify"])
def test_inputs_that_are_none(
    here: Path, capsys: pytest.CaptureFixture[str], tokenizer_folder: Path, command: str
) -> None:
    os.mkfifo("fifo.jsonl")
    os.mkdir("folder")
    os.mkfifo("folder/x.jsonl")
    os.symlink("nowhere", "link.jsonl")
    os.symlink("loop.jsonl", "loop.jsonl")
    _write("good.jsonl")
    Path(os.fsdecode(b"name\xff.jsonl")).write_text(LINE)
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model"]
    tokenizer.append(str(tokenizer_folder))
    assert cli.main(["prepare", "good.jsonl", "--output", "c", *tokenizer]) == 0
    for name in (
        "",
        " ",
        "fifo.jsonl",
        "/dev/null",
        "folder",
        "link.jsonl",
        "loop.jsonl",
        "name\udcff.jsonl",
    ):
        capsys.readouterr()
        words = {
            "prepare": ["prepare", "good.jsonl", name, "--output", "d", *tokenizer],
            "attach": ["attach", "c", "--overwrite", *tokenizer, "--from", name],
            "verify": ["verify", "c", "--against", "good.jsonl", name],
        }[command]
        assert cli.main(words) == 1
        said = capsys.readouterr().err.splitlines()
        said = [line for line in said if not line.startswith(("loading", "encoder"))]
        assert len(said) == 1 and "Traceback" not in said[0], said
        assert not list(Path().glob("d*"))


def test_tokenizers_that_would_be_waited_for(run: Run) -> None:
    os.mkfifo("model")
    _refused(run, _write("in.jsonl"), tokenizer_model="model", match="no plain file")
    flags = {"tokenizer_type": "GPT2BPETokenizer", "tokenizer_model": None}
    extra = {"vocab_file": "model"}
    _refused(run, "in.jsonl", **flags, tokenizer_extra=extra, match=r"--vocab-file.*no plain file")
    _refused(run, "in.jsonl", tokenizer_model="x\udcff", match="not UTF-8")


def test_links_to_folders_are_followed_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write("data/a/x.jsonl")
    _write("data/b.jsonl/part-0.jsonl")
    _write("elsewhere/y.jsonl")
    os.symlink("../elsewhere", "data/0-link")
    os.symlink("../elsewhere", "data/1-link")
    os.symlink("..", "data/a/loop")
    os.symlink("a", "data/z")
    found = [os.path.relpath(file.path) for file in find_files(["data"])]
    assert found == ["data/0-link/y.jsonl", "data/a/x.jsonl", "data/b.jsonl/part-0.jsonl"]
    assert [os.path.relpath(file.path) for file in find_files(["data/*"])] == [
        "data/0-link/y.jsonl",
        "data/1-link/y.jsonl",
        "data/a/x.jsonl",
        "data/b.jsonl/part-0.jsonl",
        "data/z/x.jsonl",
    ]
    assert capsys.readouterr().err == ""


def test_what_is_passed_over_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jsonl", "README.md", "a.txt", "state.json", "my-state.json"):
        _write(f"data/{name}")
    _write("data/empty.csv", "")
    names = [os.path.basename(file.path) for file in find_files(["data"])]
    assert names == ["a.jsonl", "empty.csv", "my-state.json"]
    said = capsys.readouterr().err
    assert "2 files passed over" in said and "README.md" in said
    assert "1 empty file, first" in said and "state.json" not in said
    _write("data/b.jsonl.bz2")
    for given in ("data", "data/*", "data/b.jsonl.bz2"):
        with pytest.raises(DataError, match=r"\.bz2 is not read"):
            find_files([given])


def test_a_file_given_twice_is_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    os.symlink(_write("a.jsonl"), "b.jsonl")
    assert run("a.jsonl", "b.jsonl").documents == 2
    assert "warning: 1 file given more than once, first b.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["grows", "shrinks", "changes", "goes"])
def test_a_file_that_changes_while_it_is_read(
    run: Run, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = Path(_write("in.jsonl", LINE * 30_000))
    real = prepare_module.MegatronWriter._write

    def write_and_change(self: Any, *args: Any) -> None:
        real(self, *args)
        if how == "goes":
            path.unlink(missing_ok=True)
        elif how == "changes":
            os.utime(path, (1, 1))
        else:
            os.truncate(path, len(LINE) * (29_000 if how == "shrinks" else 31_000))

    monkeypatch.setattr(prepare_module.MegatronWriter, "_write", write_and_change)
    with pytest.raises(DataError, match=r"has changed while it was read|ends too early"):
        run("in.jsonl")
    assert not Path("c.idx").exists()


def test_a_manifest_from_anywhere_runs_no_code(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run(_write("in.jsonl"))
    path = Path("c.prepare.json")
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["extra"] = {"trust_remote_code": True}
    path.write_text(json.dumps(manifest))
    assert cli.main(["verify", "c", "--against", "in.jsonl"]) == 1
    assert "Add --trust-remote-code" in capsys.readouterr().err
    assert cli.main(["verify", "c", "--against", "in.jsonl", "--trust-remote-code"]) == 0
    for extra in ({"vocab_size": "x"}, {"merge_file": 5}, {"none": 1}, {"vocab_size": [1]}):
        manifest["tokenizer"]["extra"] = extra
        path.write_text(json.dumps(manifest))
        assert cli.main(["verify", "c", "--against", "in.jsonl"]) == 1
        assert capsys.readouterr().err.count("\n") <= 2
