"""Samples after interruptions, confidence intervals, and the user's scorers."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_meco import cli
from megatron_meco.errors import FlagError
from megatron_meco.inference.model import LoadedModel, encode_prompt, load_model
from megatron_meco.inference.samples import SampleSettings, sample
from megatron_meco.inference.steer import intervals

PREFIX = "URL: en.wikipedia.org\n\n"
SETTINGS = SampleSettings(
    model="m",
    prefixes=("", PREFIX),
    num_samples=10,
    batch_size=4,
    temperature=1.0,
    top_p=0.9,
    min_new_tokens=3,
    max_new_tokens=8,
    seed=0,
)


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> LoadedModel:
    return load_model(model_folder, "cpu")


def watch(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    asked: list[list[list[int]]] = []
    generate = loaded.model.generate

    def watched(ids: Any, **options: Any) -> Any:
        asked.append(ids.tolist())
        assert (options["temperature"], options["top_p"], options["top_k"]) == (1.0, 0.9, 0)
        return generate(ids, **options)

    monkeypatch.setattr(loaded.model, "generate", watched)
    return asked


def test_an_interrupted_run_goes_on_to_the_same_samples(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = watch(loaded, monkeypatch)
    whole = sample(loaded, SETTINGS, tmp_path / "whole")
    contexts = [encode_prompt(loaded.model, loaded.tokenizer, p, "") for p in ("", PREFIX)]
    assert contexts[0] == [0] and len(contexts[1]) > 5
    assert asked == [[context] * size for context in contexts for size in (4, 4, 2)]
    assert [len(texts) for texts in whole.values()] == [10, 10] and whole[""] != whole[PREFIX]
    assert len({text for texts in whole.values() for text in texts}) > 15

    content = (tmp_path / "whole" / "generations.jsonl").read_bytes()
    entries = [json.loads(line) for line in content.splitlines()]
    assert [(e["prefix"], e["sample"]) for e in entries] == [
        (prefix, number) for prefix in ("", PREFIX) for number in range(10)
    ]
    lengths = {entry["num_tokens"] for entry in entries}
    assert min(lengths) >= 3 and max(lengths) == 8
    # In a line, between two lines of a batch, between two batches, at the very end.
    ends = np.cumsum([len(line) for line in content.splitlines(keepends=True)])
    for kept, calls in ((ends[9] + 7, 3), (ends[10], 3), (ends[13], 2), (ends[-1], 0), (0, 6)):
        folder = tmp_path / f"cut-{kept}"
        folder.mkdir()
        (folder / "generations.jsonl").write_bytes(content[:kept])
        (folder / "settings.json").write_bytes((tmp_path / "whole/settings.json").read_bytes())
        asked.clear()
        assert sample(loaded, SETTINGS, folder) == whole
        assert (folder / "generations.jsonl").read_bytes() == content
        assert len(asked) == calls


def test_samples_of_other_settings_are_not_mixed(loaded: LoadedModel, tmp_path: Path) -> None:
    few = dataclasses.replace(SETTINGS, num_samples=2)
    sample(loaded, few, tmp_path / "out")
    before = (tmp_path / "out" / "generations.jsonl").read_bytes()
    other = dataclasses.replace(few, seed=1)
    with pytest.raises(FlagError, match=r"other settings \(seed 0, now 1\)"):
        sample(loaded, other, tmp_path / "out")
    assert (tmp_path / "out" / "generations.jsonl").read_bytes() == before
    assert sample(loaded, other, tmp_path / "2") != sample(loaded, few, tmp_path / "out")
    with pytest.raises(FlagError, match="holds something else"):
        sample(loaded, few, tmp_path)


def test_intervals_are_those_of_the_mean() -> None:
    draw = np.random.default_rng(3)
    scores, plain = draw.beta(2, 8, 500), draw.beta(4, 6, 500)
    found = intervals(scores, plain)
    assert intervals(plain).keys() == {"mean", "share_above_0.5"}

    def half_width(name: str) -> float:
        low, high = found[name].low, found[name].high
        assert low < found[name].value < high
        return (high - low) / 2

    assert found["mean"].value == pytest.approx(scores.mean())
    assert half_width("mean") == pytest.approx(1.96 * scores.std() / 500**0.5, rel=0.05)
    share = (scores > 0.5).mean()
    assert found["share_above_0.5"].value == share
    assert half_width("share_above_0.5") == pytest.approx(
        1.96 * (share * (1 - share) / 500) ** 0.5, rel=0.1
    )
    both = (scores.var() / 500 + plain.var() / 500) ** 0.5
    assert found["difference"].value == pytest.approx(scores.mean() - plain.mean())
    assert half_width("difference") == pytest.approx(1.96 * both, rel=0.05)
    assert found["ratio"].value == pytest.approx(scores.mean() / plain.mean())
    wrong = draw.beta(3, 7, 1000)
    more = intervals(scores, plain, wrong=wrong)
    assert {name: more[name] for name in found} == found
    assert more["right_minus_shuffled"].value == pytest.approx(scores.mean() - wrong.mean())
    found["right_minus_shuffled"] = more["right_minus_shuffled"]
    both = (scores.var() / 500 + wrong.var() / 1000) ** 0.5
    assert half_width("right_minus_shuffled") == pytest.approx(1.96 * both, rel=0.05)
    # Nothing to divide by.
    assert "ratio" not in intervals([0.1, 0.2], [0.0, 0.0])


# ---- The command ----


@pytest.fixture
def scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_scorers.py").write_text(
        "def length(texts): return [min(len(t) / 20, 1) for t in texts]\n"
        "def few(texts): return [1.0]\n"
        "def words(texts): return {'words': ['x' for t in texts]}\n"
    )
    yield tmp_path
    sys.modules.pop("my_scorers", None)


def run(model_folder: Path, *flags: str) -> int:
    short = ["--num-samples", "6", "--batch-size", "4", "--max-new-tokens", "12", "--device", "cpu"]
    return cli.main(["steer", "--model", str(model_folder), *short, *flags])


def test_samples_behind_special_tokens_alone(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--template", "{token:<|end_of_text|>}", "--metadata", "empty"]
    for _ in range(2):  # what is there already is kept
        assert run(model_folder, *flags, "--output", str(tmp_path / "out")) == 0
    lines = (tmp_path / "out" / "generations.jsonl").read_text().splitlines()
    assert {json.loads(line)["prefix"] for line in lines} == {"", "<|end_of_text|>"}


def test_scored_by_a_function_and_then_by_another_scorer(
    model_folder: Path,
    scorers: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--metadata", "url=https://a.org/x", "--output", str(scorers / "out")]
    assert run(model_folder, *flags, "--scorer", "my_scorers:length") == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].startswith("length  BOS alone") and rows[2].startswith("length  url=https://a")
    samples = (scorers / "out" / "generations.jsonl").read_bytes()
    entries = [json.loads(line) for line in samples.splitlines()]
    report = json.loads((scorers / "out" / "scores.json").read_text())
    for prefix in ("", "URL: a.org\n\n"):
        texts = [entry["text"] for entry in entries if entry["prefix"] == prefix]
        expected = [min(len(text) / 20, 1) for text in texts]
        assert report["scores"][prefix]["length"] == expected and len(expected) == 6
        mean = report["summary"][prefix]["length"]["mean"]["value"]
        assert mean == pytest.approx(np.mean(expected)) and f"{mean:.4f} [" in "".join(rows)

    class Detoxify:
        def __init__(self, kind: str, device: str) -> None:
            assert (kind, device) == ("unbiased", "cpu")

        def predict(self, texts: list[str]) -> dict[str, list[float]]:
            return {"toxicity": [0.25] * len(texts), "insult": [0.0] * len(texts)}

    module = types.SimpleNamespace(Detoxify=Detoxify)
    monkeypatch.setitem(sys.modules, "detoxify", module)
    assert run(model_folder, *flags, "--scorer", "detoxify") == 0
    out = capsys.readouterr().out
    assert "toxicity  url=https://a.org/x  0.2500 [0.2500, 0.2500]" in out
    assert (scorers / "out" / "generations.jsonl").read_bytes() == samples


def test_right_and_wrong_metadata(
    model_folder: Path, scorers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control of a prefix is the samples under the two others, without BOS alone."""
    hosts = ("a.org", "b.org", "c.org")
    flags = [word for host in hosts for word in ("--metadata", f"url={host}")]
    flags += ["--shuffled", "--scorer", "my_scorers:length", "--output", str(scorers / "out")]
    assert run(model_folder, *flags) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].endswith("mean - mean under the other metadata")
    report = json.loads((scorers / "out" / "scores.json").read_text())
    means = {
        prefix: np.mean(report["scores"][prefix]["length"])
        for prefix in (f"URL: {host}\n\n" for host in hosts)
    }
    for prefix, mean in means.items():
        others = [means[other] for other in means if other != prefix]
        row = report["summary"][prefix]["length"]["right_minus_shuffled"]
        assert row["value"] == pytest.approx(mean - np.mean(others))
        assert f"  {row['value']:.4f} [{row['low']:.4f}, {row['high']:.4f}]" in "\n".join(rows)
    assert "right_minus_shuffled" not in report["summary"][""]["length"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shuffled", "--metadata", "url=a.org"], "--shuffled: needs --scorer and two or more"),
        (["--scorer", "detoxify"], "detoxify: .*pip install detoxify"),
        (["--scorer", "my_scorers"], "not the name of a scorer"),
        (["--scorer", "my_scorers:none"], "has no attribute 'none'"),
        (["--scorer", "no_such_module:f"], "No module named 'no_such_module'"),
        (["--scorer", "my_scorers:few"], "gave 1 number for 6 texts"),
        (["--scorer", "my_scorers:words"], "'words' are no numbers"),
        (["--metadata", "topic=x"], "unknown field 'topic'"),
        (["--min-new-tokens", "13"], "--min-new-tokens: invalid value 13"),
        (["--temperature", "0"], "--temperature: invalid value 0"),
        (["--max-new-tokens", "500"], "do not fit in the model's 192"),
    ],
)
def test_refusals(
    model_folder: Path,
    scorers: Path,
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "detoxify", None)
    assert run(model_folder, "--output", str(scorers / "out"), *flags) == 1
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("meco: error: ") and re.search(message, last), err
    assert not (scorers / "out" / "scores.json").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [lines[1], *lines[1:]], "line 1 is no sample of these settings"),
        (lambda lines: [*lines[:3], b"{}\n", *lines[4:]], "line 4 is no sample"),
        (lambda lines: [b"[" * 100_000 + b"\n"], "line 1 is no sample"),
        (lambda lines: [*lines, *lines], "line 21 is no sample"),
        (lambda lines: [lines[0].replace(b'"text": "', b'"text": 5, "t": "')], "line 1 is no"),
        (lambda lines: [b"\xff\n"], "line 1 is no sample"),
    ],
)
def test_samples_that_were_changed_are_neither_used_nor_cut_off(
    loaded: LoadedModel, tmp_path: Path, damage: Any, message: str
) -> None:
    sample(loaded, SETTINGS, tmp_path / "out")
    file = tmp_path / "out" / "generations.jsonl"
    content = b"".join(damage(file.read_bytes().splitlines(keepends=True)))
    file.write_bytes(content)
    with pytest.raises(FlagError, match=message):
        sample(loaded, SETTINGS, tmp_path / "out")
    assert file.read_bytes() == content


