"""Models that write metadata behind their texts: generation, attribution, cards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from inference.synthetic import random_tensors, run_args, write_checkpoint  # noqa: E402

from megatron_meco import cli  # noqa: E402
from megatron_meco.errors import FlagError  # noqa: E402
from megatron_meco.inference.attribute import calibrate  # noqa: E402
from megatron_meco.inference.conditioning import Conditioning, read_card  # noqa: E402
from megatron_meco.inference.export import export  # noqa: E402
from megatron_meco.inference.generate import generate_text  # noqa: E402
from megatron_meco.inference.model import encode_text, load_model  # noqa: E402
from megatron_meco.inference.model_card import describe_run, model_card  # noqa: E402
from megatron_meco.inference.suffix import beginning, cut_suffix  # noqa: E402

SUFFIX = r"\nHost: {url.host}"
SHORT = ["--min-new-tokens", "0", "--max-new-tokens", "4"]
TOPICS = ["cats", "dogs", "cats and dogs"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokens") / "tokenizer"
    return AutoTokenizer.from_pretrained(runs.write_tokenizer(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model of random weights whose documents had a prefix and a suffix."""
    folder = tmp_path_factory.mktemp("suffix")
    args = run_args(
        runs.write_tokenizer(folder / "tokenizer"),
        meco_suffix_template=r"\nTopic: {topic}",
        meco_suffix_loss=1,
    )
    write_checkpoint(folder / "checkpoint", args, random_tensors(args))
    export(folder / "checkpoint", folder / "model")
    return folder / "model"


@pytest.mark.parametrize(
    ("template", "written", "has_ended", "text", "suffix"),
    [
        ("", "a fox", True, "a fox", ""),
        (SUFFIX, "a fox\nHost: a.org", True, "a fox", "\nHost: a.org"),
        # Without EOD it may be text.
        (SUFFIX, "a fox\nHost: a.org", False, "a fox\nHost: a.org", ""),
        (SUFFIX, "a fox", True, "a fox", ""),
        # The last one is the suffix; what follows more lines is text.
        (SUFFIX, "a\nHost: b.org\nHost: c.org", True, "a\nHost: b.org", "\nHost: c.org"),
        (SUFFIX, "a\nHost: b.org\nfox", True, "a\nHost: b.org\nfox", ""),
        (SUFFIX, "\nHost: c.org", True, "", "\nHost: c.org"),
        (r"\nBy {who}[[, on {day}]].", "x\nBy A, on B.", True, "x", "\nBy A, on B."),
        (r"\nBy {who}[[, on {day}]].", "x\nBy A.", True, "x", "\nBy A."),
        ("[[ (Topic: {topic})]]", "a (Topic: b)", True, "a", " (Topic: b)"),
        ("[[ (Topic: {topic})]]", "a", True, "a", ""),
        # What is blank, or a value, cannot be told from text.
        (r"\n{url.host}", "a\nb.org", True, "a\nb.org", ""),
        ("{topic}.", "a b.", True, "a b.", ""),
    ],
)
def test_the_text_and_the_suffix_behind_it(
    tokenizer: Any, template: str, written: str, has_ended: bool, text: str, suffix: str
) -> None:
    ends = Conditioning.of_run("", None, template).suffix
    ids = encode_text(tokenizer, written)
    assert cut_suffix(ends, tokenizer, ids, has_ended=has_ended) == (text, suffix)


@pytest.mark.parametrize("has_ended", [True, False])
def test_a_special_token_begins_a_suffix(tokenizer: Any, has_ended: bool) -> None:
    ends = Conditioning.of_run("", None, "{token:<|begin_of_text|>}{topic}").suffix
    ids = [*encode_text(tokenizer, "a fox"), 0, *encode_text(tokenizer, "cats")]
    found = cut_suffix(ends, tokenizer, ids, has_ended=has_ended)
    assert found == ("a fox", "<|begin_of_text|>cats")
    missing = Conditioning.of_run("", None, "{token:<|nowhere|>}{topic}").suffix
    assert cut_suffix(missing, tokenizer, ids, has_ended=True) == ("a foxcats", "")


