"""The corpora of a command line, their weights, and their split.

Megatron reads these flags when it builds datasets. They are read here first, so that mistakes are
refused with the name of the flag.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from megatron_meco.errors import FlagError

Blend = tuple[list[str], list[float] | None]

_SPLITS = ("train", "valid", "test")
_COOLDOWN = "--meco-cooldown-data-path"


def check_blends(args: argparse.Namespace) -> None:
    """Refuse corpora, weights and splits that Megatron would misread or fail on.

    Args:
        args: Parsed flags.

    Raises:
        FlagError: Names the flag, the file or the value.
    """
    sources = [(flag, words) for flag, words in _sources(args) if words is not None]
    for flag, words in sources:
        _check_words(words, flag)
    given = [flag for flag, _ in sources if flag != _COOLDOWN]
    if not given:
        raise FlagError(
            "no corpus is given",
            where="--data-path",
            remedy="Give the path of a prepared corpus, without .bin or .idx.",
        )
    whole = [flag for flag in given if flag in ("--data-path", "--data-args-path")]
    if len(whole) > 1 or (whole and len(given) > 1):
        raise FlagError(
            f"given beside {given[0]}", where=given[-1], remedy="Give the data by one flag."
        )
    if whole:
        _check_split(args.split)
    elif args.split is not None:
        raise FlagError(
            f"has no effect on the corpora of {given[0]}",
            where=f"--split {args.split}",
            remedy="Drop one of the two.",
        )
    elif args.train_data_path is None and args.per_split_data_args_path is None:
        raise FlagError(
            "no training corpus is given", where="--train-data-path", remedy="Give its path."
        )


def training_blend(args: argparse.Namespace) -> Blend:
    """The corpora of the training split and their weights."""
    blend, per_split = _by_megatron(args)
    chosen = blend if blend is not None else per_split[0]
    return chosen or ([], None)


def validation_blend(args: argparse.Namespace) -> Blend:
    """The corpora of the validation split and their weights; those of `--data-path` if shared."""
    blend, per_split = _by_megatron(args)
    chosen = blend if blend is not None else per_split[1]
    return chosen or ([], None)


def cooldown_blend(args: argparse.Namespace) -> Blend | None:
    """`--meco-cooldown-data-path` as a blend: paths, or alternating weights and paths."""
    from megatron.core.datasets.utils import get_blend_from_list

    if not args.meco_cooldown_data_path:
        return None
    blend: Blend = get_blend_from_list(args.meco_cooldown_data_path)
    return blend


def corpus_prefixes(args: argparse.Namespace) -> list[str]:
    """Distinct corpora of the data flags, without those of the cooldown."""
    blend, per_split = _by_megatron(args)
    blends = [blend, *(per_split or [])]
    prefixes = [prefix for b in blends if b is not None for prefix in b[0]]
    return list(dict.fromkeys(prefixes))


def _by_megatron(args: argparse.Namespace) -> Any:
    from megatron.training.utils import get_blend_and_blend_per_split

    return get_blend_and_blend_per_split(args)


def _sources(args: argparse.Namespace) -> list[tuple[str, list[str] | None]]:
    """Flags of corpora with their values; None for a flag that is not given."""
    found: list[tuple[str, list[str] | None]] = []
    for name in ("data", "train_data", "valid_data", "test_data", "meco_cooldown_data"):
        words = getattr(args, f"{name}_path")
        # Megatron's parser accepts the flag without values.
        found.append((f"--{name.replace('_', '-')}-path", words or None))
    if args.data_args_path is not None:
        found.append(("--data-args-path", _read(args.data_args_path, "--data-args-path").split()))
    if args.per_split_data_args_path is not None:
        found += _per_split(args.per_split_data_args_path)
    return found


def _per_split(path: str) -> list[tuple[str, list[str] | None]]:
    flag = "--per-split-data-args-path"
    text = _read(path, flag)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FlagError(
            f"not JSON ({error})", where=f"{flag} {path}", remedy="Mend the file."
        ) from error
    lists = []
    for name in _SPLITS:
        words = content.get(name) if isinstance(content, dict) else None
        if isinstance(words, str):
            words = words.split()
        if name not in (content or ()) or not (
            words is None or (isinstance(words, list) and all(isinstance(w, str) for w in words))
        ):
            raise FlagError(
                f"has no list of corpora under {name!r}",
                where=f"{flag} {path}",
                remedy='Write {"train": ["0.5", "A", "0.5", "B"], "valid": ["C"], "test": null}.',
            )
        lists.append((f"{flag} {path}, {name}", words))
    return lists


def _read(path: str, flag: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise FlagError(
            f"cannot be read ({reason})", where=f"{flag} {path}", remedy="Name a readable file."
        ) from error


def _check_words(words: list[str], flag: str) -> None:
    if not words or any(not word.strip() for word in words):
        raise FlagError("names no corpus", where=flag, remedy="Give the path of a prepared corpus.")
    weights = [_number(word) for word in words[::2]]
    weighted = len(words) % 2 == 0 and all(w is not None for w in weights)
    if not weighted and len(words) % 2 == 0 and any(w is not None for w in weights):
        raise FlagError("mixes weights and paths", where=f"{flag} {' '.join(words)}", remedy=_BLEND)
    if weighted:
        for word, weight in zip(words[::2], weights, strict=True):
            if weight is None or not math.isfinite(weight) or weight <= 0:
                raise FlagError(
                    f"the weight {word} is not a positive number",
                    where=flag,
                    remedy="Leave out a corpus that should not be used.",
                )
    paths = words[1::2] if weighted else words
    for path in paths:
        if _number(path) is not None:
            raise FlagError(
                f"{path} stands where a path is expected",
                where=f"{flag} {' '.join(words)}",
                remedy=_BLEND,
            )


_BLEND = "Give paths alone (A B), or a weight before each (0.7 A 0.3 B)."


def _check_split(split: str | None) -> None:
    """Refuse anything but plain ratios: Megatron uses whatever digits are in the text."""
    if split is None:
        return  # Megatron's 969, 30, 1
    ratios = [_number(part) for part in split.split(",")]
    good = [r for r in ratios if r is not None and math.isfinite(r) and r >= 0]
    if len(good) != len(ratios) or not 1 <= len(ratios) <= len(_SPLITS) or "e" in split.lower():
        raise FlagError(
            "not ratios of train, valid and test",
            where=f"--split {split}",
            remedy="Write three numbers such as 99,1,0.",
        )
    if not good[0]:
        raise FlagError(
            "leaves no documents to train on",
            where=f"--split {split}",
            remedy="Give the training split a part, such as 99,1,0.",
        )


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
