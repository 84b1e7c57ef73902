"""What a preparation left beside its corpus: `PREFIX.prepare.json`.

Whoever reads it gets a dictionary whose values have the types that `meco prepare` and `meco
import-mds` write, or a refusal: the file may come from anywhere.
"""

from __future__ import annotations

import os
import re
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from megatron_meco.corpus.index_file import TYPE_CODES
from megatron_meco.corpus.sentences import SENTENCE_LANGUAGES
from megatron_meco.errors import DataError

MANIFEST_FORMAT = 3
_SUFFIX = ".prepare.json"
_CHECKED = (".bin", ".idx", ".metadata.arrow")
_READ_BYTES = 8 << 20


def manifest_path(prefix: str | os.PathLike[str]) -> Path:
    """Return where a preparation leaves what it says of the corpus at `prefix`."""
    return Path(f"{os.fspath(prefix)}{_SUFFIX}")


def read_manifest(prefix: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a preparation said of a corpus.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.

    Returns:
        Empty where there is no such file. Otherwise `documents`, `tokens` and `crc32` (hexadecimal
        by suffix) at least.

    Raises:
        DataError: The file cannot be read, or holds something else.
    """
    path = manifest_path(prefix)
    try:
        # A pipe would be waited for, for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _damaged(path, "is no plain file")
        # Not the standard library, whose limits of depth and of digits are errors of other kinds.
        manifest = orjson.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, orjson.JSONDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _damaged(path, f"cannot be read ({reason})") from None
    if not isinstance(manifest, dict):
        raise _damaged(path, "no JSON object")
    needed = {"documents", "tokens", "crc32"}
    if "text_field" in manifest:
        needed |= {"tokenizer", "metadata_fields"}
    for key, is_right in _VALUES.items():
        if key in manifest and not is_right(manifest[key]):
            raise _damaged(path, f"{key!r} is not what a preparation writes")
        if key in needed and key not in manifest:
            raise _damaged(path, f"{key!r} is missing")
    return manifest


def checksum_of(path: Path) -> str:
    """Return the CRC-32 of a file as eight hexadecimal digits."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"


def _damaged(path: Path, what: str) -> DataError:
    return DataError(what, where=str(path), remedy="Remove it, or prepare again.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_id, value.values()))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_checksums(value: Any) -> bool:
    return isinstance(value, dict) and all(
        # Not any suffix: it would name a file of another kind, or elsewhere.
        suffix in _CHECKED and isinstance(one, str) and re.fullmatch("[0-9a-f]{8}", one)
        for suffix, one in value.items()
    )


def _is_tokenizer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("type"), str)
        and isinstance(value.get("model"), str | None)
        and isinstance(value.get("extra", {}), dict)
        and all(value.get(key) is None or _is_id(value[key]) for key in ("vocab_size", "eod"))
    )


def _are_sentences(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not isinstance(value.get("orthographic_contexts"), dict):
        return False
    texts = [value.get(key) for key in ("abbreviations", "sentence_starters", "collocations")]
    contexts = value["orthographic_contexts"]
    return (
        isinstance(value.get("language"), str)
        and value["language"] in SENTENCE_LANGUAGES
        and all(map(_is_text, [*texts, *contexts.values()]))
        and all(re.fullmatch("[0-9]{1,9}", key) for key in contexts)
    )


_VALUES: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: _is_id(value) and value <= MANIFEST_FORMAT,
    "documents": _is_id,
    "tokens": _is_id,
    "sequences": _is_id,
    "rejected": _are_counts,
    "crc32": _are_checksums,
    "token_dtype": lambda value: isinstance(value, str) and value in TYPE_CODES,
    "tokenizer": _is_tokenizer,
    "metadata_fields": _are_names,
    "text_field": _is_text,
    "sentences": _are_sentences,
}
"""What tells whether a value is of the right type."""