@pytest.mark.parametrize(
    ("template", "begin"),
    [
        (SUFFIX, "\nHost: "),
        (r"\n{url.host}", ""),
        ("{topic}", ""),
        ("[[ Topic: {topic}]]", ""),
        (r"\n{token:<|end_of_text|>}{topic}", "\n<|end_of_text|>"),
    ],
)
def test_what_all_suffixes_begin_with(template: str, begin: str) -> None:
    assert beginning(Conditioning.of_run("", None, template).suffix) == begin
    assert beginning(None) == ""


def test_a_continuation_is_shown_without_the_suffix(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(folder, "cpu")
    assert loaded.conditioning.suffix == Conditioning(r"\nTopic: {topic}", ("topic",))
    written = [*encode_text(loaded.tokenizer, " and a fox\nTopic: cats"), 1]

    def write(model: Any, context: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options.get("streamer") is None
        return torch.cat([context, torch.tensor([written] * len(context))], dim=1)

    monkeypatch.setattr(type(loaded.model), "generate", write)
    suffix = loaded.conditioning.suffix
    text = generate_text(
        loaded.model, loaded.tokenizer, "", "the dog", max_new_tokens=4, suffix=suffix
    )
    assert text == " and a fox"
    flags = ["--metadata", "url=a.org", "--prompt", "the dog", "--max-new-tokens", "4"]
    assert cli.main(["generate", "--model", str(folder), *flags]) == 0
    out, err = capsys.readouterr()
    assert out == (
        "=== no metadata\nthe dog and a fox\n"
        "=== url=a.org (prefix 'URL: a.org\\n\\n')\nthe dog and a fox\n"
    )
    assert err.count("(suffix '\\nTopic: cats')") == 2
    flags = ["--output", str(folder.parent / "samples"), "--num-samples", "2"]
    assert cli.main(["steer", "--model", str(folder), *flags, *SHORT]) == 0
    lines = (folder.parent / "samples" / "generations.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == [" and a fox"] * 2


def test_the_harness_stops_before_a_suffix(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from megatron_meco.inference.harness_model import load_harness_model

    asked: list[Any] = []
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, _: asked.extend(requests))
    given = [["\n\n"], ".", None]
    requests = [
        Instance("generate_until", {}, ("the", {"until": until, "do_sample": False}), 0)
        for until in given
    ]
    load_harness_model(folder, "cpu", None, 1).generate_until(requests)
    assert [one.args[1]["until"] for one in asked] == [
        ["\n\n", "\nTopic: "],
        [".", "\nTopic: "],
        ["\nTopic: "],
    ]
    assert [one.args[1]["until"] for one in requests] == given


def exact(folder: Path, text: str, suffixes: list[str]) -> np.ndarray:
    """The log-likelihood of each suffix and EOD behind a text, from the model's own logits."""
    loaded = load_model(folder, "cpu")
    totals = []
    for suffix in suffixes:
        begin = [0, *encode_text(loaded.tokenizer, text)]
        end = [*encode_text(loaded.tokenizer, suffix), 1]
        with torch.no_grad():
            logits = loaded.model(torch.tensor([begin + end])).logits[0].double().log_softmax(-1)
        totals.append(sum(logits[len(begin) + i - 1, t].item() for i, t in enumerate(end)))
    return np.array(totals)


def attribute(folder: Path, *flags: Any) -> int:
    return cli.main(["attribute", "--model", str(folder), "--device", "cpu", *map(str, flags)])


def test_a_text_is_attributed_by_the_suffix_behind_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "topics.txt").write_text("\n".join(TOPICS))
    texts = ["the quick brown fox", "a lazy dog"]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    draw = np.random.default_rng(0)
    held = [
        {"text": " ".join(draw.choice(["fox", "dog", "the"], size=4)), "topic": TOPICS[i % 3]}
        for i in range(12)
    ]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, held)))
    flags = ["--candidates", tmp_path / "topics.txt", "--text", tmp_path / "texts.jsonl"]
    suffixes = [f"\nTopic: {topic}" for topic in TOPICS]
    assert attribute(folder, *flags, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [one["suffix"] for one in report["candidates"]] == suffixes
    for text, row in zip(texts, report["texts"], strict=True):
        weights = np.exp(exact(folder, text, suffixes))
        found = {one["suffix"]: one["probability"] for one in row["sources"]}
        expected = dict(zip(suffixes, weights / weights.sum(), strict=True))
        assert found == pytest.approx(expected, rel=1e-3)
    assert attribute(folder, *flags, "--held-out", tmp_path / "held.jsonl", "--json") == 0
    calibration = json.loads(capsys.readouterr().out)["calibration"]
    likelihoods = np.array([exact(folder, one["text"], suffixes) for one in held])
    truth = np.array([i % 3 for i in range(12)])
    oracle = calibrate(likelihoods, np.zeros(3), truth, 0, np.full(3, -np.log(3)))
    assert calibration["weight"] == pytest.approx(oracle.weight, abs=1e-2)
    assert calibration["weighted"]["brier"] == pytest.approx(oracle.weighted.brier, abs=1e-2)
    assert calibration["prior"]["log_loss"] == pytest.approx(np.log(3))
    assert attribute(folder, *flags, "--held-out", tmp_path / "held.jsonl") == 0
    assert "calibration error" in capsys.readouterr().out


def test_prefixes_on_request(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts.txt").write_text("a.org\nb.org\n")
    (tmp_path / "text.txt").write_text("the fox")
    flags = ["--candidates", tmp_path / "hosts.txt", "--text", tmp_path / "text.txt", "--json"]
    for more in (["--by", "prefix"], ["--template", r"URL: {url.host}\n\n"]):
        assert attribute(folder, *flags, *more) == 0
        [row] = json.loads(capsys.readouterr().out)["texts"]
        assert sorted(one["prefix"] for one in row["sources"])[0] == "URL: a.org\n\n"


def changed(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of an exported folder with another card."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    card = {**read_card(folder), **changes}
    (to / "meco.json").write_text(json.dumps(card))
    return to


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"suffix_template": ""}, ["--by", "suffix"], "--by suffix: .* had no suffix"),
        ({"suffix_loss": False}, ["--by", "suffix"], "had suffixes out of the loss"),
        ({"template": "", "fields": []}, ["--by", "prefix"], "without prefixes, with metadata beh"),
        ({"suffix_fields": [5]}, [], "meco.json cannot be read"),
        ({"suffix_template": 5}, [], "meco.json cannot be read"),
        ({"suffix_loss": 1}, [], "meco.json cannot be read"),
        ({"suffix_fields": []}, [], "meco.json cannot be read"),
    ],
)
def test_refusals(
    folder: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = changed(folder, tmp_path / "model", **changes)
    (tmp_path / "topics.txt").write_text("cats\ndogs\n")
    (tmp_path / "text.txt").write_text("the fox")
    files = ["--candidates", tmp_path / "topics.txt", "--text", tmp_path / "text.txt"]
    assert attribute(model, *files, *flags) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err), err


