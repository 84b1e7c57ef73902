"""The samples of a run are the same under every Megatron: their hashes are written down."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron_meco.config import MeCoConfig
from megatron_meco.data.packed_batches import PlainRun

EXPECTED = json.loads(Path(__file__).with_name("expected.json").read_text())["samples"]


@pytest.mark.parametrize("packing", ["truncate", "split", "best-fit"])
def test_samples_have_the_bytes_that_they_had(
    corpus: str, tokenizer_folder: Path, tmp_path: Path, packing: str
) -> None:
    """Two epochs of a weighted blend, the cooldown, and both views of validation."""
    run = PlainRun(
        [0.3, corpus, 0.7, corpus],
        tokenizer=tokenizer_folder,
        sequence_length=64,
        num_steps=20,
        global_batch_size=8,
        num_valid_samples=10,
        split="80,20,0",
        meco=MeCoConfig(packing=packing, plain_fraction=0.1),
        cache_folder=tmp_path,
    )
    assert hash_of(run.train, 160) + hash_of(run.valid, 10) == EXPECTED[packing]


def hash_of(dataset: Any, num_samples: int) -> str:
    digest = hashlib.sha256()
    for index in range(num_samples):
        for key, value in sorted(dataset[index].items()):
            if key != "dataset_id":
                digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:16]
