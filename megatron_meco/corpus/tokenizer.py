"""Megatron's tokenizers without Megatron's argument object, and bulk encoding of plain text.

`build_tokenizer` returns the object that Megatron builds for the same flags, so preparation and
training agree. `text_encoder` turns it into something that a worker process can receive. For
Hugging Face tokenizers that is the Rust tokenizer alone: importing Megatron costs each worker 7 to
20 seconds. Text encodes to text tokens only: no BOS, no EOS, and a `<|end_of_text|>` in a page
stays text instead of ending the document. Megatron offers no way to ask other tokenizers for that
last guarantee.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import logging
import os
import re
import stat
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tokenizers import Tokenizer

from megatron_meco.errors import FlagError

if TYPE_CHECKING:
    from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText

# Megatron's flags and their defaults (a test compares them with its TokenizerConfig).
TOKENIZER_DEFAULTS: dict[str, Any] = {
    "vocab_size": None,
    "vocab_file": None,
    "merge_file": None,
    "metadata_path": None,
    "special_tokens": None,
    "tiktoken_pattern": None,
    "tiktoken_num_special_tokens": 1000,
    "tokenizer_sentencepiece_legacy": False,
    "tokenizer_sentencepiece_ignore_extra_whitespaces": True,
    "tokenizer_hf_no_use_fast": False,
    "tokenizer_hf_no_include_special_tokens": False,
    "trust_remote_code": False,
    "null_tokenizer_eod_id": None,
    "null_tokenizer_pad_id": -1,
    "chat_template": None,
}

# Megatron's types for plain text; its chat and image types are left out.
TOKENIZER_TYPES = (
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
    "GPT2BPETokenizer",
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "NullTokenizer",
)
_TYPES_WITHOUT_MODEL = (
    "GPT2BPETokenizer",
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "NullTokenizer",
)

# Types of settings that are not bool.
_SETTING_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("vocab_file", "merge_file", "metadata_path", "tiktoken_pattern", "chat_template"), (str,)
    ),
    **dict.fromkeys(
        (
            "vocab_size",
            "tiktoken_num_special_tokens",
            "null_tokenizer_eod_id",
            "null_tokenizer_pad_id",
        ),
        (int,),
    ),
    "special_tokens": (list, tuple),
}

# Their names in Megatron 0.17.
_OLDER_NAMES = {"tokenizer_special_tokens": "special_tokens", "tokenizer_metadata": "metadata_path"}
# These decide the number of embeddings, which nothing here needs.
_NO_PADDING = {
    "padded_vocab_size": None,
    "make_vocab_size_divisible_by": 1,
    "tensor_model_parallel_size": 1,
    "rank": 0,
}

# Ids on disk are int32 at most.
_MAX_VOCABULARY = 1 << 31

# Letters, case, digits, white space and scripts, to tell encoders apart.
_PROBE = "a Probe, 12345 x\tyz\n\n  def f(x):  return x  # \u00e9\u00df \u4f60\u597d \U0001f600"


class TextEncoder(Protocol):
    """Turns plain texts into token ids; can be sent to another process."""

    def encode_batch(self, texts: list[str]) -> list[list[int] | None]:
        """Return the tokens of each text, without BOS and EOS; None if a text is refused."""
        ...


def build_tokenizer(
    tokenizer_type: str, tokenizer_model: str | None, **extra: Any
) -> MegatronTokenizerText:
    """Build Megatron's text tokenizer for the given flags.

    Args:
        tokenizer_type: Megatron's `--tokenizer-type`.
        tokenizer_model: Megatron's `--tokenizer-model`: a folder or file.
        **extra: Further tokenizer fields of Megatron, named as in `TOKENIZER_DEFAULTS`.

    Raises:
        FlagError: The type is unknown, or the model cannot be loaded.
    """
    _check_flags(tokenizer_type, tokenizer_model, extra)
    # Late: the import takes seconds, and wrong flags are answered before it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core
        from megatron.core.tokenizers import MegatronTokenizer

        try:
            from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as build
        except ModuleNotFoundError:
            build = functools.partial(_build_without_megatrons, MegatronTokenizer)
    flags = _Flags(
        tokenizer_type=tokenizer_type,
        tokenizer_model=tokenizer_model,
        # Padding depends on the tensor-parallel size, known only in training.
        pad_vocab_size=False,
        **{**_NO_PADDING, **TOKENIZER_DEFAULTS, **extra},
    )
    hub: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    remedy = "Name the folder or file that this tokenizer type reads."
    if tokenizer_model and _is_asked_of_the_hub(tokenizer_type, tokenizer_model):
        print(
            f"{tokenizer_model!r} is no folder here; asking the Hugging Face hub", file=sys.stderr
        )
        hub = _without_warnings_of("huggingface_hub")
        remedy = "There is no such folder here: name one, or what the hub has."
    try:
        with hub:
            return build(flags)
    except _UnknownFlagError as error:
        raise FlagError(
            f"Megatron's tokenizer asks for the setting {str(error)!r}, which is not known here",
            where=f"megatron-core {getattr(megatron.core, '__version__', 'of an unknown version')}",
            remedy="Install a version that this package supports; `meco doctor` names it.",
        ) from error
    # Loaders raise exceptions of any type.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FlagError(
            f"{tokenizer_model!r} does not load as {tokenizer_type} ({reason})",
            where="--tokenizer-model",
            remedy=remedy,
        ) from error


@contextlib.contextmanager
def _without_warnings_of(name: str) -> Iterator[None]:
    """Silence a logger below errors: the hub's client tells of each of a minute's retries."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _build_without_megatrons(tokenizer_class: Any, flags: _Flags) -> MegatronTokenizerText:
    """As Megatron-Core's `build_tokenizer`, which was part of the trainer before 0.17."""
    if flags.tokenizer_type != "HuggingFaceTokenizer":
        raise ValueError("this Megatron-Core builds only Hugging Face tokenizers")
    tokenizer: MegatronTokenizerText = tokenizer_class.from_pretrained(
        tokenizer_path=flags.tokenizer_model,
        metadata_path=flags.metadata_path or {"library": "huggingface"},
        vocab_file=flags.vocab_file,
        merges_file=flags.merge_file,
        additional_special_tokens=flags.special_tokens or [],
        use_fast=not flags.tokenizer_hf_no_use_fast,
        trust_remote_code=flags.trust_remote_code,
        include_special_tokens=not flags.tokenizer_hf_no_include_special_tokens,
    )
    return tokenizer


