"""The demo's classifier, its accuracies and the sentences that follow from them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import results
import steering
from steering import Judgement, Share

from megatron_meco.run.training_log import History

HOSTS = ("a.example.org", "b.example.org", "c.example.org", "d.example.org")
LETTERS = dict(zip(HOSTS, ("abba", "oxox", "klik", "zuzu"), strict=True))


def text_of(host: str, i: int) -> str:
    return " ".join([LETTERS[host]] * (3 + i % 5))


def write_held_out(path: Path) -> Path:
    lines = [
        json.dumps({"text": text_of(host, i), "url": f"https://{host}/{i}"})
        for host in HOSTS
        for i in range(12)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_samples(folder: Path, right: int, number: int = 20) -> Path:
    """Samples of which so many under each URL look like its source, the others like the next."""
    folder.mkdir()
    rows = []
    for prefix, i in ((host, i) for host in ("", *HOSTS) for i in range(number)):
        source = prefix or HOSTS[0]
        if prefix and i >= right:
            source = HOSTS[(HOSTS.index(prefix) + 1) % len(HOSTS)]
        rendered = f"URL: {prefix}\n\n" if prefix else ""
        rows.append({"prefix": rendered, "sample": i, "text": text_of(source, i)})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "generations.jsonl").write_text(lines)
    return folder


def judgement(hits: int, number: int = 100) -> Judgement:
    named = {host: [host] * hits + [HOSTS[i - 1]] * (number - hits) for i, host in enumerate(HOSTS)}
    texts = {host: ["text"] * number for host in ("", *HOSTS)}
    return Judgement(texts, {"": [HOSTS[0]] * number, **named})


def said(conditioned: int, cooled: int, baseline: int) -> str:
    models = {"conditioned": conditioned, "cooled-down": cooled, "baseline": baseline}
    return " ".join(steering.verdict({name: judgement(hits) for name, hits in models.items()}))


def test_samples_become_accuracies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write_held_out(tmp_path / "held-out.jsonl")
    rights = {"conditioned": 20, "cooled-down": 18, "baseline": 5}
    folders = [f"{name}={write_samples(tmp_path / name, n)}" for name, n in rights.items()]
    output = tmp_path / "steering.json"
    monkeypatch.setattr(sys, "argv", ["steering", str(held_out), *folders, "--output", str(output)])
    assert steering.main() == 0
    found = json.loads(output.read_text())
    values = {name: found["models"][name]["accuracy"]["value"] for name in rights}
    assert values == {"conditioned": 1.0, "cooled-down": 0.9, "baseline": 0.25}
    assert found["models"]["cooled-down"]["named"][HOSTS[0]] == {HOSTS[0]: 18, HOSTS[1]: 2}
    assert found["chance"] == 0.25
    assert found["classifier_accuracy"] == pytest.approx(
        {**found["classifier_accuracy"], "value": 1}
    )
    printed = capsys.readouterr().out
    assert "Steering: shown." in printed
    assert "0.25 [0.17, 0.35]" in printed


def test_a_wilson_interval() -> None:
    """50 of 100: Wilson 1927, as in any table."""
    assert Share(50, 100).interval == pytest.approx((0.4038, 0.5962), abs=1e-4)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((95, 93, 25), "Steering: shown. 0.93"),
        ((95, 60, 25), "below the 0.85"),
        ((95, 60, 25), "The cooldown weakened steering: it was 0.95"),
        ((60, 95, 25), "The cooldown strengthened steering"),
        ((95, 93, 25), "The cooldown kept steering"),
        ((95, 93, 25), "is at chance (0.25)"),
        ((95, 93, 60), "is above chance"),
        ((25, 25, 25), "Steering: not shown."),
        ((10, 10, 2), "Steering: not shown."),
        ((93, 93, 93), "Steering: not shown."),
    ],
)
def test_the_verdict_follows_from_the_intervals(
    shares: tuple[int, int, int], expected: str
) -> None:
    assert expected in said(*shares)


SWITCH = (
    " validation loss at iteration 9 | lm loss conditioned value: 4.0E+00 | lm loss plain value: "
    "4.5E+00 | lm loss shuffled value: 4.2E+00 | lm loss shuffled minus conditioned value: 1.0E-01 "
    "| compared share value: 8.0E-01 | \n"
)
END = SWITCH.replace("iteration 9", "iteration 10 on validation set").replace("4.0E", "4.6E")
END = END.replace("1.0E-01", "-2.0E-01")
PHASES = "> MeCo: iterations 1 to 9 conditioned, 10 to 10 cooldown (switch at sample 36 of 40)\n"
BASELINE = " validation loss at iteration {} | lm loss plain value: 4.4E+00 | \n"


def test_the_losses_are_compared_and_explained_with_their_signs() -> None:
    meco = History.of([PHASES, SWITCH, END])
    rows = results.comparison(meco, History.of([BASELINE.format(i) for i in (9, 10)]))
    assert rows[0] == {
        "at": "switch",
        "iteration": 9,
        "meco_conditioned": 4.0,
        "meco_shuffled": 4.2,
        "meco_plain": 4.5,
        "value": 0.1,
        "baseline": 4.4,
    }
    plan = {"total": {"prefix_tokens": 10, "body_tokens": 90}}
    text = results.explanation(rows, plan)
    assert "Wrong minus right URL: +0.100 at the switch, -0.200 at the end" in text
    assert "No URL minus right URL: +0.500 at the switch, -0.100 at the end" in text
    assert "0.100 above the baseline" in text
    assert "10.0 % of them prefix" in text
