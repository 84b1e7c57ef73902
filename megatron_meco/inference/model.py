"""An exported model: loading it, its tokens before a text, and what it must not compute.

A document begins with `[BOS] + prefix + text`, prefix and text tokenised apart, as in training.
Text is never read as a special token. Code in the folder is never run, and weights are never
unpickled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.utils import logging as transformers_logging

from megatron_meco.corpus.tokenizer import unknown_token
from megatron_meco.data.template import PrefixText
from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.inference.conditioning import Conditioning, not_an_export
from megatron_meco.inference.model_folder import check_model
from megatron_meco.untrusted.text_file import Refuse
from megatron_meco.wording import counted, first_line, one_line, shown


class PromptError(MeCoError):
    """A prompt that the model cannot continue."""


class ModelError(MeCoError):
    """A model whose outputs are not numbers."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """An exported model, ready to generate.

    Attributes:
        model: The `LlamaForCausalLM`, in evaluation mode.
        tokenizer: Its tokenizer.
        conditioning: How it was conditioned in training.
    """

    model: Any
    tokenizer: Any
    conditioning: Conditioning


def load_model(
    folder: Path,
    device: str | None = None,
    template: str | None = None,
    *,
    own_sampling: bool = False,
) -> LoadedModel:
    """Load a folder that `meco export` wrote.

    Args:
        folder: The folder.
        device: Device, or None for the first GPU or the CPU.
        template: Template in place of the model's own, or None.
        own_sampling: Whether to keep penalties and other settings of a foreign
            `generation_config.json`. Otherwise only the caller's options decide how to sample.

    Raises:
        FlagError: If the folder, the device or the template cannot be used.
    """
    conditioning = Conditioning.of_folder(folder, template)

    def refuse(reason: str) -> FlagError:
        return not_an_export(folder, reason)

    check_model(folder)
    device = pick_device(device)
    # Never run code from the folder, and never unpickle weights.
    options = {"local_files_only": True, "trust_remote_code": False}
    transformers_logging.disable_progress_bar()
    with enough_memory(f"--model {folder}", "Give a --device with more memory."):
        try:
            model, told = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, output_loading_info=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        # A library may raise anything for files that it did not write.
        except Exception as error:
            raise refuse(one_line(error)) from error
        _check_loaded(model, tokenizer, told, refuse)
        if not own_sampling:
            model.generation_config = GenerationConfig(eos_token_id=end_tokens(model) or None)
        model = model.to(device).eval()
    return LoadedModel(model=model, tokenizer=tokenizer, conditioning=conditioning)


def _check_loaded(model: Any, tokenizer: Any, told: dict[str, Any], refuse: Refuse) -> None:
    """Refuse what transformers only warns of: missing weights, which it draws, and extra ones."""
    for key, what in (
        ("missing_keys", "it has no tensor"),
        ("mismatched_keys", "its model has another shape for tensor"),
        ("unexpected_keys", "its model has no place for tensor"),
    ):
        if names := sorted(map(str, told.get(key) or ())):
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise refuse(f"{what} {shown(names[0], 120)}{more}")
    known = model.get_input_embeddings().num_embeddings
    for token in (*end_tokens(model), model.config.bos_token_id):
        if token is not None and not (type(token) is int and 0 <= token < known):
            raise refuse(f"its begin or end token is {token!r:.40}, its model has {known:,} tokens")
    if len(tokenizer) > known:
        raise refuse(f"its tokenizer has {counted(len(tokenizer), 'token')}, its model {known:,}")


@contextlib.contextmanager
def enough_memory(where: str, remedy: str) -> Iterator[None]:
    """Turn running out of memory inside the block into a `FlagError`.

    Args:
        where: The flag that decides how much is needed.
        remedy: What to change.

    Raises:
        FlagError: If memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch has an exception class for GPUs only.
        is_cpu = "not enough memory" in str(error) or "can't allocate memory" in str(error)
        if not is_cpu and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        raise FlagError("needs more memory than there is", where=where, remedy=remedy) from error


def pick_device(device: str | None) -> str:
    """Check a device, or pick the first GPU, or the CPU.

    Raises:
        FlagError: If torch does not have the device.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # `.item()` fails on the device `meta`, which holds no numbers.
        torch.zeros(1, device=device).item()
    # Missing backends raise all kinds of exceptions.
    except Exception as error:
        raise FlagError(
            f"cannot be used ({first_line(error)})",
            where=f"--device {device}",
            remedy="Give cpu, or cuda:N where torch sees that GPU.",
        ) from error
    return device


class _FiniteScores(LogitsProcessor):  # type: ignore[misc]
    """Refuses NaN, from which greedy decoding would silently pick token 0."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Minus infinity is valid for single tokens.
        check_finite(scores.amax(-1))
        return scores


def check_finite(scores: torch.Tensor) -> None:
    """Refuse scores of a broken model.

    Raises:
        ModelError: If any score is NaN or infinite.
    """
    if not scores.isfinite().all():
        raise ModelError(
            "computes NaN or infinity",
            where="--model",
            remedy="Its weights are broken: use another model.",
        )


def encode_prompt(model: Any, tokenizer: Any, prefix_text: str, prompt: str) -> list[int]:
    """Return `[BOS] + prefix + prompt` as tokens, like the beginning of a training document.

    BOS is left out if the model's configuration has none. The rendered prefix may be empty.
    """
    bos = model.config.bos_token_id
    ids = [] if bos is None else [bos]
    return [*ids, *encode_text(tokenizer, prefix_text), *encode_text(tokenizer, prompt)]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokenise text as in training: no added tokens, and no text is read as a special token.

    Args:
        tokenizer: Of transformers.
        text: The text. In a `PrefixText` each special token is one id, and the texts between are
            tokenised apart.

    Raises:
        FlagError: The tokenizer lacks a special token of the template.
    """
    if not text:
        return []
    if isinstance(text, PrefixText) and text.segments != (str(text),):
        ids: list[int] = []
        for part in text.segments:
            if isinstance(part, str):
                ids += encode_text(tokenizer, part)
            else:
                ids.append(_token_id(tokenizer, part.name))
        return ids
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids


def _token_id(tokenizer: Any, name: str) -> int:
    found = tokenizer.convert_tokens_to_ids(name)
    # It returns the id of UNK for an unknown token.
    if found is None or tokenizer.convert_ids_to_tokens(found) != name:
        raise unknown_token(name, "the model's template")
    return int(found)


def finite_scores() -> LogitsProcessorList:
    """Return a processor for `generate` that raises `ModelError` for NaN or infinite scores."""
    return LogitsProcessorList([_FiniteScores()])


def end_tokens(model: Any) -> list[int]:
    """Return the tokens that end a text; foreign models may have several, or none."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = model.config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


def check_room(model: Any, ids: list[int], max_new_tokens: int) -> None:
    """Refuse a prompt of these tokens that the model cannot continue by `max_new_tokens`.

    Raises:
        PromptError: If there are no tokens to continue, or no room for new ones.
    """
    if not ids:
        raise PromptError(
            "is empty, and this model's documents begin without a BOS token",
            where="--prompt",
            remedy="Give some text.",
        )
    room = getattr(model.config, "max_position_embeddings", None)
    # Some architectures have no limit.
    if room is not None and len(ids) + max_new_tokens > room:
        raise PromptError(
            f"prefix and prompt are {counted(len(ids), 'token')}, {max_new_tokens:,} more do not "
            f"fit in the model's {room}",
            where="--max-new-tokens",
            remedy=f"Give {room - len(ids)} or less, or a shorter prompt."
            if room > len(ids)
            else "Give a shorter prompt.",
        )
