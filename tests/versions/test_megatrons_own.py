"""Megatron's own tests of its GPT dataset, run on ours.

They are in a checkout and not in the wheel: MEGATRON_TESTS names the file
`tests/unit_tests/data/test_gpt_dataset.py`. Its functions run as they are written, with these names
replaced: the dataset class by MeCo's, the configuration by one of a corpus of documents (Megatron's
mock dataset makes its own) with a tokenizer for text, the set-up of NCCL by a process group of one.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_corpus import LetterTokenizer, random_bodies, write_corpus

torch = pytest.importorskip("torch")

SOURCE = os.environ.get("MEGATRON_TESTS")
pytestmark = pytest.mark.skipif(not SOURCE, reason="MEGATRON_TESTS names no file")
# What Megatron's configuration asks for by token id, and MeCo refuses.
BY_TOKEN_ID = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Runs one of Megatron's tests."""
    from megatron_meco.config import MeCoConfig
    from megatron_meco.data.dataset import MeCoGPTDataset, MeCoGPTDatasetConfig

    bodies = random_bodies(4000)
    urls = [f"https://{i % 5}.example.org" for i in range(len(bodies))]
    corpus = write_corpus(tmp_path / "corpus", bodies, {"url": urls})

    def configure(**options: Any) -> MeCoGPTDatasetConfig:
        kept = {name: value for name, value in options.items() if name not in BY_TOKEN_ID}
        ours = {"blend": ([corpus], None), "tokenizer": LetterTokenizer(), "meco": MeCoConfig()}
        return MeCoGPTDatasetConfig(**kept | ours, path_to_cache=str(tmp_path / "cache"))

    started = not torch.distributed.is_initialized()
    if started:
        store = f"file://{tmp_path}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)

    def run(name: str) -> None:
        assert SOURCE is not None
        tree = ast.parse(Path(SOURCE).read_text())
        tree.body = [node for node in tree.body if not _is_from_tests(node)]
        [test] = [node for node in tree.body if getattr(node, "name", None) == name]
        assert isinstance(test, ast.FunctionDef)
        # A second configuration asks for Megatron's own ends of a validation split.
        configured = [
            n for n in test.body if ast.unparse(n).startswith("config = GPTDatasetConfig")
        ]
        test.body = test.body[: test.body.index(configured[1])] if configured[1:] else test.body
        names: dict[str, Any] = {"__name__": "megatrons_own"}
        exec(compile(tree, SOURCE, "exec"), names)
        names |= {
            "MockGPTDataset": MeCoGPTDataset,
            "GPTDatasetConfig": configure,
            "Utils": SimpleNamespace(initialize_distributed=lambda: None),
            "compile_helpers": lambda: None,
        }
        names[name]()

    yield run
    if started:
        torch.distributed.destroy_process_group()


def _is_from_tests(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests.")


def test_identity_and_variance_by_split_and_index(own: Callable[[str], None]) -> None:
    own("test_mock_gpt_dataset")


def test_masking_between_documents(own: Callable[[str], None]) -> None:
    own("test_inter_document_masking")
