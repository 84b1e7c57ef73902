"""What pyproject.toml declares is what the package imports, and the version stands in one place."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

# A distribution whose top-level package has another name.
MODULES = {"megatron-core": "megatron", "pyyaml": "yaml"}
# Declared for a package that imports it for us, which does not declare it itself.
IMPORTED_BY_MEGATRON = {
    "psutil": "megatron/core/dist_checkpointing/strategies/filesystem_async.py",
    "tensorboard": "megatron/training/global_vars.py",
}
# Extras for work on the project itself: no user's installation may need them.
DEVELOPMENT = {"dev", "demo"}


def module_of(name):
    return MODULES.get(name, name.replace("-", "_"))


def names(requirements):
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def third_party_imports():
    """Return {top-level module: where it is imported first}, imports inside functions included."""
    found = {}
    for path in sorted((ROOT / "megatron_meco").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            for module in modules:
                top = module.partition(".")[0]
                found.setdefault(top, f"{path.relative_to(ROOT)}:{node.lineno}")
    return {
        top: where
        for top, where in found.items()
        if top not in sys.stdlib_module_names and top != "megatron_meco"
    }


BASE = names(PROJECT["dependencies"])
EXTRAS = {extra: names(lines) for extra, lines in PROJECT["optional-dependencies"].items()}
IMPORTS = third_party_imports()


@pytest.mark.parametrize("name", sorted(BASE))
def test_base_dependency_is_imported(name):
    if name in IMPORTED_BY_MEGATRON:
        source = metadata.distribution("megatron-core").locate_file(IMPORTED_BY_MEGATRON[name])
        assert re.search(rf"import .*{name}|from .*{name}", source.read_text(encoding="utf-8"))
        assert name not in names(metadata.requires("megatron-core"))
        return
    assert module_of(name) in IMPORTS, f"{name}: nothing in megatron_meco/ imports it"


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_import_is_declared(module):
    for_users = [found for extra, found in EXTRAS.items() if extra not in DEVELOPMENT]
    declared = {module_of(name) for name in BASE.union(*for_users)}
    assert module in declared, f"{IMPORTS[module]} imports {module}: add it to pyproject.toml"


def test_every_pin_of_a_dependency_satisfies_its_bounds():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert list(pins) == [canonicalize_name(name) for name in pins]
    every = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    bad = [
        line
        for line in every
        if (pin := pins.get(canonicalize_name(Requirement(line).name))) is None
        or pin not in Requirement(line).specifier
    ]
    assert not bad, f"constraints.txt has no pin that fits: {bad}"


def test_contributing_explains_every_dependency():
    section = CONTRIBUTING.partition("\n## Dependencies\n")[2].partition("\n## ")[0]
    explained = {
        canonicalize_name(name)
        for row in section.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`([^`]+)`", row.split("|")[1])
    }
    assert explained == BASE.union(*EXTRAS.values())


def test_version_stands_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    attribute = PYPROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "megatron_meco.__version__"
    pattern = re.compile(r"^__version__ =", re.MULTILINE)
    found = [p for p in (ROOT / "megatron_meco").rglob("*.py") if pattern.search(p.read_text())]
    assert found == [ROOT / "megatron_meco" / "__init__.py"]


def test_urls_are_those_that_the_project_knows():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert PROJECT["urls"]
    for name, url in PROJECT["urls"].items():
        assert url.startswith("https://")
        assert url in citation, f"project.urls.{name} is not in CITATION.cff"
