"""The languages of `meco prepare --split-sentences`.

Apart from `punkt`, because importing nltk takes two to six seconds. Languages without spaces
between sentences (Chinese, Japanese, Thai) are not supported: Punkt is not made for them.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from megatron_meco.errors import FlagError

_LATIN = (".", "?", "!")
SENTENCE_LANGUAGES: dict[str, tuple[str, ...]] = {
    # Languages of nltk's Punkt models.
    **dict.fromkeys(
        (
            "czech",
            "danish",
            "dutch",
            "english",
            "estonian",
            "finnish",
            "french",
            "german",
            "italian",
            "malayalam",
            "norwegian",
            "polish",
            "portuguese",
            "russian",
            "slovene",
            "spanish",
            "swedish",
            "turkish",
        ),
        _LATIN,
    ),
    # Languages with spaces between sentences and other marks.
    "arabic": (".", "\u061f", "!"),
    "greek": (".", ";", "\u037e", "!"),
    "hindi": (".", "?", "!", "\u0964"),
    "persian": (".", "\u061f", "!"),
    "urdu": ("\u06d4", ".", "\u061f", "!"),
}
"""The marks that may end a sentence, by language."""


def check_language(language: str) -> None:
    """Refuse a language that is not among `SENTENCE_LANGUAGES`.

    Raises:
        FlagError: It is not one of them.
    """
    if language not in SENTENCE_LANGUAGES:
        raise FlagError(
            f"sentences of {language!r} are not supported",
            where="--sentence-language",
            remedy=f"Use one of: {', '.join(sorted(SENTENCE_LANGUAGES))}.",
        )


def sentences_digest(learned: dict[str, Any] | None) -> str | None:
    """Return a digest of everything that decides the sentences; None if documents are not split."""
    if learned is None:
        return None
    return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()
