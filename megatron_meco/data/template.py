r"""The line that precedes a document: parsing a template, rendering it for many documents at once.

    URL: {url.host}\n\n                  a field and a transform
    Topic: {topic}\nURL: {url}\n\n       several fields
    URL: {url.host|top=0.2%}\n\n         a filter: frequent values stay, the rest is `unknown`
    Quality: {score|precision=1}\n\n     a number with a fixed number of digits
    Topic: {topic|default=none}\n\n      a stand-in for a missing value

Transforms (the paper's, sections 2 and 5): `full` (without scheme; what `{url}` alone means),
`host`, `domain`, `suffix`, `hash`; `raw` leaves the value as it is. Rendering works on whole Arrow
columns: no Python code runs for each document. A document that lacks a value of any placeholder has
no prefix (null). `{{` and `}}` are literal braces; `\n`, `\t` and `\\` are read, since shells do
not. What was given up: expressions, conditions and loops; a template is a line, not a program.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from megatron_meco.corpus import url
from megatron_meco.errors import DataError, FlagError

FLAG = "--meco-template"
UNKNOWN = "unknown"
"""What a value outside the frequent ones is replaced by (the paper's word)."""

TRANSFORMS: Mapping[str, Callable[[pa.Array], pa.Array]] = {
    "raw": lambda values: values,
    "full": url.without_scheme,
    "host": url.host,
    "domain": lambda values: url.registered_domain(url.host(values)),
    "suffix": lambda values: url.suffix(url.host(values)),
    "hash": lambda values: url.hashed(url.host(values)),
}
# Each filter, and what its argument looks like.
_ARGUMENTS = {
    "top": r"[0-9]{1,12}|[0-9]{0,3}\.?[0-9]{1,12}%",
    "min_documents": r"[0-9]{1,12}",
    "precision": r"[0-9]|1[0-5]",
    "default": r".*",
}
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True, slots=True)
class Placeholder:
    """One `{...}` of a template."""

    name: str
    """What stands before the first `|`: a field, with or without a transform."""

    filters: tuple[tuple[str, str], ...]

    @property
    def frequency_filters(self) -> tuple[tuple[str, str], ...]:
        """The filters that need a count over all documents first."""
        return tuple(f for f in self.filters if f[0] in ("top", "min_documents"))


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template: literal texts and placeholders in turn.

    Attributes:
        source: The text it was parsed from.
        parts: `str` for literal text, `Placeholder` for a value.
    """

    source: str
    parts: tuple[str | Placeholder, ...]

    @classmethod
    def parse(cls, source: str) -> Template:
        """Read a template.

        Raises:
            FlagError: On unbalanced braces, an empty placeholder, an unknown filter or escape, or
                a template without any placeholder.
        """
        parts: list[str | Placeholder] = []
        literal = ""
        position = 0
        for match in _PIECE.finditer(source):
            literal += _unescape(source[position : match.start()])
            position = match.end()
            if match[0] in ("{{", "}}"):
                literal += match[0][0]
            elif match[1] is None:
                raise FlagError(
                    f"unbalanced {match[0]!r} at character {match.start()} of {source!r}",
                    where=FLAG,
                    remedy="Write {field}, or {{ and }} for literal braces.",
                )
            else:
                parts += [literal, _parse_placeholder(match[1])]
                literal = ""
        parts.append(literal + _unescape(source[position:]))
        if source and len(parts) == 1:
            raise FlagError(
                f"{source!r} names no field, so every document would get the same prefix",
                where=FLAG,
                remedy="Name a metadata field, as in 'URL: {url.host}\\n\\n', or give '' for none.",
            )
        return cls(source, tuple(parts))

    @property
    def placeholders(self) -> tuple[Placeholder, ...]:
        """The placeholders, in order."""
        return tuple(part for part in self.parts if isinstance(part, Placeholder))

    def check_fields(self, fields: Iterable[str], where: str) -> None:
        """Refuse the template if it asks for what a metadata file does not have.

        Args:
            fields: Column names of the file.
            where: The file, for the message.

        Raises:
            FlagError: For an unknown transform of a field that is there.
            DataError: For a field that is not there.
        """
        names = list(fields)
        for placeholder in self.placeholders:
            _resolve(placeholder.name, names, where)

    def fields(self, available: Iterable[str], where: str) -> list[str]:
        """The columns of a metadata file that this template reads."""
        names = list(available)
        return sorted({_resolve(p.name, names, where)[0] for p in self.placeholders})

    def values(
        self, placeholder: Placeholder, batch: pa.RecordBatch | pa.Table, where: str
    ) -> pa.Array:
        """The transformed values of one placeholder, before frequency filters; null where missing.

        An empty value counts as missing: it says nothing about the document.
        """
        field, transform = _resolve(placeholder.name, batch.schema.names, where)
        column = batch.column(field)
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        for name, value in placeholder.filters:
            if name == "precision":
                column = _rounded(column, int(value))
        values = TRANSFORMS[transform](column.cast(pa.string()))
        values = pc.if_else(pc.equal(values, ""), None, values)
        for name, value in placeholder.filters:
            if name == "default":
                values = pc.fill_null(values, value)
        return values

    def render(
        self,
        batch: pa.RecordBatch | pa.Table,
        where: str,
        frequent: Mapping[Placeholder, pa.Array] | None = None,
    ) -> pa.Array:
        """Render the prefixes of a batch of documents.

        Args:
            batch: Metadata rows, one for each document.
            where: The file that they come from, for messages.
            frequent: For each placeholder with frequency filters, the values to keep.

        Returns:
            A string array, one prefix for each row; null where a value is missing.
        """
        columns: list[pa.Array | str] = []
        for part in self.parts:
            if isinstance(part, str):
                columns.append(part)
                continue
            values = self.values(part, batch, where)
            if part.frequency_filters:
                kept = (frequent or {})[part]
                known = pc.or_(pc.is_in(values, value_set=kept), pc.is_null(values))
                values = pc.if_else(known, values, UNKNOWN)
            columns.append(values)
        return pc.binary_join_element_wise(*columns, "", null_handling="emit_null")


def frequent_values(placeholder: Placeholder, counts: Mapping[str, int]) -> pa.Array:
    """The values that a placeholder's frequency filters keep.

    `top=0.2%` keeps the most frequent 0.2 % of the distinct values (the paper's 'top 0.2 % URLs'),
    `top=5000` the 5,000 most frequent, `min_documents=100` those of at least 100 documents. Ties
    fall alphabetically, so the result does not depend on the order of the documents.
    """
    ranked = sorted(counts, key=lambda value: (-counts[value], value))
    for name, argument in placeholder.frequency_filters:
        if name == "min_documents":
            ranked = [value for value in ranked if counts[value] >= int(argument)]
        elif argument.endswith("%"):
            ranked = ranked[: math.ceil(len(counts) * float(argument[:-1]) / 100)]
        else:
            ranked = ranked[: int(argument)]
    return pa.array(ranked, pa.string())


def _parse_placeholder(text: str) -> Placeholder:
    name, *filters = (part.strip() for part in text.split("|"))
    if not name:
        raise FlagError(
            f"a placeholder without a field: {{{text}}}",
            where=FLAG,
            remedy="Name a metadata field, as in {url.host}.",
        )
    return Placeholder(name, tuple(_parse_filter(part) for part in filters))


def _parse_filter(text: str) -> tuple[str, str]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if name not in _ARGUMENTS or not equals:
        raise FlagError(
            f"unknown filter {text!r}",
            where=FLAG,
            remedy=f"Known: {', '.join(f'{known}=...' for known in _ARGUMENTS)}."
            f"{_closest(name, _ARGUMENTS)}",
        )
    if not re.fullmatch(_ARGUMENTS[name], value):
        raise FlagError(
            f"filter {name} cannot take {value!r}",
            where=FLAG,
            remedy="Write top=5000, top=0.2%, min_documents=100 or precision=1.",
        )
    return name, value


def _resolve(name: str, fields: list[str], where: str) -> tuple[str, str]:
    """Split a placeholder's name into a field that exists and a transform."""
    if name in fields:
        return name, "full" if name.rpartition(".")[2] == "url" else "raw"
    field, _, transform = name.rpartition(".")
    if field in fields and transform in TRANSFORMS:
        return field, transform
    if field in fields:
        raise FlagError(
            f"unknown transform {transform!r} in {{{name}}}",
            where=FLAG,
            remedy=f"Known: {', '.join(TRANSFORMS)}.{_closest(transform, TRANSFORMS)}",
        )
    raise DataError(
        f"no metadata field {field if transform in TRANSFORMS and field else name!r}, which the "
        f"template asks for in {{{name}}}",
        where=where,
        remedy=f"It holds: {', '.join(fields) or 'no fields'}. Name one of these in {FLAG}, or "
        "prepare the corpus with that field.",
    )


def _closest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def _unescape(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        if match[1] not in _ESCAPES:
            raise FlagError(
                f"unknown escape '{match[0]}'",
                where=FLAG,
                remedy=r"Known: \n, \t and \\.",
            )
        return _ESCAPES[match[1]]

    return re.sub(r"\\(.?)", replace, text, flags=re.DOTALL)


def _rounded(column: pa.Array, digits: int) -> pa.Array:
    try:
        numbers = column.cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise DataError(
            f"precision={digits} needs numbers ({error})",
            where=FLAG,
            remedy="Apply precision to a numeric field only.",
        ) from error
    rounded = pc.round(numbers, ndigits=digits)
    texts = [None if v is None else f"{v:.{digits}f}" for v in rounded.to_pylist()]
    return pa.array(texts, pa.string())
