"""Train a byte-level BPE on raw documents, as a Hugging Face folder.

Documents are read as `meco prepare` reads them, and bad lines counted in the same way. The merges
are learned by `tokenizers`, whose memory grows with the number of different words, not with the
text. The folder's files are written here, because version 5 of transformers names a tokenizer class
that version 4 refuses. There is no padding token, since Megatron packs. The tokenizer adds no BOS:
tokens at document borders belong to the packer.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_meco.corpus.documents import RejectedRecords, TaskReader
from megatron_meco.corpus.input_bytes import Part
from megatron_meco.corpus.input_files import find_files, plan_tasks
from megatron_meco.corpus.outputs import check_fields
from megatron_meco.corpus.progress import DocumentProgress
from megatron_meco.errors import DataError, FlagError
from megatron_meco.whole_file import whole_folder

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SMALLEST_VOCABULARY = 256 + 2
"""Every byte, BOS and EOS."""

_LARGEST_VOCABULARY = 1 << 24
_DOCUMENTS_BETWEEN_REPORTS = 200


@dataclass
class TrainedTokenizer:
    """The result of a training.

    Attributes:
        vocab_size: Tokens in all, BOS and EOS included.
        documents: Documents read.
        text_bytes: UTF-8 bytes of their text.
        rejected: Rejected lines by reason.
    """

    vocab_size: int = 0
    documents: int = 0
    text_bytes: int = 0
    rejected: collections.Counter[str] = field(default_factory=collections.Counter)


def train_tokenizer(
    inputs: Sequence[str | os.PathLike[str]],
    folder: Path,
    vocab_size: int,
    *,
    text_field: str = "text",
    strict: bool = False,
) -> TrainedTokenizer:
    """Train a tokenizer and write its folder.

    Args:
        inputs: Files, folders or patterns, as for `meco prepare`.
        folder: The folder to make; it must not exist.
        vocab_size: Tokens in all. A small corpus may give fewer.
        text_field: Field of the text; dots lead into nested values.
        strict: Whether the first rejected line is an error.

    Raises:
        FlagError: The vocabulary is too small or too large, or the folder exists.
        DataError: An input cannot be read, or holds no text.
    """
    if not SMALLEST_VOCABULARY <= vocab_size <= _LARGEST_VOCABULARY:
        raise FlagError(
            f"must be {SMALLEST_VOCABULARY} (every byte, BOS and EOS) to {_LARGEST_VOCABULARY:,}",
            where=f"--vocab-size {vocab_size}",
            remedy="32000 suits most corpora.",
        )
    check_fields((text_field,), "--text-field")
    if os.path.lexists(folder):
        raise FlagError(
            f"{str(folder)!r} exists already", where="--output", remedy="Name a new folder."
        )
    tasks = plan_tasks(find_files(inputs))
    found = TrainedTokenizer()
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(tasks, text_field, strict, found), trainer)
    if not found.documents:
        reasons = ", ".join(
            f"{count:,} {reason}" for reason, count in found.rejected.most_common(2)
        )
        raise DataError(
            f"hold no document ({reasons or 'they are empty'})",
            where=", ".join(os.fspath(name) for name in inputs)[:200],
            remedy="Name the field that holds the text with --text-field.",
        )
    found.vocab_size = tokenizer.get_vocab_size()
    _save(tokenizer, folder)
    return found


def _untrained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _texts(
    tasks: list[list[Part]], text_field: str, strict: bool, found: TrainedTokenizer
) -> Iterator[str]:
    rejected = RejectedRecords(strict=strict)
    reader = TaskReader(tasks, text_field, rejected, ())
    total = sum(part.end - part.begin for task in tasks for part in task)
    before = 0
    with DocumentProgress("reading", total) as progress:
        for rank in range(len(tasks)):
            for document in reader.run(rank=rank):
                found.documents += 1
                found.text_bytes += len(document.text.encode())
                if found.documents % _DOCUMENTS_BETWEEN_REPORTS == 0:
                    done = before + rejected.source_bytes
                    progress.update(done, found.documents, found.text_bytes)
                yield document.text
            found.rejected.update(one.reason for one, _ in rejected.drain())
            before += rejected.source_bytes
            rejected.reset()
        progress.update(before, found.documents, found.text_bytes)


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that transformers 4 and 5 open as `PreTrainedTokenizerFast`."""

    def refuse(reason: str) -> FlagError:
        return FlagError(
            f"cannot be written ({reason})",
            where=str(folder),
            remedy="Name a folder that can be created.",
        )

    special = {"bos_token": BOS, "eos_token": EOS}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        # No limit: the packer decides how long a sequence is.
        "model_max_length": 10**30,
    }
    with whole_folder(folder, refuse) as unfinished:
        try:
            tokenizer.save(str(unfinished / "tokenizer.json"))
        # The Rust library has no narrower error for a full disk.
        except Exception as error:
            raise refuse(str(error)) from error
        for name, value in (("tokenizer_config", config), ("special_tokens_map", special)):
            (unfinished / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", "utf-8")
