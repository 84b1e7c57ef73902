"""`meco tokenizer llama3 --output DIR`: Meta's Llama-3 tokenizer as a Hugging Face folder.

Meta publishes the tokenizer in its PyPI package `llama-models`, as a tiktoken file that Megatron's
tokenizers cannot read. transformers' converter, the 256 special tokens that the package lists and
four settings make a folder for `--tokenizer-type HuggingFaceTokenizer`. Its ids are compared with
the package's own before the folder appears. Takes about ten seconds. The files fall under Meta's
Llama 3 Community License: they are made on the user's machine and are no part of this project.
There is no chat template.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from megatron_meco.errors import DataError, FlagError
from megatron_meco.whole_file import whole_folder

_BOS = "<|begin_of_text|>"
_EOS = "<|end_of_text|>"
_INSTALL = "Install Meta's package: pip install 'megatron-meco[llama3]' (the licence is Meta's)."
_PROBE = (
    "Llamas hum, 12345 times!\n\n  def f(x):\treturn x  # \u00e9\u00df\n",
    "\u4f60\u597d \U0001f600 it's DON'T   \r\n\r\n<|end_of_text|>",
)


def write_llama3_tokenizer(folder: Path) -> dict[str, int]:
    """Write the tokenizer of Llama 3 as a Hugging Face folder, which must not exist.

    Returns:
        The ids of BOS and EOS by their text.

    Raises:
        FlagError: The folder exists, or the package `llama-models` is not installed.
        DataError: The result encodes differently from Meta's own code.
    """
    if os.path.lexists(folder):
        raise FlagError(f"{str(folder)!r} exists already", where="DIR", remedy="Name a new folder.")
    theirs = _theirs()
    special = sorted(theirs.special_tokens, key=theirs.special_tokens.__getitem__)
    tokenizer = _converted(special)
    backend = tokenizer.backend_tokenizer
    same_special = all(
        backend.token_to_id(token) == number for token, number in theirs.special_tokens.items()
    )
    # Special tokens are text, as in `meco prepare`.
    backend.encode_special_tokens = True
    same_text = all(
        backend.encode(text, add_special_tokens=False).ids
        == theirs.encode(text, bos=False, eos=False)
        for text in _PROBE
    )
    backend.encode_special_tokens = False
    if not (same_special and same_text):
        raise DataError(
            "the converted tokenizer gives other ids than Meta's own code",
            where="llama-models",
            remedy="Use the versions of transformers and tokenizers in constraints.txt.",
        )
    _save(tokenizer, folder)
    return {token: theirs.special_tokens[token] for token in (_BOS, _EOS)}


def _theirs() -> Any:
    try:
        from llama_models.llama3 import tokenizer as module
    except ImportError as error:
        raise FlagError(
            f"the package llama-models cannot be imported ({error})",
            where="meco tokenizer llama3",
            remedy=_INSTALL,
        ) from None
    path = Path(module.__file__).with_name("tokenizer.model")
    try:
        return module.Tokenizer(path)
    except OSError as error:
        raise DataError(str(error), where=str(path), remedy=_INSTALL) from None


def _converted(special: list[str]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from llama_models.llama3 import tokenizer as module
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import TikTokenConverter
    path = Path(module.__file__).with_name("tokenizer.model")
    converter = TikTokenConverter(vocab_file=str(path), extra_special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token=_BOS,
        eos_token=_EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
    )


def _save(tokenizer: Any, folder: Path) -> None:
    def refuse(reason: str) -> FlagError:
        return FlagError(
            f"cannot be written ({reason})",
            where=str(folder),
            remedy="Name a folder that can be created.",
        )

    with whole_folder(folder, refuse) as unfinished:
        try:
            tokenizer.save_pretrained(unfinished)
        # The Rust library has no narrower error for a full disk.
        except Exception as error:
            raise refuse(str(error)) from error
        config = unfinished / "tokenizer_config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        # transformers 5 writes a class that version 4 does not know.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
