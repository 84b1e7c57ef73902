"""`meco generate`: continue a prompt with and without metadata, side by side.

Sampling is that of transformers. Guidance is its classifier-free guidance with the plain context as
the negative prompt: `plain + g * (conditioned - plain)` on log-probabilities, which gives the same
distribution as on logits, for two forward passes per token. Prompts and conditions run one after
the other, not in batches.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from megatron_meco.errors import FlagError
from megatron_meco.flag_range import SEED, InRange
from megatron_meco.inference.conditioning import Conditioning, parse_metadata, spelled
from megatron_meco.inference.model import (
    LoadedModel,
    check_room,
    encode_prompt,
    end_tokens,
    enough_memory,
    finite_scores,
    load_model,
)
from megatron_meco.inference.model_flags import add_model_arguments, add_sampling_arguments
from megatron_meco.inference.suffix import cut_suffix
from megatron_meco.untrusted.text_file import check_text, read_lines
from megatron_meco.wording import shown

_MOST_GUIDANCE = 1000.0


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
    suffix: Conditioning | None = None,
) -> str:
    """Continue a prompt; the arguments are those of `continue_text`.

    Returns:
        The new text, without the prompt and the suffix behind it.
    """
    return continue_text(
        model,
        tokenizer,
        prefix_text,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        guidance=guidance,
        streamer=streamer,
        suffix=suffix,
    )[0]


def continue_text(
    model: Any,
    tokenizer: Any,
    prefix_text: str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    guidance: float | None,
    streamer: Any,
    suffix: Conditioning | None,
) -> tuple[str, str]:
    """Continue a prompt.

    Args:
        model: A `LlamaForCausalLM`, as `load_model` or transformers load it.
        tokenizer: Its tokenizer.
        prefix_text: The rendered prefix (`Conditioning.render`); empty for plain generation.
        prompt: The text to continue; may be empty.
        max_new_tokens: Most tokens to add.
        temperature: Sampling temperature; 0 always takes the likeliest token.
        top_p: Share of the probability to sample from.
        seed: Seed of the sampling. The caller's random state is restored.
        guidance: `g` in `plain + g * (conditioned - plain)`, or None for the conditioned
            model alone.
        streamer: Receives the tokens as they are generated, like transformers' `TextStreamer`.
        suffix: What documents ended with (`LoadedModel.conditioning.suffix`), or None.

    Returns:
        The new text, without the prompt, and the suffix that the model wrote behind it.

    Raises:
        PromptError: If there are no tokens to continue, or no room for new ones.
    """
    ids = encode_prompt(model, tokenizer, prefix_text, prompt)
    check_room(model, ids, max_new_tokens)
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        # top_k=0, because transformers' default is 50.
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
            pad_token_id=next(iter(end_tokens(model)), None),
            streamer=streamer,
            logits_processor=finite_scores(),
            **options,
        )
    new, ends = out[0, len(ids) :].tolist(), end_tokens(model)
    places = [place for place, token in enumerate(new) if token in ends]
    return cut_suffix(
        suffix, tokenizer, new[: places[0]] if places else new, has_ended=bool(places)
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
        help="condition on these fields of the template, or `none`, or `empty` (the prefix without "
        "any value, as of special tokens alone); repeat it to compare. "
        "The text without metadata always comes first.",
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="the text to continue; may be empty")
    prompts.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt per line")
    add_sampling_arguments(parser, temperature=0.7, top_p=0.9, max_new_tokens=64, allow_greedy=True)
    add(
        "--seed",
        **SEED,
        nargs="+",
        default=[0],
        metavar="S",
        help="one text per seed; default: 0",
    )
    add(
        "--guidance",
        type=float,
        action=InRange,
        low=-_MOST_GUIDANCE,
        high=_MOST_GUIDANCE,
        metavar="G",
        help="plain + G * (conditioned - plain); above 1 strengthens the effect of the metadata",
    )


def run_generate(args: argparse.Namespace) -> int:
    """Run `meco generate`; returns the exit status, 0."""
    conditions = parse_metadata(args.metadata)
    _check_flags(args, conditions)
    prompts = [args.prompt] if args.prompt_file is None else _read_prompts(args.prompt_file)
    # Rendered before the model loads, because most mistakes show here.
    conditioning = Conditioning.of_folder(args.model, args.template)
    prefixes = [conditioning.prefix_of(values) for values in conditions]
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
    suffix = loaded.conditioning.suffix
    # What has been written cannot be taken back: with suffixes the text is shown as a whole.
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text, ending = continue_text(
        loaded.model,
        loaded.tokenizer,
        prefix,
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=seed,
        guidance=guidance,
        streamer=streamer if suffix is None else None,
        suffix=suffix,
    )
    print("" if suffix is None else text)
    if ending:
        print(f"(suffix {ending!r})", file=sys.stderr)
    print(f"({time.monotonic() - begin:.1f} s)", file=sys.stderr)


def _heading(values: dict[str, str] | None, prefix: str, guidance: float | None) -> str:
    if values == {}:
        return "=== no metadata"
    strength = "" if guidance is None else f", guidance {guidance:g}"
    return f"=== {spelled(values)} (prefix {prefix!r}{strength})"


def _check_flags(args: argparse.Namespace, conditions: list[dict[str, str] | None]) -> None:
    if args.guidance is not None and len(conditions) == 1:
        raise FlagError(
            "has no effect without metadata",
            where="--guidance",
            remedy="Add --metadata FIELD=VALUE, or drop the flag.",
        )
    if args.prompt is not None:
        check_text(args.prompt, "--prompt")


def _read_prompts(path: Path) -> list[str]:
    where = f"--prompt-file {path}"
    remedy = "Name a UTF-8 text file with one prompt per line."
    lines = read_lines(path, lambda reason: FlagError(reason, where=where, remedy=remedy))
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise FlagError("has no prompts", where=where, remedy="Write one per line.")
    return prompts
