"""Candidate prefixes and the texts to score: lines of files, or the most frequent in a corpus.

Counting a corpus renders its metadata once, batch by batch.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_meco.corpus.metadata import metadata_path, open_metadata
from megatron_meco.data.template import PrefixText, Template
from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.inference.conditioning import Conditioning, parse_values
from megatron_meco.untrusted.text_file import check_text, parse_json, read_lines
from megatron_meco.wording import shown

_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A prefix to try.

    Attributes:
        name: The line as given, or the prefix and its count in the corpus.
        prefix: The rendered prefix; empty for no metadata.
    """

    name: str
    prefix: str


def add_candidates_argument(add: Callable[..., Any]) -> None:
    """Add `--candidates` with `add`, the `add_argument` of a parser or group."""
    add(
        "--candidates",
        type=Path,
        metavar="FILE",
        help="one in each line: FIELD=VALUE ..., quoted as in a shell, or a JSON object; or the "
        "bare value, where the template has one field",
    )


def conditioning_of(args: argparse.Namespace) -> Conditioning:
    """Return how the model of `--model` was conditioned, before torch loads.

    Raises:
        FlagError: If it was not, and there is no `--template`.
    """
    conditioning = Conditioning.of_folder(args.model, args.template)
    if not conditioning.template:
        what = "was trained without metadata"
        if conditioning.suffix is not None:
            what = "was trained without prefixes, with metadata behind texts alone"
        raise FlagError(
            what,
            where=f"--model {args.model}",
            remedy="Give a --template to try metadata on it all the same.",
        )
    return conditioning


def count_prefixes(data_path: str, conditioning: Conditioning) -> collections.Counter[str]:
    """Count the prefixes of a corpus. Documents without a prefix are left out.

    Args:
        data_path: The corpus, as in Megatron's `--data-path`.
        conditioning: Renders its metadata.

    Raises:
        DataError: If the corpus has no readable metadata, or lacks a field.
        FlagError: If none of its documents has a prefix.
    """
    table = open_metadata(data_path)
    template = Template.parse(conditioning.template)
    where = str(metadata_path(data_path))
    counts: collections.Counter[str] = collections.Counter()
    for batch in table.to_batches(_ROWS_AT_ONCE):
        # Frequency filters choose among these values, so all of them are candidates.
        frequent = {
            p: template.values(p, batch, where)
            for p in template.placeholders
            if p.frequency_filters
        }
        for entry in template.render(batch, where, frequent).drop_null().value_counts():
            prefix = PrefixText(template.segments(entry["values"].as_py()))
            counts[prefix] += entry["counts"].as_py()
    if not counts:
        raise FlagError(
            "no document has a prefix",
            where=f"--data-path {data_path}",
            remedy="Name a corpus whose metadata fills the template.",
        )
    return counts


def most_frequent(counts: collections.Counter[str], number: int) -> list[Candidate]:
    """Return the `number` most frequent prefixes of `count_prefixes`."""
    ranked = sorted(counts, key=lambda prefix: (-counts[prefix], prefix))
    return [
        Candidate(name=f"{shown(prefix.strip())} ({counts[prefix]:,})", prefix=prefix)
        for prefix in ranked[:number]
    ]


def read_candidates(
    path: Path, conditioning: Conditioning, *, flag: str = "--candidates"
) -> list[Candidate]:
    """Read candidates from a file, one per line; blank lines are skipped, repetitions reported.

    A line is `FIELD=VALUE ...`, quoted as in a shell, or a JSON object of fields and values, or the
    bare value if the template has one field.

    Args:
        path: The file.
        conditioning: Renders them.
        flag: The flag that names the file, for messages.

    Returns:
        One candidate per prefix, named after its first line.

    Raises:
        FlagError: If a line cannot be read or rendered, or if several lines all give one prefix.
    """
    found: dict[str, tuple[int, str]] = {}
    repeated = []
    for number, line in _filled_lines(path, flag):
        where = f"{flag} {path}, line {number}"
        prefix = conditioning.render(_values(line, conditioning.columns, where), where)
        first, _ = found.setdefault(prefix, (number, line))
        if first != number:
            repeated.append(f"{number} as {first}")
    if repeated and len(found) == 1:
        [only] = found
        raise FlagError(
            f"every line gives the prefix {only!r}",
            where=f"{flag} {path}",
            remedy="Give values that render to different prefixes.",
        )
    if repeated:
        more = f" and {len(repeated) - 5:,} more" if len(repeated) > 5 else ""
        print(
            f"{flag} {path}: lines that give the same prefix as an earlier one are scored "
            f"once: {', '.join(repeated[:5])}{more}",
            file=sys.stderr,
        )
    return [Candidate(name=shown(name), prefix=prefix) for prefix, (_, name) in found.items()]


