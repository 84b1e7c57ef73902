"""From a chunk of JSON lines to tokens and metadata: what a worker process of `meco prepare` does.

Imports neither torch nor Megatron, so a worker starts in a second. Every line either becomes one
document or is rejected with a reason; nothing in a line can raise. Costs the tokenizer plus about
15 microseconds per document for JSON. Given up: telling duplicate keys (the last one wins, as in
every JSON library) and the position inside a broken line.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection, parent_process
from typing import Any

import numpy as np

from megatron_meco.corpus.readers import LineChunk
from megatron_meco.corpus.tokenizer import TextEncoder
from megatron_meco.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_EXCERPT_BYTES = 200


@dataclass(frozen=True)
class Rejected:
    """A line that did not become a document."""

    path: str
    """The input file, as the user named it."""

    line: int
    """The line's number, counted from 1."""

    reason: str
    """Why; one of a small set, so that reasons can be counted."""

    excerpt: str
    """The beginning of the line."""


@dataclass
class EncodedChunk:
    """The documents of one chunk of lines, in order."""

    tokens: np.ndarray[Any, Any]
    """All documents end to end, each ending with EOD."""

    lengths: list[int]
    """Tokens per document, EOD included."""

    metadata: list[list[str | None]]
    """One list of values per metadata field."""

    rejected: list[Rejected]
    """The other lines, by line number."""

    text_bytes: int
    """Bytes of text in the documents."""

    source_bytes: int
    """How far into the input file reading had come."""


@dataclass(frozen=True)
class ChunkEncoder:
    """Encodes chunks of lines; picklable, so that every worker has the same one."""

    encoder: TextEncoder
    """The tokenizer."""

    eod: int
    """The id that ends each document."""

    vocab_size: int
    """Ids must be below it."""

    dtype: str
    """The numpy type of tokens on disk."""

    text_field: str
    """Where a line's text is; dots lead into nested objects."""

    metadata_fields: tuple[str, ...]
    """The fields to keep as metadata; dots lead into nested objects."""

    def encode(self, chunk: LineChunk) -> EncodedChunk:
        """Return the documents and the rejected lines of a chunk.

        Args:
            chunk: Whole lines of one file.

        Returns:
            Its documents in order.

        Raises:
            DataError: The tokenizer gave an id outside its vocabulary.
        """
        parsed = self._parse(chunk)
        tokens: list[int] = []
        result = EncodedChunk(
            np.empty(0), [], [[] for _ in self.metadata_fields], parsed.rejected, 0, 0
        )
        for line, encoded in zip(
            parsed.lines, self.encoder.encode_batch(parsed.texts), strict=True
        ):
            if not encoded:
                reason = "no tokens" if encoded is not None else "refused by the tokenizer"
                result.rejected.append(
                    Rejected(chunk.path, line.number, reason, _excerpt(line.raw))
                )
                continue
            tokens += encoded
            tokens.append(self.eod)
            result.lengths.append(len(encoded) + 1)
            result.text_bytes += line.text_bytes
            for values, value in zip(result.metadata, line.metadata, strict=True):
                values.append(value)
        result.rejected.sort(key=lambda rejected: rejected.line)
        result.tokens = self._checked(tokens, chunk)
        result.source_bytes = chunk.source_bytes
        return result

    def _parse(self, chunk: LineChunk) -> _Parsed:
        parsed = _Parsed()
        lines = chunk.data.split(b"\n")
        if chunk.first_line == 1:
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        for number, raw in enumerate(lines, start=chunk.first_line):
            if not raw.strip():
                continue
            try:
                record = parse_record(raw)
                text, text_bytes = text_of(record, self.text_field)
            except _BadLine as bad:
                parsed.rejected.append(Rejected(chunk.path, number, str(bad), _excerpt(raw)))
                continue
            values = [metadata_of(record, name) for name in self.metadata_fields]
            parsed.lines.append(_Line(number, raw, text_bytes, values))
            parsed.texts.append(text)
        return parsed

    def _checked(self, tokens: list[int], chunk: LineChunk) -> np.ndarray[Any, Any]:
        ids = np.array(tokens, dtype=np.int64)
        # The type on disk is chosen by the vocabulary: a larger id would wrap silently.
        if len(ids) and (ids.max() >= self.vocab_size or ids.min() < 0):
            raise DataError(
                f"the tokenizer gave id {ids.max()}, its vocabulary ends at {self.vocab_size}",
                where=f"{chunk.path}, line {chunk.first_line} or later",
                remedy="The tokenizer's files disagree with each other: fetch them again.",
            )
        return ids.astype(self.dtype)


@dataclass(frozen=True)
class _Line:
    number: int
    raw: bytes
    text_bytes: int
    metadata: list[str | None]


@dataclass
class _Parsed:
    lines: list[_Line] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


class _BadLine(Exception):
    """The reason why a line is no document."""


def parse_record(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in a line.

    Args:
        raw: The line.

    Returns:
        The object.

    Raises:
        _BadLine: The line is not a JSON object in UTF-8.
    """
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise _BadLine("invalid UTF-8") from None
    except (ValueError, RecursionError):
        raise _BadLine("broken JSON") from None
    if not isinstance(record, dict):
        raise _BadLine("not a JSON object")
    return record


def text_of(record: dict[str, Any], name: str) -> tuple[str, int]:
    """Return a record's text and its size in bytes.

    Args:
        record: One line's object.
        name: The text field.

    Returns:
        The text, and its bytes in UTF-8.

    Raises:
        _BadLine: There is no usable text.
    """
    missing = object()
    text = lookup(record, name, missing)
    if text is missing:
        raise _BadLine(f"{name!r} missing")
    if text is None:
        raise _BadLine(f"{name!r} null")
    if not isinstance(text, str):
        raise _BadLine(f"{name!r} not a string")
    if not text or text.isspace():
        raise _BadLine(f"{name!r} empty")
    try:
        return text, len(text.encode("utf-8"))
    except UnicodeEncodeError:
        # An escaped half of a surrogate pair is legal JSON but no text.
        raise _BadLine("invalid UTF-8") from None


def metadata_of(record: dict[str, Any], name: str) -> str | None:
    """Return a metadata field as a string, or None when the record lacks it.

    Args:
        record: One line's object.
        name: The field; numbers and truth values are written as Python writes them, lists and
            objects as JSON.

    Returns:
        The value.
    """
    value = lookup(record, name, None)
    if value is None:
        return None
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False)
    return str(value).encode("utf-8", "replace").decode()


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


def _excerpt(raw: bytes) -> str:
    return raw[:_EXCERPT_BYTES].decode("utf-8", "replace")


_encode: Callable[[LineChunk], EncodedChunk]


def start_worker(encoder: ChunkEncoder) -> None:
    """Make this process a worker (the initialiser of the pool)."""
    global _encode
    # The pool is the parallelism; threads inside each worker would only take turns.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The parent handles the keyboard and ends the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encode = encoder.encode


def encode_in_worker(chunk: LineChunk) -> EncodedChunk:
    """Encode a chunk in a process that `start_worker` prepared."""
    return _encode(chunk)


def _exit_with_parent() -> None:
    # A killed parent cannot end its pool, and a waiting worker would wait for ever.
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
