"""Run files: what they become, and one line for each of the mistakes that people make in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_meco import cli
from megatron_meco.errors import MeCoError
from megatron_meco.run.flag_table import flag_table
from megatron_meco.run.launch import Launch
from megatron_meco.run.presets import model_names
from megatron_meco.run.run_file import read_run, training_flags

GOOD = """\
model: laptop-3m
data-path: data/web
tokenizer-model: tok
train-iters: 100
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text.encode())
    return path


def words(path: Path, *overrides: str) -> dict[str, list[str]]:
    """The values of each option."""
    found: dict[str, list[str]] = {}
    for word in read_run(path, overrides).flags():
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            found[option] = values = [value] if equals else []
        else:
            values.append(word)
    return found


def test_a_run_file_becomes_flags(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "lr: 1e-3\nsplit: 90,10,0\ndisable-bias-linear: false\n")
    flags = words(path)
    assert "--meco" in flags and "--disable-bias-linear" not in flags
    assert flags["--num-layers"] == ["4"]
    assert (flags["--lr"], flags["--min-lr"]) == (["1e-3"], ["0.0001"])
    # One folder for all that a run writes.
    assert flags["--save"] == flags["--load"] == ["runs/run"]
    assert flags["--tensorboard-dir"] == ["runs/run/tensorboard"]


def test_set_wins_over_the_file_and_the_file_over_the_model(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "seq-length: 256\nlaunch:\n  nproc-per-node: 2\n")
    assert words(path)["--seq-length"] == words(path)["--max-position-embeddings"] == ["256"]
    flags = words(path, "seq_length=64", "data-path=[0.3, a, 0.7, b]", "meco-template=''")
    assert flags["--seq-length"] == flags["--max-position-embeddings"] == ["64"]
    assert flags["--data-path"] == ["0.3", "a", "0.7", "b"]
    assert flags["--meco-template"] == [""]
    run = read_run(path, ["launch.env.A=1", "launch.nproc-per-node=4"])
    assert run.launch == Launch(nproc_per_node=4, env={"A": "1"})
    # One way to say how long a run is takes the place of the model's.
    flags = words(write(tmp_path, "model: llama-8b\ndata-path: a\ntrain-samples: 512\n"))
    assert "--train-samples" in flags and "--train-iters" not in flags


def test_a_value_that_begins_with_a_dash_reaches_its_flag(tmp_path: Path) -> None:
    both = words(write(tmp_path, GOOD), 'meco-suffix-template="\\n{url}"', "meco-suffix-loss=0")
    assert (both["--meco-suffix-template"], both["--meco-suffix-loss"]) == ([r"\n{url}"], ["0"])
    assert words(write(tmp_path, GOOD), "meco-template='-{url}'")["--meco-template"] == ["-{url}"]


@pytest.mark.parametrize("model", model_names())
def test_every_model_is_made_of_known_flags(model: str, tmp_path: Path) -> None:
    flags = words(write(tmp_path, f"model: {model}\ndata-path: a\ntrain-iters: 10\n"))
    assert {"--num-layers", "--seq-length", "--lr", "--global-batch-size"} <= flags.keys()


