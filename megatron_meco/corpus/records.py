"""What one record of the input says: its text, its metadata, or why it is no document.

Every record either becomes one document or is rejected with a reason; nothing in a record can raise
anything but `BadRecord`. JSON costs about one microsecond per kilobyte (orjson); what orjson
refuses, the standard library sees as well, which also takes `NaN` and finds lone surrogates. Given
up: telling duplicate keys (the last one wins, as in every JSON library), integers beyond 64 bits
(read as floating point) and the position inside a broken line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import orjson

_EXCERPT = 200
NO_OBJECT = "not a JSON object"
"""The reason why a line that is whole JSON is no record."""


@dataclass(frozen=True)
class Rejected:
    """A line, or another kind of record, that did not become a document."""

    path: str
    """The input file, as the user named it."""

    line: int
    """The line's number, counted from 1; in other formats the number of the row or record."""

    reason: str
    """Why; one of a small set, so that reasons can be counted."""

    excerpt: str
    """The beginning of the line."""


class BadRecord(Exception):
    """The reason why a record is no document.

    Args:
        reason: One of a small set, so that reasons can be counted.
        excerpt: The beginning of the record, where the one who rejects it does not have it.
    """

    def __init__(self, reason: str, excerpt: str = "") -> None:
        super().__init__(reason)
        self.excerpt = excerpt


def parse_record(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in a line.

    Args:
        raw: The line.

    Returns:
        The object.

    Raises:
        BadRecord: The line is not a JSON object in UTF-8.
    """
    try:
        record = orjson.loads(raw)
    except orjson.JSONDecodeError:
        record = _parse_slowly(raw)
    if not isinstance(record, dict):
        raise BadRecord(NO_OBJECT)
    return record


def _parse_slowly(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRecord("invalid UTF-8") from None
    except (ValueError, RecursionError):
        raise BadRecord("broken JSON") from None


def text_of(record: dict[str, Any], name: str) -> str:
    """Return a record's text.

    Args:
        record: One record's values by field.
        name: The text field; dots lead into nested objects.

    Returns:
        The text, which is not blank and can be written as UTF-8.

    Raises:
        BadRecord: There is no usable text.
    """
    missing = object()
    text = lookup(record, name, missing)
    if text is missing:
        raise BadRecord(f"{name!r} missing")
    if text is None:
        raise BadRecord(f"{name!r} null")
    if not isinstance(text, str):
        raise BadRecord(f"{name!r} not a string")
    if not text or text.isspace():
        raise BadRecord(f"{name!r} empty")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            # An escaped half of a surrogate pair is legal JSON but no text.
            raise BadRecord("invalid UTF-8") from None
    return text


def metadata_of(record: dict[str, Any], name: str) -> str | None:
    """Return a metadata field as a string, or None when the record lacks it.

    Args:
        record: One record's values by field.
        name: The field; numbers, truth values and dates are written as Python writes them, lists
            and objects as JSON. Dots lead into nested objects.

    Returns:
        The value.
    """
    value = record.get(name) if name in record else lookup(record, name, None)
    if value is None:
        return None
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    value = str(value)
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


def lookup(record: dict[str, Any], name: str, default: Any) -> Any:
    """Return `record["a.b"]` if there is such a key, else `record["a"]["b"]`, else the default."""
    if name in record:
        return record[name]
    value: Any = record
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            return default
        value = value[key]
    return value


def excerpt_of(raw: bytes) -> str:
    """Return the beginning of a line, as far as it is text."""
    return raw[:_EXCERPT].decode("utf-8", "replace")
