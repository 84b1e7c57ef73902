"""Checks that the corpora of a run exist, are intact, and have the fields of its template.

`check_corpora` reads file names and the footer of the metadata, which takes milliseconds, so it
runs before anything is built. `check_files` reads the whole index (see `corpus/index_file.py`)
before Megatron maps it, once for each index: the data cache records it. Only `meco verify` compares
the tokens with a checksum.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from megatron_meco.corpus.index_file import check_index
from megatron_meco.corpus.manifest import check_checksum, read_manifest
from megatron_meco.corpus.metadata import describe_metadata, metadata_path
from megatron_meco.data.array_file import check_once
from megatron_meco.data.fingerprint import digest, file_identity
from megatron_meco.data.template import Template
from megatron_meco.errors import DataError

KIND = "record of a check"
_VERSION = 1
"""Part of the name of every record; increase it when more is checked."""


def check_corpora(prefixes: Iterable[str], *templates: Template) -> None:
    """Check that corpora exist and have the fields of the templates.

    Args:
        prefixes: Paths without suffix.
        *templates: Those of their prefixes and suffixes.

    Raises:
        DataError: A file or field is missing.
        FlagError: A transform is unknown.
    """
    for prefix in prefixes:
        for suffix in (".idx", ".bin"):
            if "://" not in prefix:
                _check_there(prefix + suffix)
        for template in templates:
            if template.placeholders:
                fields, _ = describe_metadata(prefix)
                template.check_fields(fields, str(metadata_path(prefix)))


def check_files(prefix: str, cache_folder: Path) -> None:
    """Refuse a local corpus whose `.idx` and `.bin` are damaged or do not fit one another.

    Args:
        prefix: Its path without suffix.
        cache_folder: Where it is remembered that they do.

    Raises:
        DataError: Names the file and what is wrong with its numbers.
    """
    for suffix in (".idx", ".bin"):
        _check_there(prefix + suffix)
    noted = read_manifest(prefix).get("crc32", {}).get(".idx")
    size = os.path.getsize(f"{prefix}.bin")
    key = [_VERSION, file_identity(f"{prefix}.idx"), size, noted]

    def check() -> None:
        check_index(prefix)
        check_checksum(prefix, ".idx")

    check_once(cache_folder / f"{digest(key)}-checked.meco", KIND, check)


def _check_there(path: str) -> None:
    if not os.path.isfile(path):
        raise DataError(
            "no such file",
            where=path,
            remedy="Give the path without .bin or .idx; `meco prepare` makes both.",
        )
