"""Reading one iteration of a Megatron checkpoint (torch_dist), tensor by tensor.

The format stores each tensor under its global name and shape, in pieces; which pieces there are
depends on the parallel layout of the run, and is resolved here as PyTorch does when it re-shards.
No process group, no GPU and no Megatron: the objects of Megatron inside the run's state come back
as inert stand-ins. Costs the bytes of the tensors that are asked for, one layer at a time, and one
read of the index. What was given up: formats other than torch_dist, and remote storage.
"""

from __future__ import annotations

import io
import json
import pickle
import types
from argparse import Namespace
from collections.abc import Iterable, Mapping
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

_TRACKER = "latest_checkpointed_iteration.txt"
# What a broken index or a truncated file raises inside PyTorch.
_READ_ERRORS = (
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


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
        CheckpointError: When the folder is not a readable torch_dist checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _check_format(folder)
        self._reader = FileSystemReader(folder)
        self._index = self._read_index()
        self._tensors = {
            name: entry
            for name, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = {name: tuple(entry.size) for name, entry in self._tensors.items()}
        common = self._common_state()
        args = common.get("args")
        if not isinstance(args, Namespace):
            raise CheckpointError(
                "holds no flags of the run",
                where=str(folder),
                remedy="Use a checkpoint that Megatron's own training loop saved.",
            )
        self.args = args
        self.iteration = int(common.get("iteration") or 0)

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """Read a tensor, or one row of it: layers are stacked on the first dimension.

        Args:
            name: Megatron's name.
            row: Index on the first dimension; None: the whole tensor.

        Raises:
            CheckpointError: When its data is missing or damaged.
        """
        entry = self._tensors[name]
        begin, size = [0] * len(entry.size), list(entry.size)
        if row is not None:
            begin[0], size[0] = row, 1
        out = torch.empty(size, dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(offsets=torch.Size(begin), sizes=torch.Size(size))
        items = create_read_items_for_chunk_list(name, entry, [wanted])
        if sum(item.lengths.numel() for item in items) != out.numel():
            raise self._damaged(f"lacks a part of {name}")
        self._fetch(items, _IntoTensor(out))
        return out if row is None else out[0]

    def _common_state(self) -> Mapping[str, Any]:
        """What all ranks have in common: flags, iteration, schedules."""
        legacy = self.folder / "common.pt"
        if legacy.is_file():
            state = _unpickle(legacy.read_bytes(), str(legacy))
        else:
            state = _unpickle(self._object("common_state/shard_0_1"), str(self.folder))
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
        except _READ_ERRORS as error:
            raise self._damaged(f"cannot be read ({_first_line(error)})") from error

    def _read_index(self) -> Metadata:
        try:
            index = self._reader.read_metadata()
            self._reader.set_up_storage_reader(index, is_coordinator=True)
        except _READ_ERRORS as error:
            raise self._damaged(f"has no readable index ({_first_line(error)})") from error
        return index

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            what, where=str(self.folder), remedy="Copy the checkpoint again, or name another one."
        )


def find_iteration(load: Path, iteration: int | None = None) -> Path:
    """Find the folder of one iteration.

    Args:
        load: What Megatron's `--save` named, or the folder of one iteration itself.
        iteration: The iteration; None: the latest one.

    Raises:
        CheckpointError: When there is none.
    """
    if (load / "metadata.json").is_file() and iteration is None:
        return load
    remedy = "Name the folder that the run's --save named."
    if not load.is_dir():
        raise CheckpointError("no such folder", where=f"--load {load}", remedy=remedy)
    chosen = _latest(load, remedy) if iteration is None else str(iteration)
    folder = load / (chosen if chosen == "release" else f"iter_{int(chosen):07d}")
    if not folder.is_dir():
        saved = sorted(int(path.name[5:]) for path in load.glob("iter_[0-9]*"))
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
    text = tracker.read_text().strip()
    if text != "release" and not text.isdecimal():
        raise CheckpointError(
            f"{text!r} is no iteration", where=str(tracker), remedy="Give --iteration."
        )
    return text


def _check_format(folder: Path) -> None:
    try:
        backend = json.loads((folder / "metadata.json").read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError):
        backend = "no metadata.json of a distributed checkpoint"
    if backend != "torch_dist":
        raise CheckpointError(
            f"not a torch_dist checkpoint ({backend})",
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


class _StandIn:
    """Any object of a class that is not asked for: made, filled and then left alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Pass over an item of a list's kind."""

    def extend(self, values: Iterable[Any]) -> None:
        """Pass over items of a list's kind."""


class _Unpickler(pickle.Unpickler):
    """Knows flags, plain containers and tensors; everything else becomes a stand-in.

    Importing Megatron for the sake of a few enums would cost 10 to 20 seconds, and would tie the
    export to the version that wrote the checkpoint.
    """

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("argparse", "Namespace"),
            ("builtins", "set"),
            ("collections", "OrderedDict"),
            ("torch", "Size"),
            ("torch._utils", "_rebuild_tensor_v2"),
        }
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in known or is_dtype:
            return super().find_class(module, name)
        return _StandIn


def _unpickle(content: bytes, where: str) -> Any:
    # torch.load takes a module and uses these names of it.
    module = types.SimpleNamespace(
        __name__=__name__,
        Unpickler=_Unpickler,
        load=_load_plain,
    )
    try:
        return torch.load(
            io.BytesIO(content), map_location="cpu", pickle_module=module, weights_only=False
        )
    except _READ_ERRORS as error:
        raise CheckpointError(
            f"the state of the run cannot be read ({_first_line(error)})",
            where=where,
            remedy="Copy the checkpoint again, or name another one.",
        ) from error


def _load_plain(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
