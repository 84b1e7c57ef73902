r"""Judge the demo's samples: does a text look like the source that its URL names?

A classifier of character n-grams (scikit-learn) learns the sources from documents that no model was
trained on. It then names the source of each sample. Steering accuracy is the share of samples that
it assigns to the source of their URL. Its own accuracy on real documents, from cross-validation
that keeps the documents of a page together, is the ceiling.

The 95 % intervals (Wilson) cover the choice of samples only. Each model was trained once, so they
do not cover another seed.

    python examples/local_demo/steering.py demo-output/held-out.jsonl \
        conditioned=demo-output/samples/meco-1080 baseline=demo-output/samples/baseline-1200 \
        --output demo-output/steering.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.stats import binomtest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline

_WANTED = 0.85
_LINES_OF_TEXT = 7


@dataclass(frozen=True)
class Share:
    """A share of samples and its 95 % Wilson interval.

    Attributes:
        hits: Samples that count.
        number: All samples; at least one.
    """

    hits: int
    number: int

    @property
    def value(self) -> float:
        """The share."""
        return self.hits / self.number

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end."""
        found = binomtest(self.hits, self.number).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}]"

    def to_json(self) -> dict[str, float]:
        """Return the share as JSON."""
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "number": self.number}


@dataclass(frozen=True)
class Judgement:
    """What the classifier says about one model's samples.

    Attributes:
        texts: Texts by host of the URL; "" for none.
        named: The source that each is assigned to, likewise.
    """

    texts: dict[str, list[str]]
    named: dict[str, list[str]]

    def accuracy(self, host: str | None = None) -> Share:
        """Return the steering accuracy under one host's URL, or under all of them."""
        hosts = [host] if host else [name for name in self.named if name]
        hits = sum(self.named[name].count(name) for name in hosts)
        return Share(hits, sum(len(self.named[name]) for name in hosts))

    def without_url(self, host: str) -> Share:
        """Return the share of the samples without a URL that look like a host's text."""
        return Share(self.named[""].count(host), len(self.named[""]))


