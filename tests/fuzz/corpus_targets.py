"""Corpora, their metadata and manifests, and the caches, as a training run reads them.

What a case accepts is compared with the samples of the whole files. Excused, because no rule about
structure and no checksum that is read at the start of a run tells it:

- `.idx` without a `.prepare.json`: documents that begin and end at other EODs, as many as before;
- `.bin`: other ids inside the vocabulary, where no document's last token is another;
- `.metadata.arrow` without a `.prepare.json`: other values that are UTF-8. Samples must show them;
- a cache whose checksums were made to fit: no run must crash, and samples have their shape.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from fuzz.harness import Target, Wrong
from fuzz.mutations import Index, mutate_arrays, mutate_bytes, mutate_index, mutate_text
from small_corpus import EOD, LetterTokenizer, random_bodies, write_corpus

from megatron_meco.config import MeCoConfig
from megatron_meco.corpus.manifest import checksum_of, read_manifest
from megatron_meco.corpus.metadata import open_metadata
from megatron_meco.corpus.metadata_report import report_metadata
from megatron_meco.corpus.verify import verify
from megatron_meco.data.dataset import MeCoGPTDataset, MeCoGPTDatasetConfig
from megatron_meco.data.phases import BatchSize, make_schedule
from megatron_meco.data.run_datasets import build_datasets
from megatron_meco.errors import MeCoError

LENGTH = 48
NUM_DOCUMENTS = 120
_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens", "max_seqlen")
_SPLITS = ("train", "valid")

Sample = dict[str, np.ndarray]


def config_of(prefix: str, cache: Path, packing: str = "truncate") -> MeCoGPTDatasetConfig:
    """How the corpora here are read."""
    return MeCoGPTDatasetConfig(
        random_seed=3,
        sequence_length=LENGTH,
        blend=([prefix], None),
        split="80,20,0",
        path_to_cache=str(cache),
        tokenizer=LetterTokenizer(),
        meco=MeCoConfig(
            template="{topic}: ",
            suffix_template=";{topic}",
            packing=packing,
            cooldown_fraction=0.25,
        ),
    )


def read_all(prefix: str, cache: Path, packing: str = "truncate") -> list[Sample]:
    """Every sample of a run's training and validation."""
    config = config_of(prefix, cache, packing)
    schedule = make_schedule(config.meco, BatchSize.constant(4), train_iterations=8)
    splits = build_datasets([32, 8, 0], lambda: True, config, schedule)
    return [
        {key: np.array(split[i][key]) for key in _KEYS}
        for split in splits
        if split is not None
        for i in range(len(split))
    ]


