"""Which source a text looks like: Bayes, its calibration, and the command against the model."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

scipy_special = pytest.importorskip("scipy.special")
scipy_stats = pytest.importorskip("scipy.stats")

from megatron_meco import cli  # noqa: E402
from megatron_meco.inference.attribute import (  # noqa: E402
    calibrate,
    fit_weight,
    log_likelihoods,
    log_posteriors,
    quality,
)
from megatron_meco.inference.candidates import Candidate  # noqa: E402
from megatron_meco.inference.model import encode_prompt, encode_text, load_model  # noqa: E402

HOSTS = {"a.org": 7, "b.org": 5, "c.org": 1}
TEXTS = ["the quick brown fox", "a lazy dog and a fox", "the dog"]


def sources_and_documents(
    number: int, length: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents from three sources, each with its own words, and their exact likelihoods.

    Returns:
        Log-likelihoods [documents, sources], log-priors, and the true sources.
    """
    draw = np.random.default_rng(seed)
    words = draw.dirichlet(np.full(20, 2.0), size=3)
    priors = np.array([0.6, 0.3, 0.1])
    truth = draw.choice(3, size=number, p=priors)
    documents = np.array([draw.multinomial(length, words[source]) for source in truth])
    return documents @ np.log(words).T, np.log(priors), truth


# ---- Numbers ----


def test_bayes_is_that_of_a_table() -> None:
    likelihoods = np.log([[0.5, 0.25], [1e-9, 1e-8]]) - np.array([[0.0], [3000.0]])
    found = np.exp(log_posteriors(likelihoods, np.log([0.2, 0.8])))
    assert found == pytest.approx(np.array([[1 / 3, 2 / 3], [0.2 / 8.2, 8 / 8.2]]))
    assert np.exp(log_posteriors(likelihoods, np.log([0.2, 0.8]), 0.0)) == pytest.approx(
        np.array([[0.2, 0.8]] * 2)
    )
    draw = np.random.default_rng(0)
    likelihoods, priors = draw.normal(size=(9, 5)) * 400, draw.dirichlet(np.ones(5))
    theirs = scipy_special.log_softmax(0.3 * likelihoods + np.log(priors), axis=1)
    assert log_posteriors(likelihoods, np.log(priors), 0.3) == pytest.approx(theirs)


@pytest.mark.parametrize("certainty", [1.25, 20.0])
def test_the_weight_undoes_too_much_certainty(certainty: float) -> None:
    """Exact likelihoods taken to the power of n need the weight 1 / n."""
    likelihoods, priors, truth = sources_and_documents(4000, 12)
    found = calibrate(likelihoods * certainty, priors, truth, seed=1)
    assert found.weight == pytest.approx(1 / certainty, rel=0.1)
    assert (found.num_fitted, found.weighted.num_documents) == (2000, 2000)
    assert found.weighted.calibration_error < 0.03
    assert found.weighted.accuracy > found.prior.accuracy + 0.15
    assert found.weighted.log_loss < found.prior.log_loss
    if certainty == 20.0:
        assert found.unweighted.calibration_error > 0.08
        assert found.unweighted.log_loss > found.weighted.log_loss


def test_likelihoods_that_say_nothing_get_no_weight() -> None:
    likelihoods, priors, truth = sources_and_documents(4000, 12)
    shuffled = np.random.default_rng(2).permutation(truth)
    found = calibrate(likelihoods, priors, shuffled)
    assert found.weight < 0.05
    assert found.weighted.accuracy == pytest.approx(found.prior.accuracy, abs=0.02)
    # Evidence against the truth is not turned around.
    assert fit_weight(-likelihoods, priors, truth) == 0.0
    # Never more certain than Bayes, whatever a few documents without a mistake would ask for.
    assert fit_weight(10.0 * np.eye(3)[truth], priors, truth) == 1.0
    assert fit_weight(likelihoods / 4, priors, truth) == 1.0


def test_quality_is_that_of_the_definitions() -> None:
    draw = np.random.default_rng(3)
    probabilities = draw.dirichlet(np.full(4, 0.4), size=300)
    truth = draw.integers(4, size=300)
    found = quality(np.log(probabilities), truth)
    right = [row.argmax() == true for row, true in zip(probabilities, truth, strict=True)]
    interval = scipy_stats.binomtest(sum(right), 300).proportion_ci(method="wilson")
    assert found.accuracy == sum(right) / 300
    assert (found.accuracy_low, found.accuracy_high) == pytest.approx((interval.low, interval.high))
    assert found.log_loss == pytest.approx(
        -np.mean([math.log(row[true]) for row, true in zip(probabilities, truth, strict=True)])
    )
    brier = [
        sum((p - (k == true)) ** 2 for k, p in enumerate(row))
        for row, true in zip(probabilities, truth, strict=True)
    ]
    assert found.brier == pytest.approx(np.mean(brier))
    gap = 0.0
    for low in np.arange(10) / 10:
        inside = [i for i, row in enumerate(probabilities) if low <= row.max() < low + 0.1]
        if inside:
            confidence = np.mean([probabilities[i].max() for i in inside])
            accuracy = np.mean([right[i] for i in inside])
            gap += len(inside) / 300 * abs(confidence - accuracy)
    assert found.calibration_error == pytest.approx(gap)
    perfect = quality(np.log(np.eye(2) * (1 - 2e-16) + 1e-16), np.array([0, 1]))
    assert (perfect.accuracy, perfect.accuracy_high) == (1.0, 1.0)
    assert perfect.brier == pytest.approx(0) and perfect.calibration_error == pytest.approx(0)


