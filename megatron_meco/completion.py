"""`meco completion SHELL`: a script by which a shell completes commands, options and files.

shtab writes it from the parsers of all commands, so it is as fast as the shell and knows the
commands of the version that wrote it.
"""

from __future__ import annotations

import argparse
import contextlib
import io

_SHELLS = ("bash", "zsh")


def add_completion_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco completion`."""
    parser.add_argument("shell", choices=_SHELLS, help="the shell")


def run_completion(args: argparse.Namespace) -> int:
    """Run `meco completion`."""
    import shtab

    print(shtab.complete(_all_commands(), shell=args.shell))
    return 0


def _all_commands() -> argparse.ArgumentParser:
    """One parser with every command below it; `meco` itself only makes the one that it needs."""
    from megatron_meco.cli import COMMANDS, command_parser

    top = argparse.ArgumentParser(prog="meco")
    top.add_argument("--version", action="store_true", help="show the version")
    commands = top.add_subparsers()
    for name, command in COMMANDS.items():
        with contextlib.redirect_stderr(io.StringIO()):
            parser = command_parser(name)
        if command.takes_training_flags:
            parser.add_argument("run_file", metavar="RUN.yaml", help="The file of the run.")
        commands.add_parser(name, parents=[parser], add_help=False, help=command.summary)
    _complete_files(top)
    return top


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Let every argument that takes text complete to files: most are files, folders or prefixes."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _complete_files(below)
        elif action.nargs != 0 and action.choices is None and action.type not in (int, float):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
