"""`meco steer`: what metadata does to what a model says unprompted, scored.

The paper's toxicity protocol (section 4.2): 4,096 samples from BOS alone and from the metadata
alone, temperature 0.7, top-p 0.9, 10 to 128 tokens, each scored by a classifier. The scorer is
Detoxify's "unbiased" model, which the paper used, if it is installed, or any Python function from
texts to numbers. Means have bootstrap confidence intervals.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.flag_range import COUNT, SEED, InRange, check_range
from megatron_meco.inference.conditioning import Conditioning, parse_metadata, spelled
from megatron_meco.inference.model import load_model
from megatron_meco.inference.model_flags import (
    DEFAULT,
    MOST_AT_ONCE,
    add_model_arguments,
    add_sampling_arguments,
)
from megatron_meco.inference.model_folder import check_model
from megatron_meco.inference.output_file import write_json
from megatron_meco.inference.paper import STEERING
from megatron_meco.inference.samples import SampleSettings, sample
from megatron_meco.wording import (
    JSON_HELP,
    aligned,
    counted,
    first_line,
    json_line,
    print_progress,
)

Scorer = Callable[[list[str]], Mapping[str, Sequence[float]]]
"""Scores for each text, by the name of the score."""

_NUM_RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 200
_TEXTS_AT_ONCE = 64
_DETOXIFY = "detoxify"
_THRESHOLD = 0.5


class ScorerError(MeCoError):
    """A scorer that cannot be loaded, or does not return one number per text."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its 95 % bootstrap confidence interval (percentiles of resampled texts).

    Attributes:
        value: The figure.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def intervals(
    scores: Sequence[float],
    plain: Sequence[float] | None = None,
    seed: int = 0,
    wrong: Sequence[float] | None = None,
) -> dict[str, Interval]:
    """Summarise the scores of one condition.

    Args:
        scores: One score per text.
        plain: Scores without metadata to compare with; None if these are the baseline.
        seed: Seed of the resampling.
        wrong: Scores under other metadata to compare with, or None.

    Returns:
        `mean` and `share_above_0.5`; with `plain`, also `difference` of the means and, where those
        of `plain` are above 0, their `ratio`; with `wrong`, also `right_minus_shuffled`, the
        difference of the means.
    """
    draw = np.random.default_rng(seed)
    values = np.asarray(scores, dtype=np.float64)
    means = _resampled_means(values, draw)
    shares = _resampled_means((values > _THRESHOLD).astype(np.float64), draw)
    found = {
        "mean": _interval(values.mean(), means),
        "share_above_0.5": _interval((values > _THRESHOLD).mean(), shares),
    }
    if plain is not None:
        others = np.asarray(plain, dtype=np.float64)
        before = _resampled_means(others, draw)
        found["difference"] = _interval(values.mean() - others.mean(), means - before)
        # A rare event may be missing from a resample; the ratio then has no interval.
        if (before > 0).all():
            found["ratio"] = _interval(values.mean() / others.mean(), means / before)
    if wrong is not None:
        others = np.asarray(wrong, dtype=np.float64)
        difference = means - _resampled_means(others, draw)
        found["right_minus_shuffled"] = _interval(values.mean() - others.mean(), difference)
    return found