def test_every_document_is_scored_under_every_candidate() -> None:
    candidates = [Candidate(name=name, prefix=name) for name in "ab"]
    found = log_likelihoods(
        lambda prefix, documents: [-ord(prefix) - d for d in documents], candidates, 3
    )
    assert found.tolist() == [[-97.0, -98.0], [-98.0, -99.0], [-99.0, -100.0]]


# ---- The command ----


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """The metadata of a corpus, which is all that the priors need."""
    urls = [f"https://{host}/{i}" for host, number in HOSTS.items() for i in range(number)]
    table = pa.table({"url": [*urls, None]})
    with pa.ipc.new_file(f"{tmp_path}/web.metadata.arrow", table.schema) as writer:
        writer.write_table(table)
    return f"{tmp_path}/web"


def run(folder: Path, *flags: object) -> int:
    return cli.main(["attribute", "--model", str(folder), "--device", "cpu", *map(str, flags)])


def exact(folder: Path, text: str, hosts: list[str]) -> np.ndarray:
    """The log-likelihoods of a text under each host, from the model's own logits."""
    loaded = load_model(folder, "cpu")
    totals = []
    for host in hosts:
        begin = encode_prompt(loaded.model, loaded.tokenizer, f"URL: {host}\n\n", "")
        body = encode_text(loaded.tokenizer, text)
        with torch.no_grad():
            logits = loaded.model(torch.tensor([begin + body])).logits[0].double().log_softmax(-1)
        totals.append(sum(logits[len(begin) + i - 1, token].item() for i, token in enumerate(body)))
    return np.array(totals)


