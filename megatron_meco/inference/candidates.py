"""What a sweep tries, and on which texts: lines of files, or what stood most often in a corpus.

Counting a corpus costs one rendering of its metadata, batch by batch. What was given up: candidates
that stand in neither.
"""

from __future__ import annotations

import collections
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_meco.corpus.metadata import metadata_path, open_metadata
from megatron_meco.data.template import Template
from megatron_meco.errors import FlagError
from megatron_meco.inference.conditioning import Conditioning, parse_values

_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What the documents may be conditioned on.

    Attributes:
        name: As given, or as it stood in the corpus.
        prefix: As rendered; empty: no metadata.
    """

    name: str
    prefix: str


def most_frequent(data_path: str, conditioning: Conditioning, number: int) -> list[Candidate]:
    """What stood most often before the documents of a corpus.

    Args:
        data_path: The corpus, as in Megatron's `--data-path`.
        conditioning: Renders its metadata.
        number: How many.

    Raises:
        DataError: When the corpus has no readable metadata, or lacks a field.
    """
    table = open_metadata(data_path)
    template = Template.parse(conditioning.template)
    where = str(metadata_path(data_path))
    counts: collections.Counter[str] = collections.Counter()
    for batch in table.to_batches(_ROWS_AT_ONCE):
        # Frequency filters choose among these very values, so all of them are candidates.
        frequent = {
            p: template.values(p, batch, where)
            for p in template.placeholders
            if p.frequency_filters
        }
        for entry in template.render(batch, where, frequent).drop_null().value_counts():
            counts[entry["values"].as_py()] += entry["counts"].as_py()
    ranked = sorted(counts, key=lambda prefix: (-counts[prefix], prefix))
    return [
        Candidate(name=f"{prefix.strip()} ({counts[prefix]:,})", prefix=prefix)
        for prefix in ranked[:number]
    ]


def read_candidates(path: Path, conditioning: Conditioning) -> list[Candidate]:
    """Read candidates from a file.

    Args:
        path: One in each line: the value of the template's field, or FIELD=VALUE words where it has
            several.
        conditioning: Renders them.

    Raises:
        FlagError: When the file cannot be read, or a line cannot be rendered.
    """
    found = {}
    for line in read_lines(path, "--candidates"):
        fields = conditioning.columns
        values = {fields[0]: line} if len(fields) == 1 else parse_values(line.split())
        found[conditioning.render(values)] = line
    return [Candidate(name=name, prefix=prefix) for prefix, name in found.items()]


def read_lines(path: Path, flag: str) -> list[str]:
    """The lines of a file that hold something.

    Raises:
        FlagError: When it cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FlagError(
            f"cannot be read ({error})", where=f"{flag} {path}", remedy="Name a UTF-8 text file."
        ) from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise FlagError("holds no lines", where=f"{flag} {path}", remedy="Write some.")
    return lines


def read_texts(path: Path) -> list[str]:
    """Read texts: the lines of a file, or of a `.jsonl` the field `text` of each.

    Raises:
        FlagError: When it cannot be read, or holds none.
    """
    lines = read_lines(path, "--text")
    if path.suffix != ".jsonl":
        return lines
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise FlagError(
                f"line {number} has no text ({error!r})",
                where=f"--text {path}",
                remedy='Write one object in each line, as in {"text": "..."}.',
            ) from error
    return [text for text in texts if text]