def test_a_prefix_for_a_model_that_has_suffixes_alone(folder: Path, tmp_path: Path) -> None:
    model = changed(folder, tmp_path / "model", template="", fields=[])
    conditioning = Conditioning.of_folder(model)
    with pytest.raises(FlagError, match="trained with metadata behind texts alone"):
        conditioning.render({"topic": "a"})
    assert Conditioning.of_folder(model, "{topic}").suffix == conditioning.suffix


@pytest.mark.parametrize("template", ["", r"URL: {url.host}\n\n"])
@pytest.mark.parametrize("loss", [0, 1])
def test_the_card(tmp_path: Path, template: str, loss: int) -> None:
    tokenizer = runs.write_tokenizer(tmp_path / "tokenizer")
    options = {"meco_template": template, "meco_suffix_template": SUFFIX, "meco_suffix_loss": loss}
    card = describe_run(run_args(tokenizer, **options), 20, 0, 1)
    assert (card["suffix_template"], card["suffix_fields"]) == (SUFFIX, ["url"])
    assert card["suffix_loss"] is bool(loss)
    text = model_card(card)
    assert ("out of the loss" in text) == (not loss)
    assert ("meco attribute" in text) == bool(loss)
    assert ("meco generate" in text) == bool(template)
    assert "Trained without metadata" not in text and f"`{SUFFIX}`" in text
    plain = describe_run(run_args(tokenizer), 20, 0, 1)
    assert not [key for key in plain if key.startswith("suffix")]
