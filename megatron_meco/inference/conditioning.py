"""The prefix for a prompt: the run's template, rendered from values that a user gives.

`Conditioning` is what an exported model remembers of its template. It renders with the code that
rendered the training documents, so `url=https://en.wikipedia.org/wiki/Llama` becomes the
`URL: en.wikipedia.org` of training. Needs no torch. A given value counts as frequent enough for
filters such as `top=` and `min_documents=`, whose corpus is not available here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_meco.data.template import (
    SYNTAX,
    TRANSFORMS,
    PrefixText,
    Template,
    in_current_syntax,
    syntax_of,
)
from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.untrusted.text_file import check_text, read_json
from megatron_meco.wording import shown

_FLAG = "--metadata"
_CARD = "meco.json"
NO_METADATA = "none"
"""Stands for no metadata on the command line."""
NO_VALUES = "empty"
"""Stands there for the prefix of a document without any value: special tokens, for example."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """How a model was conditioned.

    Attributes:
        template: The run's `--meco-template`; empty for a model trained without metadata.
        columns: The metadata fields that the template reads.
        suffix: The template of its suffixes and their fields; None: documents had no suffix.
        suffix_in_loss: Whether it learned to write suffixes.
    """

    template: str
    columns: tuple[str, ...]
    suffix: Conditioning | None = None
    suffix_in_loss: bool = True

    @classmethod
    def of_run(
        cls,
        template: str,
        known_columns: Iterable[str] | None,
        suffix: str = "",
        *,
        suffix_in_loss: bool = True,
    ) -> Conditioning:
        """Work out the fields of a template.

        Args:
            template: The run's template.
            known_columns: All columns of the run's metadata. If None, a known transform at the end
                of a placeholder's name counts as a transform.
            suffix: The run's suffix template.
            suffix_in_loss: Whether suffixes were in the loss.
        """
        parsed = Template.parse(template)
        columns = known_columns
        if columns is None:
            columns = {_field_of(p.name) for p in parsed.placeholders}
        ends = cls.of_run(suffix, known_columns) if suffix else None
        return cls(template, tuple(parsed.fields(columns, _FLAG)), ends, suffix_in_loss)

    @classmethod
    def of_folder(cls, folder: Path, template: str | None = None) -> Conditioning:
        """Read it from a model's folder, or use a template in its place.

        Args:
            folder: What `meco export` wrote; with a template, any Hugging Face folder.
            template: Template in place of the model's own, or None.

        Raises:
            FlagError: If the template cannot be read, or if there is none and the folder does not
                say how the model was trained.
        """
        if template is not None:
            check_text(template, "--template")
            try:
                given = cls.of_run(template, None)
            except FlagError as error:
                raise FlagError(error.what, where="--template", remedy=error.remedy) from error
            if not os.path.lexists(folder / _CARD):
                return given
            own = cls.from_card(read_card(folder))
            return replace(given, suffix=own.suffix, suffix_in_loss=own.suffix_in_loss)
        return cls.from_card(read_card(folder))

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> Conditioning:
        """Read it from an exported `meco.json`.

        Raises:
            MeCoError: If the template cannot be read, or uses other fields.
            Exception: KeyError or TypeError if the object is not such a card.
        """
        template, fields = card["template"], card["fields"]
        if not isinstance(template, str) or not isinstance(fields, list):
            raise TypeError("its template is no text, or its fields are no list")
        if not all(isinstance(name, str) for name in fields):
            raise TypeError("its fields are no texts")
        template = template_of_run(template, syntax_of_card(card))
        Template.parse(template).check_fields(fields, _CARD)
        suffix, ends = card.get("suffix_template", ""), card.get("suffix_fields", [])
        in_loss = card.get("suffix_loss", True)
        if not isinstance(suffix, str) or not isinstance(ends, list) or type(in_loss) is not bool:
            raise TypeError("its suffix is none")
        if not all(isinstance(name, str) for name in ends):
            raise TypeError("its fields are no texts")
        if not suffix:
            return cls(template, tuple(fields))
        Template.parse(suffix).check_fields(ends, _CARD)
        return cls(template, tuple(fields), cls(suffix, tuple(ends)), in_loss)

    def required(self) -> tuple[str, ...]:
        """Return the fields outside of optional groups that have no default in the template."""
        needed = set()
        for placeholder in Template.parse(self.template).required_placeholders:
            if not any(name == "default" for name, _ in placeholder.filters):
                one = Template(self.template, (placeholder,))
                needed.update(one.fields(self.columns, _FLAG))
        return tuple(sorted(needed))

    def prefix_of(self, values: Mapping[str, str] | None, where: str = _FLAG) -> str:
        """The prefix of a condition of `parse_metadata`; '' for no metadata.

        Args:
            values: Those of the condition; None: the prefix of a document without any.
            where: Where they were given, for messages.

        Raises:
            FlagError: As `render`.
        """
        if values is None:
            return self.render({}, where)
        return self.render(values, where) if values else ""

    def render(self, values: Mapping[str, str], where: str = _FLAG) -> PrefixText:
        """Render the prefix for given metadata.

        What a run draws (`keep`, `shuffled`) is left out: the values are used as given.

        Args:
            values: One value for each field.
            where: Where they were given, for messages.

        Raises:
            FlagError: For an unknown or missing field, a value that leaves nothing, or a model that
                knows no metadata.
        """
        self._check(values, where)
        template = Template.parse(self.template)
        columns = self.columns or ("",)  # a table without columns has no rows
        row = pa.table({name: pa.array([values.get(name)], pa.string()) for name in columns})
        try:
            # A given value counts as frequent: the corpus that decides is not available.
            frequent = {
                placeholder: template.values(placeholder, row, where)
                for placeholder in template.placeholders
                if placeholder.frequency_filters
            }
            text: str | bytes | None = template.render(row, where, frequent)[0].as_py()
        except (OverflowError, pa.ArrowException) as error:
            raise FlagError(
                f"the template {self.template!r} cannot be filled ({error})",
                where=where,
                remedy="Give values that its filters take, or another --template.",
            ) from error
        if text is None:
            raise FlagError(
                f"{_spelled(values)} leaves an empty value in the template {self.template!r}",
                where=where,
                remedy="Documents like that were trained without prefix: leave it out"
                + (", or use `--metadata none`." if where == _FLAG else "."),
            )
        return PrefixText(template.segments(text))

    def _check(self, values: Mapping[str, str], where: str) -> None:
        if not self.template:
            what = "but this model was trained without metadata"
            if self.suffix is not None:
                what = "but this model was trained with metadata behind texts alone"
            raise FlagError(
                f"{_spelled(values)}, {what}",
                where=where,
                remedy="Leave the flag out.",
            )
        uses = f"The template {self.template!r} uses: {', '.join(self.columns)}."
        if not self.columns:
            uses = f"The template {self.template!r} uses none: give `--metadata {NO_VALUES}`."
        for name, value in values.items():
            if name not in self.columns:
                raise FlagError(f"unknown field {name!r}", where=where, remedy=uses)
            check_text(value, f"{where}: {name}")
        for name in self.required():
            if name not in values:
                raise FlagError(f"no value for the field {name!r}", where=where, remedy=uses)


def parse_values(words: Iterable[str], where: str = _FLAG) -> dict[str, str]:
    """Read the words after a `--metadata`.

    Args:
        words: `field=value`, one for each field.
        where: Where they stand, for messages.

    Raises:
        FlagError: For a word of another form, or a repeated field.
    """
    given = list(words)
    found: dict[str, str] = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise FlagError(
                f"cannot read {' '.join(given)!r}",
                where=where,
                remedy="Write FIELD=VALUE, as in url=https://en.wikipedia.org/wiki/Llama"
                + (", or none." if where == _FLAG else "; quote values with blanks."),
            )
        if name in found:
            raise FlagError(
                f"has two values for the field {name!r}", where=where, remedy="Give one."
            )
        found[name] = value
    return found


def parse_metadata(given: Sequence[Sequence[str]]) -> list[dict[str, str] | None]:
    """Read the `--metadata` flags.

    Args:
        given: The words after each `--metadata`: `field=value` ..., `none`, or `empty`.

    Returns:
        Conditions to show, None for `empty`. The empty one, plain generation, always comes first,
        once.

    Raises:
        FlagError: For a word that is neither.
    """
    conditions: list[dict[str, str] | None] = [{}]
    for words in given:
        values = parse_condition(words)
        if values not in conditions:
            conditions.append(values)
    return conditions


def parse_condition(words: Sequence[str]) -> dict[str, str] | None:
    """Read the words after one `--metadata`: {} for no metadata, None for no value."""
    if list(words) == [NO_METADATA]:
        return {}
    return None if list(words) == [NO_VALUES] else parse_values(words)


def spelled(values: Mapping[str, str] | None) -> str:
    """A condition as its user gave it, safe to print."""
    if values is None:
        return NO_VALUES
    return " ".join(f"{name}={shown(value)}" for name, value in values.items())


def syntax_of_card(card: Mapping[str, Any]) -> int:
    """The version of the template syntax that an exported model's card is written in."""
    if "template_syntax" in card:
        found = card["template_syntax"]
        if not isinstance(found, int):
            raise TypeError("its template syntax is no number")
        return found
    if "run_fingerprint" not in card:
        return SYNTAX
    fingerprint = card["run_fingerprint"]
    if not isinstance(fingerprint, dict | None):
        raise TypeError("its run fingerprint is no object")
    return syntax_of(fingerprint)


