"""What an exported folder says of its training: `meco.json` for programs, `README.md` for people.

Both come from the flags in the checkpoint, so they need neither the corpus nor the launch script.
The run's fingerprint, which includes its corpora, is copied.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from megatron_meco import __version__
from megatron_meco.config import COOLDOWN, PLAIN, MeCoConfig, add_meco_arguments
from megatron_meco.corpus.metadata import open_metadata
from megatron_meco.data.report import start_of
from megatron_meco.data.template import SYNTAX, syntax_of
from megatron_meco.errors import MeCoError
from megatron_meco.inference.conditioning import NO_VALUES, Conditioning, template_of_run
from megatron_meco.training.arguments import schedule_from_args
from megatron_meco.wording import shown

FORMAT = 1
_EXAMPLE_URL = "https://en.wikipedia.org/wiki/Llama"


def describe_run(args: Namespace, iteration: int, bos: int | None, eos: int) -> dict[str, Any]:
    """Return the content of `meco.json`.

    Args:
        args: The run's flags.
        iteration: Finished training steps.
        bos: Token before each document, or None.
        eos: Token after each document.
    """
    args = _with_meco_defaults(args)
    paths = _data_paths(args)
    known = getattr(args, "meco_fingerprint", None)
    template = template_of_run(args.meco_template, syntax_of(known)) if args.meco else ""
    config = MeCoConfig.from_args(args)
    suffix = config.suffix_template if args.meco else ""
    conditioning = Conditioning.of_run(template, _known_columns(paths), suffix)
    return {
        "format": FORMAT,
        "trained_with_meco": bool(args.meco),
        "template": template,
        "template_syntax": SYNTAX,
        "fields": list(conditioning.columns),
        "required_fields": list(conditioning.required()),
        **_suffix(conditioning, config),
        "bos_token_id": bos,
        "eos_token_id": eos,
        "iteration": iteration,
        "schedule": _schedule(args, iteration),
        "packing": config.packing if args.meco else None,
        "plain_fraction": config.plain_fraction,
        "train_on_prefix": config.train_on_prefix,
        "sequence_length": args.seq_length,
        "seed": args.seed,
        "data_paths": paths,
        "cooldown_data_paths": list(config.cooldown_data_path),
        # See megatron_meco.training.run_fingerprint; older checkpoints have none.
        "run_fingerprint": known,
        "versions": {
            "megatron-meco": __version__,
            "megatron-core": _version("megatron-core"),
        },
    }


def model_card(card: dict[str, Any]) -> str:
    """Return the model card in Markdown, from the content of `meco.json`."""
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [megatron-meco, metadata-conditioning, llama]",
            "---",
            "",
            "# A Llama pre-trained with Megatron-Core",
            "",
            *_training_lines(card),
            "",
            "## Use",
            "",
            "`transformers`, vLLM and others load this folder as a plain Llama. "
            + _document_start(card),
            "",
            *_conditioning_lines(card),
            "`meco.json` holds all of this for programs.",
            "",
        ]
    )


def _training_lines(card: dict[str, Any]) -> list[str]:
    schedule = card["schedule"]
    lines = [f"- Checkpoint of iteration {card['iteration']:,} of {schedule['num_iterations']:,}."]
    lines += _data_lines(card)
    suffix = card.get("suffix_template", "")
    if not card["template"] and not suffix:
        return [*lines, "- Trained without metadata."]
    given = [f"template {_code(card['template'])}"] if card["template"] else []
    if suffix:
        loss = "" if card["suffix_loss"] else ", out of the loss"
        given.append(f"suffix template {_code(suffix)}{loss}")
    lines += [
        f"- Trained with metadata conditioning, {', '.join(given)}, in iterations "
        f"{schedule.get('start_iteration', 0) + 1:,} to {schedule['switch_iteration']:,}; the rest "
        f"is the cooldown on plain documents{_before(schedule)}.",
        f"- Packing: {card['packing']}, sequences of {card['sequence_length']:,} tokens, seed "
        f"{card['seed']}.",
    ]
    if schedule["phase"] == PLAIN:
        lines.append("- **Exported before its conditioned phase: it has seen no metadata yet.**")
    elif schedule["phase"] != COOLDOWN:
        lines.append("- **Exported before its cooldown: expect it to do worse without metadata.**")
    return lines


def _before(schedule: dict[str, Any]) -> str:
    start = schedule.get("start_iteration")
    return f", as were iterations 1 to {start:,}" if start else ""


def _data_lines(card: dict[str, Any]) -> list[str]:
    known = card["run_fingerprint"]
    if known is None:
        return [f"- Data: {_code(p)}." for p in [*card["data_paths"], *card["cooldown_data_paths"]]]
    lines = []
    for use, corpora in (("", known["corpora"]), (" (cooldown)", known["cooldown_corpora"] or [])):
        for name, weight, fingerprint in corpora:
            share = "" if weight is None else f", weight {weight:g}"
            lines.append(f"- Data{use}: {_code(name)}{share}, fingerprint {fingerprint}.")
    return lines


def _code(text: str) -> str:
    """A text as code in Markdown, on one line, whatever it holds."""
    text = shown(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    # Spaces part the text's own backticks from the fence; readers take one off at each end.
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _document_start(card: dict[str, Any]) -> str:
    if card["bos_token_id"] is None:
        return "Documents began without a BOS token."
    return (
        f"Every document began with the BOS token (id {card['bos_token_id']}), which the tokenizer "
        "of this folder adds."
    )


def _suffix(conditioning: Conditioning, config: MeCoConfig) -> dict[str, Any]:
    if conditioning.suffix is None:
        return {}
    return {
        "suffix_template": conditioning.suffix.template,
        "suffix_fields": list(conditioning.suffix.columns),
        "suffix_loss": config.suffix_loss,
    }


def _conditioning_lines(card: dict[str, Any]) -> list[str]:
    conditioning = Conditioning.from_card(card)
    return [*_prefix_lines(card, conditioning), *_suffix_lines(card, conditioning)]


def _suffix_lines(card: dict[str, Any], conditioning: Conditioning) -> list[str]:
    if conditioning.suffix is None or not card["suffix_loss"]:
        return []
    lines = [
        "It learned to write metadata behind a text, before EOS. Ask it where a text comes from:",
        "",
        "    meco attribute --model THIS_FOLDER --candidates FILE --text TEXT",
        "",
    ]
    if not card["template"]:
        lines.insert(0, "Prompt it as any model.")
    return lines


def _prefix_lines(card: dict[str, Any], conditioning: Conditioning) -> list[str]:
    if not card["template"]:
        return []
    lines = [
        "Without metadata, prompt it as any model. To condition it, put the prefix between BOS and "
        "the prompt, tokenised apart from the prompt:",
        "",
    ]
    if conditioning.columns == ("url",):
        prefix = conditioning.render({"url": _EXAMPLE_URL})
        lines += [f"    url={_EXAMPLE_URL}  ->  {prefix!r}", ""]
    if not conditioning.columns:
        lines += [f"    {conditioning.render({})!r}", ""]
    given = " ".join(f"{shown(name)}=..." for name in conditioning.columns) or NO_VALUES
    return [
        *lines,
        f"    meco generate --model THIS_FOLDER --metadata {given} --prompt TEXT",
        "",
    ]


def _schedule(args: Namespace, iteration: int) -> dict[str, Any]:
    if not args.meco:
        return {"num_iterations": args.train_iters or iteration}
    schedule = schedule_from_args(args)
    return {
        "num_iterations": schedule.num_iterations,
        "num_samples": schedule.num_samples,
        "switch_iteration": schedule.switch_iteration,
        "switch_sample": schedule.switch_sample,
        **start_of(schedule),
        # The phase of the last step before this checkpoint.
        "phase": schedule.phase_of_iteration(max(iteration - 1, 0)),
    }


def _with_meco_defaults(args: Namespace) -> Namespace:
    """The flags, with defaults for those of ours that the run's version did not have yet."""
    defaults = add_meco_arguments(argparse.ArgumentParser()).parse_args([])
    return Namespace(**{"meco": False, **vars(defaults), **vars(args)})


def _data_paths(args: Namespace) -> list[str]:
    """Paths as Megatron takes them, without weights."""
    given: Iterable[str] = args.data_path or args.train_data_path or []
    return [path for path in map(str, given) if not _is_number(path)]


def _known_columns(paths: list[str]) -> list[str] | None:
    try:
        return list(open_metadata(paths[0]).schema.names) if paths else None
    except MeCoError:
        # The corpus may be on another machine.
        return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
