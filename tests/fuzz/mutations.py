"""Damage: to bytes whatever they mean, and to the fields of the formats that the package reads."""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from typing import Any

import numpy as np
import xxhash

ODD_INTEGERS = [-(2**63), -(2**31), -7, -2, -1, 0, 1, 2, 3, 255, 2**15, 2**31 - 1, 2**31]
ODD_INTEGERS += [2**32, 2**62, 2**63 - 1, 2**63]
ODD_VALUES: list[Any] = [
    *(None, True, False, "", "x", "\ud800", "../../etc/passwd", "nan", "9" * 400),
    *([], {}, [[]], [None], {"a": 1}, ["x", 1], 0.5, -0.0, 1e308),
    *(math.nan, math.inf, -math.inf, 10**9, 10**18, 2**64, 2**200, 10**4000),
    *ODD_INTEGERS,
]


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    """Flipped, lost, added, zeroed, moved, repeated or overwritten bytes."""
    content = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        if not content:
            return bytes(draw.randbytes(draw.randrange(40)))
        kind, place = draw.randrange(9), draw.randrange(len(content))
        length = draw.choice([1, 4, 8, 64, 512, 4096])
        other = draw.randrange(len(content))
        if kind <= 2:
            for _ in range(draw.choice([1, 1, 2, 8])):
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif kind == 3:
            del content[place:]
        elif kind == 4:
            content += draw.choice([bytes(length), draw.randbytes(length), content[-length:]])
        elif kind == 5:
            end = min(place + length, len(content))
            content[place:end] = bytes(end - place)
        elif kind == 6:
            value = draw.choice(ODD_INTEGERS) % 2**64
            width = draw.choice([1, 2, 4, 8])
            content[place : place + width] = value.to_bytes(8, "little")[:width]
        elif kind == 7:
            del content[place : place + draw.choice([1, 2, 4, length])]
        else:
            content[place : place + length] = content[other : other + length]
    return bytes(content)


def mutate_text(draw: random.Random, text: str) -> bytes:
    """JSON with odd values at some places, or no JSON any more."""
    if draw.random() < 0.3:
        return mutate_bytes(draw, text.encode())
    if draw.random() < 0.05:
        deep = draw.choice([20, 1000, 100_000])
        return draw.choice(["[" * deep, "[" * deep + "]" * deep, '{"a":' * deep]).encode()
    value = json.loads(text)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        value = _mutate_value(draw, value)
    return json.dumps(value, ensure_ascii=draw.random() < 0.8).encode("utf-8", "surrogatepass")


