"""`--json` of the commands that use a model: one object on stdout, with the table's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_meco.cli import main

URL = "url=https://animals.example.org"


def told(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    return found


@pytest.mark.usefixtures("only_local")
def test_eval(
    model_folder: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "eval.json"
    words = ["--tasks", "local_choice", "--include-path", tasks, "--limit", "4", "--metadata", URL]
    found = told(capsys, "eval", "--model", model_folder, *words, "--output", output)
    assert found == json.loads(output.read_text())
    assert found["results"][0]["task"] == "local_choice"


def test_sweep_urls(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "urls.txt").write_text(f"{URL}\nurl=https://numbers.example.net\n")
    (tmp_path / "texts.txt").write_text("the fox\n" * 6)
    words = ["--candidates", tmp_path / "urls.txt", "--text", tmp_path / "texts.txt"]
    output = tmp_path / "sweep.json"
    found = told(capsys, "sweep-urls", "--model", model_folder, *words, "--output", output)
    assert found == json.loads(output.read_text())
    assert len(found["results"]) == 3


def test_steer(
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scorer = "def length(texts):\n    return [len(text) / 100 for text in texts]\n"
    (tmp_path / "json_scorer.py").write_text(scorer)
    monkeypatch.chdir(tmp_path)
    words = ["--num-samples", "4", "--max-new-tokens", "12", "--metadata", URL, "--output", "s"]
    found = told(capsys, "steer", "--model", model_folder, *words, "--scorer", "json_scorer:length")
    scores = json.loads((tmp_path / "s" / "scores.json").read_text())
    assert found["summary"] == scores["summary"]
    assert found["samples"] == 4 and found["folder"] == "s"
    assert told(capsys, "steer", "--model", model_folder, *words) == {"samples": 4, "folder": "s"}
