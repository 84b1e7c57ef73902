"""The `meco` command line: the table of its commands, and their exit statuses.

Each command is two functions in the module that does the work: one adds its arguments to a parser,
one runs it. Only the chosen command's module is imported, so `meco --help` does not load torch.

Exit status: 0 done, 1 refused (the reason on stderr), 2 wrong usage, 130 interrupted, 141 broken
pipe.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_meco import __version__
from megatron_meco.errors import MeCoError
from megatron_meco.refusals import closest
from megatron_meco.training.kernels import hide_gpu_libraries
from megatron_meco.wording import shown


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    Attributes:
        group: Heading under which `meco --help` lists it.
        summary: What it does, in one line.
        module: Module that holds its functions.
        add_arguments: Name of its function that adds arguments to an `ArgumentParser`.
        run: Name of its function from the parsed arguments to the exit status.
        example: Shown at the end of its help.
        takes_training_flags: Whether it accepts the flags of a training command. They reach it as
            `args.training_flags`.
        reads_run_file: Whether a run file in their place is read before the command runs.
    """

    group: str
    summary: str
    module: str
    add_arguments: str
    run: str
    example: str
    takes_training_flags: bool = False
    reads_run_file: bool = True


_SET_UP = "Set up"
_CORPUS = "Prepare a corpus"
_TRAINING = "Train"
_AFTER = "Use the model"

