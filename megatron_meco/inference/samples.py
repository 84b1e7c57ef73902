"""Many samples from one prompt on disk: appended batch by batch, and resumed exactly.

Every sample begins with the same `[BOS] + prefix`, so a batch has no padding. Each batch has its
own seed, derived from the run's seed, the prefix and the batch number, so the samples do not depend
on interruptions. They do depend on the batch size. The settings are stored with the samples; a
resumption with other settings is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_meco.errors import FlagError
from megatron_meco.inference.model import (
    LoadedModel,
    check_room,
    encode_prompt,
    end_tokens,
    enough_memory,
    finite_scores,
)
from megatron_meco.inference.output_file import write_json
from megatron_meco.inference.suffix import cut_suffix
from megatron_meco.untrusted.text_file import read_json
from megatron_meco.whole_file import unfinished_files

_SAMPLES = "generations.jsonl"
_SETTINGS = "settings.json"
_NEW = "Name a new or an empty folder."


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """All that decides the samples.

    Attributes:
        model: The model's folder.
        prefixes: The rendered prefixes; the empty one is BOS alone.
        num_samples: Number of samples per prefix.
        batch_size: Samples generated at once.
        temperature: Sampling temperature.
        top_p: Share of the probability to sample from.
        min_new_tokens: Fewest tokens of a sample.
        max_new_tokens: Most tokens of a sample.
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
        folder: Folder for `generations.jsonl` and `settings.json`.
        progress: Called with the number of samples so far and in total.

    Returns:
        The texts of each prefix.

    Raises:
        FlagError: If the folder holds samples of other settings, or cannot be written.
        PromptError: If there is nothing to begin with, or no room for the new tokens.
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
    ends = end_tokens(model)
    digest = hashlib.sha256(f"{settings.seed} {number} {prefix}".encode()).digest()
    ids = torch.tensor([context] * size, device=model.device)
    with (
        enough_memory("--batch-size", "Give a smaller one, and a new --output."),
        torch.random.fork_rng(),
        torch.no_grad(),
    ):
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
            pad_token_id=ends[0] if ends else None,
            logits_processor=finite_scores(),
        )
    suffix, samples = loaded.conditioning.suffix, []
    for row in out[:, len(context) :].tolist():
        lengths = [i for i, token in enumerate(row) if token in ends]
        ids = row[: lengths[0]] if lengths else row
        text, _ = cut_suffix(suffix, tokenizer, ids, has_ended=bool(lengths))
        samples.append((text, len(ids)))
    return samples


# ---- The folder ----


def _check_settings(folder: Path, settings: SampleSettings) -> None:
    path = folder / _SETTINGS
    wanted = json.loads(json.dumps(asdict(settings)))
    where = f"--output {folder}"

    def refuse(reason: str) -> FlagError:
        return FlagError(f"cannot be used ({reason})", where=where, remedy=_NEW)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A killed writer leaves its own temporary file.
        is_empty = not set(folder.iterdir()) - set(unfinished_files(path))
    except OSError as error:
        raise refuse(error.strerror or str(error)) from error
    if is_empty:
        write_json(path, wanted)
        return
    if not path.is_file():
        raise FlagError("holds something else", where=where, remedy=_NEW)
    earlier = read_json(path, lambda reason: refuse(f"its {_SETTINGS} {reason}"))
    if not isinstance(earlier, dict) or earlier.keys() != wanted.keys():
        raise FlagError(f"holds another {_SETTINGS}", where=where, remedy=_NEW)
    if earlier != wanted:
        different = [key for key in wanted if earlier[key] != wanted[key]]
        told = ", ".join(f"{key} {earlier[key]!r}, now {wanted[key]!r}" for key in different)
        raise FlagError(
            f"holds samples of other settings ({told})",
            where=where,
            remedy="Repeat those, or name a new folder.",
        )


def _read_whole_batches(path: Path, settings: SampleSettings) -> dict[str, list[str]]:
    """Read the existing samples, and cut off a batch that an interruption left incomplete."""
    done: dict[str, list[str]] = {prefix: [] for prefix in settings.prefixes}
    if not os.path.lexists(path):
        return done
    if not path.is_file():
        raise FlagError("is no file", where=f"--output {path}", remedy=_NEW)
    try:
        with path.open("rb+") as file:
            kept = _whole_batches(file, path, settings, done)
            file.truncate(kept)
    except OSError as error:
        raise FlagError(
            f"cannot be used ({error.strerror or error})", where=f"--output {path}", remedy=_NEW
        ) from error
    return done


def _whole_batches(
    file: BinaryIO, path: Path, settings: SampleSettings, done: dict[str, list[str]]
) -> int:
    """Fill `done`, and return how many bytes of the file are whole batches."""
    position = kept = 0
    batch: list[str] = []
    for number, line in enumerate(file):
        # An interruption leaves a line without its end, and nothing behind it.
        if not line.endswith(b"\n"):
            break
        kind, place = divmod(number, settings.num_samples)
        try:
            # IndexError: more samples than the settings ask for.
            prefix = settings.prefixes[kind]
            entry = json.loads(line)
            text = entry["text"]
            is_sample = (entry["prefix"], entry["sample"]) == (prefix, place)
        except (ValueError, LookupError, TypeError, RecursionError):
            is_sample = False
        if not is_sample or not isinstance(text, str):
            raise FlagError(
                f"line {number + 1:,} is no sample of these settings",
                where=f"--output {path}",
                remedy=_NEW,
            )
        position += len(line)
        batch.append(text)
        if len(batch) == min(settings.batch_size, settings.num_samples - len(done[prefix])):
            done[prefix] += batch
            kept, batch = position, []
    return kept


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
            remedy="Free some space and repeat the command: it continues where it stopped.",
        ) from error


def _line(entry: dict[str, Any]) -> bytes:
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode()
