"""`meco attribute`: which source a text looks like, by suffixes or by Bayes over prefixes.

The probability of a candidate prefix c for a text x is proportional to `P(c) * P(x | c) ** w`.
`P(x | c)` is the likelihood of the text behind `[BOS] + c`, `P(c)` the share of c among the
documents of a corpus. A model that learned to write suffixes says `P(c | x)` itself, with the
priors of its training in it: the likelihood of the suffix c and EOD behind `[BOS] + x`, among those
of the candidates. It takes the place of `P(x | c)`, with even priors. The weight w calibrates: a
model's likelihoods of long texts are much too certain. It is fitted by maximum likelihood on one
half of held-out documents, whose sources are known; accuracy and calibration are measured on the
other half. The result is relative to the candidates: a text of any other source is attributed to
one of them all the same.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_meco.errors import FlagError
from megatron_meco.flag_range import COUNT, SEED
from megatron_meco.inference.candidates import (
    Candidate,
    add_candidates_argument,
    conditioning_of,
    count_prefixes,
    most_frequent,
    read_candidates,
    read_documents,
    read_texts,
)
from megatron_meco.inference.conditioning import Conditioning
from megatron_meco.inference.model_flags import DEFAULT, add_model_arguments
from megatron_meco.inference.paired import NORMAL
from megatron_meco.untrusted.text_file import read_text
from megatron_meco.wording import aligned, counted, print_progress, shown

Floats = npt.NDArray[np.float64]

Evidence = Callable[[str, list[int]], list[float]]
"""Log-likelihoods, in nats, of documents given a prefix (`TextScore.totals`), or of a suffix given
documents (`SuffixScore.totals`), by the numbers of the documents."""

_PREFIX, _SUFFIX = "prefix", "suffix"

_FEWEST_HELD_OUT = 4
# 1 is Bayes. A few documents that are all classified correctly would fit any larger weight.
_HIGHEST_WEIGHT = 1.0
_NUM_BINS = 10


# ---- Bayes ----


def log_likelihoods(
    evidence: Evidence,
    candidates: Sequence[Candidate],
    num_documents: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Floats:
    """Score documents under every candidate.

    Args:
        evidence: Scores documents given a prefix, or a suffix given documents.
        candidates: The candidates.
        num_documents: Number of documents.
        tell: Called with the number of candidates done and in total.

    Returns:
        Log-likelihoods, float64 [documents, candidates].
    """
    columns = []
    for candidate in candidates:
        columns.append(evidence(candidate.prefix, list(range(num_documents))))
        tell(len(columns), len(candidates))
    return np.array(columns, dtype=np.float64).T.reshape(num_documents, len(candidates))


def log_posteriors(likelihoods: Floats, log_priors: Floats, weight: float = 1.0) -> Floats:
    """Return `log P(candidate | document)`.

    Args:
        likelihoods: Log-likelihoods, float64 [documents, candidates].
        log_priors: Log-priors, float64 [candidates].
        weight: Exponent of the likelihood; 0 leaves the priors.

    Returns:
        Log-probabilities, float64 [documents, candidates].
    """
    joint = weight * (likelihoods - likelihoods.max(axis=1, keepdims=True)) + log_priors
    joint -= joint.max(axis=1, keepdims=True)
    normalised: Floats = joint - np.log(np.exp(joint).sum(axis=1, keepdims=True))
    return normalised


def fit_weight(likelihoods: Floats, log_priors: Floats, truth: npt.NDArray[np.int64]) -> float:
    """Fit the weight of the likelihood on documents whose source is known.

    The negative log-probability of the true sources is convex in the weight, so its minimum is
    where the derivative changes sign.

    Args:
        likelihoods: Log-likelihoods, float64 [documents, candidates].
        log_priors: Log-priors, float64 [candidates].
        truth: Number of the true candidate of each document, int64 [documents].

    Returns:
        The weight, from 0 (the likelihood says nothing) to 1 (Bayes).
    """
    true = likelihoods[np.arange(len(truth)), truth]

    def slope(weight: float) -> float:
        found = np.exp(log_posteriors(likelihoods, log_priors, weight))
        return float(((found * likelihoods).sum(axis=1) - true).mean())

    low, high = 0.0, _HIGHEST_WEIGHT
    if slope(low) >= 0:
        return low
    if slope(high) <= 0:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2


# ---- Calibration ----


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good attributions are on documents whose source is known.

    Attributes:
        num_documents: Number of documents.
        accuracy: Share of documents whose likeliest candidate is the true one.
        accuracy_low: Lower end of its 95 % confidence interval (Wilson).
        accuracy_high: Upper end.
        log_loss: Mean of `-log P(true candidate)`, in nats.
        brier: Mean squared distance between the probabilities and the truth, from 0 to 2.
        calibration_error: Expected calibration error: mean gap between the probability of the
            likeliest candidate and the accuracy, in 10 bins of that probability.
    """

    num_documents: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    log_loss: float
    brier: float
    calibration_error: float


