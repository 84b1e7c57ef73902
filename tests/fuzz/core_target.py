"""The C++ core, called with any arrays and any options."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from fuzz.harness import Target, Wrong
from fuzz.mutations import ODD_INTEGERS

from megatron_meco import _core

_STRATEGIES = ["truncate", "split", "best-fit"]
_REFUSALS = (IndexError, MemoryError, OverflowError, TypeError, ValueError)
_VOCAB_SIZE = 100


class CoreTarget(Target):
    """Whatever a caller may give: a result of the promised shape, or one of Python's own errors."""

    name = "core"

    def attempt(self, draw: random.Random, folder: Any) -> str:
        outcome = "refused by Python's errors"
        for call in draw.sample([self._plan_and_sample, self._scan, self._small, self._texts], 2):
            try:
                call(draw)
            except _REFUSALS:
                continue
            outcome = "same"
        return outcome

    def _plan_and_sample(self, draw: random.Random) -> None:
        num_documents = draw.choice([1, 2, 20])
        lengths = [draw.choice([0, 1, 5, 40]) for _ in range(num_documents)]
        offsets = [0, 2, 5, 9]
        corpus = _core.Corpus(
            sequence_lengths=self._array(draw, lengths, np.int32, most=20_000),
            document_indices=self._maybe(draw, range(num_documents + 1), np.int64),
            prefix_ids=self._maybe(draw, [i % 4 - 1 for i in range(num_documents)], np.int32),
            prefix_tokens=self._array(draw, [7] * 9, np.int32),
            prefix_offsets=self._array(draw, offsets, np.int64),
            suffix_ids=self._maybe(draw, [i % 3 - 1 for i in range(num_documents)], np.int32),
            suffix_tokens=self._array(draw, [8] * 5, np.int32),
            suffix_offsets=self._array(draw, [0, 1, 5], np.int64),
            bos_id=self._odd(draw, 3),
            plain_seed=draw.choice([0, 2**63, 2**64 - 1]),
            plain_threshold=draw.choice([0, 0, 2**63]),
        )
        num_packs = draw.choice([None, 5, *ODD_INTEGERS])
        alignment = self._odd(draw, draw.choice([1, 1, 8]))
        repeat_every = self._odd(draw, draw.choice([0, 0, 1, 5]))
        if num_packs is not None and 1000 < num_packs <= 2**32:
            num_packs = 1000  # as many would be made, and take their time
        plan: dict[str, Any] = {
            "pack_offsets": np.array([0, 1, 2]),
            "piece_document": np.zeros(2, np.int32),
            "continued_piece": np.zeros(0, np.int64),
            "continued_begin": np.zeros(0, np.int64),
        }
        try:
            built = _core.build_plan(
                corpus,
                strategy=draw.choice(_STRATEGIES),
                capacity=self._odd(draw, 32),
                max_documents=self._odd(draw, 8),
                num_packs=num_packs,
                first_document=self._odd(draw, 0),
                num_documents=self._odd(draw, num_documents),
                range_begin=self._odd(draw, 0),
                range_end=self._odd(draw, num_documents),
                seed=draw.choice([0, 5, 2**64 - 1]),
                repeat_prefix=draw.random() < 0.5,
                repeat_every=repeat_every,
                alignment=alignment,
                num_threads=draw.choice([1, 1, 1, 2, 0, -1, 2**31 - 1]),
            )
            plan = {name: built[name] for name in plan}
        except _REFUSALS:
            pass
        capacity, max_documents = self._odd(draw, 32), self._odd(draw, 8)
        alignment = alignment if draw.random() < 0.8 else self._odd(draw, 4)
        if capacity > 100_000:
            capacity = draw.choice([capacity, 32])
        has_bin = draw.random() < 0.8
        pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * 2
        tokens = np.array([draw.randrange(_VOCAB_SIZE) for _ in range(sum(lengths))], np.uint16)
        assembler = _core.Assembler(
            corpus=corpus,
            **{name: self._array(draw, array, array.dtype.type) for name, array in plan.items()},
            capacity=capacity,
            max_documents=max_documents,
            pad_id=self._odd(draw, 1),
            view=draw.choice(["conditioned", "plain", "shuffled"]),
            train_on_prefix=draw.random() < 0.3,
            train_on_suffix=draw.random() < 0.7,
            strategy=draw.choice([*_STRATEGIES, "none"] if draw.random() < 0.1 else _STRATEGIES),
            repeat_prefix=draw.random() < 0.5,
            repeat_every=repeat_every if draw.random() < 0.8 else self._odd(draw, 2),
            alignment=alignment,
            bin=tokens.view(np.uint8) if has_bin else None,
            sequence_pointers=self._array(draw, pointers.tolist(), np.int64) if has_bin else None,
            token_bytes=draw.choice([2, 2, 2, 2, 1, 4, 8, 0, -1, 3, 2**31 - 1]),
            vocab_size=draw.choice([None, _VOCAB_SIZE, _VOCAB_SIZE, *ODD_INTEGERS[:-1]]),
        )
        for pack in (0, 1, draw.choice(ODD_INTEGERS[:-1])):
            try:
                pieces = assembler.pieces(pack)
                compared = assembler.compared(pack)
                if has_bin:
                    sample = assembler.sample(pack)
                else:
                    total = sum(p.body_end - p.body_begin for p in pieces)
                    bodies = self._array(draw, [1] * total, np.int64)
                    sample = assembler.sample_from_bodies(pack, bodies)
            except _REFUSALS:
                continue
            if any(len(array) != capacity for array in (*sample[:4], compared)):
                raise Wrong("arrays of other lengths")
            if not set(compared.tolist()) <= {0.0, 1.0} or (compared > sample[2]).any():
                raise Wrong("labels are compared that are not in the loss")
            if len(sample[4]) != min(max_documents + 2, capacity + 1):
                raise Wrong(f"cu_seqlens of {len(sample[4])}")
            if sample[4][0] != 0 or sample[4][-1] != capacity or (np.diff(sample[4]) < 0).any():
                raise Wrong("cu_seqlens that are no borders")
            if (sample[4] % alignment).any():
                raise Wrong("a segment that is not aligned")

    def _scan(self, draw: random.Random) -> None:
        lengths = [draw.choice([0, 1, 5, 40]) for _ in range(30)]
        pointers = (np.concatenate([[0], np.cumsum(lengths)[:-1]]) * 2).tolist()
        arrays = (
            self._array(draw, lengths, np.int32),
            self._array(draw, pointers, np.int64),
            self._array(draw, range(31), np.int64),
        )
        width, threads = draw.choice([2, 2, 4, *ODD_INTEGERS]), self._odd(draw, 2) % 2**31
        scan = _core.scan_index(*arrays, token_bytes=width, num_threads=threads)
        found = max(scan["bad_length"], scan["bad_pointer"], scan["bad_bound"]) >= 0
        ends = np.cumsum(arrays[0].astype(object)) * width
        begins = [0, *ends[:-1]] if len(ends) else []
        bounds = arrays[2].tolist()
        is_right = (
            all(n >= 0 for n in arrays[0].tolist())
            and arrays[1].tolist() == begins
            and bounds[0] == 0
            and bounds[-1] == len(ends)
            and bounds == sorted(bounds)
        )
        if found == is_right:
            raise Wrong(f"a scan found {scan}")

    def _small(self, draw: random.Random) -> None:
        size = draw.choice([1, 7, 1000, *ODD_INTEGERS]) % 2**64
        begin = draw.choice([0, 3, *ODD_INTEGERS[:-1]])
        end = draw.choice([5, begin + 2, begin + 100, *ODD_INTEGERS[:-1]])
        if 10**6 < end - begin < 2**31:
            end = begin + 5
        _core.hash_pair(size, draw.choice(ODD_INTEGERS) % 2**64)
        order = _core.permutation(size, draw.choice(ODD_INTEGERS) % 2**64, 1, begin, end)
        if len(order) != end - begin or len(set(order.tolist())) < len(order):
            raise Wrong("no permutation")
        if any(not 0 <= place % 2**64 < size for place in order.tolist()):
            raise Wrong("a place outside")

    def _texts(self, draw: random.Random) -> None:
        texts = [
            bytes(draw.choices(b"hHt:/.@ \x00\xff", k=draw.randrange(9)))
            + draw.choice([b"", b"http://a", b"https://b.C./x"])
            for _ in range(20)
        ]
        texts = [text[::-1] if draw.random() < 0.5 else text for text in texts]
        data = self._array(draw, b"".join(texts), np.uint8)
        offsets = self._array(draw, np.cumsum([0, *map(len, texts)]), np.int32)
        valid = draw.choice([None, np.ones(20, dtype=bool), np.zeros(draw.choice([20, 3]), bool)])
        distinct = _core.DistinctTexts()
        ids, first_rows = distinct.number(data, offsets, valid)
        if len(ids) != len(offsets) - 1 or ids[first_rows].tolist() != list(range(len(distinct))):
            raise Wrong("numbers that do not begin with their first rows")
        if _core.hash_texts(data, offsets).shape != (len(ids), 2):
            raise Wrong("hashes of another shape")
        for hosts_only in (False, True):
            copies, borders, is_plain = _core.copy_plain_urls(data, offsets, hosts_only=hosts_only)
            if not (np.diff(borders) >= 0).all() or borders[-1] > len(copies):
                raise Wrong("borders that are none")
            if ((np.diff(borders) > 0) != is_plain).any():
                raise Wrong("an empty copy, or one of what is not plain")

    @staticmethod
    def _odd(draw: random.Random, usual: int) -> int:
        return draw.choice(ODD_INTEGERS) if draw.random() < 0.15 else usual

    def _maybe(self, draw: random.Random, values: Any, dtype: Any) -> Any:
        return self._array(draw, values, dtype) if draw.random() < 0.6 else None

    @staticmethod
    def _array(draw: random.Random, values: Any, dtype: Any, most: int = 2**63 - 1) -> Any:
        """The values as an array; or with odd ones, of another type or shape, too short or long."""
        values = [int(v) for v in values]
        if draw.random() < 0.7:
            return np.array(values, dtype)
        kind = draw.randrange(8)
        if kind <= 3:
            limit = min(most, int(np.iinfo(dtype).max))
            odd = [min(max(v, int(np.iinfo(dtype).min)), limit) for v in ODD_INTEGERS]
            for _ in range(draw.choice([1, 1, 3])):
                if values:
                    values[draw.randrange(len(values))] = draw.choice(odd)
            return np.array(values, dtype)
        if kind == 4:
            return np.array(values[: draw.choice([0, 1, 2])], dtype)
        if kind == 5:
            return np.array([*values, *values], dtype)
        if kind == 6:
            odd_type = draw.choice([np.int8, np.int16, np.uint64, np.float64, np.int64, np.int32])
            return np.array(values).astype(odd_type)
        array = np.array(values, dtype)
        return draw.choice([array[None], array[::-1], array[::2], array.reshape(-1, 1), None])
