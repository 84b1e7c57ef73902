"""Reads the shards of mosaicml-streaming (MDS, version 2) without that package.

The package pins numpy 2.1 and transformers 4, which would hold back everything else. A folder has
an `index.json` that describes its shards. A shard is a uint32 number of rows, uint32 offsets of the
rows and of the end, the writer's settings as JSON, and the rows. A row is the uint32 sizes of its
columns of variable size, then the values of all columns, in the order of the index
(`streaming/base/format/mds`, 0.13). Everything is little-endian. Size, hashes and number of rows
are compared with the index, and all bounds are checked before a row is read. Costs the memory of
one unpacked shard (64 MiB unless its writer chose otherwise) and about a microsecond per value.
Zstandard is the only compression, and hashes are those of `hashlib` and `xxhash`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
import zstandard

from megatron_meco.corpus.input_bytes import is_remote, open_source
from megatron_meco.corpus.input_files import walk_once
from megatron_meco.errors import DataError, FlagError

INDEX_NAME = "index.json"
_SHARD = ".mds"
_PIECE = 8 << 20
_MOST_BYTES = 1 << 40
_FETCH = "Fetch the shard again."
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_SCALARS = {
    "int": "<i8",
    **{name: np.dtype(name).newbyteorder("<").str for name in _INTEGERS},
    **{f"float{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
}
INTEGER_ENCODINGS = ("int", *_INTEGERS)
"""Encodings of columns that hold one whole number."""
_TEXTS = ("str", "json", "str_int", "str_float", "str_decimal")
# Types by the first byte of an array without a fixed type.
_ARRAY_TYPES = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    32: "uint32",
    33: "int32",
    64: "uint64",
    65: "int64",
}


@dataclass(frozen=True)
class Shard:
    """What an index says about one shard.

    Attributes:
        path: The stored file.
        is_compressed: Whether it is compressed by Zstandard.
        num_rows: Its rows.
        num_bytes: Its bytes, uncompressed.
        stored_bytes: Bytes of the file.
        hashes: Hexadecimal digests of the file by algorithm.
        columns: Encodings by column name, in the order in a row.
        sizes: Bytes of a value by column; None: it varies.
    """

    path: str
    is_compressed: bool
    num_rows: int
    num_bytes: int
    stored_bytes: int
    hashes: dict[str, str]
    columns: dict[str, str]
    sizes: tuple[int | None, ...]


def find_indices(folder: str) -> list[str]:
    """Return the paths of a folder's index, or of those of its subfolders by name.

    Links to folders are followed, each folder once.

    Args:
        folder: A folder, or the URL of one that has its own index.

    Raises:
        DataError: There is none, or a subfolder has shards and no index.
    """
    own = f"{folder.rstrip('/')}/{INDEX_NAME}"
    if is_remote(folder) or os.path.isfile(own):
        return [own]
    found = []
    try:
        for place, folders, names in walk_once(folder.rstrip("/") or "/"):
            if INDEX_NAME in names:
                # It describes everything below it.
                folders.clear()
                found.append(os.path.join(place, INDEX_NAME))
            elif any(_SHARD in name for name in names):
                raise DataError(
                    f"shards without their {INDEX_NAME}",
                    where=place,
                    remedy="Fetch the file, or leave the folder out.",
                )
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror or error})",
            where=str(error.filename or folder),
            remedy="Name folders that can be read.",
        ) from None
    if not found:
        raise DataError(
            f"no {INDEX_NAME}",
            where=folder,
            remedy="Name folders that mosaicml-streaming wrote, with their index.",
        )
    return sorted(found, key=lambda path: path.split("/"))


def read_index(path: str) -> tuple[list[Shard], str]:
    """Read an `index.json`; return its shards in order and the SHA-256 of the file.

    Raises:
        DataError: It cannot be read, or is no index of MDS shards in version 2.
    """
    try:
        with open_source(path) as file:
            raw = file.read()
        index = json.loads(raw)
        if index["version"] != 2:
            raise ValueError(f"version {index['version']}")
        shards = [_shard(path.rpartition("/")[0], told) for told in index["shards"]]
    except DataError:
        raise
    except (
        *(OSError, ImportError, ValueError, KeyError, TypeError, AttributeError),
        RecursionError,
    ) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else str(error)
        reason = (missing.splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"not a readable index of MDS shards ({reason})",
            where=path,
            remedy="Fetch it again; version 2 of the format is read.",
        ) from None
    return shards, hashlib.sha256(raw).hexdigest()


def _shard(folder: str, told: dict[str, Any]) -> Shard:
    if told["format"] != "mds" or told["version"] != 2:
        raise ValueError(f"a shard of format {told['format']}, version {told['version']}")
    raw, stored = told["raw_data"], told["raw_data"]
    path = _inside(folder, raw["basename"])
    packed = told.get("zip_data")
    # streaming leaves the unpacked file beside a shard that it has read.
    is_compressed = False
    if packed and (is_remote(folder) or not os.path.exists(path)):
        is_compressed, stored = True, packed
        path = _inside(folder, stored["basename"])
        if str(told["compression"]).partition(":")[0] != "zstd":
            raise DataError(
                f"compression {told['compression']!r}",
                where=path,
                remedy="Write the shards again with zstd, or unpack them beside the index.",
            )
    names, encodings, sizes = (told[f"column_{what}"] for what in ("names", "encodings", "sizes"))
    if not len(names) == len(encodings) == len(sizes) == len(set(names)):
        raise ValueError("columns without a name, an encoding or a size")
    counts = (told["samples"], raw["bytes"], stored["bytes"], *(size or 0 for size in sizes))
    if any(type(count) is not int or not 0 <= count <= _MOST_BYTES for count in counts):
        raise ValueError("invalid counts")
    hashes = dict(stored.get("hashes") or {})
    if not all(isinstance(text, str) for text in (*names, *encodings, *hashes, *hashes.values())):
        raise ValueError("names, encodings or hashes that are not strings")
    return Shard(
        path=path,
        is_compressed=is_compressed,
        num_rows=told["samples"],
        num_bytes=raw["bytes"],
        stored_bytes=stored["bytes"],
        hashes=hashes,
        columns=dict(zip(names, encodings, strict=True)),
        # As in streaming, 0 stands for a variable size.
        sizes=tuple(size or None for size in sizes),
    )


def _inside(folder: str, name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"a shard outside the folder: {name!r}")
    return f"{folder}/{name}"


def read_shard(shard: Shard) -> bytes:
    """Return the bytes of a shard, uncompressed.

    Raises:
        DataError: It cannot be read, or differs from its index.
    """
    try:
        with open_source(shard.path) as file:
            data = _read_at_most(file, shard.stored_bytes + 1)
    except (OSError, ImportError) as error:
        raise _damaged(shard, f"cannot be read ({error})") from None
    if len(data) != shard.stored_bytes:
        told = f"{len(data):,} bytes" if len(data) < shard.stored_bytes else "more bytes"
        raise _damaged(shard, f"{told}, the index promises {shard.stored_bytes:,}")
    for name, expected in shard.hashes.items():
        actual = _hash(name, data)
        if actual not in (None, expected):
            raise _damaged(shard, f"{name} is {actual}, the index promises {expected}")
    if shard.is_compressed:
        unpacker = zstandard.ZstdDecompressor()
        try:
            with unpacker.stream_reader(io.BytesIO(data), read_across_frames=True) as reader:
                data = _read_at_most(reader, shard.num_bytes + 1)
        except zstandard.ZstdError as error:
            raise _damaged(shard, f"cannot be unpacked ({error})") from None
        if len(data) != shard.num_bytes:
            raise _damaged(shard, f"does not unpack to the {shard.num_bytes:,} bytes of the index")
    return data


def _read_at_most(file: Any, num_bytes: int) -> bytes:
    """Read in pieces: an index or a header may promise any size, and memory is allocated for it."""
    parts: list[bytes] = []
    while num_bytes and (part := file.read(min(num_bytes, _PIECE))):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _hash(name: str, data: bytes) -> str | None:
    """Return the digest by streaming's name for it; None if it is unknown."""
    if name in hashlib.algorithms_guaranteed and not name.startswith("shake"):
        return hashlib.new(name, data).hexdigest()
    if name in xxhash.algorithms_available:
        digest: str = getattr(xxhash, name)(data).hexdigest()
        return digest
    return None


