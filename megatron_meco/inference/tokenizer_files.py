"""The run's tokenizer, read from its Hugging Face folder and written into an exported model.

Reads the JSON files and the Rust tokenizer only: it takes a tenth of a second, and no class of
transformers affects the result. The written tokenizer adds BOS to a text, as in every document of
the run, so that tools which know nothing of MeCo prompt the model correctly. Supports
`HuggingFaceTokenizer` with a `tokenizer.json`.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from megatron_meco.errors import FlagError
from megatron_meco.untrusted.text_file import read_json

_COPIED = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
)
# What `write_tokenizer` may write.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", *_COPIED)
_MOST_RANKS = 64


@dataclass(frozen=True, kw_only=True)
class Words:
    """The run's tokenizer.

    Attributes:
        folder: Its folder.
        tokenizer: Its `tokenizer.json`.
        config: Its `tokenizer_config.json`.
        size: Tokens, special ones included.
        bos: Token before each document of the run, or None.
        eos: Token after each document.
        bos_text: Text of `bos`, or None if the tokenizer has none.
        eos_text: Text of `eos`.
    """

    folder: Path
    tokenizer: Tokenizer
    config: dict[str, Any]
    size: int
    bos: int | None
    eos: int
    bos_text: str | None
    eos_text: str


def read_tokenizer(args: Namespace, given: Path | None = None) -> Words:
    """Read the run's tokenizer, as Megatron reads it.

    Args:
        args: The run's flags.
        given: Its folder, or None for the one in the run's flags.

    Raises:
        FlagError: If it is incomplete, or not the one of the run.
    """
    folder = _find(args, given)
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # The Rust library raises a plain `Exception`.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise _refusal(f"has a tokenizer.json that cannot be read ({reason})", folder) from error
    config = _read_object(folder, "tokenizer_config.json")
    is_there = (folder / "special_tokens_map.json").is_file()
    named = _read_object(folder, "special_tokens_map.json") if is_there else {}
    texts = {name: _text(value) for name, value in {**named, **config}.items()}
    # As in Megatron, CLS and SEP stand in for missing BOS and EOS.
    bos_text = texts.get("bos_token") or texts.get("cls_token")
    eos_text = texts.get("eos_token") or texts.get("sep_token")
    eos = None if eos_text is None else tokenizer.token_to_id(eos_text)
    if eos is None or eos_text is None:
        raise _refusal("has no EOS token", folder)
    bos = None if bos_text is None else tokenizer.token_to_id(bos_text)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    _check_size(size, args, folder)
    return Words(
        folder=folder,
        tokenizer=tokenizer,
        config=config,
        size=size,
        # Megatron's own datasets put no BOS before a document.
        bos=bos if getattr(args, "meco", False) else None,
        eos=eos,
        bos_text=bos_text,
        eos_text=eos_text,
    )


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    content = read_json(
        folder / name, lambda reason: _refusal(f"has a {name} that {reason}", folder)
    )
    if not isinstance(content, dict):
        raise _refusal(f"has a {name} that holds no object", folder)
    return content


def _find(args: Namespace, given: Path | None) -> Path:
    folder = given or Path(str(args.tokenizer_model))
    if given is None and args.tokenizer_type != "HuggingFaceTokenizer":
        raise FlagError(
            f"the run used {args.tokenizer_type}, which is no Hugging Face folder",
            where="--tokenizer",
            remedy="Give the same tokenizer as a Hugging Face folder with a tokenizer.json.",
        )
    if not (folder / "tokenizer.json").is_file():
        raise _refusal("has no tokenizer.json", folder)
    return folder


def _check_size(size: int, args: Namespace, folder: Path) -> None:
    """Refuse a tokenizer that cannot be the run's: the padded size follows from its size."""
    padded, step = args.padded_vocab_size, args.make_vocab_size_divisible_by
    fits = size <= padded
    if getattr(args, "vocab_size", None) is None and getattr(args, "pad_vocab_size", True):
        # Any tensor-parallel size may have decided: a resumed run keeps what its checkpoint had.
        multiples = (step * ranks for ranks in range(1, _MOST_RANKS + 1))
        fits = padded in {-(-size // multiple) * multiple for multiple in multiples}
    if not fits:
        what = f"has {size:,} tokens, which does not give the run's {padded:,} padded ones"
        raise _refusal(what, folder)


def _refusal(what: str, folder: Path) -> FlagError:
    return FlagError(
        f"{str(folder)!r} {what}",
        where="--tokenizer",
        remedy="Give the Hugging Face tokenizer folder that the run's --tokenizer-model named.",
    )


def _text(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def write_tokenizer(folder: Path, words: Words) -> None:
    """Write a tokenizer that transformers 4 and 5 load, and that begins a text as training did."""
    for name in _COPIED:
        if (words.folder / name).is_file():
            shutil.copyfile(words.folder / name, folder / name)
    config = {
        **words.config,
        # transformers 5 writes a class that 4 refuses; both know this class.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": words.bos_text,
        "eos_token": words.eos_text,
    }
    # Names code in the tokenizer's folder, which is not copied.
    config.pop("auto_map", None)
    tokenizer = Tokenizer.from_str(words.tokenizer.to_str())
    # A saved tokenizer may have both, and would silently cut prompts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if words.bos is not None and words.bos not in tokenizer.encode("a").ids:
        # The model never saw a document without BOS, and tools that know nothing of MeCo rely on
        # the tokenizer to add it.
        _add_bos(tokenizer, str(words.bos_text), words.bos)
        config["add_bos_token"] = True
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _add_bos(tokenizer: Tokenizer, text: str, bos: int) -> None:
    template = processors.TemplateProcessing(
        single=[text, "$A"], pair=[text, "$A", f"{text}:1", "$B:1"], special_tokens=[(text, bos)]
    )
    earlier = tokenizer.post_processor
    tokenizer.post_processor = (
        template if earlier is None else processors.Sequence([earlier, template])
    )
