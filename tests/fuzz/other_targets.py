"""Token shards, models, checkpoints, and the commands that look at a corpus."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from fuzz.harness import Target, Wrong
from fuzz.mutations import mutate_bytes, mutate_index, mutate_text
from inference.synthetic import random_tensors, run_args, write_checkpoint
from runs import write_pages, write_tokenizer

from megatron_meco import cli
from megatron_meco.corpus.import_mds import ImportConfig, import_mds
from megatron_meco.corpus.prepare import PrepareConfig, prepare
from megatron_meco.errors import DataError
from megatron_meco.inference.checkpoint import Checkpoint, find_iteration
from megatron_meco.inference.export import export
from megatron_meco.inference.import_hf import import_hf

_SHARDS = Path(__file__).parents[1] / "corpus" / "mds"


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class ShardsTarget(Target):
    """`meco import-mds`: `index.json`, `.mds` and `.mds.zstd`.

    Excused: an index that says something else, for which there is no checksum; and shards without
    hashes.
    """

    name = "mds"

    def prepare(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = write_tokenizer(folder / "tokenizer")
        self.expected: dict[str, dict[str, bytes]] = {}
        for kind in ("authors", "zstd", "bytes"):
            shutil.copytree(_SHARDS / kind, folder / kind)
            self.expected[kind] = self._run(folder / kind, folder / f"{kind}-out", kind)
        shutil.copytree(folder / "authors", folder / "without")
        index = json.loads((folder / "without" / "index.json").read_text())
        for shard in index["shards"]:
            shard["hashes"], shard["raw_data"]["hashes"] = [], {}
        (folder / "without" / "index.json").write_text(json.dumps(index))
        self.expected["without"] = self.expected["authors"]

    def _run(self, shards: Path, out: Path, kind: str) -> dict[str, bytes]:
        config = ImportConfig(
            folders=(str(shards),),
            output=out / "c",
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(self.tokenizer),
            token_dtype="uint16" if kind == "bytes" else None,
        )
        import_mds(config)
        return {name: c for name, c in files_of(out).items() if not name.endswith(".json")}

    def attempt(self, draw: random.Random, folder: Path) -> str:
        kind = draw.choice(["authors", "zstd", "bytes", "without"])
        shutil.copytree(self.folder / kind, folder / "shards")
        is_index = draw.random() < 0.4
        if is_index:
            path = folder / "shards" / "index.json"
            path.write_bytes(mutate_text(draw, path.read_text()))
        else:
            paths = sorted((folder / "shards").glob("shard.*"))
            path = draw.choice(paths)
            if draw.random() < 0.1:
                path.write_bytes(draw.choice(paths).read_bytes())
            elif draw.random() < 0.1:
                path.unlink()
            else:
                path.write_bytes(self._mutate_shard(draw, path.read_bytes(), kind))
        made = self._run(folder / "shards", folder / "out", kind)
        if made == self.expected[kind]:
            return "same"
        if is_index:
            return "what another index says"
        if kind != "without":
            raise Wrong("another corpus, against the hashes of the index")
        return "shards without hashes"

    @staticmethod
    def _mutate_shard(draw: random.Random, content: bytes, kind: str) -> bytes:
        """Also the numbers that its offsets are made of."""
        if draw.random() < 0.6 or kind in ("zstd", "bytes"):
            return mutate_bytes(draw, content)
        numbers = list(struct.unpack("<10I", content[:40]))
        odd = [0, 1, 2**31, 2**32 - 1, len(content), len(content) + 1]
        numbers[draw.randrange(10)] = draw.choice(odd)
        return struct.pack("<10I", *numbers) + content[40:]


class ModelTarget(Target):
    """`meco import`: `config.json`, the index of the weights, and the weights.

    Excused: other weights and other settings of the same shapes, which nothing tells.
    """

    name = "model"

    def prepare(self, folder: Path) -> None:
        self.folder = folder
        tokenizer = write_tokenizer(folder / "tokenizer")
        args = run_args(tokenizer)
        write_checkpoint(folder / "run", args, random_tensors(args))
        export(folder / "run", folder / "model", bytes_per_shard=20_000)
        self.expected = self._run(folder / "model", folder / "out")

    @staticmethod
    def _run(model: Path, out: Path) -> dict[str, torch.Tensor]:
        import_hf(model, out)
        checkpoint = Checkpoint(find_iteration(out))
        return {name: checkpoint.read(name) for name in checkpoint.shapes}

    def attempt(self, draw: random.Random, folder: Path) -> str:
        model = shutil.copytree(self.folder / "model", folder / "model")
        weights = sorted(model.glob("*.safetensors"))
        path = draw.choice(
            [model / "config.json"] * 3
            + [model / "model.safetensors.index.json"] * 2
            + [model / "tokenizer.json", *weights[:2]]
        )
        if path.suffix == ".json":
            path.write_bytes(mutate_text(draw, path.read_text()))
        else:
            path.write_bytes(self._mutate_weights(draw, path, weights))
        made = self._run(model, folder / "out")
        if made.keys() == self.expected.keys() and all(
            torch.equal(made[name], tensor) for name, tensor in self.expected.items()
        ):
            return "same"
        return "what other files say"

    @staticmethod
    def _mutate_weights(draw: random.Random, path: Path, weights: list[Path]) -> bytes:
        content = path.read_bytes()
        if draw.random() < 0.1:
            return draw.choice(weights).read_bytes()
        if draw.random() < 0.5:
            return mutate_bytes(draw, content)
        length = struct.unpack("<Q", content[:8])[0]
        head = mutate_text(draw, content[8 : 8 + length].decode())
        told = draw.choice([len(head), len(head), 0, 2**40, 2**63, 2**64 - 1])
        return struct.pack("<Q", told) + head + content[8 + length :]


class _Command:
    """What a pickle runs that is trusted."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class CheckpointTarget(Target):
    """`meco export`: what lies in a checkpoint beside its weights.

    Excused: other flags and other weights of the same shapes, which nothing tells.
    """

    name = "checkpoint"

    def prepare(self, folder: Path) -> None:
        self.folder = folder
        tokenizer = write_tokenizer(folder / "tokenizer")
        args = run_args(tokenizer)
        for kind in ("run", "legacy"):
            write_checkpoint(folder / kind, args, random_tensors(args))
        # Earlier versions of Megatron keep the common state in a file of its own.
        common = folder / "legacy" / "iter_0000020" / "common.pt"
        torch.save({"args": args, "iteration": 20}, common)
        export(folder / "run", folder / "model")
        self.expected = files_of(folder / "model")

    def attempt(self, draw: random.Random, folder: Path) -> str:
        kind = draw.choice(["run", "legacy"])
        run = shutil.copytree(self.folder / kind, folder / "run")
        iteration = run / "iter_0000020"
        marker = folder / "ran"
        names = ["metadata.json", ".metadata", ".metadata", "__0_0.distcp"]
        names += ["../latest_checkpointed_iteration.txt"]
        names += ["common.pt"] * 2 if kind == "legacy" else []
        path = iteration / draw.choice(names)
        if path.name == ".metadata" and draw.random() < 0.1:
            path.write_bytes(pickle.dumps(_Command(f"touch {marker}")))
        elif path.suffix in (".json", ".txt"):
            path.write_bytes(mutate_text(draw, path.read_text()))
        else:
            path.write_bytes(mutate_bytes(draw, path.read_bytes()))
        load = draw.choice([run, run, iteration])
        try:
            export(load, folder / "model")
        finally:
            if marker.exists():
                raise Wrong("a pickle ran a command")
        if files_of(folder / "model") == self.expected:
            return "same"
        return "what other files say"


