"""Ranking on one half and measuring on the other: scores, candidates, the command."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

pytest.importorskip("lm_eval")

from megatron_meco import cli
from megatron_meco.errors import FlagError
from megatron_meco.inference.candidates import (
    Candidate,
    count_prefixes,
    most_frequent,
    read_candidates,
    read_texts,
)
from megatron_meco.inference.conditioning import Conditioning
from megatron_meco.inference.likelihood import TextScore
from megatron_meco.inference.model import encode_prompt, encode_text, load_model
from megatron_meco.inference.sweep import sweep

CONDITIONING = Conditioning(r"URL: {url.host}\n\n", ("url",))
TEXTS = ["the quick brown fox", "a lazy dog and a fox " * 30, "the dog", "brown brown", "fox"]


def test_the_half_that_ranks_is_not_the_half_that_reports() -> None:
    """With pure noise, the winner looks good on the first half only."""
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
    found = most_frequent(count_prefixes(f"{tmp_path}/web", CONDITIONING), 2)
    assert found == [
        Candidate(name="URL: a.org (7)", prefix="URL: a.org\n\n"),
        Candidate(name="URL: b.org (5)", prefix="URL: b.org\n\n"),
    ]
    filtered = Conditioning(r"{url.host|top=1}: ", ("url",))
    assert [c.prefix for c in most_frequent(count_prefixes(f"{tmp_path}/web", filtered), 9)] == [
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
    assert "ranked on 4 documents, measured again on the other 5" in out
    results = json.loads(output.read_text())["results"]
    prefixes = ["URL: a.org\n\n", "URL: b.org\n\n", "URL: www.c.com\n\n"]
    assert (
        results[0]["name"] == "no metadata" and sorted(r["prefix"] for r in results[1:]) == prefixes
    )
    assert [r["second_half"] is None for r in results] == [False, False, False, True]
    assert all(r["first_half"] * 4 % 1 == 0 for r in results)
    assert f"Best on the first half: {results[1]['name']!r}" in out

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
        (["--candidates", "URLS", "--text", "URLS"], "1 document cannot be split"),
        (["--candidates", "LONG", "--text", "TEXTS"], "the prefix .* the model takes 192"),
        (["--candidates", "URLS", "--text", "BAD.jsonl"], r"line 1 has no text"),
        (["--data-path", "NONE", "--text", "TEXTS"], "no metadata file"),
        (["--candidates", "URLS", "--task", "local_group"], "stands for several tasks"),
        (
            ["--candidates", "URLS", "--task", "local_choice", "--metric", "f1"],
            "has: acc, acc_norm",
        ),
        (
            ["--candidates", "URLS", "--text", "TEXTS", "--metric", "acc"],
            "--metric: only valid with --task",
        ),
        (["--candidates", "URLS", "--text", "TEXTS", "--report", "0"], "--report: invalid value 0"),
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


# ---- Candidates ----

TWO = Conditioning(r"Topic: {topic}\nTitle: {title}\n\n", ("title", "topic"))


def candidates_of(tmp_path: Path, text: str | bytes, conditioning: Conditioning) -> Any:
    file = tmp_path / "candidates.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        found = read_candidates(file, conditioning)
    return [(one.name, one.prefix) for one in found], told.getvalue().splitlines()


def test_one_field_takes_a_bare_value_or_field_and_value(tmp_path: Path) -> None:
    text = (
        '\ufeffhttps://a.org/x?y=z\r\nurl=https://b.org/p\n\n{"url": "c.org"}\nurl=\'d.org/a b\'\n'
    )
    found, told = candidates_of(tmp_path, text, CONDITIONING)
    assert [prefix for _, prefix in found] == [
        *(f"URL: {host}.org\n\n" for host in "abcd"),
    ]
    assert found[0][0] == "https://a.org/x?y=z" and told == []


def test_several_fields_take_values_with_blanks(tmp_path: Path) -> None:
    text = (
        "topic=law title='two words'\n"
        'title="Mc\'Coy" topic=health\n'
        '{"topic": "x", "title": "a\\nb"}\n'
    )
    found, told = candidates_of(tmp_path, text, TWO)
    assert [prefix for _, prefix in found] == [
        "Topic: law\nTitle: two words\n\n",
        "Topic: health\nTitle: Mc'Coy\n\n",
        "Topic: x\nTitle: a\nb\n\n",
    ]
    assert told == []


def test_lines_that_give_one_prefix_are_told(tmp_path: Path) -> None:
    text = "a.org\nb.org\nhttps://a.org/x\nurl=https://b.org\n"
    found, told = candidates_of(tmp_path, text, CONDITIONING)
    assert [name for name, _ in found] == ["a.org", "b.org"]
    assert len(told) == 1 and told[0].endswith("are scored once: 3 as 1, 4 as 2")


@pytest.mark.parametrize(
    ("conditioning", "text", "message"),
    [
        # All of them would be the prefix "URL: url=https", scored and chosen.
        (CONDITIONING, "url=https://a.org/1\nurl=https://a.org/2\n", "every line gives the prefix"),
        (CONDITIONING, "a.org\nURL=https://a.org\n", "line 2: unknown field 'URL'"),
        (CONDITIONING, "a.org\n\nlink=https://a.org\n", "line 3: unknown field 'link'"),
        (CONDITIONING, "url = https://a.org\n", "line 1: cannot read 'url = https"),
        (CONDITIONING, "url=a.org url=b.org\n", "line 1: has two values for the field 'url'"),
        (CONDITIONING, "url=a.org b.org\n", "line 1: cannot read"),
        (CONDITIONING, "url='a.org\n", "line 1: cannot be split into words"),
        (CONDITIONING, "url=\n", "line 1: url= leaves an empty value"),
        (CONDITIONING, '{"url": 5}\n', "line 1: holds something else than texts"),
        (CONDITIONING, '{"url": "a", "url": "b"}\n', "line 1: is no JSON.*there twice"),
        (CONDITIONING, '{"link": "a"}\n', "line 1: unknown field 'link'"),
        (CONDITIONING, '{"url": "\\ud800"}\n', "line 1: holds a character that is no valid"),
        (CONDITIONING, b"\xff\n", "byte 0 is not UTF-8"),
        (TWO, "topic=law title=two words\n", "line 1: cannot read"),
        (TWO, "topic=law\n", "line 1: no value for the field 'title'"),
        (TWO, "a bare value\n", "line 1: cannot read 'a bare value'"),
    ],
)
def test_a_line_that_is_no_candidate(
    tmp_path: Path, conditioning: Conditioning, text: str | bytes, message: str
) -> None:
    with pytest.raises(FlagError, match=message) as refused:
        candidates_of(tmp_path, text, conditioning)
    assert refused.value.where.startswith(f"--candidates {tmp_path / 'candidates.txt'}")


def test_texts_are_lines_or_objects(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("one\u2028still one\n\n two \n")
    assert read_texts(file) == ["one\u2028still one", "two"]
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a\\u2028b", "score": NaN}\n\n{"text": ""}\n{"text": "c"}\n')
    assert read_texts(file) == ["a\u2028b", "c"]
    for line in ("[1]", '{"text": null}', "{}", "[" * 100_000, '{"text": "\\ud800"}'):
        file.write_text('{"text": "a"}\n\n' + line)
        with pytest.raises(FlagError, match="line 3"):
            read_texts(file)


def test_prefixes_of_several_lines_stand_on_one(tmp_path: Path) -> None:
    table = pa.table({"topic": ["x", "x", "y"], "title": ["a\tb", "a\tb", "c"]})
    with pa.ipc.new_file(f"{tmp_path}/web.metadata.arrow", table.schema) as writer:
        writer.write_table(table)
    names = [one.name for one in most_frequent(count_prefixes(f"{tmp_path}/web", TWO), 9)]
    assert names == [r"Topic: x\nTitle: a\tb (2)", r"Topic: y\nTitle: c (1)"]
    empty = table.slice(0, 0)
    with pa.ipc.new_file(f"{tmp_path}/no.metadata.arrow", empty.schema) as writer:
        writer.write_table(empty)
    with pytest.raises(FlagError, match="no document has a prefix"):
        count_prefixes(f"{tmp_path}/no", TWO)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--top", "0"),
        ("--report", str(2**64)),
        ("--limit", "-1"),
        ("--seed", str(2**64)),
        ("--batch-size", "0"),
        ("--batch_size", "1" + "0" * 12),
        ("--num-fewshot", "-1"),
        ("--num_fewshot", "1000000"),
    ],
)
def test_numbers_out_of_range(model_folder: Path, flag: str, value: str, capsys: Any) -> None:
    assert run(model_folder, "--candidates", "x", "--task", "t", flag, value) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"meco: error: {flag.replace('_', '-')}: invalid value ")
    assert err.count("\n") == 1


def test_the_inputs_are_not_written_over(model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    for name, text in (("urls", "a.org\nb.org\n"), ("texts", "\n".join(TEXTS))):
        (tmp_path / name).write_text(text)
    flags = ["--candidates", tmp_path / "urls", "--text", tmp_path / "texts"]
    config = model_folder / "config.json"
    before = config.read_bytes()
    for output in (tmp_path / "urls", tmp_path / "texts", config):
        assert run(model_folder, *flags, "--output", output) == 1
        assert "exists and is no earlier result" in capsys.readouterr().err
    assert (tmp_path / "urls").read_text() == "a.org\nb.org\n"
    assert config.read_bytes() == before
    # An earlier result is replaced.
    for seed in (1, 2):
        assert run(model_folder, *flags, "--output", tmp_path / "out", "--seed", seed) == 0
        assert json.loads((tmp_path / "out").read_text())["seed"] == seed


def test_a_text_without_a_token_to_predict(model_folder: Path) -> None:
    loaded = load_model(model_folder, "cpu")
    with pytest.raises(FlagError, match="text 2 has no token to predict"):
        TextScore(loaded, ["fox", ""], "")
