"""The manifest of a preparation, `PREFIX.prepare.json`.

The file may come from anywhere, so reading it checks that all values have the types that `meco
prepare` and `meco import-mds` write. Its CRC-32 of `.idx` and `.metadata.arrow` reveal damage that
no structural check can; comparing one costs a read of the file. That of `.bin` is compared by
`meco verify` only, because it means reading all tokens.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson

from megatron_meco.corpus.index_file import TYPE_CODES
from megatron_meco.corpus.sentences import SENTENCE_LANGUAGES
from megatron_meco.errors import DataError
from megatron_meco.whole_file import whole_file

MANIFEST_FORMAT = 3
_SUFFIX = ".prepare.json"
_CHECKED = (".bin", ".idx", ".metadata.arrow")
_REMEDY = "Copy the corpus again from where it is whole, or prepare it again."
_READ_BYTES = 1 << 20
_PART_BYTES = 16 << 20


def manifest_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the path of the manifest of the corpus at `prefix`."""
    return Path(f"{os.fspath(prefix)}{_SUFFIX}")


def read_manifest(prefix: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the manifest of a corpus.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.

    Returns:
        Empty without a manifest. Otherwise at least `documents`, `tokens` and `crc32` (hexadecimal
        by suffix).

    Raises:
        DataError: The file cannot be read, or holds something else.
    """
    path = manifest_path(prefix)
    try:
        # Opening a pipe would block forever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _damaged(path, "is no plain file")
        # Not `json`, which raises other errors for deep nesting and for long numbers.
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
    """Return the CRC-32 of a file as eight hexadecimal digits; parts are read on all cores."""
    with path.open("rb") as file, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        size = os.fstat(file.fileno()).st_size
        begins = range(0, size, _PART_BYTES)
        parts = pool.map(lambda begin: _crc32_of_part(file.fileno(), begin), begins)
        checksum = 0
        for part, num_bytes in parts:
            checksum = _joined(checksum, part, num_bytes)
    return f"{checksum:08x}"


def _crc32_of_part(descriptor: int, begin: int) -> tuple[int, int]:
    """Return the CRC-32 of the part of a file that begins there, and its bytes."""
    # Fits a core's own cache.
    buffer = memoryview(bytearray(_READ_BYTES))
    checksum, done = 0, 0
    while done < _PART_BYTES:
        room = buffer[: _PART_BYTES - done]
        num_bytes = os.preadv(descriptor, [room], begin + done)
        if num_bytes == 0:
            break
        checksum = zlib.crc32(room[:num_bytes], checksum)
        done += num_bytes
    return checksum, done


def _joined(first: int, second: int, num_bytes: int) -> int:
    """Return the CRC-32 of two parts, the second of `num_bytes` bytes.

    As zlib's `crc32_combine`, which Python lacks: the first CRC times x to the number of bits of
    the second part, as polynomials, plus the second CRC.
    """
    shift, power, exponent = 1 << 31, 1 << 30, 8 * num_bytes
    while exponent:
        if exponent & 1:
            shift = _product(shift, power)
        power = _product(power, power)
        exponent >>= 1
    return _product(shift, first) ^ second


def _product(one: int, other: int) -> int:
    """Return the product of two polynomials modulo CRC-32's; bit 0 is the highest power."""
    product = 0
    for bit in range(31, -1, -1):
        if one >> bit & 1:
            product ^= other
        other = other >> 1 ^ (0xEDB88320 if other & 1 else 0)
    return product


def check_checksum(prefix: str | os.PathLike[str], suffix: str) -> None:
    """Compare a file of a corpus with the CRC-32 in the manifest, if there is one.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.
        suffix: The end of the file's name.

    Raises:
        DataError: They differ; or the file or the manifest cannot be read.
    """
    noted = read_manifest(prefix).get("crc32", {}).get(suffix)
    if noted is None:
        return
    path = Path(f"{os.fspath(prefix)}{suffix}")
    try:
        actual = checksum_of(path)
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror or error})", where=str(path), remedy=_REMEDY
        ) from None
    if actual != noted:
        raise DataError(
            f"its CRC-32 is {actual}, {manifest_path(prefix).name} says {noted}",
            where=str(path),
            remedy=f"{_REMEDY} `meco verify` compares all files. Where the file was changed on "
            f"purpose, remove {manifest_path(prefix).name}.",
        )


def note_checksum(prefix: str | os.PathLike[str], suffix: str) -> None:
    """Update the CRC-32 of a replaced file in the manifest, if there is one.

    Args:
        prefix: The corpus, as in Megatron's `--data-path`.
        suffix: The end of the file's name.

    Raises:
        DataError: The manifest is damaged or cannot be written.
    """
    manifest = read_manifest(prefix)
    if not manifest:
        return
    manifest["crc32"][suffix] = checksum_of(Path(f"{os.fspath(prefix)}{suffix}"))
    path = manifest_path(prefix)
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    with whole_file(path, lambda reason: _damaged(path, f"cannot be written ({reason})")) as file:
        file.write(text.encode())


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
        # Other suffixes could name a file elsewhere.
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
