"""`meco generate`: continue a prompt with and without metadata, side by side.

The prefix is rendered from the template that the model was trained with and stands where it stood
in training: `[BOS] + prefix + prompt`, prefix and prompt tokenised apart, text never read as a
special token. Sampling is that of transformers; guidance is its classifier-free guidance with the
plain context as the negative prompt: `plain + g * (conditioned - plain)` on log-probabilities,
which is the same distribution as on logits, at the price of two forward passes for each token.
What was given up: batches; prompts and conditions run one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
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
    TextStreamer,
)
from transformers.utils import logging as transformers_logging

from megatron_meco.corpus.tokenizer import unknown_token
from megatron_meco.data.template import PrefixText
from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.inference.conditioning import Conditioning, not_an_export, parse_values
from megatron_meco.inference.eval_command import add_model_arguments
from megatron_meco.inference.flag_values import (
    MOST,
    MOST_GUIDANCE,
    check_range,
    check_seed,
    check_temperature,
    check_top_p,
)
from megatron_meco.inference.input_file import Refuse, check_text, read_lines
from megatron_meco.inference.model_folder import check_model_folder
from megatron_meco.inference.wording import counted, first_line, one_line, shown

_NONE = "none"


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

    if not folder.is_dir():
        raise refuse("no such folder")
    check_model_folder(folder, refuse)
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
    """Tokenise text as in training: no tokens of the tokenizer's own, and text stays text.

    Args:
        tokenizer: Of transformers.
        text: Of a `PrefixText` each special token is one id, and the texts between are apart.

    Raises:
        FlagError: The tokenizer lacks a special token of the template.
    """
    if not text:
        return []
    if isinstance(text, PrefixText) and text.segments != (str(text),):
        return [
            i
            for part in text.segments
            for i in (
                encode_text(tokenizer, part)
                if isinstance(part, str)
                else [_token_id(tokenizer, part.name)]
            )
        ]
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids


def _token_id(tokenizer: Any, name: str) -> int:
    found = tokenizer.convert_tokens_to_ids(name)
    # For a token that is not there it gives the id of its unknown token.
    if found is None or tokenizer.convert_ids_to_tokens(found) != name:
        raise unknown_token(name, "the model's template")
    return int(found)


def generate_text(
    model: Any,
    tokenizer: Any,
    prefix_text: str,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    guidance: float | None = None,
    streamer: Any = None,
) -> str:
    """Continue a prompt.

    Args:
        model: A `LlamaForCausalLM`, as `load_model` or transformers load it.
        tokenizer: Its tokenizer.
        prefix_text: The rendered prefix (`Conditioning.render`); empty: plain generation.
        prompt: The text to continue; may be empty.
        max_new_tokens: Tokens to add at most.
        temperature: 0: always the likeliest token.
        top_p: Share of the probability to sample from.
        seed: Decides the samples; the generator of the caller is left as it was.
        guidance: `g` in `plain + g * (conditioned - plain)`; None: the conditioned model alone.
        streamer: Receives the tokens as they come, as transformers' `TextStreamer` does.

    Returns:
        The new text alone.

    Raises:
        PromptError: When there is nothing to continue, or no room for it.
    """
    ids = encode_prompt(model, tokenizer, prefix_text, prompt)
    check_room(model, ids, max_new_tokens)
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        # top_k is given because the default of transformers is not 0.
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    context = torch.tensor([ids], device=model.device)
    if guidance is not None:
        plain = torch.tensor([encode_prompt(model, tokenizer, "", prompt)], device=model.device)
        options |= {
            "guidance_scale": guidance,
            "negative_prompt_ids": plain,
            "negative_prompt_attention_mask": torch.ones_like(plain),
        }
    with (
        enough_memory("--max-new-tokens", "Give fewer, or a shorter prompt."),
        torch.random.fork_rng(),
        torch.no_grad(),
    ):
        torch.manual_seed(seed)
        out = model.generate(
            context,
            attention_mask=torch.ones_like(context),
            max_new_tokens=max_new_tokens,
            pad_token_id=(end_tokens(model) or [None])[0],
            streamer=streamer,
            logits_processor=finite_scores(),
            **options,
        )
    text: str = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    return text


def finite_scores() -> LogitsProcessorList:
    """For `generate`: refuses the scores of a broken model (`ModelError`)."""
    return LogitsProcessorList([_FiniteScores()])


def end_tokens(model: Any) -> list[int]:
    """The tokens that end a text: one, or several in models of other origin, or none."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = model.config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


