"""What every test relies on; heavy imports belong into the tests that need them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from runs import prepare_pages, write_tokenizer

_scratch = pytest.StashKey[str]()

# One process must not take the cores of the others (torchrun ranks, parallel test workers).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may depend on a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")


def pytest_configure(config: pytest.Config) -> None:
    """Give the processes that tests start a temporary folder of their own, which goes with them.

    Killed ranks leave files of torchrun and multiprocessing behind. Pytest's own folders stay where
    they are: its choice is made by the first call. The name is short, because sockets' names are.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.stash[_scratch] = tempfile.mkdtemp(prefix="meco-", dir=tempfile.gettempdir())
        os.environ["TMPDIR"] = config.stash[_scratch]


def pytest_unconfigure(config: pytest.Config) -> None:
    if _scratch in config.stash:
        shutil.rmtree(config.stash[_scratch], ignore_errors=True)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At most 300 tokens, BOS 0 and EOS 1."""
    return write_tokenizer(tmp_path_factory.mktemp("shared") / "tokenizer")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> str:
    """300 pages from three hosts, prepared by `meco prepare`'s own function."""
    folder = tmp_path_factory.mktemp("corpus")
    return prepare_pages(folder, tokenizer_folder)
