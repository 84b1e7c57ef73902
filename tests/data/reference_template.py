"""A slow, obvious oracle of templates: one document at a time, one character at a time.

Shares no code with the package but `num_frequent`. A rendered prefix is a list of texts and of
`("token", name)`. Numbers are exact decimals. URLs must be clean: `https://host/path`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from decimal import ROUND_FLOOR, Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_meco.data.template import Placeholder, num_frequent
from tests.reference import MASK64, hash_pair, permutation

SHUFFLE_STREAM = int.from_bytes(b"SHUFFLED", "big")
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", "[": "[", "]": "]"}
Row = dict[str, str | None]


def prefixes(
    source: str, rows: list[Row], seed: int | None = None
) -> list[list[str | tuple[str, str]] | None]:
    """The prefix of each document; `seed` None: as at inference, nothing is drawn."""
    parts = parse(source)
    columns: dict[str, list[str | None]] = {
        text: values_of(text, rows, seed) for text in set(_values_in(parts))
    }
    found = []
    for document in range(len(rows)):
        shown = render(parts, columns, document)
        if shown == [] and any(kind == "group" for kind, _ in parts):
            shown = None
        found.append(shown)
    return found


def parse(source: str) -> list[tuple[str, Any]]:
    """("text", t), ("token", name), ("value", text between braces), ("group", parts)."""
    whole: list[tuple[str, Any]] = []
    parts, i = whole, 0
    while i < len(source):
        if source[i] == "\\":
            parts.append(("text", ESCAPES[source[i + 1]]))
            i += 2
        elif source[i : i + 2] in ("{{", "}}"):
            parts.append(("text", source[i]))
            i += 2
        elif source[i : i + 4] in ("[[[[", "]]]]"):
            parts.append(("text", source[i : i + 2]))
            i += 4
        elif source[i : i + 2] == "[[":
            parts = []
            i += 2
        elif source[i : i + 2] == "]]":
            whole.append(("group", parts))
            parts = whole
            i += 2
        elif source[i] == "{":
            end = source.index("}", i)
            inside = source[i + 1 : end]
            is_token = inside.startswith("token:")
            parts.append(("token", inside[6:]) if is_token else ("value", inside))
            i = end + 1
        else:
            parts.append(("text", source[i]))
            i += 1
    return whole


def render(
    parts: list[tuple[str, Any]], columns: dict[str, list[str | None]], document: int
) -> list[str | tuple[str, str]] | None:
    """One document; None where a value is missing."""
    shown: list[str | tuple[str, str]] = []

    def add(piece: str | tuple[str, str]) -> None:
        if isinstance(piece, str) and shown and isinstance(shown[-1], str):
            shown[-1] += piece
        elif piece != "":
            shown.append(piece)

    for kind, content in parts:
        if kind == "text":
            add(content)
        elif kind == "token":
            add(("token", content))
        elif kind == "value":
            value = columns[content][document]
            if value is None:
                return None
            add(value)
        else:
            for piece in render(content, columns, document) or []:
                add(piece)
    return shown


def values_of(text: str, rows: list[Row], seed: int | None) -> list[str | None]:
    """What stands in place of one placeholder in each document."""
    name, *filters = text.split("|")
    field, transform = (name, "") if name in rows[0] else name.rsplit(".", 1)
    values = [transformed(row[field], transform) for row in rows]
    counted = False
    for part in filters:
        filter_name, _, argument = part.partition("=")
        if filter_name in ("top", "min_documents"):
            if not counted:
                values = frequent(values, [f for f in filters if f.startswith(("top", "min_"))])
            counted = True
        elif filter_name == "shuffled":
            if seed is not None:
                order = permutation(len(rows), seed & MASK64, SHUFFLE_STREAM)
                shuffled = list(values)
                for i, document in enumerate(order):
                    shuffled[document] = values[order[(i + 1) % len(order)]]
                values = shuffled
        elif filter_name == "keep":
            if seed is not None:
                key = hash_pair(seed & MASK64, field_number(field))
                values = [
                    v if Decimal(hash_pair(key, d)) < Decimal(argument) * 2**64 else None
                    for d, v in enumerate(values)
                ]
        elif filter_name == "default":
            values = [argument if v is None else v for v in values]
        else:
            values = [v if v is None else number(v, filter_name, argument) for v in values]
    return values


def field_number(field: str) -> int:
    return int.from_bytes(hashlib.blake2b(field.encode(), digest_size=8).digest(), "little")


def transformed(value: str | None, transform: str) -> str | None:
    if not value:
        return None
    if transform == "host":
        return value.split("//")[1].split("/")[0] or None
    if transform in ("year", "month", "day"):
        parts = value.strip().replace("T", "-").replace(" ", "-").split("-")
        numbers = dict(zip(("year", "month", "day"), parts, strict=False))
        return numbers.get(transform)
    return value


def number(text: str, name: str, argument: str) -> str:
    value = Decimal(text)
    if name == "scale":
        product = value * Decimal(argument)
        return f"{float(product):.15g}"
    if name == "floor":
        return str(int(value.to_integral_value(ROUND_FLOOR)))
    if name == "bins":
        return str(min(int(value * int(argument)), int(argument) - 1))
    return f"{float(value):.{argument}f}"


def frequent(values: list[str | None], filters: list[str]) -> list[str | None]:
    there = [v for v in values if v is not None]
    ranked = sorted(set(there), key=lambda v: (-there.count(v), v))
    distinct = len(ranked)
    for part in filters:
        name, _, argument = part.partition("=")
        if name == "min_documents":
            ranked = [v for v in ranked if there.count(v) >= int(argument)]
        elif argument.endswith("%"):
            share = Decimal(argument[:-1]) * distinct / 100
            ranked = ranked[: math.ceil(share)]
        else:
            ranked = ranked[: int(argument)]
    return [v if v is None or v in ranked else "unknown" for v in values]


def _values_in(parts: list[tuple[str, Any]]) -> list[str]:
    return [
        text
        for kind, content in parts
        for text in (
            [content] if kind == "value" else _values_in(content) if kind == "group" else []
        )
    ]


def frequent_values(placeholder: Placeholder, counts: Mapping[str, int]) -> pa.Array:
    """The values that a placeholder's frequency filters keep, by sorting all of them.

    The number is the package's `num_frequent`; which ones is decided here.
    """
    ranked = sorted(counts, key=lambda value: (-counts[value], value))
    kept = num_frequent(placeholder, np.array(list(counts.values()), dtype=np.int64))
    return pa.array(ranked[:kept], pa.string())
