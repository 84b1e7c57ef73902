"""Where the sentences of a document end, by nltk's Punkt.

Nothing is downloaded. What Punkt (Kiss and Strunk, 2006) has to know about a text (abbreviations,
collocations, words that begin sentences) it learns from a sample of the user's documents, once per
preparation; all tasks use it, and the manifest keeps it. The space between two sentences goes to
the second, where byte-pair tokenizers want it, and line ends to the first; the joined sentences are
the document. Learning takes some seconds, and Punkt's pure Python is slower than the tokenizer.
Sentences without a final mark (titles, list items) are not found.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

from nltk import redos
from nltk.tokenize.punkt import (
    PunktLanguageVars,
    PunktParameters,
    PunktSentenceTokenizer,
    PunktTrainer,
)

from megatron_meco.corpus.sentences import SENTENCE_LANGUAGES, check_language

_LEARNED_CHARACTERS = 1 << 20


class _LanguageVars(PunktLanguageVars):  # type: ignore[misc]
    """Punkt's expressions for a language, without a time limit.

    nltk stops each of them after five seconds. A slow machine would then prepare another corpus
    than a fast one; the expressions are nltk's own and take time in proportion to the text.
    """

    def __init__(self, language: str) -> None:
        self.sent_end_chars = SENTENCE_LANGUAGES[language]
        self.internal_punctuation = "".join(
            mark
            for mark in PunktLanguageVars.internal_punctuation
            if mark not in self.sent_end_chars
        )
        self._context = _untimed(super().period_context_re())
        self._word = _untimed(super()._word_tokenizer_re())

    re_boundary_realignment = redos.compile(
        PunktLanguageVars.re_boundary_realignment.pattern,
        PunktLanguageVars.re_boundary_realignment.flags,
        timeout=None,
    )

    def period_context_re(self) -> Any:
        return self._context

    def _word_tokenizer_re(self) -> Any:
        return self._word


def _untimed(pattern: Any) -> Any:
    return redos.compile(pattern.pattern, pattern.flags, timeout=None)


def learn_sentences(texts: Iterable[str], language: str) -> dict[str, Any]:
    """Learn from texts what Punkt has to know about them.

    Args:
        texts: A sample of the documents; the first million characters count.
        language: One of `SENTENCE_LANGUAGES`.

    Returns:
        Input of `SentenceSplitter`, JSON-serialisable and the same for the same texts. Words are
        joined by spaces, which none contains, to keep the manifest short.

    Raises:
        FlagError: The language is unknown.
    """
    check_language(language)
    trainer = PunktTrainer(lang_vars=_LanguageVars(language))
    room = _LEARNED_CHARACTERS
    for text in texts:
        trainer.train(text[:room], finalize=False)
        room -= len(text)
        if room <= 0:
            break
    learned = trainer.get_params()
    # Words seen once say little about case, and are the majority.
    trainer.freq_threshold(ortho_thresh=2)
    contexts: dict[str, list[str]] = {}
    for word, context in sorted(learned.ortho_context.items()):
        if context:
            contexts.setdefault(str(context), []).append(word)
    return {
        "language": language,
        "nltk": importlib.metadata.version("nltk"),
        "abbreviations": " ".join(sorted(learned.abbrev_types)),
        "sentence_starters": " ".join(sorted(learned.sent_starters)),
        "collocations": " ".join(chain.from_iterable(sorted(learned.collocations))),
        "orthographic_contexts": {key: " ".join(contexts[key]) for key in sorted(contexts)},
    }


class SentenceSplitter:
    """Splits texts into sentences.

    Args:
        learned: From `learn_sentences`.
    """

    def __init__(self, learned: dict[str, Any]) -> None:
        self._learned = learned

    def split(self, text: str) -> list[str]:
        """Return the sentences of a text, with the line ends behind and the space before them.

        There is at least one, and joined they are the text.
        """
        ends = [end for _, end in self._punkt.span_tokenize(text)]
        borders = [0, *(_border(text, end) for end in ends[:-1]), len(text)]
        return [text[begin:end] for begin, end in pairwise(borders)]

    @cached_property
    def _punkt(self) -> PunktSentenceTokenizer:
        learned = self._learned
        parameters = PunktParameters()
        parameters.abbrev_types = _words(learned["abbreviations"])
        parameters.sent_starters = _words(learned["sentence_starters"])
        pairs = iter(learned["collocations"].split(" "))
        parameters.collocations = set(zip(pairs, pairs, strict=False))
        for context, words in learned["orthographic_contexts"].items():
            parameters.ortho_context.update(dict.fromkeys(_words(words), int(context)))
        return PunktSentenceTokenizer(parameters, lang_vars=_LanguageVars(learned["language"]))


def _border(text: str, end: int) -> int:
    """Return where to cut behind a sentence: after the last line end of the space, or at `end`."""
    stop = end
    while stop < len(text) and text[stop].isspace():
        stop += 1
    return max(text.rfind("\n", end, stop), text.rfind("\r", end, stop), end - 1) + 1


def _words(joined: str) -> set[str]:
    return set(joined.split(" ")) if joined else set()