def _values(line: str, fields: Sequence[str], where: str) -> dict[str, str]:
    if line.startswith("{"):
        return _json_values(line, where)
    # A word before = may be a misspelled field name.
    named = re.match(r"([^\W\d][\w.-]*)\s*=", line)
    if len(fields) == 1 and named is None:
        return {fields[0]: line}
    if named is not None and named[1] in fields:
        try:
            return parse_values(shlex.split(line), where)
        except ValueError as error:
            if isinstance(error, MeCoError):
                raise
            raise _no_candidate(f"cannot be split into words ({error})", fields, where) from error
    if named is None:
        raise _no_candidate(f"cannot read {line!r:.80}", fields, where)
    raise _no_candidate(f"unknown field {named[1]!r}", fields, where)


def _json_values(line: str, where: str) -> dict[str, str]:
    remedy = 'Write a JSON object of texts, as in {"url": "https://en.wikipedia.org"}.'

    def refuse(reason: str) -> FlagError:
        return FlagError(reason, where=where, remedy=remedy)

    values = parse_json(line, refuse)
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise refuse("holds something else than texts")
    return values


def _no_candidate(what: str, fields: Sequence[str], where: str) -> FlagError:
    example = " ".join(f"{name}='a value'" for name in fields)
    bare = "; a bare value does not begin with a name and =" if len(fields) == 1 else ""
    return FlagError(what, where=where, remedy=f"Write {example}, or a JSON object{bare}.")


def _filled_lines(path: Path, flag: str) -> list[tuple[int, str]]:
    """Return the non-blank lines of a file, stripped, with their numbers."""
    where = f"{flag} {path}"

    def refuse(reason: str) -> FlagError:
        return FlagError(reason, where=where, remedy="Name a UTF-8 text file.")

    lines = [(number, line.strip()) for number, line in enumerate(read_lines(path, refuse), 1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        raise FlagError("holds no lines", where=where, remedy="Write some.")
    return lines


def read_texts(path: Path) -> list[str]:
    """Read texts: the lines of a file, or the field `text` of each line of a `.jsonl`.

    Raises:
        FlagError: If it cannot be read, or has no texts.
    """
    lines = _filled_lines(path, "--text")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    texts = []
    for number, line in lines:
        try:
            text = json.loads(line)["text"]
            check_text(text, f"--text {path}, line {number}")
        except MeCoError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise FlagError(
                f"line {number} has no text ({error!r})",
                where=f"--text {path}",
                remedy='Write one object in each line, as in {"text": "..."}.',
            ) from error
        texts.append(text)
    texts = [text for text in texts if text]
    if not texts:
        raise FlagError("has no text", where=f"--text {path}", remedy="Write some.")
    return texts


def read_documents(
    path: Path, conditioning: Conditioning, flag: str, limit: int | None = None
) -> list[tuple[str, str]]:
    """Read documents with their metadata from a JSON Lines file.

    Args:
        path: The file; each line has `text` and the fields of the template as strings.
        conditioning: Renders the fields.
        flag: The flag that names the file, for messages.
        limit: Most lines to read, or None.

    Returns:
        Text and prefix of each document that has both.

    Raises:
        FlagError: If a line cannot be read, or no document has a prefix.
    """
    found = []
    reason = "no document has a text"
    for number, line in _filled_lines(path, flag)[:limit]:
        where = f"{flag} {path}, line {number}"
        remedy = 'Write one object in each line, as in {"text": "...", "url": "..."}.'
        values = parse_json(line, partial(FlagError, where=where, remedy=remedy))
        text = values.get("text") if isinstance(values, dict) else None
        if not isinstance(text, str):
            raise FlagError("has no text", where=where, remedy=remedy)
        given = {
            name: values[name] for name in conditioning.columns if values.get(name) is not None
        }
        if not all(isinstance(value, str) for value in given.values()):
            raise FlagError("has a field that is not a string", where=where, remedy=remedy)
        try:
            prefix = conditioning.render(given, where) if text else ""
        except FlagError as error:
            # As in training, where such documents have no prefix.
            reason = error.what
            continue
        if text:
            found.append((text, prefix))
    if not found:
        raise FlagError(
            f"no document has a prefix ({reason})",
            where=f"{flag} {path}",
            remedy=f"Write the fields {', '.join(conditioning.columns)} beside `text`.",
        )
    return found
