"""Whether the corpora of a run are there, and hold what its template asks for.

Looks at file names and at the schema of the metadata, so it costs milliseconds and can run before
anything is built. What was given up: counting rows, which waits for the index to be open.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from megatron_meco.corpus.metadata import metadata_path, open_metadata
from megatron_meco.data.template import Template
from megatron_meco.errors import DataError


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
            if not os.path.isfile(prefix + suffix) and "://" not in prefix:
                raise DataError(
                    "no such file",
                    where=prefix + suffix,
                    remedy="Give the path without .bin or .idx; `meco prepare` makes both.",
                )
        if template is not None and template.source:
            fields = open_metadata(prefix).schema.names
            template.check_fields(fields, str(metadata_path(prefix)))