def quality(log_probabilities: Floats, truth: npt.NDArray[np.int64]) -> Quality:
    """Measure attributions.

    Args:
        log_probabilities: `log P(candidate | document)`, float64 [documents, candidates].
        truth: Number of the true candidate of each document, int64 [documents].
    """
    number = len(truth)
    probabilities = np.exp(log_probabilities)
    is_right = probabilities.argmax(axis=1) == truth
    confidence = probabilities.max(axis=1)
    accuracy = float(is_right.mean())
    spread = NORMAL**2 / number
    centre = (accuracy + spread / 2) / (1 + spread)
    half = ((accuracy * (1 - accuracy) + spread / 4) * spread) ** 0.5 / (1 + spread)
    bins = np.minimum((confidence * _NUM_BINS).astype(np.int64), _NUM_BINS - 1)
    gaps = np.bincount(bins, weights=confidence - is_right, minlength=_NUM_BINS)
    misses = probabilities - (np.arange(probabilities.shape[1]) == truth[:, None])
    return Quality(
        num_documents=number,
        accuracy=accuracy,
        accuracy_low=max(0.0, centre - half),
        accuracy_high=min(1.0, centre + half),
        log_loss=float(-log_probabilities[np.arange(number), truth].mean()),
        brier=float((misses**2).sum(axis=1).mean()),
        calibration_error=float(np.abs(gaps).sum() / number),
    )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The weight of the likelihood, and what it is worth on documents that it was not fitted on.

    Attributes:
        weight: The fitted weight.
        num_fitted: Number of documents that it was fitted on.
        prior: Quality of the priors alone.
        unweighted: Quality with weight 1.
        weighted: Quality with the fitted weight.
    """

    weight: float
    num_fitted: int
    prior: Quality
    unweighted: Quality
    weighted: Quality


def calibrate(
    likelihoods: Floats,
    log_priors: Floats,
    truth: npt.NDArray[np.int64],
    seed: int = 0,
    corpus_priors: Floats | None = None,
) -> Calibration:
    """Fit the weight on a seeded half of held-out documents, and measure it on the other half.

    Args:
        likelihoods: Log-likelihoods, float64 [documents, candidates].
        log_priors: Log-priors, float64 [candidates].
        truth: Number of the true candidate of each document, int64 [documents]; 4 or more.
        seed: Seed of the split into halves.
        corpus_priors: Log-priors whose quality is that of the priors alone; None: `log_priors`.
    """
    order = list(range(len(truth)))
    random.Random(seed).shuffle(order)
    fitted, measured = np.split(np.array(order), [len(order) // 2])
    weight = fit_weight(likelihoods[fitted], log_priors, truth[fitted])
    alone = log_priors if corpus_priors is None else corpus_priors
    found = [
        quality(log_posteriors(likelihoods[measured], priors, one), truth[measured])
        for one, priors in ((0.0, alone), (1.0, log_priors), (weight, log_priors))
    ]
    return Calibration(
        weight=weight,
        num_fitted=len(fitted),
        prior=found[0],
        unweighted=found[1],
        weighted=found[2],
    )


# ---- The command ----


def add_attribute_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `meco attribute` to its parser."""
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--text",
        required=True,
        type=Path,
        metavar="FILE",
        help="the text; of a .jsonl, the field `text` of each line",
    )
    add(
        "--data-path",
        metavar="PREFIX",
        help="the corpus whose metadata gives the priors and, without --candidates, the candidates",
    )
    add("--top", **COUNT, default=20, metavar="N", help=f"how many of its candidates; {DEFAULT}")
    add_candidates_argument(add)
    add(
        "--held-out",
        type=Path,
        metavar="FILE",
        help="calibrate on these documents, a .jsonl with `text` and the template's fields, which "
        "the model has not seen in training",
    )
    add("--limit", **COUNT, metavar="N", help="use the first N texts and held-out documents only")
    add("--report", **COUNT, default=3, metavar="N", help=f"candidates shown per text; {DEFAULT}")
    add(
        "--by",
        choices=(_SUFFIX, _PREFIX),
        help="the likelihood of the suffix behind the text, or of the text behind the prefix; "
        "default: the suffix where the model learned one, and no --template is given",
    )
    add("--seed", **SEED, default=0, metavar="S", help=f"splits the held-out documents; {DEFAULT}")
    add("--json", action="store_true", help="print one JSON object")


