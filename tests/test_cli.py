"""The command line: help, version, exit statuses, and what it must not load."""

import importlib.metadata
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

import megatron_meco
from megatron_meco import cli
from megatron_meco.errors import FlagError

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "megatron_meco", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        **options,
    )


@pytest.fixture
def command(monkeypatch):
    """Register a sub-command `probe`; its `run` is set by the test."""
    module = types.ModuleType("meco_probe_command")
    module.add_probe_arguments = lambda parser: parser.add_argument("--number", type=int, default=0)
    module.run_probe = lambda args: args.number
    monkeypatch.setitem(sys.modules, "meco_probe_command", module)
    entry = cli.Command(
        group="Probes",
        summary="a probe",
        module="meco_probe_command",
        add_arguments="add_probe_arguments",
        run="run_probe",
        example="  meco probe",
    )
    monkeypatch.setitem(cli.COMMANDS, "probe", entry)
    return module


def test_help_lists_every_command_and_loads_nothing_heavy():
    code = (
        "import sys; from megatron_meco.cli import main; status = main(['--help']); "
        "heavy = {'torch', 'megatron', 'numpy', 'pyarrow', 'rich', 'transformers'}; "
        "print(sorted(heavy & set(sys.modules)), status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert result.stdout.splitlines()[-1] == "[] 0", result.stderr
    for name in cli.COMMANDS:
        assert f"\n  {name} " in result.stdout
    headings = [line for line in result.stdout.splitlines() if line.endswith(":")]
    assert headings[2:] == ["Set up:", "Prepare a corpus:", "Train:", "Use the model:"]


def test_module_is_the_same_as_the_script():
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"meco {megatron_meco.__version__}\n")


def test_versions_agree():
    # As setuptools reads it, from `__version__`.
    project = read_configuration(ROOT / "pyproject.toml")["project"]
    assert project["version"] == megatron_meco.__version__
    try:
        installed = importlib.metadata.version("megatron-meco")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is importable, but not installed")
    assert installed == megatron_meco.__version__


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help_with_an_example(name, capsys):
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: meco {name}")
    assert f"example:\n  meco {name}" in text


@pytest.mark.parametrize(
    "arguments",
    [[], ["no-such"], ["--no-such"], ["--", "doctor"], ["doctor", "--no-such"], ["doctor", "--js"]],
)
def test_wrong_usage_is_2(arguments, capsys):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: meco")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["prepar"], "there is no command 'prepar'. Did you mean prepare?"),
        (["trian", "a.yaml"], "Did you mean train?"),
        (["zzz"], "`meco --help` lists the commands."),
        (["doctor", "--jsno"], "unrecognized arguments: --jsno Did you mean --json?"),
    ],
)
def test_a_mistyped_word_gets_the_nearest_right_one(arguments, hint, capsys):
    assert cli.main(arguments) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_get_a_script(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("prepare", "--metadata-fields", "--dry-run"):
        assert word in script


def test_bash_completes_commands_options_and_files(tmp_path, capsys):
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "meco").write_text(capsys.readouterr().out)
    (tmp_path / "my-run.yaml").write_text("")

    def complete(*words):
        program = (
            'source ./meco; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
            '$(complete -p meco | sed \'s/.*-F \\([^ ]*\\).*/\\1/\') meco "${@: -1}" "${@: -2:1}"; '
            "printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        done = subprocess.run(
            ["bash", "-c", program, "bash", "meco", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        return done.stdout.split()

    assert complete("prep") == ["prepare"]
    assert complete("train", "--dry") == ["--dry-run"]
    assert complete("train", "my") == complete("plan", "my") == ["my-run.yaml"]
    assert complete("tokenizer", "tr") == ["train"]


def test_status_is_the_commands_own(command):
    assert cli.main(["probe"]) == 0
    assert cli.main(["probe", "--number", "1"]) == 1


def test_refusal_is_1_and_one_message(command, capsys):
    def refuse(args):
        raise FlagError("is negative: -1", where="--number", remedy="Give a positive number")

    command.run_probe = refuse
    assert cli.main(["probe"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "meco: error: --number: is negative: -1. Give a positive number\n")


def test_interrupt_is_130(command, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    command.run_probe = interrupt
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "meco: interrupted\n"


def test_missing_package_is_a_refusal(command, capsys):
    def lack(args):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    command.run_probe = lack
    assert cli.main(["probe"]) == 1
    assert "module torch is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("cannot import name 'x' from 'y'", name="y"), "cannot import name 'x'"),
        (ModuleNotFoundError("Could not import module 'Z'."), "Could not import module 'Z'."),
        (ImportError("undefined symbol", name="megatron_meco._core"), "the C++ extension cannot"),
        (ImportError("cannot import name '_core'", name="megatron_meco"), "the C++ extension"),
        (MemoryError(), "not enough memory"),
        (OSError(28, "No space left on device", "/data/x"), "/data/x: No space left on device"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (FlagError("is\x1b[2J\x00", where="a\rb", remedy="c"), r"a\rb: is\x1b[2J\x00. c"),
    ],
)
def test_what_the_host_lacks_is_one_line(command, capsys, error, message):
    def fail(args):
        raise error

    command.run_probe = fail
    assert cli.main(["probe"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("meco: error: ") and err.count("\n") == 1
    assert message in err


def test_a_mistake_of_ours_stays_loud(command):
    def fail(args):
        raise RuntimeError("ours")

    command.run_probe = fail
    with pytest.raises(RuntimeError):
        cli.main(["probe"])


def test_a_full_or_a_closed_stdout_is_one_line():
    for redirect, status in ((">/dev/full", 1), (">&-", 0)):
        done = subprocess.run(
            ["bash", "-c", f'"$0" -c "$1" {redirect}', sys.executable, PRINTS],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
        )
        assert (done.returncode, done.stderr.count("\n")) == (status, status), done.stderr


def test_a_cuda_toolkit_without_a_gpu_is_no_news():
    """PyTorch says so in each process that imports its compiler, which Megatron does."""
    code = "import torch.utils.cpp_extension"
    environment = {**os.environ, "CUDA_HOME": "/usr"}
    said = []
    for first in ("", "import megatron_meco; "):
        done = subprocess.run(
            [sys.executable, "-c", first + code],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=120,
            env=environment,
        )
        said.append(done.stderr)
    if "No CUDA runtime is found" not in said[0]:
        pytest.skip("PyTorch has nothing to say here")
    assert said[1] == ""


def test_hole_in_this_package_stays_loud(command):
    def lack(args):
        raise ModuleNotFoundError("gone", name="megatron_meco.gone")

    command.run_probe = lack
    with pytest.raises(ModuleNotFoundError):
        cli.main(["probe"])


PRINTS = (
    "import sys, types; from megatron_meco import cli; m = types.ModuleType('probe_command'); "
    "m.add_probe_arguments = lambda parser: None; "
    "m.run_probe = lambda args: print('x' * 100) or 0; sys.modules['probe_command'] = m; "
    "cli.COMMANDS['probe'] = cli.Command(group='', summary='a probe', module='probe_command', "
    "add_arguments='add_probe_arguments', run='run_probe', example=''); "
    "sys.exit(cli.main(['probe']))"
)


def test_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [sys.executable, "-c", PRINTS],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            timeout=60,
        )
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")