class _UnknownFlagError(AttributeError):
    """A setting without a default here and in the installed Megatron."""


class _Flags(Namespace):
    """Megatron's tokenizer flags; those that are not set have the defaults of its parser."""

    def __getattr__(self, name: str) -> Any:
        if name in _OLDER_NAMES:
            return getattr(self, _OLDER_NAMES[name])
        if name.startswith("__") or name not in _parser_defaults():
            raise _UnknownFlagError(name)
        return _parser_defaults()[name]


@cache
def _parser_defaults() -> dict[str, Any]:
    """Return the defaults of the installed Megatron's tokenizer flags; empty without its trainer.

    They are the fields of a dataclass, from which Megatron makes its parser. Read from the source,
    because importing megatron.training takes ten seconds and more.
    """
    import megatron.core

    found: dict[str, Any] = {}
    source = Path(megatron.core.__file__).parents[1] / "training/config/training_config.py"
    if not source.is_file():
        return found
    nodes = ast.parse(source.read_text(encoding="utf-8")).body
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    fields = [line for one in classes if one.name == "TokenizerConfig" for line in one.body]
    for field in fields:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            with contextlib.suppress(ValueError, StopIteration):
                found[field.target.id] = _default(field.value)
    return found


def _default(value: ast.expr | None) -> Any:
    """Return the value of a field: a literal, or `field(default=LITERAL)`."""
    if isinstance(value, ast.Call):
        value = next(keyword.value for keyword in value.keywords if keyword.arg == "default")
    if value is None:
        raise ValueError("a field without a default")
    return ast.literal_eval(value)


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse an object that is not a Megatron tokenizer, such as one of transformers.

    Raises:
        FlagError: Says how to build one.
    """
    if not hasattr(tokenizer, "unique_identifiers") or not hasattr(tokenizer, "tokenize"):
        kind = type(tokenizer)
        raise FlagError(
            f"{kind.__module__}.{kind.__qualname__} is not a Megatron tokenizer",
            where="tokenizer",
            remedy="Build one with megatron_meco.corpus.tokenizer.build_tokenizer("
            "'HuggingFaceTokenizer', FOLDER).",
        )


def resolve_eod(tokenizer: MegatronTokenizerText) -> int:
    """Return the id that ends a document.

    Raises:
        FlagError: The tokenizer has none, or one outside of its vocabulary; or it is none of
            Megatron's.
    """
    check_tokenizer(tokenizer)
    eod = _attribute(tokenizer, "eod")
    if eod is None:
        raise FlagError(
            "the tokenizer has no end-of-document token",
            where="--tokenizer-model",
            remedy="Give it an EOS token (`eos_token` in its tokenizer_config.json).",
        )
    if not 0 <= eod < tokenizer.vocab_size:
        raise FlagError(
            f"end-of-document id {eod} outside the vocabulary of {tokenizer.vocab_size}",
            where="--tokenizer-model",
            remedy="Use a tokenizer whose EOS token is part of its vocabulary.",
        )
    return eod


def resolve_bos(tokenizer: MegatronTokenizerText) -> int | None:
    """Return the id that begins a document, or None if the tokenizer has none.

    Raises:
        FlagError: It is not a Megatron tokenizer.
    """
    check_tokenizer(tokenizer)
    bos = _attribute(tokenizer, "bos")
    return bos if bos is not None and 0 <= bos < tokenizer.vocab_size else None


def token_ids(tokenizer: MegatronTokenizerText, names: Iterable[str], where: str) -> dict[str, int]:
    """Return the ids of tokens by their names in the vocabulary.

    Args:
        tokenizer: Megatron's tokenizer.
        names: As the vocabulary spells them, such as `<|context_begin|>`.
        where: The flag that names them, for the message.

    Raises:
        FlagError: The vocabulary lacks one; or it is not a Megatron tokenizer.
    """
    check_tokenizer(tokenizer)
    return {name: _token_id(tokenizer, name, where) for name in names}


def _token_id(tokenizer: MegatronTokenizerText, name: str, where: str) -> int:
    found = None
    # For an unknown token, libraries raise some error, or return the name or the id of UNK.
    with contextlib.suppress(Exception):
        library = tokenizer._tokenizer
        found = library.tokens_to_ids([name])[0]
        if library.ids_to_tokens([found])[0] != name:
            found = None
    if not isinstance(found, int) or not 0 <= found < tokenizer.vocab_size:
        raise unknown_token(name, where)
    return found


def unknown_token(name: str, where: str) -> FlagError:
    """The error for a token that a vocabulary lacks."""
    return FlagError(
        f"the tokenizer has no token {name!r}",
        where=where,
        remedy="Add it to the tokenizer as a special token, or name one that it has.",
    )


def text_encoder(tokenizer: MegatronTokenizerText) -> TextEncoder:
    """Return the fastest encoder that gives this tokenizer's ids for plain text and adds no tokens.

    Raises:
        FlagError: It is not a Megatron tokenizer.
    """
    check_tokenizer(tokenizer)
    through_megatron = MegatronEncoder(tokenizer)
    # Megatron has no public way to the tokenizer that it wraps.
    wrapped = getattr(tokenizer._tokenizer, "tokenizer", None)
    backend = getattr(wrapped, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        direct = HuggingFaceEncoder(backend.to_str())
        if direct.encode_batch([_PROBE]) == through_megatron.encode_batch([_PROBE]):
            return direct
    return through_megatron


class HuggingFaceEncoder:
    """Encodes with the Rust tokenizer alone, which takes a tenth of a second to import.

    Args:
        serialized: The tokenizer as JSON (`tokenizer.json`).
    """

    def __init__(self, serialized: str) -> None:
        self.serialized = serialized

    def __reduce__(self) -> tuple[type[HuggingFaceEncoder], tuple[str]]:
        return (HuggingFaceEncoder, (self.serialized,))

    def encode_batch(self, texts: list[str]) -> list[list[int] | None]:
        """Return the tokens of each text."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.serialized)
        # A saved tokenizer may have both, and would silently cut documents.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Not serialised, so it has to be set after loading.
        tokenizer.encode_special_tokens = True
        return tokenizer