def run_attribute(args: argparse.Namespace) -> int:
    """Run `meco attribute`; returns the exit status, 0."""
    by, conditioning = _evidence(args)
    sources = _sources(args, conditioning)
    texts = _texts(args)
    held_out = _held_out(args, conditioning, sources)

    # Late, because torch takes seconds to load: wrong flags and files are answered before that.
    from megatron_meco.inference.likelihood import SuffixScore, TextScore, longest_prefix
    from megatron_meco.inference.model import enough_memory, load_model

    loaded = load_model(args.model, args.device, args.template)
    longest = longest_prefix(loaded, (one.prefix for one in sources.candidates))
    scores = TextScore if by == _PREFIX else SuffixScore
    score = scores(loaded, [*texts, *held_out.texts], longest)
    # A suffix has the priors of the training in its likelihood.
    priors = sources.log_priors if by == _PREFIX else np.zeros(len(sources.candidates))
    with enough_memory("--device", "Give one with more memory."):
        likelihoods = log_likelihoods(
            score.totals,
            sources.candidates,
            len(texts) + len(held_out.texts),
            partial(print_progress, noun="candidate"),
        )
    calibration = None
    if held_out.texts:
        known = likelihoods[len(texts) :]
        calibration = calibrate(known, priors, held_out.truth, args.seed, sources.log_priors)
    found = log_posteriors(
        likelihoods[: len(texts)],
        priors,
        1.0 if calibration is None else calibration.weight,
    )
    if score.num_cut:
        part = "beginning" if by == _PREFIX else "end"
        _tell(f"{counted(score.num_cut, 'text')} longer than the model: only the {part} counts")
    report = {
        "model": str(args.model),
        "candidates": [
            {by: one.prefix, "prior": float(np.exp(prior))}
            for one, prior in zip(sources.candidates, sources.log_priors, strict=True)
        ],
        "share_of_corpus": sources.share,
        "calibration": None if calibration is None else asdict(calibration),
        "held_out_of_other_sources": held_out.num_other,
        "texts": [
            _attributed(row, sources.candidates, number, args.report, by)
            for row, number in zip(np.exp(found), score.num_tokens[: len(texts)], strict=True)
        ],
    }
    if args.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print(report, sources, calibration, by)
    return 0


def _evidence(args: argparse.Namespace) -> tuple[str, Conditioning]:
    """What tells the source of a text, and the template that candidates are rendered with."""
    whole = Conditioning.of_folder(args.model, args.template)
    by = args.by
    if by is None:
        is_learned = whole.suffix is not None and whole.suffix_in_loss
        by = _SUFFIX if is_learned and args.template is None else _PREFIX
    if by == _PREFIX:
        return by, conditioning_of(args)
    if whole.suffix is None or not whole.suffix_in_loss:
        lacks = "had no suffix" if whole.suffix is None else "had suffixes out of the loss"
        raise FlagError(
            f"the documents of --model {args.model} {lacks}",
            where=f"--by {_SUFFIX}",
            remedy=f"Use --by {_PREFIX}.",
        )
    return by, whole.suffix


@dataclass(frozen=True, kw_only=True)
class _Sources:
    """The candidates.

    Attributes:
        candidates: The candidates.
        log_priors: Their log-priors, float64 [candidates].
        share: Share of the corpus's prefixes that they cover; None without a corpus.
    """

    candidates: list[Candidate]
    log_priors: Floats
    share: float | None


def _sources(args: argparse.Namespace, conditioning: Conditioning) -> _Sources:
    if args.data_path is None and args.candidates is None:
        raise FlagError(
            "there are no candidates",
            where="--data-path",
            remedy="Give the corpus of the training, or --candidates FILE.",
        )
    given = None
    if args.candidates is not None:
        given = read_candidates(args.candidates, conditioning)
    counts = None if args.data_path is None else count_prefixes(args.data_path, conditioning)
    candidates = given or most_frequent(counts or Counter(), args.top)
    if len(candidates) < 2:
        raise FlagError(
            f"only one candidate, {candidates[0].prefix!r}",
            where="--data-path" if given is None else "--candidates",
            remedy="Give two or more.",
        )
    if counts is None:
        _tell("without --data-path, every candidate has the same prior")
        even = np.full(len(candidates), -np.log(len(candidates)))
        return _Sources(candidates=candidates, log_priors=even, share=None)
    numbers = np.array([counts[one.prefix] for one in candidates], dtype=np.float64)
    # Add-one smoothing keeps candidates possible that the corpus lacks.
    priors = (numbers + 1) / (numbers + 1).sum()
    return _Sources(
        candidates=candidates,
        log_priors=np.log(priors),
        share=float(numbers.sum() / counts.total()),
    )


