"""The prefix for one prompt: the run's own template, rendered from values that a user gives.

`Conditioning` is what an exported model remembers of its template. It renders with the very code
that rendered the documents, so `url=https://en.wikipedia.org/wiki/Llama` becomes the
`URL: en.wikipedia.org` of training. Needs no torch. What was given up: telling whether a value was
frequent enough to be kept by a `top=` or `min_documents=` filter; a given value is used as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_meco.data.template import TRANSFORMS, Template
from megatron_meco.errors import FlagError

_FLAG = "--metadata"
_CARD = "meco.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class Conditioning:
    """How a model was conditioned.

    Attributes:
        template: The run's `--meco-template`; empty for a model trained without metadata.
        columns: The metadata fields that the template reads.
    """

    template: str
    columns: tuple[str, ...]

    @classmethod
    def of_run(cls, template: str, known_columns: Iterable[str] | None) -> Conditioning:
        """Work out the fields of a template.

        Args:
            template: The run's template.
            known_columns: All columns of the run's metadata; None where they are not at hand, and
                a known transform at the end of a placeholder's name is then taken for one.
        """
        parsed = Template.parse(template)
        if known_columns is None:
            known_columns = {_field_of(p.name) for p in parsed.placeholders}
        return cls(template, tuple(parsed.fields(known_columns, _FLAG)))

    @classmethod
    def of_folder(cls, folder: Path, template: str | None = None) -> Conditioning:
        """Read it from a model's folder, or take a template in its place.

        Args:
            folder: What `meco export` wrote; with a template, any Hugging Face folder.
            template: Used instead of the model's own; None: the model's own.

        Raises:
            FlagError: When the template cannot be read, or the folder says nothing of its training
                and no template is given.
        """
        if template is not None:
            try:
                return cls.of_run(template, None)
            except FlagError as error:
                raise FlagError(error.what, where="--template", remedy=error.remedy) from error
        return cls.from_card(read_card(folder))

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> Conditioning:
        """Read it from an exported `meco.json`."""
        return cls(card["template"], tuple(card["fields"]))

    def required(self) -> tuple[str, ...]:
        """The fields that the template has no stand-in for."""
        needed = set()
        for placeholder in Template.parse(self.template).placeholders:
            if not any(name == "default" for name, _ in placeholder.filters):
                one = Template(self.template, (placeholder,))
                needed.update(one.fields(self.columns, _FLAG))
        return tuple(sorted(needed))

    def render(self, values: Mapping[str, str]) -> str:
        """Render the prefix for given metadata.

        Args:
            values: One value for each field.

        Raises:
            FlagError: For an unknown or missing field, a value that leaves nothing, or a model that
                knows no metadata.
        """
        self._check(values)
        template = Template.parse(self.template)
        row = pa.table({name: pa.array([values.get(name)], pa.string()) for name in self.columns})
        # What the user gives counts as known; the corpus that could tell is not at hand.
        frequent = {
            placeholder: template.values(placeholder, row, _FLAG)
            for placeholder in template.placeholders
            if placeholder.frequency_filters
        }
        text: str | None = template.render(row, _FLAG, frequent)[0].as_py()
        if text is None:
            raise FlagError(
                f"{_spelled(values)} leaves an empty value in the template {self.template!r}",
                where=_FLAG,
                remedy="Documents like that were trained without prefix: use `--metadata none`.",
            )
        return text

    def _check(self, values: Mapping[str, str]) -> None:
        if not self.template:
            raise FlagError(
                f"{_spelled(values)}, but this model was trained without metadata",
                where=_FLAG,
                remedy="Leave the flag out.",
            )
        uses = f"The template {self.template!r} uses: {', '.join(self.columns)}."
        for name in values:
            if name not in self.columns:
                raise FlagError(f"unknown field {name!r}", where=_FLAG, remedy=uses)
        for name in self.required():
            if name not in values:
                raise FlagError(f"no value for the field {name!r}", where=_FLAG, remedy=uses)


def parse_values(words: Iterable[str]) -> dict[str, str]:
    """Read the words after a `--metadata`.

    Args:
        words: `field=value`, one for each field.

    Raises:
        FlagError: For a word that is something else.
    """
    given = list(words)
    pairs = [word.partition("=") for word in given]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise FlagError(
                f"cannot read {' '.join(given)!r}",
                where=_FLAG,
                remedy="Write FIELD=VALUE, as in url=https://en.wikipedia.org/wiki/Llama, or none.",
            )
    return {name: value for name, _, value in pairs}


def read_card(folder: Path) -> dict[str, Any]:
    """Read the `meco.json` of an exported folder.

    Raises:
        FlagError: When the folder is not one that `meco export` wrote.
    """
    if not folder.is_dir():
        raise not_an_export(folder, "no such folder")
    try:
        card = json.loads((folder / _CARD).read_text(encoding="utf-8"))
        Conditioning.from_card(card)
    except FileNotFoundError:
        raise not_an_export(folder, f"it has no {_CARD}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise not_an_export(folder, f"its {_CARD} cannot be read ({error})") from error
    loaded: dict[str, Any] = card
    return loaded


def check_model_files(folder: Path) -> None:
    """Refuse a folder that lacks the model's configuration or its tokenizer.

    Raises:
        FlagError: Says which of the two.
    """
    if not (folder / "config.json").is_file():
        raise not_an_export(folder, "it has no config.json")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise not_an_export(folder, "it has no tokenizer")


def not_an_export(folder: Path, reason: str) -> FlagError:
    """The refusal of a folder that is no exported model."""
    return FlagError(
        f"not a folder that `meco export` wrote: {reason}",
        where=f"--model {folder}",
        remedy="Name the --output of `meco export`.",
    )


def _field_of(name: str) -> str:
    field, _, transform = name.rpartition(".")
    return field if field and transform in TRANSFORMS else name


def _spelled(values: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())
