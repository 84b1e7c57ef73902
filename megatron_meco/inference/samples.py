"""Many samples from one beginning, on disk: in batches, appended as they come, resumed exactly.

Every sample begins with the same `[BOS] + prefix`, so a batch has no padding. Each batch has a seed
of its own, made from the run's seed, the condition and its number: what a run writes does not
depend on where it was interrupted. The settings lie beside the samples, and a resumption with other
ones is refused. What was given up: samples that do not depend on the batch size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_meco.errors import FlagError
from megatron_meco.inference.generate import LoadedModel, check_room, encode_prompt
from megatron_meco.inference.output_file import write_json

_SAMPLES = "generations.jsonl"
_SETTINGS = "settings.json"


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """All that decides the samples.

    Attributes:
        model: The model's folder.
        prefixes: The rendered prefixes; an empty one is BOS alone.
        num_samples: Of each prefix.
        batch_size: Samples that are made at the same time.
        temperature: Of the sampling.
        top_p: Share of the probability to sample from.
        min_new_tokens: No sample ends before.
        max_new_tokens: Every sample ends here.
        seed: Decides the samples.
    """

    model: str
    prefixes: tuple[str, ...]
    num_samples: int
    batch_size: int
    temperature: float
    top_p: float
    min_new_tokens: int
    max_new_tokens: int
    seed: int


def sample(
    loaded: LoadedModel,
    settings: SampleSettings,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[str]]:
    """Write samples, or the rest of them.

    Args:
        loaded: The model.
        settings: What to sample.
        folder: Where to; `generations.jsonl` and `settings.json`.
        progress: Told how many samples there are, of how many.

    Returns:
        The texts of each prefix.

    Raises:
        FlagError: When the folder holds samples of other settings, or cannot be written.
        PromptError: When there is nothing to begin with, or no room for the new tokens.
    """
    contexts = {}
    for prefix in settings.prefixes:
        contexts[prefix] = encode_prompt(loaded.model, loaded.tokenizer, prefix, "")
        check_room(loaded.model, contexts[prefix], settings.max_new_tokens)
    _check_settings(folder, settings)
    path = folder / _SAMPLES
    done = _read_whole_batches(path, settings)
    total = settings.num_samples * len(settings.prefixes)
    for prefix, context in contexts.items():
        texts = done[prefix]
        while len(texts) < settings.num_samples:
            number = len(texts) // settings.batch_size
            size = min(settings.batch_size, settings.num_samples - len(texts))
            batch = _one_batch(loaded, settings, prefix, context, number, size)
            _append(
                path,
                (
                    {"prefix": prefix, "sample": len(texts) + i, "num_tokens": length, "text": text}
                    for i, (text, length) in enumerate(batch)
                ),
            )
            texts += [text for text, _ in batch]
            progress(sum(map(len, done.values())), total)
    return done


def _one_batch(
    loaded: LoadedModel,
    settings: SampleSettings,
    prefix: str,
    context: list[int],
    number: int,
    size: int,
) -> list[tuple[str, int]]:
    model, tokenizer = loaded.model, loaded.tokenizer
    end = model.config.eos_token_id
    digest = hashlib.sha256(f"{settings.seed} {number} {prefix}".encode()).digest()
    ids = torch.tensor([context] * size, device=model.device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(int.from_bytes(digest[:8], "big"))
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            # The default of transformers is not 0.
            top_k=0,
            min_new_tokens=settings.min_new_tokens,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=end,
        )
    rows = [row[: row.index(end)] if end in row else row for row in out[:, len(context) :].tolist()]
    return [(tokenizer.decode(row, skip_special_tokens=True), len(row)) for row in rows]


# ---- The folder ----


def _check_settings(folder: Path, settings: SampleSettings) -> None:
    path = folder / _SETTINGS
    wanted = json.loads(json.dumps(asdict(settings)))
    where = f"--output {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise FlagError(
            f"cannot be used ({error})", where=where, remedy="Name a folder that you may write."
        ) from error
    if earlier is None:
        if any(folder.iterdir()):
            raise FlagError(
                "holds something else", where=where, remedy="Name a new or an empty folder."
            )
        write_json(path, wanted)
    elif earlier != wanted:
        different = [key for key in wanted if earlier.get(key) != wanted[key]]
        told = ", ".join(f"{key} {earlier.get(key)!r}, now {wanted[key]!r}" for key in different)
        raise FlagError(
            f"holds samples of other settings ({told})",
            where=where,
            remedy="Repeat those, or name a new folder.",
        )


def _read_whole_batches(path: Path, settings: SampleSettings) -> dict[str, list[str]]:
    """Read what is there, and cut off the batch that an interruption left unfinished."""
    done: dict[str, list[str]] = {prefix: [] for prefix in settings.prefixes}
    if not path.is_file():
        return done
    with path.open("rb+") as file:
        kept = 0
        batch: list[dict[str, Any]] = []
        for line in file:
            try:
                batch.append(json.loads(line))
            except ValueError:
                break
            texts = done[batch[0]["prefix"]]
            if len(batch) == min(settings.batch_size, settings.num_samples - len(texts)):
                texts += [entry["text"] for entry in batch]
                kept += sum(len(_line(entry)) for entry in batch)
                batch = []
        file.truncate(kept)
    return done


def _append(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    try:
        with path.open("ab") as file:
            file.write(b"".join(map(_line, entries)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FlagError(
            f"cannot be written ({error})",
            where=f"--output {path.parent}",
            remedy="Make space, and repeat the command: it goes on where it stopped.",
        ) from error


def _line(entry: dict[str, Any]) -> bytes:
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode()
