"""The `meco` command line: which sub-commands there are, and how each one ends.

A sub-command lives in the module that does the work; that module adds its own arguments and runs
them. Only the selected one is imported, so `meco --help` needs neither torch nor a fraction of a
second. What was given up: one `argparse` tree with all arguments of all sub-commands.

Exit status: 0 done, 1 refused (the reason on stderr), 2 usage, 130 interrupted, 141 nobody reads.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_meco import __version__
from megatron_meco.errors import MeCoError
from megatron_meco.inference.wording import shown
from megatron_meco.training.kernels import hide_gpu_libraries


@dataclass(frozen=True, kw_only=True)
class Command:
    """One sub-command.

    Attributes:
        summary: What it does, in one line.
        module: Where it lives. The module has `add_NAME_arguments(parser)` and
            `run_NAME(args) -> int`, NAME being the name of the sub-command, `_` for `-`.
        example: Shown at the end of its help.
        takes_training_flags: Whether the flags that its own parser does not know are those of a
            training command; they reach it as `args.training_flags`.
    """

    summary: str
    module: str
    example: str
    takes_training_flags: bool = False


COMMANDS = {
    "prepare": Command(
        summary="turn raw documents into Megatron files and a metadata file",
        module="megatron_meco.corpus.prepare_command",
        example="""\
  meco prepare pages.jsonl more.jsonl.zst --output data/web --metadata-fields url \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model my-tokenizer --workers 8""",
    ),
    "import-mds": Command(
        summary="turn token shards of mosaicml-streaming into Megatron files",
        module="megatron_meco.corpus.import_mds",
        example="""\
  meco import-mds DCLM-unpacked --output data/dclm \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model my-llama3 --workers 8""",
    ),
    "attach": Command(
        summary="add metadata to .bin/.idx files that exist already",
        module="megatron_meco.corpus.attach",
        example="""\
  meco attach data/old --from pages.jsonl.gz --metadata-fields url,topic \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model my-tokenizer
  meco attach data/old --table urls.parquet""",
    ),
    "verify": Command(
        summary="check a corpus on disk, or compare it with what it was made of",
        module="megatron_meco.corpus.verify",
        example="""\
  meco verify data/web
  meco verify data/web --against pages.jsonl more.jsonl.zst""",
    ),
    "metadata": Command(
        summary="show what the metadata of a corpus holds",
        module="megatron_meco.corpus.metadata_report",
        example="""\
  meco metadata data/web --top 20""",
    ),
    "tokenizer": Command(
        summary="make a tokenizer folder from what its authors publish",
        module="megatron_meco.corpus.llama3",
        example="""\
  meco tokenizer llama3 my-llama3""",
    ),
    "plan": Command(
        summary="show what a run will train on, without training",
        module="megatron_meco.training.plan",
        takes_training_flags=True,
        example="""\
  meco plan run.yaml
  meco plan --data-path data/web --split 99,1,0 --seq-length 8192 \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model my-tokenizer \\
      --train-iters 1000 --global-batch-size 256 --meco-template 'URL: {url.host}\\n\\n'""",
    ),
    "inspect": Command(
        summary="show one training sample: prefixes, document borders, loss mask",
        module="megatron_meco.training.plan",
        takes_training_flags=True,
        example="""\
  meco inspect run.yaml --sample 0
  meco inspect --data-path data/web --split 99,1,0 --seq-length 8192 \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model my-tokenizer \\
      --train-iters 1000 --global-batch-size 256 --meco-template 'URL: {url.host}\\n\\n' \\
      --sample 0""",
    ),
    "train": Command(
        summary="train what a run file says",
        module="megatron_meco.run.train",
        example="""\
  meco train run.yaml
  meco train run.yaml --set lr=1e-3 --set launch.nproc-per-node=8 --dry-run""",
    ),
    "watch": Command(
        summary="show how a run goes, from its log",
        module="megatron_meco.run.watch",
        example="""\
  meco watch runs/web
  meco watch slurm-123.log""",
    ),
    "export": Command(
        summary="turn a checkpoint into a Hugging Face Llama folder",
        module="megatron_meco.inference.export",
        example="""\
  meco export --load checkpoints --output my-llama
  meco export --load checkpoints --iteration 9000 --output my-llama-9000 --dtype bfloat16""",
    ),
    "import": Command(
        summary="turn a Hugging Face Llama into a checkpoint to train from",
        module="megatron_meco.inference.import_hf",
        example="""\
  meco import --model some-llama --output checkpoints/some-llama
  torchrun ... examples/pretrain_gpt.py --load checkpoints/some-llama --finetune ...""",
    ),
    "generate": Command(
        summary="continue a prompt with and without metadata, side by side",
        module="megatron_meco.inference.generate",
        example="""\
  meco generate --model my-llama --metadata url=https://en.wikipedia.org/wiki/Llama \\
      --metadata url=https://www.factquizmaster.com --prompt 'The llama is'""",
    ),
    "eval": Command(
        summary="evaluate with and without metadata on lm-evaluation-harness",
        module="megatron_meco.inference.eval_command",
        example="""\
  meco eval --model my-llama --tasks openbookqa --metadata url=www.factquizmaster.com
  meco eval --model my-llama --tasks paper --batch-size 32 --output paper.json""",
    ),
    "sweep-urls": Command(
        summary="find the metadata that suits a task or a kind of text",
        module="megatron_meco.inference.sweep",
        example="""\
  meco sweep-urls --model my-llama --candidates urls.txt --task openbookqa
  meco sweep-urls --model my-llama --data-path data/web --text questions.txt""",
    ),
    "steer": Command(
        summary="sample freely with and without metadata, and score the samples",
        module="megatron_meco.inference.steer",
        example="""\
  meco steer --model my-llama --metadata url=en.wikipedia.org --scorer detoxify --output toxicity
  meco steer --model my-llama --metadata url=4chan.org --scorer my_module:my_function --output s""",
    ),
    "doctor": Command(
        summary="check this installation and say what a run here will really use",
        module="megatron_meco.doctor.command",
        example="""\
  meco doctor
  meco doctor --json""",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; None: those of this process.

    Returns:
        The exit status; nothing that a user can cause is raised.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        _prepare_process(arguments)
    try:
        status = _run(arguments)
        # Here and not at exit, where a closed pipe could no longer be answered quietly. There is
        # no stdout where the caller has closed it.
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
        # Of the host and not of this package: a disk that is full, a name that is too long.
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            _drop_stdout()
        place = f"{error.filename}: " if error.filename is not None else ""
        return _refuse(f"{place}{error.strerror or error}. Mend that, and repeat the command")
    return status


def _drop_stdout() -> None:
    """Let Python flush stdout into nothing at exit, where it would complain once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prepare_process(arguments: list[str]) -> None:
    """What only a process of ours may do: it trains nothing, and nobody else uses it."""
    if arguments[:1] != ["doctor"]:
        # Megatron would import both libraries, and end where they cannot be loaded.
        hide_gpu_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What the terminal's encoding lacks is spelled out, not an error.
            stream.reconfigure(errors="backslashreplace")


def _refuse(message: str) -> int:
    # Names and values of files may hold anything, also what moves a terminal's cursor.
    lines = map(shown, message.split("\n"))
    with contextlib.suppress(OSError):
        print("meco: error: " + "\n".join(lines), file=sys.stderr)
    return 1


def _lacking(error: ImportError, arguments: list[str]) -> str:
    """The refusal of a command whose import failed."""
    name = error.name or ""
    if name == "megatron_meco._core" or (name == "megatron_meco" and "'_core'" in str(error)):
        return (
            "the C++ extension cannot be loaded. Build it: make venv, or pip install . with a C++ "
            "compiler"
        )
    if name.startswith("megatron_meco"):
        raise error  # a hole in this package is no mistake of the user
    advice = "`meco doctor` says what is missing and how to mend it"
    if arguments[:1] == ["doctor"]:
        advice = "Install this package anew: make venv, or pip install ."
    if isinstance(error, ModuleNotFoundError) and name:
        return f"the Python module {name} is not installed. {advice}"
    reason = (str(error).strip() or name).splitlines()[0]
    return f"a Python module cannot be loaded ({reason}). {advice}"


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        parser = _top_parser()
        parser.parse_args(arguments)
        parser.error("the sub-command comes first")
    name = arguments[0]
    function = name.replace("-", "_")
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = argparse.ArgumentParser(
        prog=f"meco {name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=f"example:\n{command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    getattr(module, f"add_{function}_arguments")(parser)
    args, unknown = parser.parse_known_args(arguments[1:])
    run = getattr(module, f"run_{function}")
    if command.takes_training_flags:
        from megatron_meco.run.run_file import training_flags

        with training_flags(unknown) as args.training_flags:
            return int(run(args))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return int(run(args))


def _top_parser() -> argparse.ArgumentParser:
    lines = [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="meco",
        description="Metadata conditioning then cooldown (MeCo) for Megatron-Core.",
        epilog="\n".join(
            [
                "sub-commands:",
                *lines,
                "",
                "`meco COMMAND --help` shows its arguments and an example.",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"meco {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="see below")
    return parser


if __name__ == "__main__":
    sys.exit(main())
