"""Wrong metadata as a control and two models on the same documents, against simple oracles."""

from __future__ import annotations

import json
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("lm_eval")
scipy_stats = pytest.importorskip("scipy.stats")

from inference.local_tasks import LENGTH  # noqa: E402
from inference.synthetic import export_random  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from megatron_meco import cli  # noqa: E402
from megatron_meco.inference.harness_model import MeCoLM  # noqa: E402
from megatron_meco.inference.harness_tasks import Evaluation, evaluate_task  # noqa: E402
from megatron_meco.inference.paired import deal_wrong, paired  # noqa: E402

URLS = "local_choice: {url: a.org}\nlocal_empty: {url: b.org}\n"


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """As `model_folder`, with other weights."""
    room = {"max_position_embeddings": LENGTH, "seq_length": LENGTH}
    return export_random(tmp_path_factory.mktemp("other"), tokenizer_folder, seed=1, **room)


def run(folder: Path, tasks: Path, *flags: object) -> int:
    fixed = ["--include-path", str(tasks), "--batch-size", "8", "--device", "cpu"]
    return cli.main(["eval", "--model", str(folder), *fixed, *map(str, flags)])


# ---- Numbers ----


@given(
    own=st.lists(st.sampled_from("abcd"), min_size=1, max_size=30),
    others=st.none() | st.lists(st.sampled_from("abcde"), min_size=1, max_size=6),
    seed=st.integers(0, 2**64 - 1),
)
def test_wrong_values_are_dealt_evenly_and_never_right(
    own: list[str], others: list[str] | None, seed: int
) -> None:
    dealt = deal_wrong(own, seed, others)
    assert dealt == deal_wrong(own, seed, others)
    assert len(dealt) == len(own)
    assert all(wrong != right for wrong, right in zip(dealt, own, strict=True))
    if others is None:
        # A permutation of the same values, in which only what cannot be avoided stays in place.
        most = max(Counter(own).values())
        assert dealt.count(None) == max(0, 2 * most - len(own))
        kept = [right for wrong, right in zip(dealt, own, strict=True) if wrong is None]
        assert Counter([wrong for wrong in dealt if wrong is not None]) + Counter(kept) == Counter(
            own
        )
    elif not set(others) & set(own):
        # No value is its own: every entry is dealt as often as any other, or once more.
        low, more = divmod(len(own), len(others))
        for value, times in Counter(others).items():
            assert low * times <= dealt.count(value) <= low * times + min(more, times)


def test_a_seed_decides_who_gets_which() -> None:
    own = [f"{number}" for number in range(50)]
    assert deal_wrong(own, 0) != deal_wrong(own, 1)
    assert Counter(deal_wrong(["a"] * 9, 0, ["b", "c"])) in ({"b": 5, "c": 4}, {"b": 4, "c": 5})


def test_a_pair_is_scipys_paired_t_test() -> None:
    first = {"a": 0.5, "b": 1.0, "c": 0.0, "e": 2.0}
    second = {"c": 0.5, "a": 0.25, "b": 0.0, "d": 9.0}
    one = paired(first, second)
    theirs = scipy_stats.ttest_rel([0.5, 1.0, 0.0], [0.25, 0.0, 0.5])
    interval = theirs.confidence_interval(0.95)
    assert one.num_documents == 3 and (one.first, one.second) == (0.5, 0.25)
    assert one.difference == pytest.approx(0.25)
    assert one.difference / one.stderr == pytest.approx(theirs.statistic)
    assert (one.low, one.high) == pytest.approx((interval.low, interval.high))
    assert (paired({"a": 1.0}, {"a": 0.0}).difference, paired({"a": 1.0}, {}).difference) == (
        1,
        None,
    )
    assert paired({"a": 1.0}, {"a": 0.0}).stderr is None


# ---- Wrong metadata ----


