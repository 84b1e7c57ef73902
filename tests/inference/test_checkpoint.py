"""Reading a torch_dist folder; several pieces of one tensor are in test_export's real runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from inference.synthetic import random_tensors, run_args, write_checkpoint  # noqa: E402

from megatron_meco.inference.checkpoint import (  # noqa: E402
    Checkpoint,
    CheckpointError,
    find_iteration,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    args = run_args(tmp_path / "tokenizer")
    return write_checkpoint(tmp_path / "run", args, random_tensors(args))


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
