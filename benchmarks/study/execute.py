"""Carry out one run: documents, training, export, questions, one JSON file with the answers.

A result that is there is not made again. It is written last and at once, so an interrupted run
leaves none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.study import trainer
from benchmarks.study.recipe import Run
from benchmarks.study.worlds import (
    TOKENS_OF_DOCUMENT,
    World,
    WorldSettings,
    write_documents,
    write_tokenizer,
)

# More documents than a run without prefixes reads, so that none is read twice.
_SPARE = 1.02
_TOKENIZER = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model")


class Executor:
    """Carries out runs; from several threads, if you like.

    Args:
        work: The folder for everything.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._locks: dict[Path, threading.Lock] = {}
        self._lock = threading.Lock()

    def result(self, run: Run) -> dict[str, Any] | None:
        """Return the result of a run; None: there is none yet."""
        path = self._result_path(run)
        return json.loads(path.read_text()) if path.is_file() else None

    def execute(self, run: Run) -> dict[str, Any]:
        """Carry out a run, unless its result is there, and return the result.

        Returns:
            `run`, `digest`, `seconds` (training), `tokens` (trained), `documents_per_person`
            (read in training, on average), and `checkpoints`: for "switch" and "end" what
            `questions.ask` returned.

        Raises:
            trainer.RunFailed: A command failed.
        """
        if (found := self.result(run)) is not None:
            return found
        data, statements = self._prepared(run)
        folder = self._work / "runs" / run.digest
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begin = time.monotonic()
        trainer.train(flags(run, data, folder / "checkpoints"), folder / "train.log")
        seconds = time.monotonic() - begin
        places = {"switch": run.switch, "end": run.iterations}
        checkpoints = {name: self._asked(run, folder, at) for name, at in places.items()}
        tokens = run.iterations * run.training.tokens_per_step
        per_document = TOKENS_OF_DOCUMENT + run.head_tokens
        result = {
            "run": run.to_json(),
            "digest": run.digest,
            "seconds": round(seconds, 1),
            "tokens": tokens,
            "documents_per_person": round(
                statements * tokens / per_document / number_of_documents(run), 1
            ),
            "checkpoints": checkpoints,
        }
        _write(self._result_path(run), result)
        shutil.rmtree(folder / "checkpoints")
        return result

    def _result_path(self, run: Run) -> Path:
        return self._work / "results" / f"{run.digest}.json"

    def _prepared(self, run: Run) -> tuple[Path, float]:
        """Return the folder of a run's corpus, and documents about each person in it."""
        what = [asdict(run.world), run.seed, number_of_documents(run), run.shuffles]
        what += [run.choice.tokens] if run.choice and run.choice.tokens else []
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        folder = self._work / "data" / digest
        with self._lock:
            lock = self._locks.setdefault(folder, threading.Lock())
        with lock:
            done = folder / "done.json"
            if not done.is_file():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                statements = self._prepare(run, folder)
                _write(done, {"documents_per_person": statements})
            return folder, float(json.loads(done.read_text())["documents_per_person"])

    def _prepare(self, run: Run, folder: Path) -> float:
        world = World(run.world, run.seed)
        tokens = run.choice.tokens if run.choice else ()
        write_tokenizer(folder / "tokenizer", world.words(), tokens)
        documents = folder / "documents.jsonl"
        shuffle_seed = run.seed if run.shuffles else None
        statements = write_documents(world, documents, number_of_documents(run), shuffle_seed)
        output = ["--output", str(folder / "corpus"), *_TOKENIZER, str(folder / "tokenizer")]
        fields = ["--metadata-fields", "url,topic", "--workers", "1"]
        trainer.meco(["prepare", str(documents), *output, *fields], folder / "prepare.log")
        documents.unlink()
        return statements

    def _asked(self, run: Run, folder: Path, iteration: int) -> dict[str, dict[str, float]]:
        """Export a checkpoint and ask it."""
        model, answers = folder / f"model-{iteration}", folder / f"answers-{iteration}.json"
        if not answers.is_file():
            arguments = ["--load", str(folder / "checkpoints"), "--iteration", str(iteration)]
            trainer.meco(
                ["export", *arguments, "--output", str(model)], folder / f"export-{iteration}.log"
            )
            what = (str(model), run.world, run.seed, run.question_template, str(answers))
            trainer.call(ask_to_file, what, folder / f"ask-{iteration}.log")
            shutil.rmtree(model)
        return json.loads(answers.read_text())


def number_of_documents(run: Run) -> int:
    """Return the documents that a run's corpus has: as many as the baseline reads, and some."""
    tokens = run.iterations * run.training.tokens_per_step
    return math.ceil(_SPARE * tokens / TOKENS_OF_DOCUMENT)


def flags(run: Run, data: Path, checkpoints: Path) -> list[str]:
    """Return the flags of the training script.

    Args:
        run: The run.
        data: Folder of the corpus.
        checkpoints: Folder to save to.
    """
    model, training = run.model, run.training
    warmup = max(1, round(training.warmup_share * run.iterations))
    return [
        *("--num-layers", str(model.layers), "--hidden-size", str(model.hidden_size)),
        *("--ffn-hidden-size", str(model.ffn_hidden_size)),
        *("--num-attention-heads", str(model.attention_heads)),
        *("--position-embedding-type", "rope", "--swiglu", "--normalization", "RMSNorm"),
        *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
        *("--attention-dropout", "0", "--hidden-dropout", "0"),
        *("--seq-length", str(training.tokens_per_step)),
        *("--max-position-embeddings", str(training.tokens_per_step)),
        *("--micro-batch-size", "1", "--global-batch-size", "1"),
        *("--train-iters", str(run.iterations), "--seed", str(run.seed + 1)),
        *("--lr", repr(training.learning_rate), "--min-lr", repr(training.learning_rate / 10)),
        *("--lr-decay-style", "cosine", "--lr-warmup-iters", str(warmup)),
        *("--adam-beta2", "0.95", "--weight-decay", repr(training.weight_decay)),
        *("--data-path", str(data / "corpus"), "--split", "100,0,0", "--num-workers", "0"),
        *("--data-cache-path", str(checkpoints.parent / "cache")),
        *(*_TOKENIZER, str(data / "tokenizer")),
        *("--eval-iters", "0", "--eval-interval", str(run.iterations)),
        *("--log-interval", str(max(1, run.iterations // 30))),
        *("--save", str(checkpoints), "--save-interval", str(run.iterations), "--no-save-optim"),
        *("--meco", "--meco-template", run.template),
        *("--meco-packing", "best-fit", "--meco-cooldown-fraction", repr(run.cooldown)),
        *_choice_flags(run),
    ]


def _choice_flags(run: Run) -> list[str]:
    found = []
    if run.choice and run.choice.start:
        found += ["--meco-start-fraction", repr(run.choice.start)]
    if run.choice and run.choice.suffix:
        found += ["--meco-suffix-template", run.choice.suffix]
    return found


def ask_to_file(model: str, world: WorldSettings, seed: int, template: str, output: str) -> int:
    """Write what `questions.ask` returns (runs in a process of its own)."""
    from benchmarks.study.questions import ask

    _write(Path(output), ask(Path(model), World(world, seed), template))
    return 0


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON at once: a reader finds nothing or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