def test_each_document_gets_the_metadata_of_another_task(
    model_folder: Path,
    tasks: Path,
    only_local: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two tasks of one size under two prefixes: every document gets that of the other task."""
    per_task, swapped = tmp_path / "urls.yaml", tmp_path / "swapped.yaml"
    per_task.write_text(URLS)
    swapped.write_text("local_choice: {url: b.org}\nlocal_empty: {url: a.org}\n")
    fixed = ["--tasks", "local_choice,local_empty", "--num-fewshot", 0, 2, "--limit", 12]
    reports = []
    for file, flags in ((per_task, ["--shuffled", "--seed", 3]), (swapped, [])):
        output = tmp_path / "out.json"
        flags += ["--metadata-per-task", file, "--output", output]
        assert run(model_folder, tasks, *fixed, *flags) == 0
        reports.append(json.loads(output.read_text()))
    out = capsys.readouterr().out
    shuffled, oracle = reports
    assert shuffled["shuffled"]["seed"] == 3 and "shuffled" not in oracle
    rows = {(r["task"], r["num_fewshot"], r["metric"]): r for r in shuffled["shuffled"]["results"]}
    assert len(rows) == 8
    changed = 0
    for right, wrong in zip(shuffled["results"], oracle["results"], strict=True):
        for one, other in zip(right["comparisons"], wrong["comparisons"], strict=True):
            row = rows[right["task"], right["num_fewshot"], one["metric"]]
            assert (row["num_documents"], row["num_dropped"]) == (12, 0)
            assert row["right"] == pytest.approx(one["conditioned"])
            assert row["shuffled"] == pytest.approx(other["conditioned"])
            assert row["difference"] == pytest.approx(row["right"] - row["shuffled"])
            assert row["low"] <= row["difference"] <= row["high"]
            changed += row["stderr"] > 0
    assert changed > 0
    assert "right metadata minus that of another document (seed 3), on the same documents:" in out


def test_documents_with_their_own_metadata_count_on_neither_side(
    model_folder: Path, tasks: Path, only_local: None, tmp_path: Path
) -> None:
    """60 documents under one prefix and 30 under another: 30 of the 60 must keep theirs."""
    per_task, output = tmp_path / "urls.yaml", tmp_path / "out.json"
    per_task.write_text("local_group: {url: a.org}\nlocal_words: {url: b.org}\n")
    flags = ["--tasks", "local_group,local_words", "--metadata-per-task", per_task]
    assert run(model_folder, tasks, *flags, "--shuffled", "--output", output) == 0
    report = json.loads(output.read_text())
    rows = {(row["task"], row["metric"]): row for row in report["shuffled"]["results"]}
    group, words = rows["local_group", "acc"], rows["local_words", "exact_match"]
    assert (group["num_documents"], group["num_dropped"]) == (30, 30)
    assert (words["num_documents"], words["num_dropped"]) == (30, 0)

    model = MeCoLM(str(model_folder), device="cpu", batch_size=8)
    evaluation = Evaluation(["local_group"], tasks)
    right, wrong = (
        evaluate_task(evaluation, model, "local_group", f"URL: {host}\n\n")[0]
        for host in ("a.org", "b.org")
    )
    keys = [("local_choice", n) for n in range(30)] + [("local_empty", n) for n in range(30)]
    dealt = deal_wrong(["a"] * 60 + ["b"] * 30, 0)[:60]
    kept = [key for key, value in zip(keys, dealt, strict=True) if value is not None]
    for name, result in (("right", right), ("shuffled", wrong)):
        values = result.scores["conditioned"]["acc"]
        assert group[name] == pytest.approx(statistics.fmean(values[key] for key in kept))


def test_wrong_metadata_from_a_file(
    model_folder: Path,
    tasks: Path,
    only_local: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    urls, output = tmp_path / "urls.txt", tmp_path / "out.json"
    urls.write_text("b.org\n")
    flags = ["--tasks", "local_choice", "--limit", 9, "--output", output]
    assert run(model_folder, tasks, *flags, "--metadata", "url=b.org") == 0
    oracle = json.loads(output.read_text())["results"][0]["comparisons"]
    flags += ["--shuffled-from", urls]
    assert run(model_folder, tasks, *flags, "--metadata", "url=a.org") == 0
    report = json.loads(output.read_text())["shuffled"]
    assert report["from"] == str(urls)
    for row, one in zip(report["results"], oracle, strict=True):
        assert (row["shuffled"], row["num_documents"]) == (pytest.approx(one["conditioned"]), 9)
    assert run(model_folder, tasks, *flags, "--metadata", "url=b.org") == 1
    assert "every document has the prefix 'URL: b.org" in capsys.readouterr().err


# ---- Two models ----


def test_two_models_on_the_same_documents(
    model_folder: Path,
    other_folder: Path,
    tasks: Path,
    only_local: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    per_task, output = tmp_path / "urls.yaml", tmp_path / "out.json"
    per_task.write_text(URLS)
    flags = ["--tasks", "local_choice,local_empty", "--limit", 15, "--output", output]
    flags += ["--metadata-per-task", per_task, "--shuffled", "--against", other_folder]
    assert run(model_folder, tasks, *flags) == 0
    report = json.loads(output.read_text())
    out = capsys.readouterr().out
    assert f"{model_folder} minus {other_folder}, on the same documents:" in out
    rows = {
        (row["task"], row["condition"], row["metric"]): row
        for row in report["against"]["differences"]
    }
    assert len(rows) == 2 * 3 * 2
    evaluation = Evaluation(["local_choice"], tasks)
    models = [MeCoLM(str(f), device="cpu", batch_size=8) for f in (model_folder, other_folder)]
    right, wrong = (
        [
            evaluate_task(evaluation, model, "local_choice", f"URL: {host}\n\n", limit=15)[0].scores
            for model in models
        ]
        for host in ("a.org", "b.org")
    )
    for metric in ("acc", "acc_norm"):
        for condition in ("plain", "conditioned"):
            one, other = (list(scores[condition][metric].values()) for scores in right)
            check(rows["local_choice", condition, metric], one, other)
        one, other = (
            [
                value - bad["conditioned"][metric][key]
                for key, value in good["conditioned"][metric].items()
            ]
            for good, bad in zip(right, wrong, strict=True)
        )
        check(rows["local_choice", "right - shuffled", metric], one, other)
    assert any(row["stderr"] > 0 for row in rows.values())


def check(row: dict[str, Any], one: list[float], other: list[float]) -> None:
    differences = [a - b for a, b in zip(one, other, strict=True)]
    assert row["num_documents"] == len(differences) == 15
    assert row["model"] == pytest.approx(statistics.fmean(one))
    assert row["against"] == pytest.approx(statistics.fmean(other))
    assert row["difference"] == pytest.approx(statistics.fmean(differences))
    assert row["stderr"] == pytest.approx(statistics.stdev(differences) / 15**0.5)


def test_a_baseline_is_compared_without_metadata(
    model_folder: Path, tmp_path: Path, tasks: Path, only_local: None, capsys: Any
) -> None:
    """A model that was trained without a template reads no prefix unless one is given."""
    baseline = shutil.copytree(model_folder, tmp_path / "baseline")
    card = json.loads((baseline / "meco.json").read_text())
    (baseline / "meco.json").write_text(json.dumps(card | {"template": "", "fields": []}))
    flags = ["--tasks", "local_choice", "--limit", 4, "--against", baseline]
    assert run(model_folder, tasks, *flags, "--metadata", "url=a.org") == 1
    err = capsys.readouterr().err
    assert f"--against {baseline}: was trained without metadata" in err and err.count("\n") == 1
    assert run(model_folder, tasks, *flags) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    # The same weights: no difference, and no error.
    assert "+0.0000 ± 0.0000  [+0.0000, +0.0000]" in last
    flags += ["--metadata", "url=a.org", "--template", "{url}: "]
    assert run(model_folder, tasks, *flags) == 0
    assert " conditioned " in capsys.readouterr().out.splitlines()[-1]


def damage_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    merges = content["model"]["merges"]
    # The same vocabulary, other tokens.
    content["model"]["merges"] = merges[::-1]
    path.write_text(json.dumps(content))


def change(name: str, key: str, value: Any) -> Any:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {key: value}))

    return apply


@pytest.mark.parametrize(
    ("alter", "flags", "message"),
    [
        (damage_tokenizer, [], "has another tokenizer than --model"),
        (
            change("config.json", "bos_token_id", 1),
            [],
            "begins documents with token 1, and --model",
        ),
        (
            change("meco.json", "template", "{url.host}: "),
            ["--metadata", "url=a.org"],
            "has the template '{url.host}: ', and --model has",
        ),
        (
            lambda folder: (folder / "meco.json").unlink(),
            ["--metadata", "url=a.org"],
            "it has no meco.json",
        ),
        (lambda folder: (folder / "config.json").unlink(), [], "it has no config.json"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{"),
            [],
            "tokenizer cannot be read",
        ),
        (lambda folder: None, ["--shuffled"], "--shuffled: has no metadata to take away"),
        (
            lambda folder: None,
            ["--shuffled", "--metadata", "url=a.org"],
            "--shuffled: every document has the prefix 'URL: a.org",
        ),
        (
            lambda folder: None,
            ["--shuffled-from", "NONE", "--metadata", "url=a.org"],
            "--shuffled-from NONE: cannot be read",
        ),
    ],
)
def test_pairs_that_mean_nothing_are_refused(
    model_folder: Path,
    tasks: Path,
    only_local: None,
    tmp_path: Path,
    alter: Any,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = shutil.copytree(model_folder, tmp_path / "other")
    alter(other)
    flags = ["--tasks", "local_choice", "--limit", "4", "--against", str(other), *flags]
    assert run(model_folder, tasks, *flags) == 1
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("meco: error: ") and message in last, err
    if not message.startswith("--shuffled"):
        assert f"--against {other}: " in last


def test_a_model_against_itself_is_refused(
    model_folder: Path, tasks: Path, only_local: None, tmp_path: Path, capsys: Any
) -> None:
    link = tmp_path / "link"
    link.symlink_to(model_folder)
    for folder in (model_folder, link, tmp_path / "none"):
        assert run(model_folder, tasks, "--tasks", "local_choice", "--against", folder) == 1
        err = capsys.readouterr().err
        assert f"--against {folder}: " in err and err.count("\n") == 1


def test_a_second_model_that_fails_loses_nothing_of_the_first(
    model_folder: Path, tasks: Path, only_local: None, tmp_path: Path, capsys: Any
) -> None:
    broken, output = shutil.copytree(model_folder, tmp_path / "broken"), tmp_path / "out.json"
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    flags = ["--tasks", "local_choice", "--limit", 4, "--output", output]
    assert run(model_folder, tasks, *flags) == 0
    alone = json.loads(output.read_text())
    output.unlink()
    assert run(model_folder, tasks, *flags, "--against", broken) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"meco: error: --against {broken}: computes NaN"), err
    assert json.loads(output.read_text()) == alone
