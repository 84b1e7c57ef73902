"""Reads one iteration of a Megatron checkpoint (torch_dist), tensor by tensor.

The format stores each tensor under its global name and shape, in pieces. Which pieces there are
depends on the parallel layout of the run; PyTorch's re-sharding code resolves them here. Needs no
process group, GPU or Megatron: Megatron's objects inside the run's state come back inert, and
nothing that the folder pickles is run (`untrusted/`). Memory holds the tensors that are asked for,
one layer at a time. Reads local torch_dist folders only.
"""

from __future__ import annotations

import io
import json
import math
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_meco.errors import MeCoError
from megatron_meco.untrusted.checkpoint_index import DTYPES, read_index
from megatron_meco.untrusted.inert_pickle import READ_ERRORS, Inert, read_saved
from megatron_meco.wording import first_line, shown

_TRACKER = "latest_checkpointed_iteration.txt"
_MOST_DIGITS = 12


class CheckpointError(MeCoError):
    """A checkpoint that is missing, damaged, or not what the command can work on."""


class Checkpoint:
    """One iteration of a run.

    Args:
        folder: The folder of that iteration.

    Attributes:
        folder: As given.
        shapes: Global shape of each tensor, by Megatron's name; optimizer state included.
        args: The run's parsed flags.
        iteration: Training steps that were finished.

    Raises:
        CheckpointError: If the folder is not a readable torch_dist checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _check_format(folder)
        self._index = self._read_index()
        # Its own `read_metadata` would run the index.
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._index, is_coordinator=True)
        self._tensors = {
            name: entry
            for name, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = {name: tuple(entry.size) for name, entry in self._tensors.items()}
        common = self._common_state()
        args, iteration = common.get("args"), common.get("iteration") or 0
        fields = args.state if isinstance(args, Inert) else None
        if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
            raise CheckpointError(
                "holds no flags of the run",
                where=str(folder),
                remedy="Use a checkpoint that Megatron's own training loop saved.",
            )
        if not isinstance(iteration, int) or not 0 <= iteration < 10**_MOST_DIGITS:
            raise self._damaged(f"its iteration is {iteration!r:.40}")
        self.args = Namespace()
        vars(self.args).update(fields)
        self.iteration = int(iteration)

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """Read a tensor, or one row of it: layers are stacked on the first dimension.

        Raises:
            CheckpointError: If its data is missing or damaged.
        """
        entry = self._tensors[name]
        begin, size = [0] * len(entry.size), list(entry.size)
        if row is not None:
            begin[0], size[0] = row, 1
        dtype = entry.properties.dtype
        # Elements that no piece fills stay NaN and are detected.
        out = torch.full(size, math.nan if dtype.is_floating_point else 0, dtype=dtype)
        wanted = ChunkStorageMetadata(offsets=torch.Size(begin), sizes=torch.Size(size))
        items = create_read_items_for_chunk_list(name, entry, [wanted])
        if sum(item.lengths.numel() for item in items) != out.numel():
            raise self._damaged(f"lacks a part of {name}")
        self._fetch(items, _IntoTensor(out))
        return out if row is None else out[0]

    def _common_state(self) -> Mapping[str, Any]:
        """What all ranks have in common: flags, iteration, schedules."""
        legacy = self.folder / "common.pt"
        try:
            if legacy.is_file():
                content = legacy.read_bytes()
            else:
                content = self._object("common_state/shard_0_1")
            state = read_saved(content, DTYPES)
        except READ_ERRORS as error:
            if isinstance(error, MeCoError):
                raise
            reason = first_line(error)
            raise self._damaged(f"the state of the run cannot be read ({reason})") from error
        if isinstance(state, list) and state:
            state = state[0]
        if not isinstance(state, Mapping):
            raise self._damaged("holds no state of the run")
        return state

    def _object(self, name: str) -> bytes:
        if name not in self._index.state_dict_metadata:
            raise self._damaged(f"lacks {name}")
        nothing = torch.Size([0])
        index = MetadataIndex(name)
        item = ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)
        planner = _IntoBytes()
        self._fetch([item], planner)
        return planner.content

    def _fetch(self, items: list[ReadItem], planner: DefaultLoadPlanner) -> None:
        try:
            self._reader.read_data(LoadPlan(items), planner).wait()
        except READ_ERRORS as error:
            raise self._damaged(f"cannot be read ({first_line(error)})") from error

    def _read_index(self) -> Metadata:
        try:
            return read_index(self.folder)
        except READ_ERRORS as error:
            raise self._damaged(f"its index cannot be used ({first_line(error)})") from error

    def _damaged(self, what: str) -> CheckpointError:
        # It may name a tensor, and names come from the file.
        return CheckpointError(
            shown(what),
            where=str(self.folder),
            remedy="Copy the checkpoint again, or name another one.",
        )


def find_iteration(load: Path, iteration: int | None = None) -> Path:
    """Find the folder of one iteration.

    Args:
        load: What Megatron's `--save` named, or the folder of one iteration itself.
        iteration: The iteration, or None for the latest.

    Raises:
        CheckpointError: If there is none.
    """
    if iteration is not None and not 0 <= iteration < 10**_MOST_DIGITS:
        raise CheckpointError(
            f"cannot be {iteration!s:.40}",
            where="--iteration",
            remedy="Give the number of a checkpoint, as in iter_0009000.",
        )
    if (load / "metadata.json").is_file() and iteration is None:
        return load
    remedy = "Name the folder that the run's --save named."
    if not load.is_dir():
        raise CheckpointError("no such folder", where=f"--load {load}", remedy=remedy)
    chosen = _latest(load, remedy) if iteration is None else str(iteration)
    folder = load / (chosen if chosen == "release" else f"iter_{int(chosen):07d}")
    if not folder.is_dir():
        names = (path.name for path in load.glob("iter_*"))
        saved = sorted(int(name[5:]) for name in names if re.fullmatch("iter_[0-9]{1,12}", name))
        raise CheckpointError(
            f"no checkpoint of iteration {chosen}",
            where=f"--load {load}",
            remedy=f"Saved are: {', '.join(map(str, saved)) or 'none'}.",
        )
    return folder


def _latest(load: Path, remedy: str) -> str:
    tracker = load / _TRACKER
    if not tracker.is_file():
        raise CheckpointError(f"no {_TRACKER} in it", where=f"--load {load}", remedy=remedy)
    with tracker.open("rb") as file:
        content = file.read(64)
    text = content.decode("utf-8", "backslashreplace").strip()
    # ASCII digits only.
    if not re.fullmatch(rf"release|[0-9]{{1,{_MOST_DIGITS}}}", text):
        raise CheckpointError(
            f"{text!r} is no iteration", where=str(tracker), remedy="Give --iteration."
        )
    return text


def _check_format(folder: Path) -> None:
    try:
        content = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        backend = str(content["sharded_backend"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        backend = "no metadata.json of a distributed checkpoint"
    if backend != "torch_dist":
        raise CheckpointError(
            f"not a torch_dist checkpoint ({backend:.80})",
            where=str(folder),
            remedy="Save with Megatron's default, --ckpt-format torch_dist.",
        )


class _IntoTensor(DefaultLoadPlanner):
    """Puts the pieces of one tensor in their places."""

    def __init__(self, out: torch.Tensor) -> None:
        super().__init__()
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        place = self._out
        bounds = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        for dimension, (offset, length) in enumerate(bounds):
            place = place.narrow(dimension, offset, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: the place was a view."""


class _IntoBytes(DefaultLoadPlanner):
    """Keeps the bytes of one object."""

    content = b""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.content = value.getvalue()
