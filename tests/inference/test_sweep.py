"""Ranking on one half, measuring on the other: halves, scores, candidates, the command."""

from __future__ import annotations

import json
import random
import re
import statistics
from pathlib import Path

import pyarrow as pa
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

from megatron_meco import cli  # noqa: E402
from megatron_meco.inference.candidates import Candidate, most_frequent  # noqa: E402
from megatron_meco.inference.conditioning import Conditioning  # noqa: E402
from megatron_meco.inference.generate import encode_prompt, encode_text, load_model  # noqa: E402
from megatron_meco.inference.sweep import TextScore, sweep  # noqa: E402

CONDITIONING = Conditioning(r"URL: {url.host}\n\n", ("url",))
TEXTS = ["the quick brown fox", "a lazy dog and a fox " * 30, "the dog", "brown brown", "fox"]


def test_the_half_that_ranks_is_not_the_half_that_reports() -> None:
    """With scores that are noise alone, the winner looks good on the first half and only there."""
    draw = random.Random(5)
    table = {name: [draw.gauss(0, 1) for _ in range(101)] for name in ["", *map(str, range(200))]}
    asked: dict[str, list[list[int]]] = {}

    def score(prefix: str, documents: list[int]) -> list[float]:
        asked.setdefault(prefix, []).append(documents)
        return [table[prefix][number] for number in documents]

    candidates = [Candidate(name=f"n{key}", prefix=key) for key in table if key]
    plain, best, *others = sweep(score, candidates, 101, num_reported=3, seed=1)
    first, second = asked[""]
    assert sorted(first + second) == list(range(101)) and len(first) == 50
    for prefix, documents in asked.items():
        assert documents in ([first], [first, second]), prefix
    assert len([x for x in asked.values() if len(x) == 2]) == 1 + 3
    assert (plain.name, plain.prefix, plain.difference) == ("no metadata", "", None)
    means = {key: statistics.fmean(table[key][i] for i in first) for key in table}
    assert [best.prefix, *(o.prefix for o in others)] == sorted(
        (key for key in table if key), key=lambda key: -means[key]
    )
    assert best.first_half == pytest.approx(means[best.prefix])
    differences = [table[best.prefix][i] - table[""][i] for i in second]
    assert best.difference == pytest.approx(statistics.fmean(differences))
    assert best.difference_stderr == pytest.approx(statistics.stdev(differences) / 51**0.5)
    # All of them are worth 0, with a standard error of 0.14 on either half.
    assert best.first_half > 0.3
    assert abs(best.second_half) < 0.2
    assert others[2].second_half is None


def test_texts_are_scored_by_the_models_own_likelihood(model_folder: Path) -> None:
    loaded = load_model(model_folder, "cpu")
    longest = CONDITIONING.render({"url": "www.factquizmaster.com"})
    score = TextScore(loaded, TEXTS, longest)
    room = 192 - len(encode_prompt(loaded.model, loaded.tokenizer, longest, ""))
    for prefix in ("", "URL: a.org\n\n", longest):
        for number, text in enumerate(TEXTS):
            begin = encode_prompt(loaded.model, loaded.tokenizer, prefix, "")
            body = encode_text(loaded.tokenizer, text)[:room]
            with torch.no_grad():
                logits = loaded.model(torch.tensor([begin + body])).logits[0].log_softmax(-1)
            expected = [logits[len(begin) + i - 1, token].item() for i, token in enumerate(body)]
            [found] = score(prefix, [number])
            assert found == pytest.approx(statistics.fmean(expected), abs=1e-5)
    assert len(encode_text(loaded.tokenizer, TEXTS[1])) > room


