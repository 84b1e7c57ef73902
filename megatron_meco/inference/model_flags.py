"""Flags that several commands share: the model, sampling, and the harness's spellings.

Kept apart from the modules that do the work, so that a wrong flag is answered before torch loads.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_meco.flag_range import MOST, InRange

DEFAULT = "default: %(default)s"
OWN_TASKS = "a folder of your own tasks; functions that their YAML files name with !function run"

MOST_AT_ONCE = 65_536
"""Largest batch."""

SHOTS: dict[str, Any] = {"type": int, "action": InRange, "low": 0, "high": 1000}
"""Options of a flag for the number of few-shot examples."""

# Colder than this, float32 overflows; the likeliest token has all the probability long before.
_COLDEST, _HOTTEST = 1e-6, 1e6
_SMALLEST_SHARE = 5e-324


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--template` and `--device`."""
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="a folder of `meco export`")
    add(
        "--template",
        metavar="T",
        help="render metadata with this template instead of the model's own: for a baseline, which "
        "has none, and for Hugging Face folders of other origin",
    )
    add("--device", metavar="D", help="as in cuda:0; default: the first GPU, or the CPU")


def add_sampling_arguments(
    parser: argparse.ArgumentParser,
    *,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    allow_greedy: bool,
) -> None:
    """Add `--max-new-tokens`, `--temperature` and `--top-p`.

    Args:
        parser: Parser of the command.
        temperature: Default of `--temperature`.
        top_p: Default of `--top-p`.
        max_new_tokens: Default of `--max-new-tokens`.
        allow_greedy: Whether temperature 0 is allowed, for the likeliest token.
    """
    greedy = "0 for the likeliest token, or " if allow_greedy else ""
    add = parser.add_argument
    add(
        "--max-new-tokens",
        type=int,
        action=InRange,
        low=1,
        high=MOST,
        default=max_new_tokens,
        metavar="N",
        help=DEFAULT,
    )
    add(
        "--temperature",
        type=float,
        action=InRange,
        low=_COLDEST,
        high=_HOTTEST,
        also=0.0 if allow_greedy else None,
        remedy=f"Give {greedy}a number from {_COLDEST:g} to {_HOTTEST:,.0f}.",
        default=temperature,
        metavar="T",
        help=f"0: greedy; {DEFAULT}" if allow_greedy else DEFAULT,
    )
    add(
        "--top-p",
        type=float,
        action=InRange,
        low=_SMALLEST_SHARE,
        high=1,
        remedy="Give a share above 0, up to 1.",
        default=top_p,
        metavar="P",
        help=DEFAULT,
    )


def add_spelled(parser: argparse.ArgumentParser, flag: str, **options: Any) -> None:
    """Add a flag that may also be spelled with underscores, as in lm-evaluation-harness."""
    parser.add_argument(flag, **options)
    hidden = {**options, "help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument(f"--{flag[2:].replace('-', '_')}", **hidden)