def template_of_run(template: str, syntax: int) -> str:
    """A run's template as it is written today.

    Raises:
        FlagError: It cannot be written any more.
    """
    written = in_current_syntax(template, syntax)
    if written is None:
        raise FlagError(
            f"{template!r} names a field {{token:...}}, which is a special token today",
            where="the template of the run",
            remedy="Rename the field in the metadata, and give a --template.",
        )
    return written


def read_card(folder: Path) -> dict[str, Any]:
    """Read the `meco.json` of an exported folder.

    Raises:
        FlagError: If `meco export` did not write the folder.
    """
    if not folder.is_dir():
        raise not_an_export(folder, "no such folder")
    path = folder / _CARD
    if not os.path.lexists(path):
        raise not_an_export(folder, f"it has no {_CARD}")
    card = read_json(path, lambda reason: not_an_export(folder, f"its {_CARD} {reason}"))
    try:
        Conditioning.from_card(card)
    except (LookupError, TypeError, MeCoError) as error:
        reason = error.what if isinstance(error, MeCoError) else str(error)
        raise not_an_export(folder, f"its {_CARD} cannot be read ({reason})") from error
    loaded: dict[str, Any] = card
    return loaded


def not_an_export(folder: Path, reason: str) -> FlagError:
    """Return the error for a folder that is not an exported model."""
    return FlagError(
        f"not a folder that `meco export` wrote: {reason}",
        where=f"--model {folder}",
        remedy="Name the --output of `meco export`.",
    )


def _field_of(name: str) -> str:
    field, _, transform = name.rpartition(".")
    return field if field and transform in TRANSFORMS else name


def _spelled(values: Mapping[str, str]) -> str:
    if not values:
        return "no value"
    return " ".join(f"{name}={value}" for name, value in values.items())