class MegatronEncoder:
    """Encodes through Megatron's tokenizer, one text at a time.

    Args:
        tokenizer: Megatron's tokenizer; another process builds its own from the same arguments.
    """

    def __init__(self, tokenizer: MegatronTokenizerText) -> None:
        self._tokenizer = tokenizer
        self._begin, self._num_trailing = _added_tokens(tokenizer)

    def __reduce__(self) -> tuple[Any, ...]:
        tokenizer = self._tokenizer
        return (
            rebuild_megatron_encoder,
            (tokenizer.library, tokenizer.path, tokenizer.additional_args),
        )

    def encode_batch(self, texts: list[str]) -> list[list[int] | None]:
        """Return the tokens of each text; None if the tokenizer refuses it."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int] | None:
        try:
            ids = list(self._tokenizer.tokenize(text))
        except ValueError:
            return None
        return ids[self._begin : len(ids) - self._num_trailing]


def rebuild_megatron_encoder(
    library: str, path: str | None, arguments: dict[str, Any]
) -> MegatronEncoder:
    """Build an encoder again from its pickled arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.tokenizers import MegatronTokenizer
    return MegatronEncoder(
        MegatronTokenizer.from_pretrained(
            tokenizer_path=path, metadata_path={"library": library}, **arguments
        )
    )


