"""The flags that a run file can hold, as Megatron's own parser and MeCo's define them.

`schema.json` is that parser written down as a JSON schema, one line for each flag: editors complete
and check run files with it, and `meco` checks them in milliseconds where the import of Megatron
takes seconds. Another Megatron-Core than the one it was written with is asked itself, in a process
of its own. To write it anew:

    python -m megatron_meco.run.read_flags > megatron_meco/run/schema.json
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from megatron_meco.errors import MeCoError

_FILE = "schema.json"
VERSION_KEY = "x-megatron-core"
"""Where the schema says which Megatron-Core it was read from."""

_TYPES: dict[str, Any] = {
    "switch": "boolean",
    "int": "integer",
    "float": "number",
    # A number is text to a flag that takes text.
    "text": ["string", "number"],
}


@dataclass(frozen=True, kw_only=True)
class KnownFlag:
    """One flag of the training script.

    Attributes:
        option: As it is typed: `--seq-length`.
        dest: Its name in Megatron's arguments. Flags of the same `dest` exclude each other.
        kind: What its values are; a switch has none.
        count: How many values it takes: "" for one, "*" or "+" for a list, else a number.
        choices: The values that it takes; empty: any of its kind.
        off: The option that switches a switch off; empty: none, it is left out.
        default: What the parser fills in (as JSON has it).
        help: What it does, in a sentence.
    """

    option: str
    dest: str
    kind: Literal["switch", "int", "float", "text"]
    count: str = ""
    choices: tuple[str, ...] = ()
    off: str = ""
    default: Any = None
    help: str = ""

    @property
    def key(self) -> str:
        """The key of a run file: the option without its dashes, with dashes inside."""
        return key_of(self.option)

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return self.count != ""

    def schema(self) -> dict[str, Any]:
        """The JSON schema of its value, which `from_schema` reads."""
        value: dict[str, Any] = {"type": _TYPES[self.kind]}
        if self.choices:
            numbers = self.kind in ("int", "float")
            value["enum"] = [json.loads(c) if numbers else c for c in self.choices]
        if self.is_list:
            items: dict[str, Any] = {"type": "array", "items": value}
            if self.count == "+":
                items["minItems"] = 1
            elif self.count != "*":
                items["minItems"] = items["maxItems"] = int(self.count)
            value = {"anyOf": [value, items]}
        more = {
            "default": self.default or None,
            "description": self.help,
            "x-dest": self.dest if self.dest != _plain_dest(self.key) else "",
            "x-off": self.off,
            "x-option": self.option if self.option != f"--{self.key}" else "",
        }
        return value | {name: told for name, told in more.items() if told not in ("", None)}

    @classmethod
    def from_schema(cls, key: str, schema: Mapping[str, Any]) -> KnownFlag:
        """The flag that `schema()` describes."""
        count, value = "", schema
        if "anyOf" in schema:
            value, items = schema["anyOf"]
            count = str(items.get("maxItems") or ("+" if "minItems" in items else "*"))
        kinds = {str(kind): name for name, kind in _TYPES.items()}
        return cls(
            option=schema.get("x-option", f"--{key}"),
            dest=schema.get("x-dest", _plain_dest(key)),
            kind=kinds[str(value["type"])],  # type: ignore[arg-type]
            count=count,
            choices=tuple(str(choice) for choice in value.get("enum", ())),
            off=schema.get("x-off", ""),
            default=schema.get("default"),
            help=schema.get("description", ""),
        )


def key_of(option: str) -> str:
    """The key of an option, or of a key that is written with underscores."""
    return option.removeprefix("--").replace("_", "-")


def _plain_dest(key: str) -> str:
    return key.replace("-", "_")


@functools.cache
def flag_table() -> Mapping[str, KnownFlag]:
    """All flags by key.

    Raises:
        MeCoError: Another Megatron-Core is installed, and it cannot be asked.
    """
    written = json.loads(schema_text())
    if written[VERSION_KEY] != _installed():
        written = json.loads(_ask())
    return {
        key: KnownFlag.from_schema(key, schema)
        for key, schema in written["properties"].items()
        # `model` and `launch` are no flags.
        if "$ref" not in schema
    }


def schema_text() -> str:
    """The JSON schema of run files that comes with this package."""
    return resources.files(__package__).joinpath(_FILE).read_text("utf-8")


def _installed() -> str:
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise MeCoError(
            "is not installed",
            where="megatron-core",
            remedy="`meco doctor` says what is missing and how to mend it.",
        ) from error


def _ask() -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"{__package__}.read_flags"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return done.stdout
    last = (done.stderr.strip() or "no output").splitlines()[-1]
    raise MeCoError(
        f"its flags cannot be read ({last[:200]})",
        where=f"megatron-core {_installed()}",
        remedy="`meco doctor` says what is missing and how to mend it.",
    )
