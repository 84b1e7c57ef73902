"""The run files that come with the repository."""

from __future__ import annotations

import json

import pytest
from runs import ROOT

from megatron_meco.run.flag_table import schema_text
from megatron_meco.run.launch import LAUNCH_KEYS
from megatron_meco.run.presets import model_names
from megatron_meco.run.run_file import read_run

FILES = sorted((ROOT / "examples").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_run_file_of_the_examples_is_one(path):
    run = read_run(path)
    assert run.model in model_names()
    first = path.read_text().splitlines()[0]
    schema = path.parent / first.partition("$schema=")[2]
    assert schema.read_text() == schema_text()


def test_there_are_some():
    assert len(FILES) >= 2


def test_the_documentation_names_every_model_and_key_of_launch():
    text = (ROOT / "docs" / "run-file.md").read_text()
    for name in model_names():
        assert name in text or name.removeprefix("llama") in text
    for key in LAUNCH_KEYS:
        assert key in text, key
    assert json.loads(schema_text())["definitions"]["model"]["enum"] == model_names()