def rows_of(shard: Shard, data: bytes, names: list[str]) -> Iterator[list[memoryview]]:
    """Yield the stored values of the named columns, row by row.

    Args:
        shard: The shard.
        data: From `read_shard`.
        names: The columns.

    Raises:
        DataError: The shard is damaged.
    """
    count = shard.num_rows
    head = 4 * (count + 2)
    if len(data) < head or int.from_bytes(data[:4], "little") != count:
        raise _damaged(shard, f"does not begin with the {count:,} rows of the index")
    offsets = np.frombuffer(data, "<u4", count + 1, 4).astype(np.int64)
    if offsets[0] < head or offsets[-1] != len(data) or (np.diff(offsets) < 0).any():
        raise _damaged(shard, "its rows do not lie one after the other to its end")
    varying = struct.Struct(f"<{shard.sizes.count(None)}I")
    places = [list(shard.columns).index(name) for name in names]
    view = memoryview(data)
    for row, (begin, end) in enumerate(
        zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ):
        if end - begin < varying.size:
            raise _damaged(shard, "shorter than the sizes of its columns", row)
        given = iter(varying.unpack_from(data, begin))
        border = begin + varying.size
        borders = [border]
        for size in shard.sizes:
            border += next(given) if size is None else size
            borders.append(border)
        if border != end:
            raise _damaged(shard, "its columns do not fill it", row)
        yield [view[borders[i] : borders[i + 1]] for i in places]


