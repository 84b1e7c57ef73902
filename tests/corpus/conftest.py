"""One small tokenizer for all corpus tests, and a way to write JSONL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import BOS, EOS, save_tokenizer, train_bpe
from tokenizers import processors

from megatron_meco import cli
from megatron_meco.corpus.documents import RejectedRecords, TaskReader, metadata_columns
from megatron_meco.corpus.input_files import find_files, plan_tasks

TEXT = "the text of a page and the text of the next"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder that adds BOS and EOS, and truncates, unless told not to."""
    tokenizer = train_bpe(TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    tokenizer.enable_truncation(16)
    folder = tmp_path_factory.mktemp("tokenizer")
    return save_tokenizer(tokenizer, folder, bos_token=BOS, eos_token=EOS)


@pytest.fixture(scope="session")
def tokenizer_without_eos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder that names no EOS token."""
    return save_tokenizer(train_bpe(TEXT), tmp_path_factory.mktemp("tokenizer_without_eos"))


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


@pytest.fixture
def meco(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a command and returns its status and what it printed."""

    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        status = cli.main([str(word) for word in words])
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return status, told.out + told.err

    return run
