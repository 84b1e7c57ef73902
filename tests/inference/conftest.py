"""A small tokenizer, an export of a synthetic checkpoint, and a real run with Megatron's logits."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from inference.launched import Trained, train_with_logits
from inference.local_tasks import LENGTH, write_tasks
from runs import prepare_pages

# torch and what is built on it are imported where they are used: collecting stays fast.


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A Llama with random weights, as `meco export` wrote it."""
    from inference.synthetic import export_random

    return export_random(tmp_path_factory.mktemp("exported"), tokenizer_folder)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Trained:
    """Four iterations with MeCo on one rank; wide heads, an uncommon RoPE base."""
    from megatron_meco.inference.export import export

    folder = tmp_path_factory.mktemp("trained")
    prepare_pages(folder, tokenizer_folder, 200)
    corpus, logits = str(folder / "pages"), folder / "logits.pt"
    train_with_logits(corpus, tokenizer_folder, folder / "ckpt", logits)
    export(folder / "ckpt", folder / "model")
    return Trained(corpus, folder / "ckpt", logits, folder / "model")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """As `exported`, with more room."""
    from inference.synthetic import export_random

    room = {"max_position_embeddings": LENGTH, "seq_length": LENGTH}
    return export_random(tmp_path_factory.mktemp("roomy"), tokenizer_folder, **room)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for `--include_path`."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def only_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of the harness's 14,000 own tasks takes eight seconds to build."""
    from lm_eval import tasks

    local = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", local)