def test_candidates_from_a_corpus_are_what_stood_there_most_often(tmp_path: Path) -> None:
    hosts = ["b.org"] * 5 + ["a.org"] * 7 + ["c.org"] * 5 + [None, ""]
    table = pa.table({"url": [h and f"https://{h}/{i}" for i, h in enumerate(hosts)]})
    with pa.ipc.new_file(f"{tmp_path}/web.metadata.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    found = most_frequent(f"{tmp_path}/web", CONDITIONING, 2)
    assert found == [
        Candidate(name="URL: a.org (7)", prefix="URL: a.org\n\n"),
        Candidate(name="URL: b.org (5)", prefix="URL: b.org\n\n"),
    ]
    filtered = Conditioning(r"{url.host|top=1}: ", ("url",))
    assert [c.prefix for c in most_frequent(f"{tmp_path}/web", filtered, 9)] == [
        *("a.org: ", "b.org: ", "c.org: "),
    ]


# ---- The command ----


def run(model_folder: Path, *flags: object) -> int:
    return cli.main(
        ["sweep-urls", "--model", str(model_folder), "--device", "cpu", *map(str, flags)]
    )


def test_a_task_and_a_text_file(
    model_folder: Path,
    tasks: Path,
    only_local: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    urls = tmp_path / "urls.txt"
    urls.write_text("a.org\nhttps://b.org/x?y=z\n\nwww.c.com\na.org/again\n")
    output = tmp_path / "out.json"
    flags = ["--candidates", urls, "--output", output, "--report", 2]
    target = ["--task", "local_choice", "--include_path", tasks, "--metric", "acc", "--limit", 9]
    assert run(model_folder, *flags, *target) == 0
    out = capsys.readouterr().out
    assert "ranked on 4 documents, measured anew on the other 5" in out
    results = json.loads(output.read_text())["results"]
    prefixes = ["URL: a.org\n\n", "URL: b.org\n\n", "URL: www.c.com\n\n"]
    assert (
        results[0]["name"] == "no metadata" and sorted(r["prefix"] for r in results[1:]) == prefixes
    )
    assert [r["second_half"] is None for r in results] == [False, False, False, True]
    assert all(r["first_half"] * 4 % 1 == 0 for r in results)
    assert f"The choice is {results[1]['name']!r}" in out

    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    assert run(model_folder, *flags, "--text", texts) == 0
    assert "ranked on 2 documents" in capsys.readouterr().out
    results = json.loads(output.read_text())["results"]
    assert all(-20 < r["first_half"] < -1 for r in results)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--candidates", "NONE", "--text", "TEXTS"], r"--candidates \S*NONE: cannot be read"),
        (["--candidates", "EMPTY", "--text", "TEXTS"], r"--candidates \S*EMPTY: holds no lines"),
        (["--candidates", "URLS", "--text", "URLS"], "1 documents are too few"),
        (["--candidates", "LONG", "--text", "TEXTS"], "the prefix .* the model takes 192"),
        (["--candidates", "URLS", "--text", "BAD.jsonl"], r"line 1 has no text"),
        (["--data-path", "NONE", "--text", "TEXTS"], "no metadata file"),
        (["--candidates", "URLS", "--task", "local_group"], "stands for several tasks"),
        (
            ["--candidates", "URLS", "--task", "local_choice", "--metric", "f1"],
            "has: acc, acc_norm",
        ),
        (["--candidates", "URLS", "--text", "TEXTS", "--metric", "acc"], "and --text is none"),
        (["--candidates", "URLS", "--text", "TEXTS", "--report", "0"], "--report: cannot be 0"),
    ],
)
def test_refusals(
    model_folder: Path,
    tasks: Path,
    only_local: None,
    tmp_path: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {"EMPTY": "\n", "URLS": "a.org\n", "LONG": "a" * 400, "BAD.jsonl": "{}"}
    files["TEXTS"] = "\n".join(TEXTS)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    upper = [str(tmp_path / flag) if flag.split(".")[0].isupper() else flag for flag in flags]
    assert run(model_folder, "--include_path", tasks, *upper) == 1
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("meco: error: ") and re.search(message, last), err
