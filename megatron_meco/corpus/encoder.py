"""Texts to token ids in bulk: gigatoken where it gives the same ids, else the tokenizer itself.

gigatoken is about fifty times as fast as Hugging Face's tokenizers and returns arrays.
`choose_encoder` compares both on probes and on a sample of the user's text, and falls back with a
reason. A process on another machine than the one that compared checks its first batch again.
Special tokens written in a text stay text. `DocumentEncoder` makes Megatron sequences: documents,
or their sentences. Loading costs a second per process. SentencePiece and tiktoken models do not go
through gigatoken: Megatron gives their flags (spaces, prefixes) a meaning of its own.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from megatron_meco.corpus.text_arrays import text_buffers
from megatron_meco.corpus.tokenizer import (
    HuggingFaceEncoder,
    TextEncoder,
    build_tokenizer,
    resolve_eod,
    text_encoder,
)
from megatron_meco.errors import DataError

if TYPE_CHECKING:
    from megatron_meco.corpus.punkt import SentenceSplitter

_CHECKED_TEXTS = 256
_CHECKED_CHARACTERS = 1 << 18
_PROBES = (
    "a Probe, 12345 x\tyz\n\n  def f(x):  return x  # \u00e9\u00df \u4f60\u597d \U0001f600",
    "it's DON'T  we\u2019ll \r\n\r\n \n\t mixed\u00a0spaces\u3000and\u200bmarks\ufeff",
    "e\u0301 \u0000\u0007\u007f\u0085\u2028 \u0915\u094d\u0937"
    " \u0645\u0631\u062d\u0628\u0627 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    " " * 300 + "x" * 300 + "\n" * 50 + "0123456789" * 20 + "-=" * 100,
)


ENCODERS = ("auto", "gigatoken", "huggingface")


class BulkEncoder(Protocol):
    """Turns many texts into one array of ids."""

    def encode(self, texts: list[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the ids of all texts end to end, and each text's number of ids (-1: refused)."""
        ...


class ListBulkEncoder:
    """A bulk encoder over an encoder that returns lists."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    def encode(self, texts: list[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the ids of all texts end to end, and each text's number of ids (-1: refused)."""
        lists = self._encoder.encode_batch(texts)
        lengths = np.array([-1 if ids is None else len(ids) for ids in lists], dtype=np.int64)
        total = int(lengths.clip(0).sum())
        ids = chain.from_iterable(ids for ids in lists if ids is not None)
        return np.fromiter(ids, dtype=np.int64, count=total), lengths