class CommandsTarget(Target):
    """`meco plan`, `inspect`, `verify` and `metadata` on a corpus that `meco prepare` made."""

    name = "commands"

    def prepare(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = write_tokenizer(folder / "tokenizer")
        (folder / "corpus").mkdir()
        prepare(
            PrepareConfig(
                inputs=(write_pages(folder / "pages.jsonl", 80),),
                output=folder / "corpus" / "c",
                tokenizer_type="HuggingFaceTokenizer",
                tokenizer_model=str(self.tokenizer),
            )
        )
        self.expected = {
            name: self._run(self._words(name, folder / "corpus" / "c"))
            for name in ("plan", "inspect", "verify", "metadata")
        }
        assert all(status == 0 for status, _ in self.expected.values()), self.expected

    def _words(self, name: str, prefix: Path) -> list[str]:
        if name in ("verify", "metadata"):
            return [name, str(prefix), *(["--json"] if name == "metadata" else [])]
        flags = f"""
            --data-path {prefix} --tokenizer-type HuggingFaceTokenizer
            --tokenizer-model {self.tokenizer} --seq-length 64 --train-iters 10
            --global-batch-size 4 --split 90,10,0 --eval-iters 1 --json
        """
        return [name, *flags.split(), *(["--sample", "3"] if name == "inspect" else [])]

    @staticmethod
    def _run(words: list[str]) -> tuple[int, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(words)
        if status not in (0, 1) or "Traceback" in err.getvalue():
            raise Wrong(f"status {status}: {err.getvalue()[-500:]}")
        if status == 1 and not ("meco: error: " in err.getvalue() or "WRONG" in out.getvalue()):
            raise Wrong(f"no reason: {err.getvalue()[-500:]}")
        return status, out.getvalue()

    def attempt(self, draw: random.Random, folder: Path) -> str:
        corpus = shutil.copytree(self.folder / "corpus", folder / "corpus")
        suffix = draw.choice([".idx", ".bin", ".metadata.arrow", ".prepare.json"])
        path = corpus / f"c{suffix}"
        content = path.read_bytes()
        if suffix == ".prepare.json":
            path.write_bytes(mutate_text(draw, content.decode()))
        elif suffix == ".idx" and draw.random() < 0.5:
            path.write_bytes(mutate_index(draw, content))
        elif draw.random() < 0.02:
            path.unlink()
        else:
            path.write_bytes(mutate_bytes(draw, content))
        name = draw.choice(sorted(self.expected))
        status, out = self._run(self._words(name, corpus / "c"))
        if status:
            raise DataError("refused", where="the command", remedy="None.")
        expected = self.expected[name][1]
        if out.replace(str(folder), "") == expected.replace(str(self.folder), ""):
            return "same"
        if suffix == ".bin" and name in ("plan", "inspect"):
            return "other ids inside the vocabulary"
        if suffix == ".prepare.json" and name == "verify":
            return "what another manifest says"
        raise Wrong(f"{name} accepts another {suffix}: {out[:500]}")


OTHER_TARGETS: tuple[type[Target], ...] = (
    ShardsTarget,
    ModelTarget,
    CheckpointTarget,
    CommandsTarget,
)