def _texts(args: argparse.Namespace) -> list[str]:
    if args.text.suffix == ".jsonl":
        return read_texts(args.text)[: args.limit]

    def refuse(reason: str) -> FlagError:
        return FlagError(reason, where=f"--text {args.text}", remedy="Name a UTF-8 text file.")

    text = read_text(args.text, refuse)
    if not text.strip():
        raise refuse("holds no text")
    return [text]


@dataclass(frozen=True, kw_only=True)
class _HeldOut:
    """Documents whose source is known.

    Attributes:
        texts: The texts of those whose source is a candidate.
        truth: The number of its candidate, int64 [texts].
        num_other: Number of documents of other sources.
    """

    texts: list[str]
    truth: npt.NDArray[np.int64]
    num_other: int


def _held_out(args: argparse.Namespace, conditioning: Conditioning, sources: _Sources) -> _HeldOut:
    if args.held_out is None:
        return _HeldOut(texts=[], truth=np.zeros(0, np.int64), num_other=0)
    number = {one.prefix: place for place, one in enumerate(sources.candidates)}
    documents = read_documents(args.held_out, conditioning, "--held-out", args.limit)
    known = [(text, number[prefix]) for text, prefix in documents if prefix in number]
    if len(known) < _FEWEST_HELD_OUT:
        raise FlagError(
            f"{counted(len(known), 'document')} of {len(documents):,} with a candidate's prefix",
            where=f"--held-out {args.held_out}",
            remedy=f"Give {_FEWEST_HELD_OUT} or more; some hundred calibrate well.",
        )
    return _HeldOut(
        texts=[text for text, _ in known],
        truth=np.array([place for _, place in known], dtype=np.int64),
        num_other=len(documents) - len(known),
    )


def _attributed(
    probabilities: Floats, candidates: Sequence[Candidate], num_tokens: int, number: int, by: str
) -> dict[str, Any]:
    order = np.argsort(-probabilities, kind="stable")[:number]
    return {
        "num_tokens": num_tokens,
        "sources": [
            {by: candidates[place].prefix, "probability": float(probabilities[place])}
            for place in order
        ],
    }


def _print(
    report: dict[str, Any], sources: _Sources, calibration: Calibration | None, by: str
) -> None:
    rows = [["text", "tokens", "probability", "source"]]
    for number, text in enumerate(report["texts"], 1):
        for place, one in enumerate(text["sources"]):
            begin = ["", ""] if place else [str(number), f"{text['num_tokens']:,}"]
            rows.append([*begin, f"{one['probability']:.4f}", shown(one[by].strip(), 100)])
    print("\n".join(aligned(rows, 1)))
    told = counted(len(sources.candidates), "candidate")
    if sources.share is not None:
        told += f", {sources.share:.1%} of the corpus's documents with a {by}"
    print(f"among {told}; a text of another source is attributed to one of them")
    if calibration is None:
        print("not calibrated: give --held-out to learn how far to trust the probabilities")
        return
    table = [["", "accuracy", "95 % interval", "log loss", "Brier", "calibration error"]]
    for name, one in (
        ("prior alone", calibration.prior),
        ("weight 1", calibration.unweighted),
        (f"weight {calibration.weight:.4g}", calibration.weighted),
    ):
        interval = f"[{one.accuracy_low:.3f}, {one.accuracy_high:.3f}]"
        scores = (one.log_loss, one.brier, one.calibration_error)
        table.append([name, f"{one.accuracy:.3f}", interval, *(f"{score:.3f}" for score in scores)])
    print(
        f"\ncalibration: weight of the likelihood fitted on {calibration.num_fitted:,} held-out "
        f"documents, measured on {calibration.weighted.num_documents:,} others"
    )
    print("\n".join(aligned(table, 1)))
    if report["held_out_of_other_sources"]:
        other = counted(report["held_out_of_other_sources"], "held-out document")
        print(f"{other} of other sources left out")


def _tell(line: str) -> None:
    print(line, file=sys.stderr)