def _resampled_means(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    parts = []
    for begin in range(0, _NUM_RESAMPLES, _RESAMPLES_AT_ONCE):
        rows = min(_RESAMPLES_AT_ONCE, _NUM_RESAMPLES - begin)
        parts.append(values[draw.integers(len(values), size=(rows, len(values)))].mean(axis=1))
    return np.concatenate(parts)


def _interval(value: Any, resampled: np.ndarray) -> Interval:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Interval(value=float(value), low=float(low), high=float(high))


# ---- Scorers ----


def load_scorer(name: str, device: str | None = None) -> Scorer:
    """Load a scorer.

    Args:
        name: `detoxify`, or `MODULE:FUNCTION`; the function takes a list of texts and returns a
            number for each, or such a list for each of several names.
        device: Device for Detoxify, or None for the CPU.

    Raises:
        ScorerError: If it is not installed or does not exist.
    """
    if name == _DETOXIFY:
        try:
            from detoxify import Detoxify

            detoxify: Scorer = Detoxify("unbiased", device=device or "cpu").predict
        except ModuleNotFoundError as error:
            raise _unusable(name, str(error), "Install it: pip install detoxify.") from error
        # It downloads its weights on first use.
        except (OSError, RuntimeError) as error:
            raise _unusable(name, str(error), "Run it once with network access.") from error
        return detoxify
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        remedy = f"Give {_DETOXIFY}, or MODULE:FUNCTION as in my_scores:toxicity."
        raise _unusable(name, "not the name of a scorer", remedy)
    remedy = "The module must be importable: installed, or a file in this folder."
    # Unlike `python -m`, a command on PATH does not import from the current folder.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    # The user's module may raise any exception.
    except Exception as error:
        raise _unusable(name, first_line(error), remedy) from error
    if not callable(found):
        raise _unusable(name, f"{function} cannot be called", remedy)

    def scores(texts: list[str]) -> Mapping[str, Sequence[float]]:
        given = found(texts)
        return given if isinstance(given, Mapping) else {function: given}

    return scores


def score_texts(scorer: Scorer, texts: Sequence[str], name: str) -> dict[str, list[float]]:
    """Score texts in batches; return the scores by name, each as long as the texts.

    Args:
        scorer: The scorer.
        texts: The texts.
        name: The scorer's name, for messages.

    Raises:
        ScorerError: If it does not return one finite number per text.
    """
    found: dict[str, list[float]] = {}
    for begin in range(0, len(texts), _TEXTS_AT_ONCE):
        batch = list(texts[begin : begin + _TEXTS_AT_ONCE])
        try:
            given = scorer(batch)
        # So may the user's function.
        except Exception as error:
            raise _unusable(
                name, f"failed ({type(error).__name__}: {first_line(error)})"
            ) from error
        for key, values in given.items():
            try:
                numbers = [float(value) for value in values]
            except (OverflowError, TypeError, ValueError) as error:
                raise _unusable(name, f"its {key!r} are no numbers ({error})") from error
            if len(numbers) != len(batch) or not np.isfinite(numbers).all():
                what = f"gave {counted(len(numbers), 'number')} for {counted(len(batch), 'text')}"
                raise _unusable(name, f"{what} under {key!r}, or some that are not finite")
            found.setdefault(str(key), []).extend(numbers)
    if any(len(numbers) != len(texts) for numbers in found.values()) or not found:
        raise _unusable(name, "gave other names for some texts than for others, or none")
    return found


def _unusable(name: str, what: str, remedy: str | None = None) -> ScorerError:
    remedy = remedy or "It must return one number per text, or such a list per name."
    return ScorerError(what, where=f"--scorer {name}", remedy=remedy)


# ---- The command ----


def add_steer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `meco steer` to its parser."""
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--metadata",
        action="append",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="sample behind these fields of the template, or `empty` (the prefix without any "
        "value); repeat it to compare. Samples from BOS "
        "alone are always included",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="the folder to write")
    add(
        "--scorer",
        metavar="S",
        help=f"{_DETOXIFY}, or MODULE:FUNCTION; default: write the samples only. Existing "
        "samples are kept",
    )
    add(
        "--shuffled",
        action="store_true",
        help="also compare the scores under each metadata with those under the other metadata "
        "given: the effect of what the metadata says. Needs --scorer and two or more --metadata",
    )
    add("--num-samples", **COUNT, default=STEERING.num_samples, metavar="N", help=DEFAULT)
    add("--min-new-tokens", type=int, default=STEERING.min_new_tokens, metavar="N", help=DEFAULT)
    add_sampling_arguments(
        parser,
        temperature=STEERING.temperature,
        top_p=STEERING.top_p,
        max_new_tokens=STEERING.max_new_tokens,
        allow_greedy=False,
    )
    add(
        "--batch-size",
        type=int,
        action=InRange,
        low=1,
        high=MOST_AT_ONCE,
        default=64,
        metavar="N",
        help=DEFAULT,
    )
    add("--seed", **SEED, default=0, metavar="S", help=DEFAULT)
    add("--json", action="store_true", help=JSON_HELP)


def run_steer(args: argparse.Namespace) -> int:
    """Run `meco steer`; returns the exit status, 0."""
    remedy = "Give 0 or more, and not more than --max-new-tokens."
    check_range("--min-new-tokens", args.min_new_tokens, 0, args.max_new_tokens, remedy)
    conditions = parse_metadata(args.metadata)
    conditioning = Conditioning.of_folder(args.model, args.template)
    check_model(args.model)
    names = _names(conditions, conditioning)
    if args.shuffled and (args.scorer is None or len(names) < 3):
        raise FlagError(
            f"needs --scorer and two or more --metadata, and has {len(names) - 1}",
            where="--shuffled",
            remedy="Add them, or drop the flag.",
        )
    scorer = None if args.scorer is None else load_scorer(args.scorer, args.device)
    settings = SampleSettings(
        model=str(args.model.resolve()),
        prefixes=tuple(names),
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        temperature=args.temperature,
        top_p=args.top_p,
        min_new_tokens=args.min_new_tokens,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    loaded = load_model(args.model, args.device, args.template)
    texts = sample(loaded, settings, args.output, partial(print_progress, noun="sample"))
    told = f"{counted(settings.num_samples, 'sample')} of {counted(len(names), 'kind')}"
    print(f"{args.output}: {told}", file=sys.stderr)
    about: dict[str, Any] = {}
    if scorer is not None:
        scores = {p: score_texts(scorer, texts[p], args.scorer) for p in settings.prefixes}
        report = _report(scores, args.seed, shuffled=args.shuffled)
        if not args.json:
            _print_report(report, names)
        about |= {
            "scorer": args.scorer,
            "summary": {
                prefix: {name: {k: asdict(i) for k, i in row.items()} for name, row in rows.items()}
                for prefix, rows in report.items()
            },
        }
        write_json(args.output / "scores.json", {**about, "scores": scores})
    if args.json:
        print(json_line({"samples": settings.num_samples, **about, "folder": args.output}))
    return 0


def _names(conditions: list[dict[str, str] | None], conditioning: Conditioning) -> dict[str, str]:
    """Names of the conditions by their rendered prefix; '' is no metadata."""
    names: dict[str, str] = {}
    for values in conditions:
        prefix = conditioning.prefix_of(values)
        name = spelled(values)
        if prefix in names:
            raise FlagError(
                f"{names[prefix]} and {name} give the same prefix {prefix!r}",
                where="--metadata",
                remedy="Give one of them.",
            )
        names[prefix] = name
    return names


def _report(
    scores: dict[str, dict[str, list[float]]], seed: int, *, shuffled: bool
) -> dict[str, dict[str, dict[str, Interval]]]:
    plain = scores[""]
    report = {}
    for prefix, rows in scores.items():
        report[prefix] = {
            name: intervals(
                values,
                plain[name] if prefix else None,
                seed,
                _under_others(scores, prefix, name) if prefix and shuffled else None,
            )
            for name, values in rows.items()
        }
    return report


def _under_others(scores: dict[str, dict[str, list[float]]], prefix: str, name: str) -> list[float]:
    """Return the scores of all samples under metadata other than `prefix`."""
    return [
        value for other, rows in scores.items() if other not in ("", prefix) for value in rows[name]
    ]


def _print_report(report: dict[str, dict[str, dict[str, Interval]]], names: dict[str, str]) -> None:
    titles = {"": "BOS alone", **{prefix: name for prefix, name in names.items() if prefix}}
    header = ["score", "samples from", "mean", "share above 0.5", "mean / mean from BOS alone"]
    is_shuffled = any(
        "right_minus_shuffled" in row for rows in report.values() for row in rows.values()
    )
    rows = [header + ["mean - mean under the other metadata"] * is_shuffled]
    for score in report[""]:
        for prefix, found in report.items():
            row = found[score]
            ratio = str(row["ratio"]) if "ratio" in row else ""
            cells = [score, titles[prefix], str(row["mean"]), str(row["share_above_0.5"]), ratio]
            rows.append(cells + [str(row.get("right_minus_shuffled", ""))] * is_shuffled)
    print("\n".join(aligned(rows, len(rows[0]))))
    print("in brackets: 95 % bootstrap confidence intervals")
