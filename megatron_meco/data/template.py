r"""The text before or behind a document: parsing a template, rendering it for many at once.

    URL: {url.host}\n\n                  a field and a transform
    Topic: {topic}\nURL: {url}\n\n       several fields
    [[Topic: {topic}\n]]URL: {url}\n\n   a group: it disappears where its value is missing
    {token:<boc>}{url}{token:<eoc>}      special tokens of the tokenizer, by name
    URL: {url.host|top=0.2%}\n\n         a filter: frequent values stay, the rest is `unknown`
    Quality: {score|scale=10|floor}\n\n  filters in a chain

Transforms: `full` (a URL without scheme; what `{url}` alone means), `host`, `domain`, `suffix`,
`hash` (the paper's, sections 2 and 5); `year`, `month`, `day` of an ISO date; `raw` leaves the
value as it is. Filters work from left to right, except that neighbours among `precision`,
`default` and `top`/`min_documents` work in this order, however they are written. Rendering works
on whole Arrow columns: no Python code runs for each document. A document that lacks a value outside
of a group has no prefix (null). `{{`, `}}`, `[[[[` and `]]]]` are literal; `\n`, `\t`, `\\`, `\[`
and `\]` are read, since shells do not. There are no expressions, nested groups or loops.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megatron_meco import _core
from megatron_meco.corpus import url
from megatron_meco.corpus.text_arrays import text_buffers
from megatron_meco.errors import DataError, FlagError

FLAG = "--meco-template"
SUFFIX_FLAG = "--meco-suffix-template"
SYNTAX = 2
"""Version of what a template means; raise it when one that could be read comes to mean something
else. 2: `[[...]]` is a group and `{token:...}` a special token; in 1 the first was text, the second
a field."""
UNKNOWN = "unknown"
"""What a value outside the frequent ones is replaced by (the paper's word)."""

_DATE = (
    r"^\s*(?P<year>[0-9]{4})(?:$|\s*$|-(?P<month>0[1-9]|1[0-2])(?:\s*$|"
    r"-(?P<day>0[1-9]|[12][0-9]|3[01])(?:\s*$|[Tt ].*$)))"
)


def _date_part(part: str) -> Callable[[pa.Array], pa.Array]:
    def transform(values: pa.Array) -> pa.Array:
        found = pc.struct_field(pc.extract_regex(values, _DATE), part)
        return pc.if_else(pc.equal(found, ""), None, found)

    return transform


TRANSFORMS: Mapping[str, Callable[[pa.Array], pa.Array]] = {
    "raw": lambda values: values,
    "full": url.without_scheme,
    "host": url.host,
    "domain": lambda values: url.registered_domain(url.host(values)),
    "suffix": lambda values: url.suffix(url.host(values)),
    "hash": lambda values: url.hashed(url.host(values)),
    "year": _date_part("year"),
    "month": _date_part("month"),
    "day": _date_part("day"),
}
_SHARE = r"0|1|0?\.[0-9]{1,17}|[01]\.0{1,17}|0\.[0-9]{1,17}"
# Each filter, and what its argument looks like; None: it takes none.
_ARGUMENTS: Mapping[str, str | None] = {
    "top": r"[0-9]{1,12}|[0-9]{0,3}\.?[0-9]{1,12}%",
    "min_documents": r"[0-9]{1,12}",
    "precision": r"[0-9]|1[0-5]",
    "default": r".*",
    "bins": r"[1-9][0-9]{0,5}",
    "scale": r"-?(?:[0-9]{1,15}(?:\.[0-9]{1,15})?|\.[0-9]{1,15})",
    "floor": None,
    "keep": _SHARE,
    "shuffled": None,
}
_EXAMPLES = {
    "top": "top=5000 or top=0.2%",
    "min_documents": "min_documents=100",
    "precision": "precision=1 (0 to 15 digits)",
    "bins": "bins=10 (1 to 999999)",
    "scale": "scale=10 or scale=0.5",
    "default": "default=none",
    "keep": "keep=0.5 (0 to 1)",
}
_FREQUENCY = ("top", "min_documents")
_NUMERIC = ("precision", "bins", "scale", "floor")
_TRAINING = ("keep", "shuffled")
# Neighbours among these work in this order.
_ORDERED = {"precision": 0, "default": 1, "top": 2, "min_documents": 2}
_PIECE = re.compile(r"\\.?|\{\{|\}\}|\{([^{}]*)\}|[{}]|\[{2,}|\]{2,}", re.DOTALL)
_PIECE_OF_1 = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|\[{2,}|\]{2,}")
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", "[": "[", "]": "]"}
_TOKEN = "token:"
# Stands before the number of a special token in rendered bytes; UTF-8 has no such byte.
_MARK = 0xFF
_MARKED = 3
"""Bytes of a special token in rendered bytes: the mark and two digits of base 128."""
_MAX_TOKENS = 128 * 128
_SHUFFLE_STREAM = 0x5348_5546_464C_4544
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
# A product of two floats is off by two units in the last place at most.
_ULPS = 2.0**-51


def kind_of(flag: str) -> str:
    """What the template of a flag makes: "prefix" or "suffix"."""
    return "suffix" if flag == SUFFIX_FLAG else "prefix"


@dataclass(frozen=True, slots=True)
class Placeholder:
    """One `{...}` of a template that stands for a value."""

    name: str
    """What stands before the first `|`: a field, with or without a transform."""

    filters: tuple[tuple[str, str], ...]
    """Names and arguments, in the order in which they work; `""` for no argument."""

    @property
    def frequency_filters(self) -> tuple[tuple[str, str], ...]:
        """The filters that need a count over all documents first."""
        return tuple(f for f in self.filters if f[0] in _FREQUENCY)


@dataclass(frozen=True, slots=True)
class Token:
    """A special token, by its name in the vocabulary."""

    name: str


class PrefixText(str):
    """A rendered prefix for people, special tokens by name; `segments` is what to tokenise.

    Args:
        segments: Texts and special tokens in turn.
    """

    segments: tuple[str | Token, ...]

    def __new__(cls, segments: Iterable[str | Token]) -> PrefixText:
        """Join the segments."""
        parts = tuple(segments)
        text = super().__new__(cls, "".join(p if isinstance(p, str) else p.name for p in parts))
        text.segments = parts
        return text

    def __reduce__(self) -> tuple[type[PrefixText], tuple[tuple[str | Token, ...]]]:
        return (PrefixText, (self.segments,))


@dataclass(frozen=True, slots=True)
class Group:
    """What disappears from a document that lacks one of its values."""

    parts: tuple[str | Placeholder | Token, ...]


Part = str | Placeholder | Token | Group


@dataclass(frozen=True)
class Draws:
    """What `keep` and `shuffled` depend on besides the template; the same in any order of asking.

    Attributes:
        seed: The run's.
        metadata: The metadata of the whole corpus, one row for each document.
    """

    seed: int
    metadata: pa.Table

    def kept(self, field: str, documents: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
        """Which documents keep the value of a field.

        Args:
            field: A column of the metadata; all its placeholders draw the same number.
            documents: (n,), numbers in the corpus.
            share: The expected share.

        Returns:
            (n,).
        """
        if share >= 1:
            return np.ones(len(documents), dtype=bool)
        name = int.from_bytes(hashlib.blake2b(field.encode(), digest_size=8).digest(), "little")
        key = _core.hash_pair(self.seed & _MASK64, name)
        return _hash_pairs(key, documents.view(np.uint64)) < np.uint64(int(share * 2**64))

    def partners(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """The documents whose values these documents get: always others, each for exactly one.

        Args:
            documents: (n,), numbers in the corpus.

        Returns:
            (n,); of a corpus of one document, the document itself.
        """
        return self._successors[documents].astype(np.int64)

    def prepare(self) -> None:
        """Make what `partners` needs: 4 bytes for each document of the corpus."""
        _ = self._successors

    def take(self, field: str, documents: NDArray[np.int64]) -> pa.Array:
        """Values of a field of documents all over the corpus, in their order."""
        column = self.metadata.column(field)
        # Chunk by chunk: what pyarrow does with many chunks at once may copy the whole column.
        order = np.argsort(documents, kind="stable")
        ends = np.cumsum([len(chunk) for chunk in column.chunks])
        borders = np.searchsorted(documents[order], ends)
        parts, begin, first = [], 0, 0
        for chunk, border, end in zip(column.chunks, borders, ends, strict=True):
            if border > begin:
                parts.append(chunk.take(pa.array(documents[order[begin:border]] - first)))
            begin, first = border, end
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order))
        return pa.concat_arrays(parts).take(pa.array(places))

    @cached_property
    def _successors(self) -> NDArray[np.int32]:
        # The permutation read as one cycle: nobody is his own successor.
        size = self.metadata.num_rows
        successors = np.zeros(size, dtype=np.int32)
        stride = 1 << 20
        order = (self.seed & _MASK64, _SHUFFLE_STREAM)
        first = before = int(_core.permutation(size, *order, 0, 1)[0])
        for begin in range(1, size, stride):
            part = _core.permutation(size, *order, begin, min(begin + stride, size))
            successors[np.concatenate([[before], part[:-1]])] = part
            before = int(part[-1])
        successors[before] = first
        return successors


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template: literal texts, values, special tokens and groups in turn.

    Attributes:
        source: The text it was parsed from.
        parts: `str` for literal text.
        flag: Where it was given, for messages.
    """

    source: str
    parts: tuple[Part, ...]
    flag: str = FLAG

    @classmethod
    def parse(cls, source: str, flag: str = FLAG) -> Template:
        """Read a template.

        Args:
            source: The text, with backslash escapes.
            flag: Where it was given, for messages.

        Raises:
            FlagError: Names what cannot be read, and the character.
        """
        return cls(source, _Parser(source, flag).parts(), flag)

    @property
    def placeholders(self) -> tuple[Placeholder, ...]:
        """The placeholders, in order, those in groups among them."""
        return tuple(part for part in _flat(self.parts) if isinstance(part, Placeholder))

    @property
    def required_placeholders(self) -> tuple[Placeholder, ...]:
        """The placeholders outside of groups: a document that lacks one of them trains plain."""
        return tuple(part for part in self.parts if isinstance(part, Placeholder))

    @property
    def tokens(self) -> tuple[str, ...]:
        """The names of the special tokens, each once, in order."""
        names = [part.name for part in _flat(self.parts) if isinstance(part, Token)]
        return tuple(dict.fromkeys(names))

    @property
    def is_seeded(self) -> bool:
        """Whether what a document gets depends on a seed."""
        return any(f[0] in _TRAINING for p in self.placeholders for f in p.filters)

    @property
    def is_shuffled(self) -> bool:
        """Whether documents get the values of others."""
        return any(f[0] == "shuffled" for p in self.placeholders for f in p.filters)

    @property
    def has_groups(self) -> bool:
        """Whether it has optional groups."""
        return any(isinstance(part, Group) for part in self.parts)

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
            self._resolve(placeholder.name, names, where)

    def fields(self, available: Iterable[str], where: str) -> list[str]:
        """The columns of a metadata file that this template reads."""
        names = list(available)
        return sorted({self._resolve(p.name, names, where)[0] for p in self.placeholders})

    def values(
        self,
        placeholder: Placeholder,
        batch: pa.RecordBatch | pa.Table,
        where: str,
        draws: Draws | None = None,
        first_document: int = 0,
    ) -> pa.Array:
        """The values of one placeholder before its frequency filters; null where missing.

        An empty value counts as missing: it says nothing about the document.

        Args:
            placeholder: One of this template's.
            batch: Metadata rows, one for each document.
            where: The file that they come from, for messages.
            draws: Of a training run; None: `keep` and `shuffled` leave the values as they are.
            first_document: The number of the first row's document in the corpus.

        Returns:
            A string array, one value for each row.
        """
        names = [name for name, _ in placeholder.filters]
        end = next((i for i, name in enumerate(names) if name in _FREQUENCY), len(names))
        return self._chain(placeholder, batch, where, draws, first_document, end, None)

    def render(
        self,
        batch: pa.RecordBatch | pa.Table,
        where: str,
        frequent: Mapping[Placeholder, pa.Array] | None = None,
        draws: Draws | None = None,
        first_document: int = 0,
    ) -> pa.Array:
        """Render the prefixes of a batch of documents.

        Args:
            batch: Metadata rows, one for each document.
            where: The file that they come from, for messages.
            frequent: For each placeholder with frequency filters, the values to keep.
            draws: Of a training run; None: `keep` and `shuffled` leave the values as they are.
            first_document: The number of the first row's document in the corpus.

        Returns:
            One prefix for each row: a string array, or, where the template has special tokens, a
            binary array, which `segments` reads. Null where a value is missing outside of a group,
            and where all groups disappear and nothing else is there.
        """
        tokens = self.tokens

        def values(placeholder: Placeholder) -> pa.Array:
            kept = (frequent or {}).get(placeholder)
            end = len(placeholder.filters)
            return self._chain(placeholder, batch, where, draws, first_document, end, kept)

        def join(parts: tuple[Part, ...]) -> pa.Array:
            columns = []
            for part in parts:
                if isinstance(part, Group):
                    columns.append(pc.fill_null(join(part.parts), b"" if tokens else ""))
                elif isinstance(part, Placeholder):
                    columns.append(values(part).cast(pa.binary()) if tokens else values(part))
                elif isinstance(part, Token):
                    columns.append(pa.scalar(_mark(tokens.index(part.name)), pa.binary()))
                elif part:
                    columns.append(pa.scalar(part.encode() if tokens else part))
            if not any(isinstance(column, pa.Array) for column in columns):
                constant = b"".join(column.as_py() for column in columns)
                return pa.repeat(pa.scalar(constant, pa.binary()), batch.num_rows)
            empty = pa.scalar(b"" if tokens else "")
            return pc.binary_join_element_wise(*columns, empty, null_handling="emit_null")

        rendered = join(self.parts)
        if self.has_groups:
            rendered = pc.if_else(pc.equal(pc.binary_length(rendered), 0), None, rendered)
        return rendered

    def segments(self, rendered: str | bytes) -> list[str | Token]:
        """Cut one rendered prefix into texts and special tokens.

        Args:
            rendered: An element of what `render` returned.

        Returns:
            Texts (none empty) and special tokens in turn.
        """
        if isinstance(rendered, str):
            return [rendered] if rendered else []
        names = self.tokens
        text, *marked = rendered.split(bytes([_MARK]))
        segments: list[str | Token] = [text.decode()]
        for piece in marked:
            segments += [Token(names[piece[0] * 128 + piece[1]]), piece[_MARKED - 1 :].decode()]
        return [segment for segment in segments if segment != ""]

    def _chain(
        self,
        placeholder: Placeholder,
        batch: pa.RecordBatch | pa.Table,
        where: str,
        draws: Draws | None,
        first_document: int,
        end: int,
        frequent: pa.Array | None,
    ) -> pa.Array:
        """The values of one placeholder after its first `end` filters."""
        field, transform = self._resolve(placeholder.name, batch.schema.names, where)
        filters = placeholder.filters[:end]
        # The counting of frequent values does not depend on which document has which value, so
        # `values` before a frequency filter leaves them where they are.
        is_whole = end == len(placeholder.filters)
        documents = np.arange(first_document, first_document + batch.num_rows)
        numbers: list[NDArray[np.int64]] = [documents] * len(filters)
        is_moved = False
        for i in reversed(range(len(filters))):
            numbers[i] = documents
            if filters[i][0] == "shuffled" and draws is not None and is_whole:
                documents = draws.partners(documents)
                is_moved = True
        if is_moved:
            assert draws is not None
            column = draws.take(field, documents)
        else:
            column = batch.column(field)
            if isinstance(column, pa.ChunkedArray):
                column = column.combine_chunks()
        values = _null_where_empty(TRANSFORMS[transform](column.cast(pa.string())))
        for (name, argument), documents in zip(filters, numbers, strict=True):
            if name in _NUMERIC:
                values = _null_where_empty(self._number(name, argument, values, where))
            elif name == "default":
                values = pc.fill_null(values, argument)
            elif name in _FREQUENCY:
                # The first of neighbours does the work of all.
                if frequent is not None:
                    known = pc.or_(pc.is_in(values, value_set=frequent), pc.is_null(values))
                    values = pc.if_else(known, values, UNKNOWN)
                    frequent = None
            elif name == "keep" and draws is not None:
                kept = draws.kept(field, documents, float(argument))
                values = pc.if_else(pa.array(kept), values, None)
        return values

    def _number(self, name: str, argument: str, values: pa.Array, where: str) -> pa.Array:
        """A filter for numbers: texts to texts."""
        shown = f"{name}={argument}" if argument else name
        try:
            numbers = values.cast(pa.float64())
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{shown} needs numbers ({error})",
                where=self.flag,
                remedy=f"Apply {name} to a numeric field only.",
            ) from error
        if name == "precision":
            rounded = pc.round(numbers, ndigits=int(argument))
            return _format(rounded, lambda number: f"{number:.{argument}f}")
        found = numbers.drop_null().to_numpy(zero_copy_only=False)
        low, high = (0.0, 1.0) if name == "bins" else (-1e300, 1e300)
        # Written so that NaN is refused.
        outside = found[~((found >= low) & (found <= high))]
        if len(outside):
            raise DataError(
                f"{shown} cannot take {float(outside[0])!r} of {where}",
                where=self.flag,
                remedy="bins takes numbers from 0 to 1: put scale= before it."
                if name == "bins"
                else f"Apply {name} to finite numbers only.",
            )
        if name == "scale":
            products = pc.multiply(numbers, float(argument))
            return _format(products, lambda number: f"{number + 0.0:.15g}")
        if name == "bins":
            bins = pc.min_element_wise(
                _floor(pc.multiply(numbers, float(argument))),
                float(argument) - 1,
                skip_nulls=False,
            )
            return _format(bins, lambda number: f"{number:.0f}")
        return _format(_floor(numbers), lambda number: f"{number + 0.0:.0f}")

    def _resolve(self, name: str, fields: list[str], where: str) -> tuple[str, str]:
        """Split a placeholder's name into a field that exists and a transform."""
        if name in fields:
            return name, "full" if name.rpartition(".")[2] == "url" else "raw"
        field, _, transform = name.rpartition(".")
        if field in fields and transform in TRANSFORMS:
            return field, transform
        if field in fields:
            raise FlagError(
                f"unknown transform {transform!r} in {{{name}}}",
                where=self.flag,
                remedy=f"Known: {', '.join(TRANSFORMS)}.{_closest(transform, TRANSFORMS)}",
            )
        raise DataError(
            f"no metadata field {field if transform in TRANSFORMS and field else name!r}, which "
            f"the template asks for in {{{name}}}",
            where=where,
            remedy=f"It holds: {', '.join(fields) or 'no fields'}. Name one of these in "
            f"{self.flag}, or prepare the corpus with that field.",
        )


def syntax_of(fingerprint: Mapping[str, object] | None) -> int:
    """The version of the template syntax that a run was trained with.

    Args:
        fingerprint: Of the run, as its checkpoints have it; None: from before there were any.
    """
    if fingerprint is None:
        return 1
    # Versions without the key are told apart by another one: it came with the second syntax.
    found = fingerprint.get("template_syntax", 2 if "pad_documents_to" in fingerprint else 1)
    return found if isinstance(found, int) else 1


def in_current_syntax(source: str, syntax: int) -> str | None:
    """Write a template of an earlier syntax as it is written today.

    Args:
        source: The template; unchanged if it means the same today.
        syntax: The version that it was written for.

    Returns:
        None if it cannot be written any more.
    """
    if syntax >= SYNTAX:
        return source
    text, position = "", 0
    for match in _PIECE_OF_1.finditer(source):
        text += source[position : match.start()]
        position = match.end()
        if match[0][0] in "[]":
            text += rf"\{match[0][0]}" * len(match[0])
        elif (match[1] or "").startswith(_TOKEN):
            return None
        else:
            text += match[0]
    return text + source[position:]


def num_frequent(placeholder: Placeholder, counts: NDArray[np.int64]) -> int:
    """How many of the most frequent values a placeholder's frequency filters keep.

    `top=0.2%` keeps the most frequent 0.2 % of the distinct values (the paper's 'top 0.2 % URLs'),
    `top=5000` the 5,000 most frequent, `min_documents=100` those of at least 100 documents. Of
    equally frequent values the first ones of the alphabet stay, so the result does not depend on
    the order of the documents.

    Args:
        placeholder: With frequency filters.
        counts: (n,), how often each distinct value occurs.
    """
    kept = len(counts)
    for name, argument in placeholder.frequency_filters:
        if name == "min_documents":
            kept = min(kept, int((counts >= int(argument)).sum()))
        elif argument.endswith("%"):
            kept = min(kept, math.ceil(len(counts) * float(argument[:-1]) / 100))
        else:
            kept = min(kept, int(argument))
    return kept


def cut_at_tokens(
    rendered: pa.Array,
) -> tuple[pa.Array, NDArray[np.int64], NDArray[np.int64]]:
    """Cut rendered prefixes at their special tokens, all at once; see `Template.segments`.

    Args:
        rendered: A binary array of n prefixes without nulls.

    Returns:
        The texts (empty ones, too), a special token between each two of a prefix; the prefix of
        each text; and the special tokens in their order, as places in `Template.tokens`.
    """
    data, borders, _ = text_buffers(rendered)
    data = data[borders[0] : borders[-1]]
    begins = borders[:-1].astype(np.int64) - borders[0]
    marks = np.flatnonzero(data == _MARK)
    special = data[marks + 1].astype(np.int64) * 128 + data[marks + 2]
    is_text = np.ones(len(data), dtype=bool)
    for place in range(_MARKED):
        is_text[marks + place] = False
    # A text begins at each prefix and behind each mark; a mark at the very beginning comes second.
    starts = np.concatenate([begins, marks + _MARKED])
    order = np.argsort(np.concatenate([begins * 2, marks * 2 + 1]), kind="stable")
    starts = starts[order]
    owners = np.concatenate(
        [np.arange(len(begins)), np.searchsorted(begins, marks, side="right") - 1]
    )[order]
    removed = np.searchsorted(marks, starts) * _MARKED
    ends = np.append(starts - removed, is_text.sum()).astype(np.int32)
    texts = pa.StringArray.from_buffers(
        len(starts), pa.py_buffer(ends), pa.py_buffer(data[is_text].tobytes())
    )
    return texts, owners, special


class _Parser:
    """Reads a template from left to right."""

    def __init__(self, source: str, flag: str) -> None:
        self._source, self._flag = source, flag

    def parts(self) -> tuple[Part, ...]:
        whole: list[Part] = []
        parts: list[Part] = whole
        group_begin = -1
        literal = ""
        position = 0

        def flush() -> None:
            nonlocal literal
            parts.append(literal)
            literal = ""

        for match in _PIECE.finditer(self._source):
            literal += self._source[position : match.start()]
            position, begin, text = match.end(), match.start(), match[0]
            if text[0] == "\\":
                literal += self._unescaped(text, begin)
            elif text in ("{{", "}}", "[[[[", "]]]]"):
                literal += text[: len(text) // 2]
            elif match[1] is not None:
                flush()
                parts.append(self._value(match[1], begin + 1))
            elif text == "[[" and group_begin < 0:
                flush()
                parts, group_begin = [], begin
            elif text == "]]" and group_begin >= 0:
                flush()
                if not any(isinstance(part, Placeholder) for part in parts):
                    raise self._refusal(
                        "a group that names no field, so it would never disappear,",
                        group_begin,
                        "Put a {field} inside, or write [[[[ and ]]]] for literal brackets.",
                    )
                whole.append(Group(_merged(parts)))  # type: ignore[arg-type]
                parts, group_begin = whole, -1
            elif text == "[[":
                raise self._refusal(
                    "a group inside a group", begin, "Close the first one by ]] before."
                )
            elif text == "]]":
                raise self._refusal(
                    "unbalanced ']]'", begin, "Write [[...]] for a group, ]]]] for literal ]]."
                )
            elif text[0] in "[]":
                raise self._refusal(
                    f"{len(text)} brackets in a row",
                    begin,
                    rf"Write \{text[0]} for a literal bracket beside others.",
                )
            else:
                raise self._refusal(
                    f"unbalanced {text!r}",
                    begin,
                    "Write {field}, or {{ and }} for literal braces.",
                )
        literal += self._source[position:]
        flush()
        if group_begin >= 0:
            raise self._refusal(
                "unbalanced '[['", group_begin, "Write [[...]] for a group, [[[[ for literal [[."
            )
        if self._source and all(isinstance(part, str) for part in whole):
            raise FlagError(
                f"{self._source!r} names no field, so every document would get the same "
                f"{kind_of(self._flag)}",
                where=self._flag,
                remedy="Name a metadata field, as in 'URL: {url.host}\\n\\n', or give '' for none.",
            )
        self._check_number_of_tokens(whole)
        return _merged(whole)

    def _value(self, text: str, begin: int) -> Placeholder | Token:
        """What stands between braces; `begin` is the first character behind the brace."""
        if text.startswith(_TOKEN):
            # Names of special tokens hold bars: <|context_begin|>.
            name = text.removeprefix(_TOKEN)
            if not name:
                raise self._refusal(
                    "a special token without a name", begin, "Write it as in {token:<|name|>}."
                )
            return Token(name)
        name, *filters = text.split("|")
        place = begin + len(name) + 1
        if not name.strip():
            raise self._refusal(
                f"a placeholder without a field: {{{text}}}",
                begin,
                "Name a metadata field, as in {url.host}.",
            )
        found = []
        for part in filters:
            indent = len(part) - len(part.lstrip())
            found.append(self._filter(part.strip(), place + indent))
            place += len(part) + 1
        chain = _in_order(found)
        groups = [i for i, f in enumerate(chain) if f[0] in _FREQUENCY]
        if groups and groups[-1] - groups[0] >= len(groups):
            raise self._refusal(
                f"top and min_documents apart from one another in {{{text}}}",
                begin,
                "Put them side by side: they share one count of the values.",
            )
        return Placeholder(name.strip(), chain)

    def _filter(self, text: str, begin: int) -> tuple[str, str]:
        name, equals, argument = (part.strip() for part in text.partition("="))
        if name not in _ARGUMENTS:
            known = (
                f"{other}=..." if form is not None else other for other, form in _ARGUMENTS.items()
            )
            raise self._refusal(
                f"unknown filter {text!r}",
                begin,
                f"Known: {', '.join(known)}.{_closest(name, _ARGUMENTS)}",
            )
        form = _ARGUMENTS[name]
        if form is not None and not equals:
            raise self._refusal(
                f"filter {name} without its argument", begin, f"Write {_EXAMPLES[name]}."
            )
        if form is None and equals:
            raise self._refusal(
                f"filter {name} takes no argument, here {argument!r},",
                begin,
                f"Write {name} alone.",
            )
        if form is not None and not re.fullmatch(form, argument):
            raise self._refusal(
                f"filter {name} cannot take {argument!r}", begin, f"Write {_EXAMPLES[name]}."
            )
        return name, argument

    def _unescaped(self, text: str, begin: int) -> str:
        if text[1:] not in _ESCAPES:
            raise self._refusal(f"unknown escape '{text}'", begin, r"Known: \n, \t, \\, \[ and \].")
        return _ESCAPES[text[1:]]

    def _check_number_of_tokens(self, parts: list[Part]) -> None:
        number = len({part.name for part in _flat(parts) if isinstance(part, Token)})
        if number > _MAX_TOKENS:
            raise FlagError(
                f"{number:,} different special tokens",
                where=self._flag,
                remedy=f"Use up to {_MAX_TOKENS:,}.",
            )

    def _refusal(self, what: str, position: int, remedy: str) -> FlagError:
        shown = self._source if len(self._source) <= 200 else self._source[:197] + "..."
        return FlagError(
            f"{what} at character {position} of {shown!r}", where=self._flag, remedy=remedy
        )


def _in_order(filters: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Put neighbours among `_ORDERED` in their order; all others stay where they are."""
    chain: list[tuple[str, str]] = []
    run: list[tuple[str, str]] = []
    for part in [*filters, ("", "")]:
        if part[0] in _ORDERED:
            run.append(part)
            continue
        chain += [*sorted(run, key=lambda f: _ORDERED[f[0]]), part]
        run = []
    return tuple(chain[:-1])


def _flat(parts: Iterable[Part]) -> Iterator[Part]:
    for part in parts:
        if isinstance(part, Group):
            yield from part.parts
        else:
            yield part


def _merged(parts: list[Part]) -> tuple[Part, ...]:
    """Without empty texts."""
    return tuple(part for part in parts if part != "")


def _mark(number: int) -> bytes:
    return bytes([_MARK, number // 128, number % 128])


def _closest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def _null_where_empty(values: pa.Array) -> pa.Array:
    _, offsets, _ = text_buffers(values)
    if (offsets[1:] > offsets[:-1]).all():
        return values
    return pc.if_else(pc.equal(values, ""), None, values)


def _floor(numbers: pa.Array) -> pa.Array:
    """Round down. 0.29 * 100 is 28.999999999999996 in floats and counts as 29."""
    nearest = pc.round(numbers)
    tolerance = pc.multiply(pc.abs(nearest), _ULPS)
    is_whole = pc.less_equal(pc.abs(pc.subtract(numbers, nearest)), tolerance)
    return pc.if_else(is_whole, nearest, pc.floor(numbers))


def _format(numbers: pa.Array, write: Callable[[float], str]) -> pa.Array:
    """Numbers as texts; null stays null. Python writes each distinct number once."""
    floats = pc.fill_null(numbers, 0.0).to_numpy(zero_copy_only=False)
    # By their bits: 0.0 and -0.0 are written differently.
    distinct, places = np.unique(floats.view(np.int64), return_inverse=True)
    texts = pa.array([write(number) for number in distinct.view(np.float64).tolist()], pa.string())
    return pc.if_else(numbers.is_valid(), texts.take(pa.array(places)), None)


def _hash_pairs(a: int, b: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`_core.hash_pair(a, i)` for each `i` of `b`: the finaliser of splitmix64, twice."""
    golden = np.uint64(0x9E37_79B9_7F4A_7C15)
    begin = _mix(np.array([(a + int(golden)) & _MASK64], dtype=np.uint64))
    return _mix(begin + (b + np.uint64(1)) * golden)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return x ^ (x >> np.uint64(31))