# What somebody wrote after `GOOD`, on line 5; where it is found, and the message.
MISTAKES = {
    "unknown key": ("seq-lenght: 1", 5, "unknown key seq-lenght. Did you mean seq-length?"),
    "other trainer": ("learning-rate: 1", 5, "unknown key learning-rate. Did you mean lr?"),
    "part of a key": ("template: x", 5, "Did you mean meco-template?"),
    "dashes": ("--lr: 1", 5, "begins with a dash. Drop the dashes. Write lr."),
    "launch key": ("nproc-per-node: 2", 5, "is a key of launch. Write `launch:`"),
    "launch typo": ("launch:\n  nproc: 2", 6, "unknown key nproc in launch. Did you mean nproc-"),
    "launch scalar": ("launch: torchrun", 5, "launch takes keys of its own"),
    "launch ranks": ("launch:\n  nproc-per-node: 0", 6, "nproc-per-node is 0"),
    "launch nodes": ("launch: {nnodes: 2}", 5, "nothing says where they meet"),
    "launch rank": ("launch: {nnodes: 2, node-rank: 2, master-addr: a}", 5, "node-rank is 2"),
    "launch own slurm": ("launch:\n  slurm:\n    nodes: 2", 7, "Give nnodes in launch."),
    "launch env": ("launch:\n  env:\n    1X: 2", 7, "cannot be a key of env"),
    "no preset": ("model: laptop-4m", 5, "model is given twice, first on line 1"),
    "duplicate": ("train-iters: 5", 5, "train-iters is given twice, first on line 4"),
    "same with underscore": ("train_iters: 5", 5, "is given twice, first on line 4"),
    "wrong type": ("lr: fast", 5, "lr is fast, which is not a number. Write it as 0.0005"),
    "text for int": ("seq-length: '512'", 5, "takes a whole number, and '512' is text"),
    "fraction": ("seq-length: 512.5", 5, "which is not a whole number. Write a number without"),
    "exponent": ("global-batch-size: 1e3", 5, "which is not a whole number. Write 1000."),
    "suffix": ("seq-length: 8k", 5, "Write 8000."),
    "thousands": ("seq-length: 8,192", 5, "Write 8192."),
    "underscores": ("seq-length: 8_192", 5, "Write 8192."),
    "octal": ("seq-length: 010", 5, "take it for octal"),
    "base 60": ("lr: 1:30", 5, "take it for base 60"),
    "percent": ("meco-cooldown-fraction: 10%", 5, "Write 0.1."),
    "comma": ("lr: 0,001", 5, "Write 0.001, with a point."),
    "infinite": ("lr: 1e999", 5, "beyond what a number holds"),
    "boolean for number": ("lr: yes", 5, "takes a number, and yes is a boolean"),
    "yaml 1.1 boolean": ("swiglu: yes", 5, "takes true or false. Write true or false"),
    "quoted boolean": ("swiglu: 'true'", 5, "takes true or false"),
    "number for boolean": ("swiglu: 1", 5, "takes true or false"),
    "boolean for text": ("tensorboard-dir: on", 5, "take on for a boolean. Quote it: 'on'."),
    "null": ("lr: null", 5, "lr has no value"),
    "nothing": ("lr:", 5, "lr has no value"),
    "tilde": ("data-cache-path: ~", 5, "data-cache-path has no value"),
    "list": ("lr: [1, 2]", 5, "lr takes one value, and this is a list"),
    "nested list": ("meco-cooldown-data-path: [[a]]", 5, "one of these is a list. Write it flat"),
    "keys": ("lr:\n  peak: 1", 5, "lr takes one value, and this is keys"),
    "choice": ("optimizer: adam2", 5, "none of"),
    "tab": ("launch:\n\tnnodes: 1", 6, "a tab, where YAML wants spaces. Indent with spaces."),
    "unquoted colon": ("meco-template: URL: {url}", 5, "Quote a value that holds `: `"),
    "open quote": ("meco-template: 'URL", 5, "a quote that is not closed"),
    "open bracket": ("data-cache-path: [a", 5, "a bracket or brace that is not closed"),
    "no colon": ("swiglu", 5, "a line that is not `key: value`"),
    "anchor": ("save: &a runs", 5, "anchors and aliases"),
    "tag": ("save: !!python/object:os.system x", 5, "the tag"),
    "second document": ("---\nlr: 1", 5, "a second document"),
    "merge": ("<<: {lr: 1}", 5, "merged keys"),
    "escape": ('meco-template: "\\q"', 5, "a backslash that YAML does not know"),
    "several lines": ("save: a\n  b", 5, "goes on over several lines"),
    "not printable": ("save: a\x01", 5, "an unprintable character"),
    "zero byte": ('save: "a\\0b"', 5, "no command line can pass on"),
    "other run file": ("yaml-cfg: a.yaml", 5, "another kind of run file"),
    "long key": ("x" * 900 + ": 1", 5, "unknown key xxx"),
    "huge number": ("seq-length: " + "9" * 5000, 5, "a number of 5,000 characters"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, number, message = MISTAKES[name]
    path = write(tmp_path, f"{GOOD}{line}\n")
    assert cli.main(["train", str(path), "--dry-run"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"meco: error: {path}:{number}: ")
    assert message in err
    assert err.count("\n") == 1 and len(err) < 500


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seq-lenght=1", "unknown key seq-lenght. Did you mean seq-length?"),
        ("lr", "is not key=value"),
        ("=1", "is not key=value"),
        ("lr=", "lr has no value"),
        ("lr=yes", "is a boolean"),
        ("lr.peak=1", "lr has no keys inside"),
        ("launch.nproc=1", "unknown key nproc in launch"),
        ("launch=1", "launch takes keys of its own"),
        ("model=llama-7b", "none of llama-600m"),
        ("lr=[1", "not closed"),
        ("lr=\x01", "unprintable"),
    ],
)
def test_a_mistake_after_set_is_told_in_one_line(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, GOOD)
    assert cli.main(["train", str(path), "--dry-run", "--set", override]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "--set" in err and message in err


def test_files_that_are_no_run_files(tmp_path: Path) -> None:
    for name, data, message in (
        ("empty", b"", "holds no key"),
        ("comment", b"# nothing\n", "holds no key"),
        ("list", b"- a\n", ":1: is a list, not keys with values"),
        ("word", b"hello\n", ":1: is one value, not keys"),
        ("binary", b"lr: 1\n\xff\xfe\x00", ":2: is not text in UTF-8"),
        ("zeros", bytes(100), "an unprintable character"),
        ("huge", b"#" * (1 << 20) + b"#", "is larger than 1,048,576 bytes"),
        ("deep", b"[" * 5000, "levels of nesting"),
        ("cut", GOOD.encode()[:-6] + b"\n", "a line that is not `key: value`"),
        ("windows", GOOD.replace("\n", "\r\n").encode(), ""),
        ("bom", b"\xef\xbb\xbf" + GOOD.encode(), ""),
    ):
        path = tmp_path / f"{name}.yaml"
        path.write_bytes(data)
        if not message:
            assert "--num-layers" in words(path)
            continue
        with pytest.raises(MeCoError) as refusal:
            read_run(path)
        assert message in str(refusal.value) and "\n" not in str(refusal.value), name
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "none.yaml", "No such file"),
        (Path("/dev/null"), "not a plain file"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(MeCoError, match=message) as refusal:
            read_run(path)
        assert str(refusal.value).count("Name a YAML file.") == 1


def test_two_names_of_one_argument(tmp_path: Path) -> None:
    flag, other = next(
        (a, b)
        for a in flag_table().values()
        for b in flag_table().values()
        if a.off == b.option and a.kind == "switch"
    )
    path = write(tmp_path, f"{GOOD}{flag.key}: true\n{other.key}: true\n")
    with pytest.raises(MeCoError, match=f":6: {other.key} says the same as {flag.key}"):
        read_run(path)


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (MeCoError("too large", where="--train-iters 100"), ":4: --train-iters 100"),
        (MeCoError("no such file", where="data/web.idx"), ":2: data/web.idx"),
        (MeCoError("assert args.hidden_size % args.train_iters == 0", where="a.py"), ":4: a.py"),
        (MeCoError("hidden_size is odd", where="a.py"), ":1 (model laptop-3m): a.py"),
        (MeCoError("strange", where="somewhere"), "run.yaml: somewhere"),
    ],
)
def test_refusals_of_megatron_and_meco_get_their_line(
    error: MeCoError, place: str, tmp_path: Path
) -> None:
    run = read_run(write(tmp_path, GOOD))
    assert run.locate(error).where.endswith(place)