def parse_metadata(given: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Read the `--metadata` flags.

    Args:
        given: The words after each `--metadata`: `field=value` ..., or `none`.

    Returns:
        Conditions to show; an empty one is plain generation. It comes first, always and once: what
        metadata does is seen beside it.

    Raises:
        FlagError: For a word that is neither.
    """
    conditions: list[dict[str, str]] = [{}]
    for words in given:
        if list(words) == [_NONE]:
            continue
        values = parse_values(words)
        if values not in conditions:
            conditions.append(values)
    return conditions


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


# ---- The command ----


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `meco generate` to its parser."""
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--metadata",
        action="append",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="condition on these fields of the template, or `none`; repeat it to compare. What "
        "the model says without metadata is always shown first.",
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="the text to continue; may be empty")
    prompts.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt in each line")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    add(
        "--temperature",
        type=float,
        default=0.7,
        metavar="T",
        help="0: greedy; default: %(default)s",
    )
    add("--top-p", type=float, default=0.9, metavar="P", help="default: %(default)s")
    add(
        "--seed",
        type=int,
        nargs="+",
        default=[0],
        metavar="S",
        help="several give a text each; default: 0",
    )
    add(
        "--guidance",
        type=float,
        metavar="G",
        help="plain + G * (conditioned - plain); above 1 strengthens what the metadata does",
    )


def run_generate(args: argparse.Namespace) -> int:
    """Run `meco generate`.

    Args:
        args: The parsed flags of `add_generate_arguments`.

    Returns:
        The exit status, 0.
    """
    conditions = parse_metadata(args.metadata)
    _check_flags(args, conditions)
    prompts = [args.prompt] if args.prompt_file is None else _read_prompts(args.prompt_file)
    # Rendered before anything heavy is loaded: most mistakes show here.
    conditioning = Conditioning.of_folder(args.model, args.template)
    prefixes = [conditioning.render(values) if values else "" for values in conditions]
    transformers_logging.disable_progress_bar()
    loaded = load_model(args.model, args.device, args.template)
    for number, prompt in enumerate(prompts, 1):
        if len(prompts) > 1:
            print(f"##### prompt {number}: {shown(prompt)}\n")
        for values, prefix in zip(conditions, prefixes, strict=True):
            guidance = args.guidance if prefix else None
            for seed in args.seed:
                told = f", seed {seed}" if len(args.seed) > 1 else ""
                print(_heading(values, prefix, guidance) + told, flush=True)
                _generate_one(loaded, args, prefix, prompt, guidance, seed)
    return 0


def _generate_one(
    loaded: LoadedModel,
    args: argparse.Namespace,
    prefix: str,
    prompt: str,
    guidance: float | None,
    seed: int,
) -> None:
    begin = time.monotonic()
    print(prompt, end="", flush=True)
    generate_text(
        loaded.model,
        loaded.tokenizer,
        prefix,
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=seed,
        guidance=guidance,
        streamer=TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    print()
    print(f"({time.monotonic() - begin:.1f} s)", file=sys.stderr)


def _heading(values: dict[str, str], prefix: str, guidance: float | None) -> str:
    if not values:
        return "=== no metadata"
    given = " ".join(f"{name}={shown(value)}" for name, value in values.items())
    strength = "" if guidance is None else f", guidance {guidance:g}"
    return f"=== {given} (prefix {prefix!r}{strength})"


def _check_flags(args: argparse.Namespace, conditions: list[dict[str, str]]) -> None:
    check_range("--max-new-tokens", args.max_new_tokens, 1, MOST)
    check_temperature(args.temperature, zero=True)
    check_top_p(args.top_p)
    for seed in args.seed:
        check_seed(seed)
    check_range("--guidance", args.guidance, -MOST_GUIDANCE, MOST_GUIDANCE)
    if args.guidance is not None and len(conditions) == 1:
        raise FlagError(
            "has nothing to strengthen without metadata",
            where="--guidance",
            remedy="Give --metadata FIELD=VALUE, or drop the flag.",
        )
    if args.prompt is not None:
        check_text(args.prompt, "--prompt")


def _read_prompts(path: Path) -> list[str]:
    where = f"--prompt-file {path}"
    remedy = "Name a UTF-8 text file with one prompt in each line."
    lines = read_lines(path, lambda reason: FlagError(reason, where=where, remedy=remedy))
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise FlagError("holds no prompts", where=where, remedy="Write one in each line.")
    return prompts