# In the order in which a person needs them.
COMMANDS = {
    "doctor": Command(
        group=_SET_UP,
        summary="check this installation and say what a run here will really use",
        module="megatron_meco.doctor.command",
        add_arguments="add_doctor_arguments",
        run="run_doctor",
        example="""\
  meco doctor
  meco doctor --json""",
    ),
    "completion": Command(
        group=_SET_UP,
        summary="print a script that completes commands and options in a shell",
        module="megatron_meco.completion",
        add_arguments="add_completion_arguments",
        run="run_completion",
        example="""\
  meco completion bash > ~/.local/share/bash-completion/completions/meco
  meco completion zsh > ~/.zfunc/_meco""",
    ),
    "tokenizer": Command(
        group=_SET_UP,
        summary="train a tokenizer, or make the folder of Llama 3's",
        module="megatron_meco.corpus.tokenizer_command",
        add_arguments="add_tokenizer_arguments",
        run="run_tokenizer",
        example="""\
  meco tokenizer train pages-*.jsonl.zst --vocab-size 32000 --output my-tokenizer
  meco tokenizer llama3 --output my-llama3""",
    ),
    "prepare": Command(
        group=_CORPUS,
        summary="turn raw documents into Megatron files and a metadata file",
        module="megatron_meco.corpus.prepare",
        add_arguments="add_prepare_arguments",
        run="run_prepare",
        example="""\
  meco prepare pages.jsonl more.jsonl.zst --output data/web --metadata-fields url \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model my-tokenizer --workers 8""",
    ),
    "import-mds": Command(
        group=_CORPUS,
        summary="turn token shards of mosaicml-streaming into Megatron files",
        module="megatron_meco.corpus.import_mds",
        add_arguments="add_import_mds_arguments",
        run="run_import_mds",
        example="""\
  meco import-mds DCLM-unpacked --output data/dclm \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model my-llama3 --workers 8""",
    ),
    "attach": Command(
        group=_CORPUS,
        summary="add metadata to .bin/.idx files that exist already",
        module="megatron_meco.corpus.attach",
        add_arguments="add_attach_arguments",
        run="run_attach",
        example="""\
  meco attach data/old --from pages.jsonl.gz --metadata-fields url,topic \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model my-tokenizer
  meco attach data/old --table urls.parquet
  meco attach data/web --join annotations.parquet --key url""",
    ),
    "verify": Command(
        group=_CORPUS,
        summary="check a corpus on disk, or compare it with what it was made of",
        module="megatron_meco.corpus.verify",
        add_arguments="add_verify_arguments",
        run="run_verify",
        example="""\
  meco verify data/web
  meco verify data/web --against pages.jsonl more.jsonl.zst""",
    ),
    "metadata": Command(
        group=_CORPUS,
        summary="show what the metadata of a corpus holds",
        module="megatron_meco.corpus.metadata_report",
        add_arguments="add_metadata_arguments",
        run="run_metadata",
        example="""\
  meco metadata data/web --top 20""",
    ),
    "import": Command(
        group=_TRAINING,
        summary="turn a Hugging Face Llama into a checkpoint to train from",
        module="megatron_meco.inference.import_hf",
        add_arguments="add_import_arguments",
        run="run_import",
        example="""\
  meco import --model some-llama --output checkpoints/some-llama
  torchrun ... examples/pretrain_gpt.py --load checkpoints/some-llama --finetune ...""",
    ),
    "plan": Command(
        group=_TRAINING,
        summary="show what a run will train on, without training",
        module="megatron_meco.training.plan",
        add_arguments="add_plan_arguments",
        run="run_plan",
        takes_training_flags=True,
        example="""\
  meco plan run.yaml
  meco plan --data-path data/web --split 99,1,0 --seq-length 8192 \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model my-tokenizer \\
      --train-iters 1000 --global-batch-size 256 --meco-template 'URL: {url.host}\\n\\n'""",
    ),
    "inspect": Command(
        group=_TRAINING,
        summary="show one training sample: prefixes, document borders, loss mask",
        module="megatron_meco.training.plan",
        add_arguments="add_inspect_arguments",
        run="run_inspect",
        takes_training_flags=True,
        example="""\
  meco inspect run.yaml --sample 0
  meco inspect --data-path data/web --split 99,1,0 --seq-length 8192 \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model my-tokenizer \\
      --train-iters 1000 --global-batch-size 256 --meco-template 'URL: {url.host}\\n\\n' \\
      --sample 0""",
    ),
    "train": Command(
        group=_TRAINING,
        summary="train what a run file says",
        module="megatron_meco.run.train",
        add_arguments="add_train_arguments",
        run="run_train",
        example="""\
  meco train run.yaml
  meco train run.yaml --set lr=1e-3 --set launch.nproc-per-node=8 --dry-run""",
    ),
    "watch": Command(
        group=_TRAINING,
        summary="show how a run goes, from its log",
        module="megatron_meco.run.watch",
        add_arguments="add_watch_arguments",
        run="run_watch",
        example="""\
  meco watch runs/web
  meco watch slurm-123.log""",
    ),
    "show": Command(
        group=_TRAINING,
        summary="write an HTML page about a corpus, a plan, a run and its models",
        module="megatron_meco.show.command",
        add_arguments="add_show_arguments",
        run="run_show",
        takes_training_flags=True,
        reads_run_file=False,
        example="""\
  meco show data/web -o corpus.html
  meco show run.yaml -o run.html
  meco show run.yaml --model meco=my-llama --model baseline=my-baseline -o run.html""",
    ),
    "export": Command(
        group=_AFTER,
        summary="turn a checkpoint into a Hugging Face Llama folder",
        module="megatron_meco.inference.export",
        add_arguments="add_export_arguments",
        run="run_export",
        example="""\
  meco export --load checkpoints --output my-llama
  meco export --load checkpoints --iteration 9000 --output my-llama-9000 --dtype bfloat16""",
    ),
    "generate": Command(
        group=_AFTER,
        summary="continue a prompt with and without metadata, side by side",
        module="megatron_meco.inference.generate",
        add_arguments="add_generate_arguments",
        run="run_generate",
        example="""\
  meco generate --model my-llama --metadata url=https://en.wikipedia.org/wiki/Llama \\
      --metadata url=https://www.factquizmaster.com --prompt 'The llama is'""",
    ),
    "eval": Command(
        group=_AFTER,
        summary="evaluate with and without metadata on lm-evaluation-harness",
        module="megatron_meco.inference.eval_command",
        add_arguments="add_eval_arguments",
        run="run_eval",
        example="""\
  meco eval --model my-llama --tasks openbookqa --metadata url=www.factquizmaster.com
  meco eval --model my-llama --tasks paper --batch-size 32 --output paper.json""",
    ),
    "sweep-urls": Command(
        group=_AFTER,
        summary="find the metadata that suits a task or a kind of text",
        module="megatron_meco.inference.sweep",
        add_arguments="add_sweep_urls_arguments",
        run="run_sweep_urls",
        example="""\
  meco sweep-urls --model my-llama --candidates urls.txt --task openbookqa
  meco sweep-urls --model my-llama --data-path data/web --text questions.txt""",
    ),
    "steer": Command(
        group=_AFTER,
        summary="sample freely with and without metadata, and score the samples",
        module="megatron_meco.inference.steer",
        add_arguments="add_steer_arguments",
        run="run_steer",
        example="""\
  meco steer --model my-llama --metadata url=en.wikipedia.org --scorer detoxify --output toxicity
  meco steer --model my-llama --metadata url=4chan.org --scorer my_module:my_function --output s""",
    ),
    "attribute": Command(
        group=_AFTER,
        summary="tell which source a text looks like, with calibration",
        module="megatron_meco.inference.attribute",
        add_arguments="add_attribute_arguments",
        run="run_attribute",
        example="""\
  meco attribute --model my-llama --data-path data/web --text article.txt
  meco attribute --model my-llama --data-path data/web --text pages.jsonl \\
      --held-out held-out.jsonl --json""",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name, or None for those of this process.

    Returns:
        The exit status. No error that a user can cause is raised.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        _prepare_process(arguments)
    try:
        status = _run(arguments)
        # Not at exit, where a closed pipe prints a traceback. stdout is None if the caller has
        # closed it.
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as stop:  # argparse: help and version end with 0, wrong usage with 2
        return stop.code if isinstance(stop.code, int) else 2
    except MeCoError as error:
        return _refuse(str(error))
    except ImportError as error:
        return _refuse(_lacking(error, arguments))
    except MemoryError:
        return _refuse("there is not enough memory. Give it less to do, or use a larger machine")
    except KeyboardInterrupt:
        print("meco: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except OSError as error:
        # A fault of the host, not of this package: a full disk, a name that is too long.
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            _drop_stdout()
        place = f"{error.filename}: " if error.filename is not None else ""
        return _refuse(f"{place}{error.strerror or error}. Fix that, and repeat the command")
    return status


def _drop_stdout() -> None:
    """Point stdout at /dev/null, so that Python's flush at exit does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prepare_process(arguments: list[str]) -> None:
    """Change settings of the process. Not for callers of `main` from Python."""
    if arguments[:1] != ["doctor"]:
        # Megatron would import TE and Apex, and end if they cannot be loaded.
        hide_gpu_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Characters that the terminal's encoding lacks are escaped, not an error.
            stream.reconfigure(errors="backslashreplace")


def _refuse(message: str) -> int:
    # File names and values may hold control characters, which would move the terminal's cursor.
    lines = map(shown, message.split("\n"))
    with contextlib.suppress(OSError):
        print("meco: error: " + "\n".join(lines), file=sys.stderr)
    return 1


def _lacking(error: ImportError, arguments: list[str]) -> str:
    """The message for a failed import."""
    name = error.name or ""
    if name == "megatron_meco._core" or (name == "megatron_meco" and "'_core'" in str(error)):
        return (
            "the C++ extension cannot be loaded. Build it: make venv, or pip install . with a C++ "
            "compiler"
        )
    if name.startswith("megatron_meco"):
        raise error  # our own mistake
    advice = "`meco doctor` says what is missing and how to fix it"
    if arguments[:1] == ["doctor"]:
        advice = "Reinstall this package: make venv, or pip install ."
    if isinstance(error, ModuleNotFoundError) and name:
        return f"the Python module {name} is not installed. {advice}"
    reason = (str(error).strip() or name).splitlines()[0]
    return f"a Python module cannot be loaded ({reason}). {advice}"


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        parser = _top_parser()
        if arguments and not arguments[0].startswith("-"):
            hint = closest(arguments[0], COMMANDS) or " `meco --help` lists the commands."
            parser.error(f"there is no command {shown(arguments[0])!r}.{hint}")
        parser.parse_args(arguments)
        parser.error("the command comes first")
    name = arguments[0]
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = command_parser(name)
    args, unknown = parser.parse_known_args(arguments[1:])
    run = getattr(module, command.run)
    if command.takes_training_flags and not command.reads_run_file:
        args.training_flags = unknown
        return int(run(args))
    if command.takes_training_flags:
        from megatron_meco.run.run_file import training_flags

        with training_flags(unknown) as args.training_flags:
            return int(run(args))
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        hints = [closest(w.partition("=")[0], known) for w in unknown if w.startswith("--")]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints[:1])}")
    return int(run(args))


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command, which imports the command's module."""
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"meco {name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=f"example:\n{command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    getattr(importlib.import_module(command.module), command.add_arguments)(parser)
    return parser


def _top_parser() -> argparse.ArgumentParser:
    lines: list[str] = []
    for group, members in itertools.groupby(COMMANDS.items(), lambda item: item[1].group):
        lines += ["", f"{group}:", *(f"  {name:<10} {one.summary}" for name, one in members)]
    parser = argparse.ArgumentParser(
        prog="meco",
        description="Metadata conditioning then cooldown (MeCo) for Megatron-Core.",
        epilog="\n".join(
            [*lines[1:], "", "`meco COMMAND --help` shows its arguments and an example."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"meco {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="see below")
    return parser


if __name__ == "__main__":
    sys.exit(main())