def test_a_path_without_a_slash_gets_its_line(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, "model: laptop-3m\ndata-path: web\ntrain-iters: 9\n"))
    for where in ("web", "web.idx", "web.metadata.arrow"):
        assert run.locate(MeCoError("no such file", where=where)).where.endswith(f":2: {where}")
    elsewhere = run.locate(MeCoError("no such file", where="website.idx")).where
    assert elsewhere.endswith("run.yaml: website.idx")


@pytest.mark.parametrize("key", ["lr-warmup-iters: 100", "lr-warmup-samples: 100"])
def test_names_of_megatron_alone_get_a_line(key: str, tmp_path: Path) -> None:
    run = read_run(write(tmp_path, f"{GOOD}{key}\n"))
    error = MeCoError("assert self.lr_warmup_steps < self.lr_decay_steps", where="scheduler.py")
    assert ":5: " in run.locate(error).where


def test_what_follows_from_a_key_is_told_where_the_key_is(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, f"{GOOD}seq-length: -5\n"))
    error = MeCoError("must be above 0", where="--max-position-embeddings -5")
    place = f"{tmp_path}/run.yaml:5, from seq-length: --max-position-embeddings -5"
    assert run.locate(error).where == place
    error = MeCoError("too large", where="--min-lr 1")
    assert "run.yaml:1 (model laptop-3m), from lr: --min-lr" in run.locate(error).where


def test_other_commands_take_the_run_file_too(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "launch: {nproc-per-node: 2}\n")
    with training_flags(["--set", "lr=1e-3", str(path)]) as flags:
        assert Path.cwd() == tmp_path
        assert "--meco" not in flags and flags[flags.index("--lr") + 1] == "1e-3"
    with training_flags(["--data-path", "a"]) as flags:
        assert flags == ["--data-path", "a"] and Path.cwd() != tmp_path
    with pytest.raises(MeCoError, match="Write --set lr=1"), training_flags([str(path), "--lr=1"]):
        pass
    words = [str(path), "--set", "meco=false"]
    with pytest.raises(MeCoError, match="meco is false"), training_flags(words):
        pass
    gone = r"run.yaml:2: data/web.idx: gone"
    with pytest.raises(MeCoError, match=gone), training_flags([str(path)]):
        raise MeCoError("gone", where="data/web.idx", remedy="Make it.")