def main() -> int:
    """Fit, classify, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("held_out", type=Path, help="JSONL of documents to fit the classifier on")
    parser.add_argument("samples", nargs="+", metavar="NAME=DIR", help="folders of `meco steer`")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args()
    classifier, ceiling = fitted(args.held_out)
    folders = dict(pair.split("=", 1) for pair in args.samples)
    models = {name: judged(classifier, Path(folder)) for name, folder in folders.items()}
    console = Console(highlight=False)
    print_texts(console, models)
    print_shares(console, models, ceiling)
    console.print("\n".join(verdict(models)))
    args.output.write_text(json.dumps(as_json(models, ceiling), indent=2) + "\n")
    return 0


def fitted(held_out: Path) -> tuple[Pipeline, Share]:
    """Return a classifier and its accuracy on documents that it was not fitted on.

    Args:
        held_out: JSONL with `text` and `url`; the host is the class.
    """
    records = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    texts = [record["text"] for record in records]
    hosts = [urlsplit(record["url"]).netloc for record in records]
    classifier = make_pipeline(
        TfidfVectorizer(
            analyzer="char",
            ngram_range=(1, 3),
            max_features=8000,
            lowercase=False,
            sublinear_tf=True,
        ),
        LogisticRegression(C=10, max_iter=300),
    )
    pages = [record["url"] for record in records]
    named = cross_val_predict(classifier, texts, hosts, groups=pages, cv=GroupKFold(3))
    hits = sum(a == b for a, b in zip(hosts, named, strict=True))
    return classifier.fit(texts, hosts), Share(hits, len(hosts))


def judged(classifier: Pipeline, folder: Path) -> Judgement:
    """Classify the samples in a folder of `meco steer`."""
    texts: dict[str, list[str]] = {}
    lines = (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    for record in map(json.loads, lines):
        host = record["prefix"].removeprefix("URL:").strip()
        texts.setdefault(host, []).append(record["text"])
    known = set(classifier.classes_)
    if unknown := texts.keys() - known - {""}:
        raise SystemExit(f"steering: error: {folder}: no held-out document is from {unknown}")
    named = {host: classifier.predict(group).tolist() for host, group in texts.items()}
    return Judgement(texts, named)


def print_texts(console: Console, models: dict[str, Judgement]) -> None:
    """Print the first sample of the last two models under each URL, side by side."""
    names = list(models)[-2:]
    table = Table(title="The first sample under each URL", title_justify="left", show_lines=True)
    for name in names:
        table.add_column(name, ratio=1)
    # A cell is this wide; longer lines would wrap and hide the layout of code.
    width = max(10, (console.width - 3 * len(names) - 1) // len(names))
    for host in _hosts(models):
        cells = [_excerpt(models[name].texts[host][0], width) for name in names]
        table.add_row(*(Text(f"URL: {host}\n", style="bold") + Text(cell) for cell in cells))
    console.print(table)


def _excerpt(text: str, width: int) -> str:
    lines = [line for line in text.expandtabs(4).splitlines() if line.strip()]
    return "\n".join(line[:width] for line in lines[:_LINES_OF_TEXT])


def print_shares(console: Console, models: dict[str, Judgement], ceiling: Share) -> None:
    """Print the steering accuracy by URL and over all of them."""
    table = Table(
        "URL given",
        title="Steering accuracy: samples that look like the source that their URL names",
        title_justify="left",
    )
    for name in models:
        table.add_column(name, justify="right")
    last_meco = list(models)[-2]
    table.add_column("no URL", justify="right")
    for host in _hosts(models):
        shares = [f"{model.accuracy(host).value:.2f}" for model in models.values()]
        table.add_row(host, *shares, f"{models[last_meco].without_url(host).value:.2f}")
    table.add_section()
    shares = [model.accuracy() for model in models.values()]
    # Every sample without a URL looks like one of the sources: the mean is chance by construction.
    chance = f"{1 / len(_hosts(models)):.2f}"
    table.add_row("all", *(f"{share.value:.2f}" for share in shares), chance)
    table.add_row("95 % interval", *("{:.2f}-{:.2f}".format(*share.interval) for share in shares))
    console.print(table)
    number = len(models[last_meco].texts[""])
    console.print(
        f"{number} samples of each model under each URL; the interval is over samples. "
        f"No URL: what the {last_meco} model writes by itself. The classifier names the "
        f"source of held-out real documents with accuracy {ceiling}."
    )


def verdict(models: dict[str, Judgement]) -> list[str]:
    """Return sentences that follow from the intervals.

    Args:
        models: "conditioned", "cooled-down" and "baseline".
    """
    chance = 1 / len(_hosts(models))
    end, baseline = models["cooled-down"].accuracy(), models["baseline"].accuracy()
    low, high = baseline.interval
    found = []
    if end.interval[0] > high and end.interval[0] > chance:
        found.append(f"Steering: shown. {end} after the cooldown against {baseline}.")
        if end.value < _WANTED:
            found.append(f"It is below the {_WANTED:.2f} that this demo aims at.")
    else:
        found.append(f"Steering: not shown. {end} after the cooldown against {baseline}.")
    where = "at" if low <= chance <= high else "above" if low > chance else "below"
    found.append(f"The baseline under the same URLs is {where} chance ({chance:.2f}).")
    before = models["conditioned"].accuracy()
    if before.interval[0] > end.interval[1]:
        found.append(f"The cooldown weakened steering: it was {before} before.")
    elif end.interval[0] > before.interval[1]:
        found.append(f"The cooldown strengthened steering: it was {before} before.")
    else:
        found.append(f"The cooldown kept steering within the intervals: it was {before} before.")
    found.append("One run of each model: another seed may give other numbers.")
    return found


def as_json(models: dict[str, Judgement], ceiling: Share) -> dict[str, Any]:
    """Return all numbers, and what the classifier says under each URL."""
    return {
        "classifier_accuracy": ceiling.to_json(),
        "chance": 1 / len(_hosts(models)),
        "models": {
            name: {
                "accuracy": model.accuracy().to_json(),
                "by_url": {host: model.accuracy(host).to_json() for host in _hosts(models)},
                "named": {host: dict(Counter(named)) for host, named in model.named.items()},
            }
            for name, model in models.items()
        },
        "verdict": verdict(models),
    }


def _hosts(models: dict[str, Judgement]) -> Sequence[str]:
    """The hosts whose URLs were given, in the order of the samples."""
    first = next(iter(models.values()))
    return [host for host in first.texts if host]


if __name__ == "__main__":
    raise SystemExit(main())
