"""Source files and modules that the documentation, docstrings and comments name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    ".github",
    "benchmarks",
    "csrc",
    "docs",
    "examples",
    "megatron_meco",
    "tests",
    "tools",
)
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
TEXTS = sorted({*PAGES, *(ROOT / "megatron_meco").rglob("*.py")} - {ROOT / "CHANGELOG.md"})
# The compiled module, and a key in the metadata of a file.
NO_SOURCES = {"megatron_meco._core", "megatron_meco.format"}
# The reader's own, those of other projects, and those that a run writes.
NOT_OURS = {
    "command.sh",
    "common.py",
    "llama.cpp",
    "my_script.py",
    "pages.py",
    "preprocess_data.py",
    "torch/distributed/run.py",
    "training/config/training_config.py",
    "utils.py",
}
_FILE = re.compile(r"(?<![\w{}$*<>/.-])[\w./-]*[\w-]\.(?:py|sh|cpp|h|hpp|toml|yml)\b")
_MODULE = re.compile(r"(?<![\w.])megatron_meco(?:\.[a-z_]\w*)+")


@pytest.fixture(scope="module")
def known() -> set[str]:
    """The ends of the paths of all files: a module may be named without its package."""
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    parts = [path.relative_to(ROOT).parts for path in files]
    return {"/".join(each[i:]) for each in parts for i in range(len(each))}


def dead_names(text: str, known: set[str]) -> list[str]:
    files = {re.sub(r"^(\.\.?/)+", "", name) for name in _FILE.findall(text)}
    dead = sorted(files - known - NOT_OURS)
    for name in sorted({*_MODULE.findall(text)} - NO_SOURCES):
        # The last part may be something in the module.
        path = name.replace(".", "/")
        places = (f"{path}.py", f"{path}/__init__.py", f"{path.rpartition('/')[0]}.py")
        if not known.intersection(places):
            dead.append(name)
    return dead


def test_files_that_are_named_exist(known: set[str]) -> None:
    found = {str(path.relative_to(ROOT)): dead_names(path.read_text(), known) for path in TEXTS}
    assert {path: dead for path, dead in found.items() if dead} == {}


@pytest.mark.parametrize(
    "text",
    [
        "as `training/compat.py` says",
        "(`tests/data/test_gone.py`)",
        "sh tools/gone.sh",
        "`megatron_meco.training.compat`",
        "`megatron_meco.compat.patch`",
        "`.github/workflows/gone.yml`",
    ],
)
def test_a_dead_name_is_found(known: set[str], text: str) -> None:
    assert len(dead_names(text, known)) == 1


def test_living_names_pass(known: set[str]) -> None:
    text = "`provider.py`, ./tools/setup_venv.sh, csrc/packing.cpp, megatron_meco.data.report.Run"
    assert (
        dead_names(f"{text}, a/{{NAME}}.py, `pyproject.toml`, .github/workflows/wheels.yml", known)
        == []
    )
