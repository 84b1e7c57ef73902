"""Reading a torch_dist folder; several pieces of one tensor are in test_export's real runs."""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from inference.synthetic import random_tensors, run_args, write_run
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_meco.inference.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_iteration,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tmp_path / "tokenizer")


def test_flags_iteration_and_shapes_without_the_packages_of_the_run(saved: Path) -> None:
    checkpoint = Checkpoint(find_iteration(saved))
    assert "foreign_package" not in sys.modules
    assert checkpoint.iteration == 20
    assert checkpoint.args.meco_template == r"URL: {url.host}\n\n"
    assert checkpoint.args.params_dtype is torch.float32
    assert checkpoint.shapes["decoder.layers.mlp.linear_fc2.weight"] == (3, 16, 24)
    assert "rng_state/shard_0.0_1.1" not in checkpoint.shapes


def test_whole_tensors_and_rows(saved: Path) -> None:
    checkpoint = Checkpoint(find_iteration(saved))
    tensors = random_tensors(checkpoint.args)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
    name = "decoder.layers.self_attention.linear_qkv.weight"
    for row in range(3):
        assert torch.equal(checkpoint.read(name, row), tensors[name][row])


def test_state_in_a_file_of_its_own(saved: Path) -> None:
    folder = find_iteration(saved)
    torch.save({"args": run_args(saved, seed=99), "iteration": 20}, folder / "common.pt")
    assert Checkpoint(folder).args.seed == 99


def test_which_iteration(saved: Path) -> None:
    latest = saved / "iter_0000020"
    assert find_iteration(saved) == find_iteration(saved, 20) == find_iteration(latest) == latest
    with pytest.raises(CheckpointError, match=r"iteration 15.*Saved are: 20\."):
        find_iteration(saved, 15)
    with pytest.raises(CheckpointError, match="no such folder"):
        find_iteration(saved / "no")
    (saved / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(CheckpointError, match="iteration release"):
        find_iteration(saved)
    (saved / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(CheckpointError, match="'soon' is no iteration"):
        find_iteration(saved)
    (saved / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match=r"no latest_checkpointed_iteration\.txt"):
        find_iteration(saved)


def test_other_formats_are_named(saved: Path) -> None:
    folder = find_iteration(saved)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "fsdp_dtensor"}))
    with pytest.raises(CheckpointError, match=r"not a torch_dist checkpoint \(fsdp_dtensor\)"):
        Checkpoint(folder)
    (folder / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"no metadata\.json"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["removed", "truncated"])
def test_damage_is_a_refusal(saved: Path, name: str, damage: str) -> None:
    folder = find_iteration(saved)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "truncated":
        (folder / name).write_bytes(content[: len(content) // 9])
    with pytest.raises(CheckpointError):
        checkpoint = Checkpoint(folder)
        for tensor in checkpoint.shapes:
            checkpoint.read(tensor)


# ---- Folders that lie ----


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"-5", b"9" * 5000, b"\xff\xfe", b"20\0", b"20 30", b"2e1", b"+20", b"20.0"),
        "\u0662\u0660".encode(),
    ],
)
def test_a_tracker_that_names_no_iteration(saved: Path, content: bytes) -> None:
    (saved / "latest_checkpointed_iteration.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is no iteration. Give --iteration"):
        find_iteration(saved)
    (saved / "latest_checkpointed_iteration.txt").write_bytes(b"\n 20 \n")
    assert find_iteration(saved).name == "iter_0000020"


@pytest.mark.parametrize("iteration", [-1, 10**12, 10**400])
def test_an_iteration_that_cannot_be(saved: Path, iteration: int) -> None:
    with pytest.raises(CheckpointError, match="--iteration: cannot be"):
        find_iteration(saved, iteration)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"\xff", b'{"sharded_backend": 5}'])
def test_a_format_that_cannot_be_read(saved: Path, content: bytes) -> None:
    (find_iteration(saved) / "metadata.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a torch_dist checkpoint"):
        Checkpoint(find_iteration(saved))


NORM = "decoder.final_layernorm.weight"


def tamper(index: Any, how: str) -> None:
    """Change the index of a checkpoint."""
    norm = index.state_dict_metadata[NORM]
    place = index.storage_data[MetadataIndex(NORM, torch.Size([0]))]
    match how:
        case "a shape of more bytes":
            norm.size = norm.chunks[0].sizes = torch.Size([10**9])
        case "a shape of too many numbers":
            norm.size = norm.chunks[0].sizes = torch.Size([2**40, 2**40])
        case "a negative size":
            norm.size = (-16,)
        case "a size that is true":
            norm.size = (True,)
        case "a size that is a text":
            norm.size = "16"
        case "a piece outside of its tensor":
            norm.chunks[0].sizes = torch.Size([17])
        case "a piece of other dimensions":
            norm.chunks[0].sizes = torch.Size([4, 4])
        case "no dtype":
            norm.properties.dtype = "float32"
        case "a piece without a place":
            del index.storage_data[MetadataIndex(NORM, torch.Size([0]))]
        case "a place behind the file":
            place.offset = 10**12
        case "a place before the file":
            place.offset = -1
        case "a file elsewhere":
            place.relative_path = "../other.distcp"
        case "an absolute file":
            place.relative_path = "/etc/passwd"
        case "a folder":
            place.relative_path = ".."
        case "a name with a zero byte":
            place.relative_path = "a\0b"
        case "a missing file":
            place.relative_path = "__9_0.distcp"
        case "no table":
            index.storage_data = [1]
        case "no names":
            index.state_dict_metadata = {5: norm}


@pytest.mark.parametrize(
    "how",
    [
        *("a shape of more bytes", "a shape of too many numbers", "a negative size"),
        *("a size that is true", "a size that is a text", "a piece outside of its tensor"),
        *("a piece of other dimensions", "no dtype", "a piece without a place"),
        *("a place behind the file", "a place before the file", "a file elsewhere"),
        *("an absolute file", "a folder", "a name with a zero byte", "a missing file"),
        *("no table", "no names"),
    ],
)
def test_an_index_that_lies(saved: Path, how: str) -> None:
    folder = find_iteration(saved)
    index = pickle.loads((folder / ".metadata").read_bytes())
    tamper(index, how)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="its index cannot be used"):
        Checkpoint(folder)


def test_one_list_in_many_places_is_refused(saved: Path) -> None:
    """A crafted index of some hundred kilobytes would take minutes to read piece by piece."""
    folder = find_iteration(saved)
    index = pickle.loads((folder / ".metadata").read_bytes())
    norm = index.state_dict_metadata[NORM]
    norm.chunks = norm.chunks * 20_000
    place = index.storage_data[MetadataIndex(NORM, torch.Size([0]))]
    for i in range(3000):
        index.state_dict_metadata[f"n{i}"] = norm
        index.storage_data[MetadataIndex(f"n{i}", torch.Size([0]))] = place
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match="more pieces than bytes"):
        Checkpoint(folder)
    assert time.monotonic() - begin < 30


def test_what_no_piece_fills_is_not_left_to_chance(saved: Path) -> None:
    """Two overlapping pieces have the size of the tensor and leave a part of it unset."""
    folder = find_iteration(saved)
    index = pickle.loads((folder / ".metadata").read_bytes())
    norm = index.state_dict_metadata[NORM]
    [chunk] = norm.chunks
    chunk.sizes = torch.Size([8])
    norm.chunks = [chunk, chunk]
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    tensor = Checkpoint(folder).read(NORM)
    assert tensor[8:].isnan().all()
