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

from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.inference.conditioning import Conditioning, not_an_export
from megatron_meco.inference.model_folder import check_model
from megatron_meco.untrusted.text_file import Refuse
from megatron_meco.wording import counted, first_line, one_line, shown


class PromptError(MeCoError):
    """A prompt that the model cannot continue."""


class ModelError(MeCoError):
    """A model that computes nothing."""


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
        device: Where to; None: the first GPU, or the CPU.
        template: Instead of the one it was trained with; None: that one.
        own_sampling: Whether penalties and the like in a `generation_config.json` of other origin
            are kept; else nothing but the callers' options decides how to sample.

    Raises:
        FlagError: When it is no such folder, or the device or the template cannot be used.
    """
    conditioning = Conditioning.of_folder(folder, template)

    def refuse(reason: str) -> FlagError:
        return not_an_export(folder, reason)

    check_model(folder)
    device = pick_device(device)
    # Code that lies in the folder is never run; weights are never unpickled.
    options = {"local_files_only": True, "trust_remote_code": False}
    with enough_memory(f"--model {folder}", "Give a --device with more memory."):
        try:
            model, told = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, output_loading_info=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        # What a library of others says about files of others may be anything.
        except Exception as error:
            raise refuse(one_line(error)) from error
        _check_loaded(model, tokenizer, told, refuse)
        if not own_sampling:
            model.generation_config = GenerationConfig(eos_token_id=end_tokens(model) or None)
        model = model.to(device).eval()
    return LoadedModel(model=model, tokenizer=tokenizer, conditioning=conditioning)


def _check_loaded(model: Any, tokenizer: Any, told: dict[str, Any], refuse: Refuse) -> None:
    """Refuse what transformers only warns of: weights that it made up or had no place for."""
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
    """Turn a lack of memory inside the block into a refusal.

    Args:
        where: The flag that asks for so much.
        remedy: What to do.

    Raises:
        FlagError: When memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch says it in a class of its own for GPUs alone.
        is_cpu = "not enough memory" in str(error) or "can't allocate memory" in str(error)
        if not is_cpu and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        raise FlagError("needs more memory than there is", where=where, remedy=remedy) from error


def pick_device(device: str | None) -> str:
    """Check a device, or pick the first GPU, or the CPU.

    Raises:
        FlagError: When torch does not have the device.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # A number comes back: the device `meta` has none.
        torch.zeros(1, device=device).item()
    # Backends that are not there raise whatever they like.
    except Exception as error:
        raise FlagError(
            f"cannot be used ({first_line(error)})",
            where=f"--device {device}",
            remedy="Give cpu, or cuda:N where torch sees that GPU.",
        ) from error
    return device


class _FiniteScores(LogitsProcessor):  # type: ignore[misc]
    """Refuses what a broken model computes: the likeliest of tokens that are NaN is the first."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Single tokens may be ruled out with minus infinity.
        check_finite(scores.amax(-1))
        return scores


def check_finite(scores: torch.Tensor) -> None:
    """Refuse what a broken model computes.

    Raises:
        ModelError: When any score is NaN or infinite.
    """
    if not scores.isfinite().all():
        raise ModelError(
            "computes NaN or infinity",
            where="--model",
            remedy="Its weights are broken: name another one.",
        )


def encode_prompt(model: Any, tokenizer: Any, prefix_text: str, prompt: str) -> list[int]:
    """Tokenise a prompt as a training document begins.

    Args:
        model: The model; its configuration says whether documents begin with BOS.
        tokenizer: Its tokenizer.
        prefix_text: The rendered prefix; empty: none.
        prompt: What follows.

    Returns:
        `[BOS] + prefix + prompt`.
    """
    bos = model.config.bos_token_id
    ids = [] if bos is None else [bos]
    return [*ids, *encode_text(tokenizer, prefix_text), *encode_text(tokenizer, prompt)]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokenise text as in training: no tokens of the tokenizer's own, and text stays text."""
    if not text:
        return []
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids


def finite_scores() -> LogitsProcessorList:
    """For `generate`: refuses the scores of a broken model (`ModelError`)."""
    return LogitsProcessorList([_FiniteScores()])


def end_tokens(model: Any) -> list[int]:
    """The tokens that end a text: one, or several in models of other origin, or none."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = model.config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


def check_room(model: Any, ids: list[int], max_new_tokens: int) -> None:
    """Refuse what the model cannot continue.

    Args:
        model: The model.
        ids: What stands before the new tokens.
        max_new_tokens: How many there may be.

    Raises:
        PromptError: When there is nothing to continue, or no room for it.
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
