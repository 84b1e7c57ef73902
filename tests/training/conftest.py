"""One prepared corpus for all training tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import write_pages, write_tokenizer

from megatron_meco.corpus.prepare import PrepareConfig, prepare


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer with BOS and EOS."""
    return write_tokenizer(tmp_path_factory.mktemp("training") / "tokenizer")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> str:
    """300 pages from three hosts, prepared by `meco prepare`'s own function."""
    folder = tmp_path_factory.mktemp("corpus")
    prepare(
        PrepareConfig(
            inputs=(write_pages(folder / "pages.jsonl"),),
            output=folder / "pages",
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(tokenizer_folder),
        )
    )
    return str(folder / "pages")