def _added_tokens(tokenizer: MegatronTokenizerText) -> tuple[int, int]:
    """Return how many tokens the tokenizer puts before and after a text."""
    try:
        one, two = tokenizer.tokenize("a"), tokenizer.tokenize("a a")
    except ValueError:
        # NullTokenizer reads numbers only and adds nothing.
        return 0, 0
    special = {_attribute(tokenizer, name) for name in ("bos", "eos", "eod", "cls", "sep")}
    begin = int(bool(one) and one[0] in special and two[0] == one[0])
    end = int(len(one) > begin and one[-1] in special and two[-1] == one[-1])
    return begin, end


def _attribute(tokenizer: MegatronTokenizerText, name: str) -> int | None:
    """Return a special id, or None; libraries raise various errors for one that they lack."""
    try:
        value = getattr(tokenizer, name)
    # The SentencePiece wrapper raises NameError for CLS and SEP.
    except (AttributeError, NameError, NotImplementedError, TypeError):
        return None
    return value if isinstance(value, int) else None


def _check_flags(tokenizer_type: str, tokenizer_model: str | None, extra: dict[str, Any]) -> None:
    if tokenizer_type not in TOKENIZER_TYPES:
        raise FlagError(
            f"unknown tokenizer type {tokenizer_type!r}",
            where="--tokenizer-type",
            remedy=f"Use one of: {', '.join(TOKENIZER_TYPES)}.",
        )
    unknown = sorted(extra.keys() - TOKENIZER_DEFAULTS.keys())
    if unknown:
        raise FlagError(
            f"unknown tokenizer settings {unknown}",
            where="build_tokenizer",
            remedy=f"Use Megatron's names: {', '.join(TOKENIZER_DEFAULTS)}.",
        )
    _check_settings(extra)
    for name, path in (
        ("tokenizer_model", tokenizer_model),
        ("vocab_file", extra.get("vocab_file")),
        ("merge_file", extra.get("merge_file")),
    ):
        _check_file(path, f"--{name.replace('_', '-')}")
    if tokenizer_type in _TYPES_WITHOUT_MODEL:
        return
    if not tokenizer_model:
        raise FlagError(
            f"{tokenizer_type} needs a model",
            where="--tokenizer-model",
            remedy="Name the folder or file that this tokenizer type reads.",
        )
    is_remote = _is_asked_of_the_hub(tokenizer_type, tokenizer_model)
    if not os.path.exists(tokenizer_model) and not is_remote:
        raise FlagError(
            f"no such folder or file: {tokenizer_model!r}",
            where="--tokenizer-model",
            remedy="Name the folder or file that this tokenizer type reads.",
        )


def _check_settings(extra: dict[str, Any]) -> None:
    """Refuse values that a `PREFIX.prepare.json` from anywhere can hold, but no command line."""
    for name, value in extra.items():
        kinds = _SETTING_TYPES.get(name, (bool,))
        if value is not None and type(value) not in kinds:
            told = " or ".join(kind.__name__ for kind in kinds)
            raise FlagError(
                f"{value!r} is no {told}",
                where=f"--{name.replace('_', '-')}",
                remedy="Use a value of the type that Megatron's flag has.",
            )
    for name, least in (("vocab_size", 1), ("tiktoken_num_special_tokens", 0)):
        number = extra.get(name)
        if number is not None and not least <= number < _MAX_VOCABULARY:
            raise FlagError(
                f"{number} tokens",
                where=f"--{name.replace('_', '-')}",
                remedy=f"Use a number between {least} and {_MAX_VOCABULARY - 1:,}.",
            )


def _check_file(path: str | None, flag: str) -> None:
    """Refuse files that block, or whose name no `PREFIX.prepare.json` can hold."""
    if path is None:
        return
    try:
        path.encode()
        mode = os.stat(path).st_mode
    except UnicodeEncodeError:
        raise FlagError(
            f"the name {path!r} is not UTF-8", where=flag, remedy="Rename it."
        ) from None
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise FlagError(
            f"{path!r} is no plain file", where=flag, remedy="Name a folder or a plain file."
        )


def _is_asked_of_the_hub(tokenizer_type: str, name: str) -> bool:
    is_absent = not os.path.exists(name)
    return is_absent and tokenizer_type == "HuggingFaceTokenizer" and _is_hub_name(name)


def _is_hub_name(name: str) -> bool:
    # `organisation/name`, unless there is such a folder here.
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None
    return is_name and not os.path.isdir(name.partition("/")[0])