def _mutate_value(draw: random.Random, value: Any) -> Any:
    """Odd values at one place of a tree."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.03:
        if isinstance(value, bool | None) or draw.random() < 0.6:
            return draw.choice(ODD_VALUES)
        if isinstance(value, int) and abs(value) < 2**64:
            return draw.choice([value + 1, value - 1, -value, value * 2, 10 * value, value + 0.5])
        if isinstance(value, float):
            return draw.choice([value + 1, -value, value * 1e300])
        if isinstance(value, str):
            return draw.choice([f"{value}x", value[:-1], value.upper(), value[::-1]])
        return draw.choice(ODD_VALUES)
    if isinstance(value, list):
        place = draw.randrange(len(value))
        kind = draw.random()
        if kind < 0.15:
            return value[:place] + value[place + 1 :]
        if kind < 0.3:
            return [*value, draw.choice([value[place], *ODD_VALUES])]
        return [*value[:place], _mutate_value(draw, value[place]), *value[place + 1 :]]
    key = draw.choice(sorted(value))
    kind = draw.random()
    if kind < 0.15:
        return {k: v for k, v in value.items() if k != key}
    if kind < 0.25:
        return {(f"{k}x" if k == key else k): v for k, v in value.items()}
    return {k: (_mutate_value(draw, v) if k == key else v) for k, v in value.items()}


class Index:
    """The fields of a Megatron `.idx`."""

    def __init__(self, content: bytes) -> None:
        self.magic = content[:9]
        self.version, self.code, sequences, bounds = struct.unpack("<QBQQ", content[9:34])
        self.lengths = np.frombuffer(content, "<i4", sequences, 34).astype(object)
        self.pointers = np.frombuffer(content, "<i8", sequences, 34 + 4 * sequences).astype(object)
        self.bounds = np.frombuffer(content, "<i8", bounds, 34 + 12 * sequences).astype(object)
        self.counts: list[int | None] = [None, None]
        self.modes = b""

    @property
    def width(self) -> int:
        """Bytes of a token."""
        return {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}.get(self.code, 4)

    def set_pointers(self) -> None:
        """Make them follow from the lengths."""
        ends = np.cumsum(self.lengths) * self.width
        self.pointers = np.concatenate([[0], ends[:-1]]).astype(object)

    def content(self) -> bytes:
        """The file."""
        counts = [len(self.lengths), len(self.bounds)]
        told = zip(counts, self.counts, strict=True)
        counts = [n if odd is None else odd % 2**64 for n, odd in told]
        head = self.magic + struct.pack("<QBQQ", self.version % 2**64, self.code, *counts)
        arrays = ((self.lengths, 32), (self.pointers, 64), (self.bounds, 64))
        parts = [
            b"".join((int(n) % 2**bits).to_bytes(bits // 8, "little") for n in array)
            for array, bits in arrays
        ]
        return head + b"".join(parts) + self.modes


def mutate_index(draw: random.Random, content: bytes) -> bytes:
    """Numbers of an index that are odd, or that agree with one another and are others."""
    index = Index(content)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        kind = draw.randrange(13)
        place = draw.randrange(max(1, len(index.lengths) - 1))
        bound = draw.randrange(len(index.bounds))
        near = draw.choice([-2, -1, 1, 2, 7, 100])
        if kind == 0:
            index.version = draw.choice(ODD_INTEGERS)
        elif kind == 1:
            index.code = draw.randrange(12)
        elif kind == 2:
            which = draw.randrange(2)
            count = (len(index.lengths), len(index.bounds))[which]
            index.counts[which] = draw.choice([count + near, *ODD_INTEGERS])
        elif kind == 3:
            index.lengths[place] = draw.choice([index.lengths[place] + near, *ODD_INTEGERS])
            if draw.random() < 0.5:
                index.set_pointers()
        elif kind == 4:
            index.pointers[place] = draw.choice([index.pointers[place] + near, *ODD_INTEGERS])
        elif kind == 5:
            index.bounds[bound] = draw.choice([index.bounds[bound] + near, *ODD_INTEGERS])
        elif kind == 6 and len(index.lengths) > 1:
            # A token changes sides: everything agrees, and two documents are others.
            index.lengths[place] += near
            index.lengths[place + 1] -= near
            index.set_pointers()
        elif kind == 7 and len(index.lengths) > 1:
            swapped = index.lengths[place : place + 2][::-1].copy()
            index.lengths[place : place + 2] = swapped
            index.set_pointers()
        elif kind == 8:
            index.modes = bytes(len(index.lengths))
        elif kind == 9:
            index.lengths = index.lengths[:-1]
            index.pointers = index.pointers[:-1]
        elif kind == 10:
            index.bounds = np.delete(index.bounds, bound) if len(index.bounds) > 1 else index.bounds
        elif kind == 11:
            index.bounds = np.sort(np.append(index.bounds, index.bounds[bound] + near))
        else:
            index.magic = draw.choice([b"MMIDIDX\x00\x01", b"TNTIDX\x00\x00\x00", bytes(9)])
    return index.content()


def mutate_arrays(draw: random.Random, content: bytes) -> tuple[bytes, bool]:
    """A cache file with damage; and whether its checksums were made right again.

    A file whose numbers were changed with their checksum says what its writer wanted.
    """
    kind = draw.random()
    if kind < 0.5:
        return mutate_bytes(draw, content), False
    magic, line, rest = content.split(b"\n", 2)
    length = int(line.split()[1])
    begin = len(magic) + len(line) + 2 + length
    begin += -begin % 64
    head, body = rest[:length], content[begin:]
    is_forged = False
    if kind < 0.75:
        body = mutate_bytes(draw, body)
        if draw.random() < 0.7:
            told = json.loads(head)
            told["xxh3"] = xxhash.xxh3_128(body).hexdigest()
            told["bytes"] = len(body)
            head = json.dumps(told).encode()
            is_forged = True
    else:
        head = mutate_text(draw, head.decode())
        is_forged = True
    checksum = hashlib.blake2b(head, digest_size=16).hexdigest().encode()
    start = magic + b"\n" + checksum + b" " + str(len(head)).encode() + b"\n" + head
    return start + b" " * (-len(start) % 64) + body, is_forged
