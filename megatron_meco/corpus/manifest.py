"""`PREFIX.prepare.json`: what `meco prepare` and `meco import-mds` say of a corpus.

Whoever reads it gets what was written or one error: the file may come from anywhere. Costs
microseconds.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from megatron_meco.corpus.index_file import TYPE_CODES
from megatron_meco.corpus.sentences import SENTENCE_LANGUAGES
from megatron_meco.errors import DataError

MANIFEST_FORMAT = 3
CHECKED_SUFFIXES = (".bin", ".idx", ".metadata.arrow")

type _Check = Callable[[Any], bool]


def manifest_path(prefix: str | os.PathLike[str]) -> Path:
    """Return where the manifest of the corpus at `prefix` lies."""
    return Path(f"{os.fspath(prefix)}.prepare.json")


def read_manifest(prefix: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what is said of a corpus.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.

    Returns:
        The manifest, whose values have the types that were written; empty where there is none.

    Raises:
        DataError: It cannot be read, or is not a manifest.
    """
    path = manifest_path(prefix)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("not a plain file")
        manifest = orjson.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, orjson.JSONDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _refusal(path, f"cannot be read ({reason})") from None
    if not isinstance(manifest, dict):
        raise _refusal(path, "holds no JSON object")
    required = {**_REQUIRED, **_DESCRIPTION} if "text_field" in manifest else _REQUIRED
    for name, check in {**_REQUIRED, **_DESCRIPTION, **_OPTIONAL}.items():
        if name not in manifest and name in required:
            raise _refusal(path, f"has no {name!r}")
        if name in manifest and not check(manifest[name]):
            raise _refusal(path, f"has a value of {name!r} that cannot be right")
    return manifest


def _refusal(path: Path, what: str) -> DataError:
    return DataError(
        what,
        where=str(path),
        remedy="Fetch the file again, or remove it: the corpus can be used without.",
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _are_checksums(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() <= set(CHECKED_SUFFIXES)
        and all(map(_is_text, value.values()))
    )


def _is_tokenizer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_text(value.get("type"))
        and isinstance(value.get("model"), str | None)
        and isinstance(value.get("extra", {}), dict)
        and _is_count(value.get("vocab_size"))
        and _is_count(value.get("eod"))
    )


def _are_sentences(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or value.get("language") not in list(SENTENCE_LANGUAGES):
        return False
    texts = [value.get(key) for key in ("abbreviations", "sentence_starters", "collocations")]
    contexts = value.get("orthographic_contexts")
    return (
        all(map(_is_text, texts))
        and isinstance(contexts, dict)
        and all(key.isdecimal() and len(key) < 10 for key in contexts)
        and all(map(_is_text, contexts.values()))
    )


_REQUIRED: dict[str, _Check] = {
    "documents": _is_count,
    "tokens": _is_count,
    "sequences": _is_count,
    "rejected": _are_counts,
    "crc32": _are_checksums,
}
# A pipeline of one's own leaves them out.
_DESCRIPTION: dict[str, _Check] = {
    "format": lambda value: _is_count(value) and value <= MANIFEST_FORMAT,
    "token_dtype": lambda value: value in list(TYPE_CODES),
    "tokenizer": _is_tokenizer,
    "metadata_fields": _are_texts,
}
_OPTIONAL: dict[str, _Check] = {"text_field": _is_text, "sentences": _are_sentences}