def equal(one: list[Sample], other: list[Sample], keys: tuple[str, ...] = _KEYS) -> bool:
    """Whether two runs read the same."""
    return len(one) == len(other) and all(
        np.array_equal(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in keys
    )


def write_manifest(prefix: str) -> None:
    """What a preparation would have left."""
    documents = len(Index(Path(f"{prefix}.idx").read_bytes()).bounds) - 1
    manifest = {
        "format": 3,
        "text_field": "text",
        "metadata_fields": ["topic"],
        "tokenizer": {"type": "NullTokenizer", "model": None, "extra": {"vocab_size": 400}}
        | {"vocab_size": 400, "eod": EOD, "eod_text": ""},
        "encoder": "megatron",
        "sentences": None,
        "token_dtype": "uint16",
        "documents": documents,
        "tokens": os.path.getsize(f"{prefix}.bin") // 2,
        "sequences": len(Index(Path(f"{prefix}.idx").read_bytes()).lengths),
        "crc32": {
            suffix: checksum_of(Path(f"{prefix}{suffix}"))
            for suffix in (".bin", ".idx", ".metadata.arrow")
        },
    }
    Path(f"{prefix}.prepare.json").write_text(json.dumps(manifest, indent=2))


class Corpora(Target):
    """Whole corpora with their caches, and copies of them to spoil."""

    def prepare(self, folder: Path) -> None:
        self.folder = folder
        self.expected: dict[tuple[str, str], list[Sample]] = {}
        bodies = random_bodies(NUM_DOCUMENTS, seed=1, longest=90)
        topics = [None if i % 9 == 4 else f"topic {i % 5} \u00e9" for i in range(NUM_DOCUMENTS)]
        others = random_bodies(NUM_DOCUMENTS, seed=2, longest=90)
        for kind, sequences, dtype in (
            ("plain", 1, np.uint16),
            ("noted", 1, np.uint16),
            ("sentences", 3, np.int32),
        ):
            (folder / kind).mkdir()
            prefix = write_corpus(
                folder / kind / "c", bodies, {"topic": topics}, dtype, sequences_each=sequences
            )
            if kind == "noted":
                write_manifest(prefix)
            for packing in ("truncate", "split", "best-fit"):
                cache = folder / kind / "cache"
                self.expected[kind, packing] = read_all(prefix, cache, packing)
        self.bodies = bodies
        # As many documents, other lengths and values.
        (folder / "other").mkdir()
        write_corpus(
            folder / "other" / "c", others, {"topic": topics[::-1]}, np.uint16, sequences_each=1
        )
        self.other = str(folder / "other" / "c")

    def copy(self, draw: random.Random, folder: Path, kind: str) -> tuple[str, str, Path]:
        """A copy with times, the prefix in it, a strategy, and a cache that is warm or not."""
        shutil.copytree(self.folder / kind, folder / kind)
        cache = folder / kind / "cache"
        if draw.random() < 0.5:
            shutil.rmtree(cache)
        return str(folder / kind / "c"), draw.choice(["truncate", "split", "best-fit"]), cache

    @staticmethod
    def overwrite(draw: random.Random, path: Path, content: bytes) -> None:
        """Replace a file; sometimes as a disk does that changes bits, which keeps the time."""
        times = os.stat(path)
        path.write_bytes(content)
        if draw.random() < 0.5:
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


class IndexTarget(Corpora):
    """`.idx`."""

    name = "idx"

    def attempt(self, draw: random.Random, folder: Path) -> str:
        kind = draw.choice(["plain", "noted", "sentences"])
        prefix, packing, cache = self.copy(draw, folder, kind)
        path = Path(f"{prefix}.idx")
        content = path.read_bytes()
        how = draw.random()
        if how < 0.05:
            content = Path(f"{self.other}.idx").read_bytes()
        elif how < 0.45:
            content = mutate_bytes(draw, content)
        else:
            content = mutate_index(draw, content)
        self.overwrite(draw, path, content)
        if draw.random() < 0.1:
            list(verify(Path(prefix), EOD))
        if equal(read_all(prefix, cache, packing), self.expected[kind, packing]):
            return "same"
        if kind == "noted" or not self._ends_in_eod(path):
            raise Wrong("other samples")
        return "documents joined at an EOD"

    @staticmethod
    def _ends_in_eod(path: Path) -> bool:
        """Whether an index is whole, and all of its documents end in EOD."""
        index = Index(path.read_bytes())
        ids = np.fromfile(path.with_suffix(".bin"), f"<i{index.width}")
        ends = np.cumsum(index.lengths).tolist()
        bounds = [0, *ends]
        whole = Index(path.read_bytes())
        whole.set_pointers()
        return (
            index.content() == whole.content()
            and len(index.bounds) == NUM_DOCUMENTS + 1
            and index.bounds[0] == 0
            and index.bounds[-1] == len(index.lengths)
            and all(np.diff(index.bounds) >= 0)
            and ends[-1] == len(ids)
            and all(
                bounds[last] == bounds[first] or ids[bounds[last] - 1] == EOD
                for first, last in pairwise(index.bounds)
            )
        )


class TokensTarget(Corpora):
    """`.bin`."""

    name = "bin"

    def attempt(self, draw: random.Random, folder: Path) -> str:
        kind = draw.choice(["plain", "noted", "sentences"])
        prefix, packing, cache = self.copy(draw, folder, kind)
        path = Path(f"{prefix}.bin")
        whole = path.read_bytes()
        content = mutate_bytes(draw, whole)
        if draw.random() < 0.05:
            content = Path(f"{self.other}.bin").read_bytes()
        elif draw.random() < 0.5:
            # Bits that flip: what keeps the size comes further.
            content = bytearray(whole)
            for _ in range(draw.choice([1, 2, 10])):
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        self.overwrite(draw, path, bytes(content))
        samples = read_all(prefix, cache, packing)
        expected = self.expected[kind, packing]
        if equal(samples, expected):
            return "same"
        width = 4 if kind == "sentences" else 2
        if len(content) != len(whole):
            raise Wrong("accepted with another size")
        ids = np.frombuffer(bytes(content), f"<i{width}").astype(np.int64)
        ends = np.cumsum([len(body) for body in self.bodies]) - 1
        # One that no sample holds is not met.
        if any(s["tokens"].max() >= LetterTokenizer.vocab_size for s in samples):
            raise Wrong("an id outside the vocabulary in a sample")
        if (ids[ends] != EOD).any():
            raise Wrong("a document that does not end in EOD")
        if not equal(samples, expected, ("loss_mask", "position_ids", "cu_seqlens", "max_seqlen")):
            raise Wrong("other masks or borders")
        changed = set(np.unique(ids).tolist()) | set(
            np.unique([s["tokens"] for s in expected]).tolist()
        )
        if not {int(i) for s in samples for i in s["tokens"]} <= changed:
            raise Wrong("tokens that stand nowhere")
        return "other ids inside the vocabulary"


class MetadataTarget(Corpora):
    """`.metadata.arrow`."""

    name = "metadata"

    def attempt(self, draw: random.Random, folder: Path) -> str:
        kind = draw.choice(["plain", "noted"])
        prefix, packing, cache = self.copy(draw, folder, kind)
        path = Path(f"{prefix}.metadata.arrow")
        content = path.read_bytes()
        how = draw.random()
        if how < 0.05:
            content = Path(f"{self.other}.metadata.arrow").read_bytes()
        elif how < 0.25:
            content = self._other_table(draw)
        elif how < 0.6:
            # The schema at the beginning, the batches' description and the footer at the end.
            begin = draw.choice([0, 0, len(content) - 700])
            part = mutate_bytes(draw, content[begin : begin + 700])
            content = content[:begin] + part + content[begin + 700 :]
        else:
            content = mutate_bytes(draw, content)
        self.overwrite(draw, path, content)
        if draw.random() < 0.2:
            report_metadata(prefix)
        samples = read_all(prefix, cache, packing)
        if equal(samples, self.expected[kind, packing]):
            return "same"
        if kind == "noted":
            raise Wrong("other samples, against the CRC-32 in PREFIX.prepare.json")
        self._check_shown(prefix, cache, packing)
        return "other values in UTF-8"

    def _other_table(self, draw: random.Random) -> bytes:
        """What other writers make: other types, names, nulls, batches, compression."""
        values = [draw.choice([None, "", "a", "\u4e2d" * 20]) for _ in range(NUM_DOCUMENTS)]
        text = pa.array(values, draw.choice([pa.string(), pa.large_string()]))
        column = draw.choice(
            [
                text,
                text,
                text.dictionary_encode(),
                pa.array(range(NUM_DOCUMENTS)),
                pa.array([b"\xff\xfe"] * NUM_DOCUMENTS, pa.binary()),
                pa.array([["a"]] * NUM_DOCUMENTS),
                pa.nulls(NUM_DOCUMENTS),
                text[: draw.choice([0, 7])],
            ]
        )
        names = draw.choice([["topic"], ["other"], ["topic", "topic"], ["topic", "x"], [""]])
        table = pa.table([column] * len(names), names=names)
        sink = pa.BufferOutputStream()
        kind = draw.choice([pa.ipc.new_file, pa.ipc.new_file, pa.ipc.new_stream])
        options = pa.ipc.IpcWriteOptions(compression=draw.choice([None, "zstd", "lz4"]))
        with kind(sink, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=draw.choice([1, 50, 1000]))
        content = sink.getvalue().to_pybytes()
        return mutate_bytes(draw, content) if draw.random() < 0.5 else content

    def _check_shown(self, prefix: str, cache: Path, packing: str) -> None:
        """Samples show what the file says of their documents, and nothing else."""
        values = open_metadata(prefix)["topic"].to_pylist()
        config = config_of(prefix, cache, packing)
        tokenize = config.tokenizer.tokenize
        # An empty value is none.
        prefixes = [tokenize(f"{v}: ") if v else None for v in values]
        suffixes = [tokenize(f";{v}") if v else [] for v in values]
        schedule = make_schedule(config.meco, BatchSize.constant(4), train_iterations=8)
        train, _, _ = build_datasets([32, 8, 0], lambda: True, config, schedule)
        dataset: MeCoGPTDataset = train.conditioned
        for pack in range(len(dataset)):
            sample = dataset[pack]
            bounds = sample["cu_seqlens"].tolist()
            for piece, begin in zip(dataset.documents_of(pack), bounds, strict=False):
                shown = sample["tokens"][begin + 1 : begin + 1 + piece["prefix_tokens"]].tolist()
                expected = prefixes[piece["document"]] or []
                if len(expected) > LENGTH // 2:
                    expected = []
                if shown != expected[: len(shown)] or (
                    expected and not shown and begin + 1 < LENGTH and piece["body_end"]
                ):
                    raise Wrong(f"document {piece['document']} shows {shown}, not {expected}")
                for kind, first, last in piece["parts"]:
                    behind = sample["tokens"][first:last].tolist()
                    expected = suffixes[piece["document"]]
                    if kind == "suffix" and behind != expected[: len(behind)]:
                        raise Wrong(f"document {piece['document']} ends in {behind}")


class ManifestTarget(Corpora):
    """`.prepare.json`."""

    name = "manifest"

    def attempt(self, draw: random.Random, folder: Path) -> str:
        prefix, packing, cache = self.copy(draw, folder, "noted")
        path = Path(f"{prefix}.prepare.json")
        self.overwrite(draw, path, mutate_text(draw, path.read_text()))
        refusal: MeCoError | None = None
        for look in (read_manifest, lambda p: list(verify(Path(p)))):
            try:
                look(prefix)
            except MeCoError as error:
                refusal = error
        if not equal(read_all(prefix, cache, packing), self.expected["noted", packing]):
            raise Wrong("other samples")
        if refusal is not None:
            raise refusal
        return "same"


class CacheTarget(Corpora):
    """Plans, prefix tables and records of checks."""

    name = "cache"

    def attempt(self, draw: random.Random, folder: Path) -> str:
        kind = draw.choice(["plain", "noted", "sentences"])
        shutil.copytree(self.folder / kind, folder / kind)
        prefix, cache = str(folder / kind / "c"), folder / kind / "cache"
        packing = draw.choice(["truncate", "split", "best-fit"])
        files = sorted(cache.iterdir())
        is_forged = False
        for path in draw.sample(files, draw.choice([1, 1, 3, len(files)])):
            if draw.random() < 0.15:
                other = draw.choice(files)
                content = other.read_bytes()
            else:
                content, forged = mutate_arrays(draw, path.read_bytes())
                is_forged = is_forged or forged
            self.overwrite(draw, path, content)
        samples = read_all(prefix, cache, packing)
        expected = self.expected[kind, packing]
        if equal(samples, expected):
            return "same"
        if not is_forged:
            raise Wrong("other samples")
        for sample in samples:
            if sample["tokens"].min() < 0 or sample["tokens"].max() >= LetterTokenizer.vocab_size:
                raise Wrong("ids outside the vocabulary")
        return "a cache with checksums made to fit"


CORPUS_TARGETS = (IndexTarget, TokensTarget, MetadataTarget, ManifestTarget, CacheTarget)