def _damaged(shard: Shard, what: str, row: int | None = None) -> DataError:
    where = shard.path if row is None else f"{shard.path}, row {row + 1}"
    return DataError(what, where=where, remedy=_FETCH)


def ids_decoder(
    encoding: str, token_dtype: str | None
) -> Callable[[memoryview], np.ndarray[Any, Any]]:
    """Return a function from a stored value to token ids.

    Args:
        encoding: The column's encoding: `ndarray`, `ndarray:TYPE`, `ndarray:TYPE:SHAPE`, `bytes`.
        token_dtype: The type of the ids in `bytes`, which do not tell it.

    Returns:
        A function to one-dimensional integers, shape [ids]; a ValueError says what is wrong.

    Raises:
        FlagError: This encoding holds no ids.
    """
    kind, _, rest = encoding.partition(":")
    dtype, _, shape = rest.partition(":")
    if token_dtype is not None and (kind != "bytes" or token_dtype not in _INTEGERS):
        raise FlagError(
            f"{token_dtype!r} cannot be used for a column of encoding {encoding!r}",
            where="--token-dtype",
            remedy=f"It is for `bytes`, and one of {', '.join(_INTEGERS)}.",
        )
    if kind == "bytes" and token_dtype is None:
        raise FlagError(
            "the column of ids is `bytes`, which do not state their type",
            where="--token-dtype",
            remedy="Name the type that the ids were written with, for example uint32.",
        )
    if kind == "bytes":
        return lambda value: np.frombuffer(value, np.dtype(token_dtype).newbyteorder("<"))
    if kind != "ndarray" or (dtype and dtype not in _INTEGERS) or "," in shape:
        raise FlagError(
            f"encoding {encoding!r} holds no token ids",
            where="--ids-column",
            remedy="Name a column of `ndarray` with one axis and whole numbers, or of `bytes`.",
        )
    return lambda value: _array(value, dtype, has_shape=bool(shape))


def _array(value: memoryview, dtype: str, *, has_shape: bool) -> np.ndarray[Any, Any]:
    """Decode [type: 1 byte] [axes and size type: 1] [shape] [values], as far as they are stored."""
    place = 0
    if not dtype:
        if not value or value[0] not in _ARRAY_TYPES:
            raise ValueError("not an array of whole numbers")
        dtype, place = _ARRAY_TYPES[value[0]], 1
    num_ids = None
    if not has_shape:
        if len(value) <= place or value[place] >> 2 != 1:
            raise ValueError("not an array with one axis")
        width = 1 << (value[place] & 3)
        num_ids = int.from_bytes(value[place + 1 : place + 1 + width], "little")
        place += 1 + width
    ids = np.frombuffer(value[place:], np.dtype(dtype).newbyteorder("<"))
    if num_ids not in (None, len(ids)):
        raise ValueError(f"an array of {num_ids} ids that holds {len(ids)}")
    return ids


def text_decoder(encoding: str, name: str) -> Callable[[memoryview], str]:
    """Return a function from a stored value to text; a ValueError says what is wrong.

    Args:
        encoding: The column's encoding: text, JSON, or a number.
        name: The column.

    Raises:
        FlagError: The encoding is none of these.
    """
    if encoding in _TEXTS:
        return lambda value: str(value, "utf-8")
    if encoding in _SCALARS:
        dtype = np.dtype(_SCALARS[encoding])

        def number(value: memoryview) -> str:
            if len(value) != dtype.itemsize:
                raise ValueError(f"{len(value)} bytes for a number of {dtype.itemsize}")
            return str(np.frombuffer(value, dtype)[0])

        return number
    raise FlagError(
        f"column {name!r} of encoding {encoding!r} cannot be kept as text",
        where="--metadata-fields",
        remedy=f"Columns of {', '.join((*_TEXTS, *_SCALARS))} can.",
    )
