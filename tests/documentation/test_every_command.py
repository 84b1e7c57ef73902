"""Every command of the documentation is run, in the order of its page, on small data.

The fast test calls `meco` in this process and leaves training to README.md's page. The nightly one
types each page into a shell.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from documentation.pages import PAGES, Step, name_of, steps_of, text_of
from documentation.scenarios import SCENARIOS, Scenario
from runs import PYTHONPATH, ROOT

from megatron_meco import cli

NAMES = [name_of(page) for page in PAGES]
WITH_STEPS = [name for page, name in zip(PAGES, NAMES, strict=True) if any(steps_of(page))]


def steps(name: str) -> list[Step]:
    """The steps of a page, with small data in place of large."""
    return list(steps_of(ROOT / name, SCENARIOS[name].small))


def begins_with(step: Step, beginnings: tuple[str, ...]) -> bool:
    return step.kind == "shell" and f"{step.text} ".startswith(beginnings or ("\0",))


def environment() -> dict[str, str]:
    variables = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([".", PYTHONPATH]),
        "MECO_PYTHON": sys.executable,
    }
    return {**os.environ, **variables}


def in_a_shell(script: str, folder: Path) -> str:
    """Run a script and return what it printed."""
    done = subprocess.run(
        ["bash", "-c", f"set -eu\n{script}"],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stdout + done.stderr


def in_this_process(command: str, folder: Path) -> str:
    """Run a `meco` command and return what it printed on stdout."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    before = Path.cwd()
    os.chdir(folder)
    # The current folder, where a scorer is looked up.
    sys.path.insert(0, str(folder))
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            status = cli.main(words[1:])
    finally:
        sys.path.remove(str(folder))
        os.chdir(before)
    assert status == 0, command
    return told.getvalue()


def follow(name: str, folder: Path, *, whole: bool) -> None:
    """Do what a page says.

    Args:
        name: The page.
        folder: Where.
        whole: Also what only the nightly test does, each command in a shell.
    """
    scenario = SCENARIOS[name]
    for step in steps(name):
        if begins_with(step, tuple(scenario.not_run)):
            continue
        if not whole and begins_with(step, scenario.nightly):
            continue
        print(f"{name}:{step.line}: {step.text}")
        if step.kind in ("save", "append"):
            with (folder / step.file).open("w" if step.kind == "save" else "a") as file:
                file.write(step.text)
        elif step.kind == "python":
            (folder / "block.py").write_text(step.text)
            in_a_shell("python -W ignore block.py", folder)
        else:
            is_quick = step.text.startswith("meco ") and not needs_shell(step.text)
            run = in_this_process if is_quick and not whole else in_a_shell
            told = run(step.text, folder)
            assert not stale(step.shown, told), f"{name}:{step.line}: {stale(step.shown, told)}"


def stale(shown: str, told: str) -> list[str]:
    """The words, between numbers, that a page shows of an output and that it does not have.

    Numbers and texts depend on the data. What a command says around them does not.
    """
    # What follows are texts of documents and of models.
    shown = re.sub(r"<\|begin_of_text\|>.*", "", shown, flags=re.DOTALL)
    # Which advice is the best depends on the lengths of the documents.
    shown = re.sub(r"(would be:).*?\.(?=\s|$)", r"\1", shown, flags=re.DOTALL)
    if "\n=== " in f"\n{shown}":
        shown, told = (
            "\n".join(line for line in text.splitlines() if line.startswith("=== "))
            for text in (shown, told)
        )
    found = " ".join(words_between_numbers(told, "#"))
    # Line by line: what comes between two lines depends on the length of the run.
    return [
        words
        for line in shown.splitlines()
        for words in words_between_numbers(line, "#")
        if words != "#" and words not in found
    ]


def words_between_numbers(text: str, number: str) -> list[str]:
    """Runs of words without digits; lines of a table and line ends do not count."""
    words = [
        number if re.search(r"\d|^\.\.\.$", word) else word
        for word in re.sub(r"[^\x20-\x7e]+|-{4,}", " ", text).split()
    ]
    return [
        " ".join(group) if not is_number else number
        for is_number, group in itertools.groupby(words, lambda word: word == number)
    ]


def needs_shell(command: str) -> bool:
    """Whether a command redirects its output, or is several."""
    lexer = shlex.shlex(command.replace("\\\n", " "), posix=True, punctuation_chars="|&;<>")
    return any(set(word) <= set("|&;<>") for word in lexer)


@pytest.fixture(autouse=True)
def _only_local_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    # The index of the harness's 14,000 own tasks takes eight seconds to build.
    from lm_eval import tasks

    local = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", local)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder in which a page was followed to its end."""
    done: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in done:
            folder = begin(SCENARIOS[name], tmp_path_factory.mktemp("page"), folder_of)
            follow(name, folder, whole=False)
            done[name] = folder
        return done[name]

    return folder_of


def begin(scenario: Scenario, folder: Path, finished: Callable[[str], Path]) -> Path:
    """Fill a folder with what a reader has at the beginning of a page."""
    if scenario.after:
        shutil.copytree(finished(scenario.after), folder, dirs_exist_ok=True, symlinks=True)
    else:
        for part in ("examples", "benchmarks", "megatron_meco"):
            (folder / part).symlink_to(ROOT / part)
    scenario.given(folder)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", WITH_STEPS)