def test_samples_with_other_spelling_go_on(loaded: LoadedModel, tmp_path: Path) -> None:
    """JSON by another program has lines of other lengths; no line is cut."""
    whole = sample(loaded, SETTINGS, tmp_path / "out")
    file = tmp_path / "out" / "generations.jsonl"
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    file.write_text(
        "".join(json.dumps(line, indent=None, separators=(",", ":")) + "\n" for line in lines[:9])
    )
    assert sample(loaded, SETTINGS, tmp_path / "out") == whole
    again = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert again == lines


@pytest.mark.parametrize("content", ["[]", "5", "{", "[" * 100_000, '{"seed": 0}', '{"seed": NaN}'])
def test_settings_that_cannot_be_read(loaded: LoadedModel, tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(FlagError, match=r"settings\.json"):
        sample(loaded, SETTINGS, tmp_path)
    assert (tmp_path / "settings.json").read_text() == content


def test_a_folder_that_a_killed_run_left_behind(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / ".settings.json.0123456789ab").write_text("{")
    few = dataclasses.replace(SETTINGS, num_samples=1)
    assert len(sample(loaded, few, tmp_path)[""]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *(
            ([flag, value], f"{flag}: invalid value ")
            for flag, values in {
                "--num-samples": ("0", "1" + "0" * 12),
                "--batch-size": ("0", "65537"),
                "--temperature": ("nan", "inf", "1e-300"),
                "--top-p": ("nan", "0"),
                "--seed": ("-1", str(2**64)),
                "--max-new-tokens": ("0",),
                "--min-new-tokens": ("-1", "1" + "0" * 30),
            }.items()
            for value in values
        ),
        (["--metadata", "url=a.org/1", "--metadata", "url=a.org/2"], "give the same prefix"),
        (["--scorer", "my_scorers:fails"], r"failed \(ZeroDivisionError"),
        (["--scorer", "my_scorers:nothing"], "gave other names"),
        (["--scorer", "my_scorers:number"], "cannot be called"),
        (["--scorer", "broken_scorers:x"], "invalid syntax"),
    ],
)
def test_more_refusals(
    model_folder: Path,
    scorers: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (scorers / "broken_scorers.py").write_text("def (")
    (scorers / "my_scorers.py").write_text(
        "number = 5\ndef fails(texts): return 1 / 0\ndef nothing(texts): return {}\n"
    )
    assert run(model_folder, "--output", str(scorers / "out"), *flags) == 1
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("meco: error: ") and re.search(message, last), err
