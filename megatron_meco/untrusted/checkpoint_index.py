"""Reads and checks the index of a torch_dist checkpoint (`.metadata`) without running it.

PyTorch unpickles the index, which runs whatever its author put there. Here its objects come back
inert (`inert_pickle`) and are rebuilt as PyTorch's own after every number was checked: each piece
lies inside its tensor, and each place inside a file that exists and is long enough. So no later
step allocates more than the folder holds, or reads a file outside it. Costs about 50 microseconds
per piece. A missing file is an error even if nobody asks for its tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_meco.untrusted.inert_pickle import Inert, read_pickle

INDEX = ".metadata"
# Immutable and not callable, as `read_pickle` asks.
DTYPES: dict[tuple[str, str], Any] = {
    ("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a piece is stored, with the attribute names that PyTorch's reader uses.

    Attributes:
        relative_path: File in the checkpoint's folder.
        offset: First byte in the file.
        length: Number of bytes.
        transform_descriptors: Names of the encodings of the bytes; None if they are plain.
    """

    relative_path: str
    offset: int
    length: int
    transform_descriptors: tuple[str, ...] | None


def read_index(folder: Path) -> Metadata:
    """Read and check the index.

    Args:
        folder: The folder of one iteration.

    Returns:
        The index, for PyTorch's `FileSystemReader.set_up_storage_reader`.

    Raises:
        Exception: One of `inert_pickle.READ_ERRORS`, with the reason as its message.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError("no such file")
    content = path.read_bytes()
    top = _fields(read_pickle(content, DTYPES))
    sizes = _FileSizes(folder)
    places = {
        _piece(key): _place(value, sizes) for key, value in _mapping(top["storage_data"]).items()
    }
    entries: dict[str, Any] = {}
    num_pieces = 0
    for name, entry in _mapping(top["state_dict_metadata"]).items():
        if not isinstance(name, str):
            raise ValueError(f"a name that is no text: {name!r}")
        if not _names(entry, "TensorStorageMetadata"):
            entries[name] = BytesStorageMetadata()
            continue
        # A crafted file can refer to one list of pieces any number of times. A real one needs some
        # ten bytes per piece.
        num_pieces += len(_list(_fields(entry)["chunks"]))
        if num_pieces > len(content):
            raise ValueError("it has more pieces than bytes")
        entries[name] = _tensor(entry)
        _check_places(name, entries[name], places)
    return Metadata(state_dict_metadata=entries, storage_data=places)


class _FileSizes:
    """Sizes in bytes of the files that the index names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, int] = {}

    def of(self, name: str) -> int:
        if name not in self._known:
            if "/" in name or "\0" in name or name in ("", ".", ".."):
                raise ValueError(f"it names {name!r}, which is no file of the folder")
            path = self._folder / name
            if not path.is_file():
                raise ValueError(f"{name} is missing")
            self._known[name] = path.stat().st_size
        return self._known[name]


def _tensor(entry: Inert) -> TensorStorageMetadata:
    fields = _fields(entry)
    size = _numbers(fields["size"])
    if math.prod(size) >= 2**60:
        raise ValueError(f"a shape that no tensor has: {size}")
    properties = fields["properties"]
    # (dtype, layout, requires_grad, memory format, pinned); only the first matters.
    dtype = properties.state[0] if isinstance(properties, Inert) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor of an unknown type: {dtype!r}")
    chunks = []
    for chunk in _list(fields["chunks"]):
        parts = _fields(chunk)
        offsets, sizes = _numbers(parts["offsets"]), _numbers(parts["sizes"])
        if not len(offsets) == len(sizes) == len(size) or any(
            begin + length > most for begin, length, most in zip(offsets, sizes, size, strict=True)
        ):
            raise ValueError("a piece that is no part of its tensor")
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), chunks)


def _check_places(
    name: str, tensor: TensorStorageMetadata, places: dict[MetadataIndex, Place]
) -> None:
    for chunk in tensor.chunks:
        place = places.get(MetadataIndex(name, chunk.offsets))
        if place is None:
            raise ValueError(f"it does not say where {name} lies")
        needed = chunk.sizes.numel() * tensor.properties.dtype.itemsize
        if place.length < needed and place.transform_descriptors is None:
            raise ValueError(f"{name} has fewer bytes than its shape needs")


def _piece(key: Any) -> MetadataIndex:
    fields = _fields(key)
    offset = fields.get("offset")
    if not isinstance(fields["fqn"], str):
        raise ValueError("a name that is no text")
    return MetadataIndex(fields["fqn"], None if offset is None else _numbers(offset))


def _place(value: Any, sizes: _FileSizes) -> Place:
    fields = _fields(value)
    name, offset, length = fields["relative_path"], fields["offset"], fields["length"]
    offset, length = _numbers((offset, length))
    if not isinstance(name, str):
        raise ValueError("a file name that is no text")
    if offset + length > sizes.of(name):
        raise ValueError(f"{name} is cut short")
    coded = fields.get("transform_descriptors")
    if coded is not None:
        coded = tuple(str(one) for one in _list(coded))
    return Place(
        relative_path=name, offset=offset, length=length, transform_descriptors=coded or None
    )


# ---- Kinds of values ----


def _names(value: Any, name: str) -> bool:
    # By the last part of the name: PyTorch has moved these classes before.
    return isinstance(value, Inert) and value.qualified_name.rpartition(".")[2] == name


def _fields(value: Any) -> dict[str, Any]:
    if not isinstance(value, Inert) or not isinstance(value.state, dict):
        raise ValueError(f"something else where an object with fields belongs: {value!r:.80}")
    return value.state


def _mapping(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"something else where a table belongs: {value!r:.80}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"something else where a list belongs: {value!r:.80}")
    return list(value)


def _numbers(value: Any) -> tuple[int, ...]:
    numbers = tuple(_list(value))
    # PyTorch's sizes are signed 64-bit integers.
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"something else where sizes belong: {value!r:.80}")
    return numbers