def test_the_posterior_is_bayes_over_the_models_own_likelihoods(
    model_folder: Path, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    flags = ["--data-path", corpus, "--text", texts, "--json", "--report", 9]
    assert run(model_folder, *flags) == 0
    report = json.loads(capsys.readouterr().out)
    priors = np.array([8, 6, 2]) / 16
    assert [one["prior"] for one in report["candidates"]] == pytest.approx(list(priors))
    assert (report["share_of_corpus"], report["calibration"]) == (1.0, None)
    for text, row in zip(TEXTS, report["texts"], strict=True):
        weights = np.exp(exact(model_folder, text, list(HOSTS))) * priors
        expected = dict(zip(HOSTS, weights / weights.sum(), strict=True))
        found = {one["prefix"][5:-2]: one["probability"] for one in row["sources"]}
        assert found == pytest.approx(expected, rel=1e-3)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert len(found) == 3

    # A file that is not .jsonl is one text, line breaks and all.
    text = tmp_path / "text.txt"
    text.write_text("the dog\n\nthe fox\n")
    urls = tmp_path / "urls.txt"
    urls.write_text("b.org\nnew.org\n")
    assert run(model_folder, "--candidates", urls, "--text", text, "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert "every candidate has the same prior" in err and len(report["texts"]) == 1
    weights = np.exp(exact(model_folder, text.read_text(), ["b.org", "new.org"]))
    found = {one["prefix"]: one["probability"] for one in report["texts"][0]["sources"]}
    assert found["URL: b.org\n\n"] == pytest.approx(weights[0] / weights.sum(), rel=1e-3)
    # Priors of the corpus; one more for each, as one of them does not occur.
    assert (
        run(model_folder, "--candidates", urls, "--data-path", corpus, "--text", text, "--json")
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert [one["prior"] for one in report["candidates"]] == pytest.approx([6 / 7, 1 / 7])
    assert report["share_of_corpus"] == pytest.approx(5 / 13)


def test_calibration_on_held_out_documents(
    model_folder: Path, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    words = ["the", "quick", "brown", "fox", "dog", "lazy"]
    documents = [
        {"text": " ".join(draw.choice(words, size=5)), "url": f"https://{host}/x", "other": 1}
        for host in draw.choice(["a.org", "b.org", "d.org"], size=24, p=[0.5, 0.3, 0.2])
    ]
    documents[3]["url"] = None
    held_out = tmp_path / "held.jsonl"
    held_out.write_text("\n".join(map(json.dumps, documents)))
    text = tmp_path / "text.txt"
    text.write_text("the lazy dog")
    flags = ["--data-path", corpus, "--text", text, "--held-out", held_out]
    assert run(model_folder, *flags, "--json", "--seed", 5) == 0
    report = json.loads(capsys.readouterr().out)
    hosts = Counter(one["url"] and one["url"].split("/")[2] for one in documents)
    assert report["held_out_of_other_sources"] == hosts["d.org"] > 0

    kept = [one for one in documents if one["url"] and "d.org" not in one["url"]]
    likelihoods = np.array([exact(model_folder, one["text"], list(HOSTS)) for one in kept])
    truth = np.array([["a", "b"].index(one["url"][8]) for one in kept])
    oracle = calibrate(likelihoods, np.log(np.array([8, 6, 2]) / 16), truth, seed=5)
    found = report["calibration"]
    assert found["num_fitted"] + found["weighted"]["num_documents"] == len(kept)
    assert found["weight"] == pytest.approx(oracle.weight, abs=1e-2)
    for name in ("prior", "unweighted", "weighted"):
        assert found[name]["accuracy"] == getattr(oracle, name).accuracy
        assert found[name]["brier"] == pytest.approx(getattr(oracle, name).brier, abs=1e-2)
    weighted = log_posteriors(
        exact(model_folder, "the lazy dog", list(HOSTS))[None],
        np.log(np.array([8, 6, 2]) / 16),
        found["weight"],
    )
    assert report["texts"][0]["sources"][0]["probability"] == pytest.approx(
        np.exp(weighted).max(), rel=1e-3
    )

    assert run(model_folder, *flags, "--seed", 5) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["text", "tokens", "probability", "source"]
    assert "among 3 candidates, 100.0% of the corpus's documents with a prefix" in out
    assert f"{found['weighted']['accuracy']:.3f}" in out and "calibration error" in out
    assert "held-out documents of other sources left out" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data-path: there are no candidates"),
        (["--data-path", "NONE"], "no metadata file"),
        (["--candidates", "ONE"], "--candidates: only one candidate, 'URL: a.org"),
        (["--data-path", "WEB", "--top", "1"], "--data-path: only one candidate"),
        (["--data-path", "WEB", "--held-out", "BAD.jsonl"], "BAD.jsonl, line 1: "),
        (["--data-path", "WEB", "--held-out", "NUMBER.jsonl"], "line 1: has a field that is not"),
        (["--data-path", "WEB", "--held-out", "PLAIN.jsonl"], "no document has a prefix (no value"),
        (["--data-path", "WEB", "--held-out", "FEW.jsonl"], "1 document of 2 with a candidate's"),
        (["--data-path", "WEB", "--held-out", "TEXTLESS.jsonl"], "line 1: has no text"),
        (["--data-path", "WEB", "--text", "EMPTY"], "holds no text"),
        (["--data-path", "WEB", "--text", "EMPTIES.jsonl"], "has no text"),
        (["--data-path", "WEB", "--text", "NONE"], "cannot be read"),
        (["--data-path", "WEB", "--limit", "0"], "--limit: invalid value 0"),
        (["--candidates", "LONG"], "and the model takes 192"),
    ],
)
def test_refusals(
    model_folder: Path,
    corpus: str,
    tmp_path: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {
        "TEXT": "a fox",
        "EMPTY": " \n",
        "EMPTIES.jsonl": '{"text": ""}',
        "ONE": "a.org\n",
        "LONG": f"{'a' * 400}\nb.org\n",
        "BAD.jsonl": '{"text": NaN}',
        "NUMBER.jsonl": '{"text": "a", "url": 3}',
        "PLAIN.jsonl": '{"text": "a"}',
        "TEXTLESS.jsonl": '{"url": "a.org"}',
        "FEW.jsonl": '{"text": "a", "url": "a.org"}\n{"text": "a", "url": "x.org"}',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "WEB.metadata.arrow").write_bytes(Path(f"{corpus}.metadata.arrow").read_bytes())
    upper = [str(tmp_path / flag) if flag.split(".")[0].isupper() else flag for flag in flags]
    text = [] if "--text" in flags else ["--text", tmp_path / "TEXT"]
    assert run(model_folder, *text, *upper) == 1
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("meco: error: ") and message in last, err


def test_a_model_without_metadata_and_a_text_that_is_too_long(
    model_folder: Path, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a lazy dog and a fox " * 60)
    assert run(model_folder, "--data-path", corpus, "--text", text, "--report", 1) == 0
    out, err = capsys.readouterr()
    assert "1 text longer than the model: only the beginning counts" in err
    assert "not calibrated" in out and len(out.splitlines()) == 4
    assert run(model_folder, "--template", "", "--data-path", corpus, "--text", text) == 1
    assert "was trained without metadata" in capsys.readouterr().err
