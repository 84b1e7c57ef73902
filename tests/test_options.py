"""One spelling for the same option in all commands, and `--json` wherever a table is printed."""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_meco.cli import COMMANDS, command_parser
from megatron_meco.wording import json_line

# Commands that print no table, and what they print.
WITHOUT_JSON = {
    "completion": "a script",
    "import": "the flags of a run",
    "train": "the progress of a run",
    "watch": "the progress of a run",
    "export": "two lines",
    "generate": "texts, while they are made",
}
# Options whose names are alike and that mean different things.
ALIKE = {
    ("--metadata", "--metadata-fields"): "values for a model; names of columns",
    ("--shuffled", "--shuffled-from"): "the second names where the first takes its metadata",
    ("--split", "--split-sentences"): "a part of the corpus; a way to store documents",
    ("--task", "--tasks"): "one is searched for; several are evaluated",
    ("--text", "--text-field"): "a file; the name of a column",
    ("--text", "--texts"): "a file; a number of held-out texts",
    ("--tokenizer-model", "--tokenizer-type"): "Megatron's",
    ("--max-new-tokens", "--min-new-tokens"): "bounds",
}
# What else the same thing might be called.
SYNONYMS = {
    "--output": ["--out", "--output-dir", "--output-path", "--output-file", "--to", "--save"],
    "--workers": ["--num-workers", "--jobs", "--processes", "--num-processes", "--threads"],
    "--seed": ["--random-seed", "--rng-seed", "--split-seed"],
    "--overwrite": ["--force", "--replace", "--clobber"],
    "--limit": ["--max-documents", "--num-documents", "--max-samples"],
    "--top": ["--top-n", "--num-top", "--most"],
    "--dry-run": ["--dryrun", "--no-run", "--print-only"],
    "--device": ["--cuda", "--gpu"],
    "--json": ["--as-json", "--format"],
    "--metadata-fields": ["--fields", "--metadata-columns"],
    "--text-field": ["--text-key", "--text-column"],
    "--batch-size": ["--batch", "--num-at-once"],
    "--max-new-tokens": ["--max-tokens", "--num-tokens"],
}


def options() -> Iterator[tuple[str, argparse.Action]]:
    def of(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner, its in action.choices.items():
                    yield from of(f"{name} {inner}", its)
            elif action.option_strings:
                yield name, action

    for name in COMMANDS:
        yield from of(name, command_parser(name))


SHOWN = [(name, action) for name, action in options() if action.help != argparse.SUPPRESS]
SPELLED = sorted({word for _, action in SHOWN for word in action.option_strings})


def test_options_are_words_with_dashes() -> None:
    assert len(SPELLED) > 60
    for word in SPELLED:
        assert word in ("-h", "-o") or (word[:2] == "--" and "_" not in word), word
        assert word == word.lower()


def test_one_thing_has_one_name() -> None:
    others = {other for names in SYNONYMS.values() for other in names}
    assert not others & set(SPELLED)
    long = [word for word in SPELLED if word.startswith("--")]
    for one, other in itertools.combinations(long, 2):
        alike = difflib.SequenceMatcher(None, one[2:], other[2:]).ratio() > 0.8
        assert not alike or (one, other) in ALIKE, f"{one} and {other}: one name, or say why two"


def test_one_name_means_one_kind_of_value() -> None:
    kinds: dict[str, dict[str, list[str]]] = {}
    for name, action in SHOWN:
        kind = "switch" if action.nargs == 0 else "value"
        for word in action.option_strings:
            kinds.setdefault(word, {}).setdefault(kind, []).append(name)
    assert {word: found for word, found in kinds.items() if len(found) > 1} == {}
    # Paths have one word in the help: DIR, FILE or PREFIX.
    for name, action in SHOWN:
        if "--output" in action.option_strings:
            assert action.metavar in ("DIR", "FILE", "PREFIX"), name


def test_what_writes_says_where_by_output() -> None:
    writes = {"tokenizer train", "tokenizer llama3", "prepare", "import-mds", "import", "export"}
    writes |= {"eval", "sweep-urls", "steer", "show"}
    assert {name for name, action in SHOWN if "--output" in action.option_strings} == writes


def test_tables_come_as_json_too() -> None:
    with_json = {name.split()[0] for name, action in SHOWN if "--json" in action.option_strings}
    assert set(COMMANDS) - with_json == set(WITHOUT_JSON)


def test_json_is_standard_json() -> None:
    value = {"a": math.nan, "b": [math.inf, 1.5], "c": Path("x"), "d": Counter(e=2), "é": True}
    line = json_line(value)
    assert "\n" not in line and "é" in line
    found = json.loads(line, parse_constant=pytest.fail)
    assert found == {"a": None, "b": [None, 1.5], "c": "x", "d": {"e": 2}, "é": True}
