"""One small tokenizer for all corpus tests, and a way to write JSONL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_meco.corpus.documents import RejectedRecords, TaskReader, metadata_columns
from megatron_meco.corpus.input_files import find_files, plan_tasks

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"


def _train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the text of a page and the text of the next"] * 20, trainer)
    return tokenizer


def _save(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder that adds BOS and EOS, and truncates, unless told not to."""
    tokenizer = _train()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    tokenizer.enable_truncation(16)
    folder = tmp_path_factory.mktemp("tokenizer")
    return _save(tokenizer, folder, bos_token=BOS, eos_token=EOS)


@pytest.fixture(scope="session")
def tokenizer_without_eos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder that names no EOS token."""
    return _save(_train(), tmp_path_factory.mktemp("tokenizer_without_eos"))


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes records (or raw lines as bytes) to a JSONL file."""

    def write(*lines: Any, name: str = "input.jsonl") -> Path:
        path = tmp_path / name
        encoded = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
        path.write_bytes(b"".join(line + b"\n" for line in encoded))
        return path

    return write


@pytest.fixture
def read() -> Callable[..., tuple[list[Any], list[str]]]:
    """Return a function that reads files as `meco prepare` does, without a tokenizer.

    It returns text and metadata of the documents, and the reasons of rejected records.
    """

    def read_all(*inputs: Path, fields: tuple[str, ...] = ("url",)) -> tuple[list[Any], list[str]]:
        tasks = plan_tasks(find_files(inputs))
        rejected = RejectedRecords()
        reader = TaskReader(tasks, "text", rejected, fields)
        documents = [document for rank in range(len(tasks)) for document in reader.run(rank=rank)]
        columns = zip(*metadata_columns(documents, fields), strict=True)
        texts = [document.text for document in documents]
        found = [(text, *row) for text, row in zip(texts, columns, strict=True)]
        return found, [record.reason for record, _ in rejected.drain()]

    return read_all
