"""The command `meco doctor`: the report as a table or as JSON, and the exit status."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from megatron_meco.doctor.facts import collect_facts
from megatron_meco.doctor.verdicts import Diagnosis, Verdict, diagnose

_COLOURS: dict[Verdict, str] = {
    "ok": "green",
    "note": "cyan",
    "warning": "yellow",
    "problem": "bold red",
}


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_doctor(args: argparse.Namespace) -> int:
    """Print the report.

    Returns:
        0 if training can run, 1 if not.
    """
    diagnosis = diagnose(collect_facts())
    if args.json:
        print(json.dumps(asdict(diagnosis), indent=2))
    else:
        _print(diagnosis)
    return 0 if diagnosis.can_train else 1


def _print(diagnosis: Diagnosis) -> None:
    try:
        # Late, because `meco doctor` must also run where this dependency is missing.
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _print_plainly(diagnosis)
        return
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in diagnosis.checks:
        found = Text(check.found)
        if check.remedy:
            found.append(f"\n-> {check.remedy}", style="dim" if check.verdict == "note" else "")
        table.add_row(Text(check.verdict, style=_COLOURS[check.verdict]), Text(check.name), found)
    console.print(table)
    console.print()
    plain = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for name, used in _what_a_run_uses(diagnosis):
        plain.add_row(name, Text(used))
    console.print(plain)
    console.print()
    style = "bold green" if diagnosis.can_train else "bold red"
    console.print(Text(_conclusion(diagnosis), style=style))


def _print_plainly(diagnosis: Diagnosis) -> None:
    for check in diagnosis.checks:
        print(f"{check.verdict:<7}  {check.name}: {check.found}")
        if check.remedy:
            print(f"         -> {check.remedy}")
    print()
    for name, used in _what_a_run_uses(diagnosis):
        print(f"{name}: {used}")
    print()
    print(_conclusion(diagnosis))


def _what_a_run_uses(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    return [
        ("A run here uses", "CUDA" if diagnosis.device == "cuda" else "the CPU"),
        ("attention", diagnosis.attention),
        ("layers", diagnosis.layers),
        ("optimizer", diagnosis.optimizer),
    ]


def _conclusion(diagnosis: Diagnosis) -> str:
    if diagnosis.can_train:
        return "Training can run here."
    problems = sum(check.verdict == "problem" for check in diagnosis.checks)
    noun = "problem keeps" if problems == 1 else "problems keep"
    return f"{problems} {noun} training from running here."