class GigatokenEncoder:
    """A bulk encoder over gigatoken; runs on the calling thread.

    Args:
        serialized: A Hugging Face tokenizer as JSON.

    Raises:
        Exception: gigatoken cannot read it; its errors have no common type.
    """

    def __init__(self, serialized: str) -> None:
        import gigatoken

        settings = json.loads(serialized)
        # Special tokens in a text are text. Nothing is added, truncated or padded.
        added = settings.get("added_tokens") or []
        settings["added_tokens"] = [token for token in added if not token.get("special")]
        settings.update(post_processor=None, truncation=None, padding=None)
        self._tokenizer = gigatoken.Tokenizer.from_json(json.dumps(settings))

    def encode(
        self, texts: list[str] | pa.Array
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the ids of all texts end to end, and each text's number of ids.

        Args:
            texts: Strings; a string array without nulls is not copied into Python.
        """
        given = _as_awkward(texts) if isinstance(texts, pa.Array) else texts
        try:
            layout = self._tokenizer.encode_batch(given, parallel=False).layout
        except BaseException as error:
            # A Rust panic is no Exception, and other processes cannot unpickle it.
            if type(error).__name__ != "PanicException":
                raise
            raise DataError(
                f"gigatoken panicked ({str(error).splitlines()[0][:120]})",
                where="--encoder gigatoken",
                remedy="Prepare with --encoder huggingface.",
            ) from None
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


def _as_awkward(texts: pa.Array) -> Any:
    """A string array in the form that gigatoken takes, over the same bytes."""
    import awkward

    assert pa.types.is_string(texts.type) and not texts.null_count, texts.type
    characters, borders, _ = text_buffers(texts)
    contents, parameters = awkward.contents, "__array__"
    return awkward.Array(
        contents.ListOffsetArray(
            awkward.index.Index64(borders.astype(np.int64)),
            contents.NumpyArray(characters, parameters={parameters: "char"}),
            parameters={parameters: "string"},
        )
    )


def fast_encoder(encoder: TextEncoder, sample: list[str]) -> GigatokenEncoder | None:
    """Return gigatoken's encoder for a tokenizer, or None if it gives other ids or cannot read it.

    Args:
        encoder: The tokenizer's own encoder.
        sample: Texts to compare, besides the probes.
    """
    if not isinstance(encoder, HuggingFaceEncoder):
        return None
    return _compared(encoder, _compared_texts(encoder, sample))[0]


def build_encoder(
    tokenizer_type: str,
    tokenizer_model: str | None,
    tokenizer_extra: dict[str, Any] | None = None,
    sample: list[str] | None = None,
    encoder: str = "auto",
) -> dict[str, Any]:
    """Build Megatron's tokenizer and choose how texts are encoded.

    Args:
        tokenizer_type: Megatron's `--tokenizer-type`.
        tokenizer_model: Megatron's `--tokenizer-model`.
        tokenizer_extra: Further tokenizer settings, by Megatron's names.
        sample: Texts to compare gigatoken's ids on.
        encoder: `auto`; `gigatoken` refuses to fall back; `huggingface` never compares.

    Returns:
        What `choose_encoder` returns, and `eod`, `eod_text`, `vocab_size` and `dtype`.

    Raises:
        FlagError: The tokenizer cannot be built, or has no EOD in its vocabulary.
        DataError: gigatoken was asked for and gives other ids.
    """
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_model, **(tokenizer_extra or {}))
    from megatron.core.datasets.indexed_dataset import DType

    eod = resolve_eod(tokenizer)
    chosen = choose_encoder(
        text_encoder(tokenizer), sample or [], allow_gigatoken=encoder != "huggingface"
    )
    if encoder == "gigatoken" and chosen["kind"] != "gigatoken":
        raise DataError(
            f"gigatoken cannot be used ({chosen['reason']})",
            where="--encoder gigatoken",
            remedy="Leave --encoder out.",
        )
    return {
        **chosen,
        "eod": eod,
        "eod_text": str(tokenizer.detokenize([eod])),
        "vocab_size": tokenizer.vocab_size,
        "dtype": DType.optimal_dtype(tokenizer.vocab_size).__name__,
    }


def choose_encoder(
    encoder: TextEncoder, sample: list[str], *, allow_gigatoken: bool = True
) -> dict[str, Any]:
    """Choose how texts are encoded.

    Args:
        encoder: The tokenizer's own encoder.
        sample: Texts of the corpus; some of them are compared.
        allow_gigatoken: False: the tokenizer's own encoder, without a comparison.

    Returns:
        `kind` ("gigatoken", "huggingface", "megatron"), `reason` (one line for the user), and what
        `encoder_of` needs.
    """
    if not isinstance(encoder, HuggingFaceEncoder):
        arguments = encoder.__reduce__()[1]
        reason = "Megatron's own tokenizer: gigatoken is used for Hugging Face tokenizers only"
        return {"kind": "megatron", "reason": reason, "arguments": list(arguments)}
    serialized = encoder.serialized
    chosen = {"kind": "huggingface", "serialized": serialized}
    if not allow_gigatoken:
        return {**chosen, "reason": "Hugging Face tokenizers, as requested"}
    texts = _compared_texts(encoder, sample)
    fast, reason = _compared(encoder, texts)
    if fast is None:
        return {**chosen, "reason": f"Hugging Face tokenizers: {reason}"}
    characters = sum(map(len, texts))
    return {
        **chosen,
        "kind": "gigatoken",
        "reason": f"gigatoken, ids equal to Hugging Face's on {len(texts):,} texts "
        f"({characters / 1e6:.1f} M characters)",
    }


def _compared_texts(encoder: HuggingFaceEncoder, sample: list[str]) -> list[str]:
    return [*_PROBES, *_special_texts(encoder.serialized), *_checked_part(sample)]


def _compared(encoder: HuggingFaceEncoder, texts: list[str]) -> tuple[GigatokenEncoder | None, str]:
    """The encoder of gigatoken if it gives the tokenizer's ids for these texts, or why not."""
    try:
        fast = GigatokenEncoder(encoder.serialized)
        differing = _first_difference(fast, ListBulkEncoder(encoder), texts)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic is no Exception
        what = (str(error).splitlines() or [type(error).__name__])[0]
        return None, f"gigatoken cannot ({what[:120]})"
    if differing is not None:
        return None, f"gigatoken gives other ids, first for the text {differing[:60]!r}"
    return fast, ""


def encoder_digest(chosen: dict[str, Any]) -> str:
    """Return a digest of everything that decides the ids."""
    made_of = {key: chosen.get(key) for key in ("serialized", "arguments")}
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def encoder_of(chosen: dict[str, Any]) -> BulkEncoder:
    """Make the encoder that `choose_encoder` chose."""
    if chosen["kind"] == "megatron":
        from megatron_meco.corpus.tokenizer import rebuild_megatron_encoder

        return ListBulkEncoder(rebuild_megatron_encoder(*chosen["arguments"]))
    slow = ListBulkEncoder(HuggingFaceEncoder(chosen["serialized"]))
    if chosen["kind"] == "huggingface":
        return slow
    fast = GigatokenEncoder(chosen["serialized"])
    if chosen.get("compared_on", platform.node()) == platform.node():
        return fast
    return _CheckedOnce(fast, slow)


class _CheckedOnce:
    """Compares the first batch with the tokenizer itself: another machine may run other code."""

    def __init__(self, fast: BulkEncoder, slow: BulkEncoder) -> None:
        self._fast, self._slow = fast, slow
        self._is_checked = False

    def encode(self, texts: list[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if not self._is_checked:
            differing = _first_difference(self._fast, self._slow, _checked_part(texts))
            if differing is not None:
                raise DataError(
                    f"gigatoken gives other ids here than Hugging Face's tokenizer for the text "
                    f"{differing[:60]!r}",
                    where=platform.node(),
                    remedy="Prepare with --encoder huggingface.",
                )
            self._is_checked = True
        return self._fast.encode(texts)


def _checked_part(texts: list[str]) -> list[str]:
    """Return texts spread over the sample, up to a size that takes half a second to compare."""
    step = max(len(texts) // _CHECKED_TEXTS, 1)
    part, room = [], _CHECKED_CHARACTERS
    for text in texts[::step]:
        part.append(text[:room])
        room -= len(text)
        if room <= 0:
            break
    return part


def _special_texts(serialized: str) -> list[str]:
    added = json.loads(serialized).get("added_tokens") or []
    return [f"x{token['content']}y {token['content']}" for token in added[:64]]


def _first_difference(one: BulkEncoder, other: BulkEncoder, texts: list[str]) -> str | None:
    # Text by text, which also finds ids that move from one text into the next.
    for text in texts:
        (a, a_lengths), (b, b_lengths) = one.encode([text]), other.encode([text])
        if not (np.array_equal(a, b) and np.array_equal(a_lengths, b_lengths)):
            return text
    return None


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents as ids, cut into Megatron sequences, without EODs.

    Attributes:
        ids: The ids of all documents end to end, shape [ids].
        lengths: Ids per document, int64, shape [documents]; -1: refused by the tokenizer.
        sequence_lengths: Ids per sequence, none zero, int64, shape [sequences].
        num_sequences: Sequences per document, int64, shape [documents]; 0 without ids.
    """

    ids: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]
    sequence_lengths: np.ndarray[Any, Any]
    num_sequences: np.ndarray[Any, Any]

    def sequence_lengths_with_eod(self) -> np.ndarray[Any, Any]:
        """Return tokens per sequence, with an EOD in the last sequence of each document."""
        lengths = self.sequence_lengths.copy()
        ends = np.cumsum(self.num_sequences)[self.num_sequences > 0]
        lengths[ends - 1] += 1
        return lengths


class DocumentEncoder:
    """Encodes documents, each as one sequence or as one per sentence.

    Args:
        encoder: Encodes texts.
        learned: From `learn_sentences`; None: a document is one sequence.
    """

    def __init__(self, encoder: BulkEncoder, learned: dict[str, Any] | None = None) -> None:
        self._encoder = encoder
        self._splitter: SentenceSplitter | None = None
        if learned is not None:
            # Late: the import takes seconds, and few corpora need it.
            from megatron_meco.corpus.punkt import SentenceSplitter

            self._splitter = SentenceSplitter(learned)

    def encode(self, texts: list[str]) -> EncodedDocuments:
        """Encode documents.

        A sentence without ids (white space alone, to some tokenizers) is no sequence. A document is
        refused if one of its sentences is.
        """
        if self._splitter is None:
            ids, lengths = self._encoder.encode(texts)
            has_ids = lengths > 0
            return EncodedDocuments(ids, lengths, lengths[has_ids], has_ids.astype(np.int64))
        sentences = [self._splitter.split(text) for text in texts]
        ids, lengths = self._encoder.encode(list(chain.from_iterable(sentences)))
        document_of = np.repeat(np.arange(len(texts)), [len(one) for one in sentences])
        is_refused = np.zeros(len(texts), dtype=bool)
        is_refused[document_of[lengths < 0]] = True
        if is_refused.any():
            dropped = is_refused[document_of]
            ids = ids[np.repeat(~dropped, lengths.clip(0))]
            lengths = np.where(dropped, 0, lengths)
        has_ids = lengths > 0
        totals = np.zeros(len(texts), dtype=np.int64)
        np.add.at(totals, document_of, lengths)
        totals[is_refused] = -1
        num_sequences = np.bincount(document_of[has_ids], minlength=len(texts))
        return EncodedDocuments(ids, totals, lengths[has_ids], num_sequences)
