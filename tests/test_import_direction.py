"""Imports point down one way only, and the parts without torch stay without it.

Read from the sources with `ast`, so that imports inside functions and under TYPE_CHECKING count.
Not with import-linter: it knows other packages by their top-level name only, and so cannot tell
`megatron.training` or a private name of Megatron from the rest of `megatron`.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_meco"

# Each room and the rooms that it may import, itself included.
BASE = {
    *("errors", "config", "whole_file", "wording", "flag_range", "untrusted"),
    *("megatron_flags", "refusals"),
}
DATA = BASE | {"source", "core", "data"}
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "whole_file": {"errors"},
    "wording": set(),
    "flag_range": {"errors"},
    "untrusted": {"errors", "untrusted"},
    "megatron_flags": set(),
    "refusals": {"errors", "config", "megatron_flags"},
    "core": set(),
    "source": BASE | {"core", "source"},
    "corpus": BASE | {"source", "corpus"},
    "data": DATA,
    "training": DATA | {"training"},
    "inference": DATA | {"training", "inference"},
    "bridge": DATA | {"training", "bridge"},
    "run": DATA | {"training", "run"},
    "top": DATA | {"corpus", "training", "inference", "run", "top"},
}

# What is known of a corpus and of a document's source: the only part of corpus/ that data/ may use.
SOURCE = {
    *("encoder", "index_file", "manifest", "metadata", "punkt", "sentences", "text_arrays"),
    *("tokenizer", "url"),
}
TOP = {"cli", "completion", "doctor", "show", "__main__"}

# These run in a bare Python with numpy, pyarrow and _core: no torch and no Megatron, not even
# inside a function, nor through another module of the package.
WITHOUT_TORCH = [
    "errors",
    "config",
    "whole_file",
    "wording",
    "flag_range",
    "untrusted.text_file",
    "untrusted.inert_pickle",
    "megatron_flags",
    "refusals",
    "cli",
    "doctor.command",
    "doctor.facts",
    "doctor.probes",
    "doctor.verdicts",
    "corpus.metadata",
    "corpus.text_arrays",
    "corpus.url",
    "corpus.index_file",
    "corpus.manifest",
    "corpus.metadata_report",
    "corpus.mds",
    "corpus.punkt",
    "corpus.sentences",
    "data.array_file",
    "data.corpora",
    "data.template",
    "data.prefix_table",
    "data.packing",
    "data.phases",
    "data.fingerprint",
    "run.endings",
    "run.flag_table",
    "run.launch",
    "run.run_file",
    "run.run_folder",
    "run.watch",
    "training.kernels",
]

FORBIDDEN_NAMES = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imports_of(module, path, tree=None):
    """Return (line, full dotted name) for each import; `from a import b` gives a.b."""
    tree = tree or ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base]) if base else ".".join(up)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def room(module):
    """Return the room of a module, or None for the package's own __init__."""
    parts = module.split(".")[1:]
    if not parts:
        return None
    if parts[0] in TOP:
        return "top"
    if parts[0] == "_core":
        return "core"
    if parts[0] == "corpus":
        return "source" if len(parts) > 1 and parts[1] in SOURCE else "corpus"
    assert parts[0] in ALLOWED, f"{module} stands in no room of the design"
    return parts[0]


def own_target(name):
    """Return the module of this package that an import names, or None for any other import.

    Names inside a module are cut off; for `from megatron_meco.corpus import url` the name is
    megatron_meco.corpus.url, which is a module.
    """
    if name.split(".")[0] != PACKAGE:
        return None
    if name.split(".")[:2] == [PACKAGE, "_core"]:
        return f"{PACKAGE}._core"
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def is_private(part):
    return part.startswith("_") and not part.startswith("__")


def is_under(name, package):
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    path = MODULES[module]
    own_room = room(module)
    bad = []
    for line, name in imports_of(module, path):
        target = own_target(name)
        if target in (None, PACKAGE, module):
            continue
        # The package's own __init__ has no room: it imports nothing.
        if room(target) not in ALLOWED.get(own_room, set()):
            bad.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not bad, f"{own_room} may import only {sorted(ALLOWED.get(own_room, set()))}: {bad}"


def test_no_circles():
    graph = {
        module: {own_target(name) for _, name in imports_of(module, path)} - {None, PACKAGE, module}
        for module, path in MODULES.items()
    }
    # A circle raises CycleError, with its modules.
    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES) - 1


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_stays_without_torch(module):
    start = f"{PACKAGE}.{module}"
    assert start in MODULES, f"{start} is gone: correct the list in this test"
    seen, waiting, bad = set(), [start], []
    while waiting:
        current = waiting.pop()
        if current in seen or current not in MODULES:
            continue
        seen.add(current)
        waiting += [current.rpartition(".")[0]]  # importing a module runs its package's __init__
        for line, name in imports_of(current, MODULES[current]):
            if is_under(name, "torch") or is_under(name, "megatron"):
                bad.append(f"{MODULES[current].relative_to(ROOT)}:{line} imports {name}")
            waiting += [target] if (target := own_target(name)) else []
    assert not bad, f"{start} must not need torch or Megatron: {bad}"


@pytest.mark.parametrize("module", MODULES)
def test_megatron_training_only_in_training(module):
    if room(module) == "training":
        return
    bad = [
        f"{MODULES[module].relative_to(ROOT)}:{line}"
        for line, name in imports_of(module, MODULES[module])
        if is_under(name, "megatron.training")
    ]
    assert not bad, f"megatron.training belongs to {PACKAGE}/training alone: {bad}"


@pytest.mark.parametrize("module", MODULES)
def test_private_names_of_megatron_only_in_one_file(module):
    if module == f"{PACKAGE}.training.megatron_patches":
        return
    bad = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports_of(module, MODULES[module])
        if is_under(name, "megatron") and any(is_private(part) for part in name.split("."))
    ]
    assert not bad, f"private names of Megatron belong to training/megatron_patches.py: {bad}"


def test_no_drawer_for_leftovers():
    folders = ("megatron_meco", "examples", "benchmarks", "tests")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    bad = [str(path.relative_to(ROOT)) for path in found if path.name in FORBIDDEN_NAMES]
    assert not bad, f"name a module after what it does: {bad}"


def test_the_reader_of_imports_sees_every_kind():
    source = """
import torch.nn as nn
from . import url
from ..data.template import Template
from megatron_meco import _core
def f():
    from megatron_meco.training import cpu
"""
    path = ROOT / PACKAGE / "corpus" / "example.py"
    found = [name for _, name in imports_of(f"{PACKAGE}.corpus.example", path, ast.parse(source))]
    assert found == [
        "torch.nn",
        f"{PACKAGE}.corpus.url",
        f"{PACKAGE}.data.template.Template",
        f"{PACKAGE}._core",
        f"{PACKAGE}.training.cpu",
    ]
    assert [room(own_target(name)) for name in found[1:]] == ["source", "data", "core", "training"]
