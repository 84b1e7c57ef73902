"""Whether the corpora of a run are there, whole, and hold what its template asks for.

`check_corpora` looks at file names and at the footer of the metadata, so it costs milliseconds and
can run before anything is built. `check_files` reads the whole index (see `corpus/index_file.py`)
before Megatron maps it, once for each index: the data cache remembers it. What was given up:
comparing the tokens with a checksum, which is what `meco verify` does.
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
"""Part of every record's name; raise it when more is checked."""


def check_corpora(prefixes: Iterable[str], template: Template | None) -> None:
    """Refuse corpora that are not there, or that lack the fields of the template.

    Args:
        prefixes: Paths without suffix.
        template: What conditions their documents; None: nothing does.

    Raises:
        DataError: For a missing file or field.
        FlagError: For an unknown transform.
    """
    for prefix in prefixes:
        for suffix in (".idx", ".bin"):
            if "://" not in prefix:
                _check_there(prefix + suffix)
        if template is not None and template.placeholders:
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
