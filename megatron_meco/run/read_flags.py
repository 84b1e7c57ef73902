"""Write the JSON schema of run files from the installed Megatron's parser.

    python -m megatron_meco.run.read_flags > megatron_meco/run/schema.json

Imports torch and Megatron, so it runs in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import sys
from typing import Any, Literal

from megatron_meco.run.flag_table import VERSION_KEY, KnownFlag, key_of
from megatron_meco.run.launch import launch_schema
from megatron_meco.run.presets import model_names

_LONGEST_HELP = 160


def read_flags() -> list[KnownFlag]:
    """The flags of the training script, with the defaults of a GPU host, by key."""
    from megatron_meco.training.arguments import CommandLine
    from megatron_meco.training.cpu import enable_cpu_platform, should_use_cpu

    if should_use_cpu():
        enable_cpu_platform()
    found: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        found.append(parser)
        return parser

    stock = sys.argv
    sys.argv = [stock[0]]
    try:
        CommandLine(keep, on_cpu=False).parse()
    finally:
        sys.argv = stock
    flags = [flag for action in found[0]._actions for flag in _flags(found[0], action)]
    return sorted(flags, key=lambda flag: flag.key)


def schema(flags: list[KnownFlag]) -> str:
    """The schema as text, one line for each key."""
    properties: dict[str, Any] = {
        "model": {"$ref": "#/definitions/model"},
        "launch": {"$ref": "#/definitions/launch"},
        **{flag.key: flag.schema() for flag in flags},
    }
    head: dict[str, Any] = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A run file of megatron-meco",
        "type": "object",
        "additionalProperties": False,
        VERSION_KEY: importlib.metadata.version("megatron-core"),
    }
    definitions = {
        "model": {
            "description": "A model whose flags the run has; keys of this file win over them.",
            "enum": model_names(),
        },
        "launch": launch_schema(),
    }
    lines = [f'"{name}": {json.dumps(value)},' for name, value in head.items()]
    lines.append(f'"definitions": {{{_rows(definitions)}}},')
    lines.append(f'"properties": {{{_rows(properties)}}}')
    return "\n".join(["{", *lines, "}", ""])


def _rows(entries: dict[str, Any]) -> str:
    rows = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items()]
    return "\n" + ",\n".join(rows) + "\n"


def _flags(parser: argparse.ArgumentParser, action: argparse.Action) -> list[KnownFlag]:
    if not action.option_strings or action.dest == "help":
        return []
    text = _help(parser, action)
    # argparse has no public names for these kinds of actions.
    if isinstance(action, argparse.BooleanOptionalAction):
        on, off = action.option_strings[0], action.option_strings[-1]
        default = bool(action.default)
        return [
            KnownFlag(
                option=on, off=off, kind="switch", default=default, dest=action.dest, help=text
            ),
            KnownFlag(
                option=off, off=on, kind="switch", default=not default, dest=action.dest, help=text
            ),
        ]
    # Two spellings of one key, as with an underscore inside, are one flag.
    options = {key_of(option): option for option in action.option_strings}
    if action.nargs == 0:
        on_by_default = bool(getattr(action, "const", True)) == bool(action.default)
        return [
            KnownFlag(
                option=option, kind="switch", default=on_by_default, dest=action.dest, help=text
            )
            for option in options.values()
        ]
    kinds: dict[Any, Literal["int", "float"]] = {int: "int", float: "float"}
    return [
        KnownFlag(
            option=option,
            dest=action.dest,
            kind=kinds.get(action.type, "text"),
            count="" if action.nargs is None else str(action.nargs),
            choices=tuple(str(getattr(c, "name", c)) for c in action.choices or ()),
            default=_plain(action.default),
            help=text,
        )
        for option in options.values()
    ]


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """The first sentence of a flag's help."""
    text = action.help or ""
    if text == argparse.SUPPRESS:
        return ""
    # Some of Megatron's texts hold a percent sign that argparse cannot take.
    with contextlib.suppress(ValueError, TypeError, KeyError):
        text = parser._get_formatter()._expand_help(action)
    first = " ".join(text.split()).partition(". ")[0].rstrip(".")
    return first if len(first) <= _LONGEST_HELP else f"{first[: _LONGEST_HELP - 3]}..."


def _plain(value: Any) -> Any:
    """A default as JSON has it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(getattr(value, "name", value))


def main() -> int:
    """Print the schema."""
    # Megatron prints; the schema alone goes to stdout.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as result:
        os.dup2(2, 1)
        result.write(schema(read_flags()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