def test_a_page_is_followed(name: str, tmp_path: Path, finished: Callable[[str], Path]) -> None:
    if any(other.after == name for other in SCENARIOS.values()):
        finished(name)
        return
    follow(name, begin(SCENARIOS[name], tmp_path, finished), whole=False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", WITH_STEPS)
def test_a_page_is_typed_into_a_shell(
    name: str, tmp_path: Path, finished: Callable[[str], Path]
) -> None:
    follow(name, begin(SCENARIOS[name], tmp_path, finished), whole=True)


# ---- What is not run is checked by name ----


def problem(command: str) -> str:
    """What is wrong with a command that is only named, or nothing."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    match words:
        case ["make", *rest]:
            targets = [word for word in rest if "=" not in word and word != "..."]
            done = subprocess.run(
                ["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=False
            )
            if done.returncode:
                return done.stderr
            given = [word[5:].split() for word in rest if word.startswith("ARGS=")]
            files = re.findall(r"benchmarks/\S+\.(?:py|sh)|examples/\S+\.py", done.stdout)
            files += [
                module.replace(".", "/") + ".py"
                for module in re.findall(r"-m (benchmarks\.\S+)", done.stdout)
            ]
            return unknown_options(
                [*files, "benchmarks/gpu/check.py"], [word for words in given for word in words]
            )
        case ["python", "-m", module, *rest]:
            file = module.replace(".", "/") + ".py"
            # Other modules are those of installed packages.
            return unknown_options([file], rest) if (ROOT / file).exists() else ""
        case ["python" | "sh", file, *rest]:
            return unknown_options([file], rest)
        case ["sbatch", *rest]:
            [file] = [word for word in rest if word.endswith(".sbatch")]
            return "" if (ROOT / file).is_file() else f"no {file}"
        case ["pip", "install", *rest]:
            extras = re.findall(r"megatron-meco\[([\w,]+)\]", " ".join(rest))
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            wrong = {e for group in extras for e in group.split(",")}
            return " ".join(wrong - set(known["optional-dependencies"]))
        case ["source", ".venv/bin/activate"] | ["import", "os", *_]:
            return ""
    return "a test for such a command is missing"


def unknown_options(files: list[str], words: list[str]) -> str:
    """The options that no text of `files` names."""
    for file in files:
        if not (ROOT / file).is_file():
            return f"no {file}"
    text = "".join((ROOT / file).read_text() for file in files)
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return " ".join(o for o in options if not re.search(rf"{re.escape(o)}(?![\w-])", text))


@pytest.mark.parametrize("name", WITH_STEPS)
def test_what_is_not_run_is_there(name: str) -> None:
    for step in steps(name):
        if begins_with(step, tuple(SCENARIOS[name].not_run)):
            assert not problem(step.text), f"{name}:{step.line}: {step.text}: {problem(step.text)}"


_NAMED = re.compile(r"`((?:make|python|sh|pip|torchrun) [^`]*)`")


def test_commands_of_other_programs_in_prose_are_there() -> None:
    named = {
        (name, command)
        for page, name in zip(PAGES, NAMES, strict=True)
        for command in _NAMED.findall(
            re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        )
    }
    assert len(named) > 20
    for name, command in sorted(named):
        for part in command.split(" && "):
            assert not problem(part), f"{name}: {part}: {problem(part)}"


def test_a_stale_output_is_noticed() -> None:
    assert sum(bool(step.shown) for step in steps("docs/tutorial.md")) >= 8
    told = "documents        300\ntokens  7,368\nwritten data/web.bin (0.0 MB)\n"
    assert not stale("documents        2,845\n...\nwritten data/web.bin (20.2 MB)", told)
    assert stale("docs 2,845", told) == ["docs"]
    assert stale("documents 2,845\nsaved data/web.bin (1 MB)", told) == ["saved data/web.bin"]
    assert not stale("=== no metadata\nsome text\n", "=== no metadata\nother\n")
    assert stale("=== none\nsome text\n", "=== no metadata\nother\n")


@pytest.mark.parametrize(
    "command",
    [
        "make demos",
        "make study ARGS=--fulll",
        "python benchmarks/bench_plan.py",
        "python benchmarks/bench_plans.py --document 1e7x --rouds 5",
        "pip install 'megatron-meco[shows]'",
        "curl https://example.org",
    ],
)
def test_a_wrong_name_is_noticed(command: str) -> None:
    assert problem(command)


@pytest.mark.parametrize("name", WITH_STEPS)
def test_what_the_tables_say_is_there(name: str) -> None:
    text = text_of(ROOT / name)
    for old in SCENARIOS[name].small:
        assert old in text, f"{name} no longer says {old!r}"
        text = text.replace(old, SCENARIOS[name].small[old])
    found = steps(name)
    for beginning in (*SCENARIOS[name].not_run, *SCENARIOS[name].nightly):
        assert any(begins_with(step, (beginning,)) for step in found), f"{name}: {beginning}"


def test_the_notebook_is_that_of_the_page() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "tutorial_notebook.py"))
    text = made["notebook"](made["PAGE"].read_text())
    assert made["NOTEBOOK"].read_text() == text, "run python tools/tutorial_notebook.py"
    cells = json.loads(text)["cells"]
    assert sum(cell["cell_type"] == "code" for cell in cells) > 10


def test_every_table_has_its_page() -> None:
    assert sorted(SCENARIOS) == sorted(WITH_STEPS)
    run = [
        step
        for name in WITH_STEPS
        for step in steps(name)
        if not begins_with(step, tuple(SCENARIOS[name].not_run))
    ]
    assert sum(step.kind == "shell" for step in run) > 50
