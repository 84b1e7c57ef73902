"""`meco eval`: equality with the harness's own model, its requests, its table, its errors."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from inference.local_tasks import LENGTH

from megatron_meco import cli
from megatron_meco.inference import harness_tasks as evaluate_module
from megatron_meco.inference.harness_model import MeCoLM, RequestError
from megatron_meco.inference.harness_tasks import (
    Comparison,
    Evaluation,
    TaskResult,
    evaluate_task,
)

PREFIX = "URL: www.factquizmaster.com\n\n"


@pytest.fixture(scope="module")
def model(model_folder: Path) -> MeCoLM:
    return MeCoLM(str(model_folder), device="cpu", batch_size=4)


def seen_by(model: MeCoLM, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Every row of tokens that reaches the model, without padding on the left."""
    rows: list[list[int]] = []
    call, generate = MeCoLM._model_call, MeCoLM._model_generate

    def watch_call(self: MeCoLM, inps: Any, *args: Any, **options: Any) -> Any:
        rows.extend(inps.tolist())
        return call(self, inps, *args, **options)

    def watch_generate(self: MeCoLM, context: Any, **options: Any) -> Any:
        for row, mask in zip(context, options["attention_mask"], strict=True):
            rows.append(row[mask.bool()].tolist())
        return generate(self, context, **options)

    monkeypatch.setattr(MeCoLM, "_model_call", watch_call)
    monkeypatch.setattr(MeCoLM, "_model_generate", watch_generate)
    return rows


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_plain_numbers_are_the_harnesss_own(
    model: MeCoLM, model_folder: Path, tasks: Path, only_local: None, num_fewshot: int
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    evaluation = Evaluation(["local_group", "local_words", "local_rolling"], tasks)
    theirs = simple_evaluate(
        HFLM(str(model_folder), device="cpu", batch_size=4),
        tasks=evaluation.names,
        num_fewshot=num_fewshot,
        task_manager=evaluation._manager,
    )
    compared = 0
    for name in evaluation.names:
        model.condition_on("")
        ours = evaluation.run(model, evaluation.load(name), num_fewshot, None)
        for task, samples in ours["samples"].items():
            for mine, other in zip(samples, theirs["samples"][task], strict=True):
                assert mine["arguments"] == other["arguments"]
                assert mine["resps"] == other["resps"]
                compared += 1
        for task, values in ours["results"].items():
            assert values == theirs["results"][task]
        [result] = evaluate_task(evaluation, model, name, "", num_fewshot=num_fewshot)
        assert result.num_fewshot == num_fewshot
        for one in result.comparisons:
            assert one.plain == theirs["results"][name][f"{one.metric},none"]
            assert (one.conditioned, one.difference) == (None, None)
    assert compared == 4 * 30


@pytest.mark.parametrize("name", ["local_choice", "local_empty", "local_words"])
def test_prefix_stands_once_after_bos_and_changes_nothing_else(
    model: MeCoLM, tasks: Path, only_local: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = Evaluation([name], tasks)
    rows = seen_by(model, monkeypatch)
    # One at a time, so that no row is padded and the order is that of the lengths.
    monkeypatch.setattr(model, "batch_size_per_gpu", 1)
    both = []
    for prefix in ("", PREFIX):
        rows.clear()
        model.condition_on(prefix)
        evaluation.run(model, evaluation.load(name), 2, None)
        assert model.num_cut == 0
        both.append([tuple(row) for row in rows])
    plain, conditioned = both
    prefix_ids = model.tokenizer(PREFIX, add_special_tokens=False).input_ids
    assert sorted(conditioned) == sorted((0, *prefix_ids, *row[1:]) for row in plain)
    assert {row.count(0) for row in conditioned} == {row.count(0) for row in plain} == {1}
    text = model.tokenizer.decode(conditioned[0])
    assert text.startswith("<|begin_of_text|>" + PREFIX) and text.count("URL") == 1
    if name != "local_empty":
        # The examples stand behind the prefix.
        assert text.count("Q: ") == 3


def test_requests_that_are_too_long_lose_their_oldest_context(
    model: MeCoLM, tasks: Path, only_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = Evaluation(["local_choice", "local_words"], tasks)
    rows = seen_by(model, monkeypatch)
    begin = [0, *model.tokenizer(PREFIX, add_special_tokens=False).input_ids]
    for name, room in (("local_choice", LENGTH), ("local_words", LENGTH - 6)):
        rows.clear()
        [result] = evaluate_task(evaluation, model, name, PREFIX, num_fewshot=8, limit=4)
        assert result.num_cut["plain"] > 0 and result.num_cut["conditioned"] > 0
        half = len(rows) // 2
        # The harness's own cut takes BOS; ours leaves it and the prefix.
        assert any(row[0] != 0 for row in rows[:half])
        assert all(row[: len(begin)] == begin for row in rows[half:])
        assert max(map(len, rows)) == room
        ends = {tuple(row[-20:]) for row in rows[:half]}
        assert {tuple(row[-20:]) for row in rows[half:]} == ends
    model.condition_on("URL: " + "x" * 300)
    with pytest.raises(RequestError, match="Give shorter metadata"):
        evaluation.run(model, evaluation.load("local_choice"), 0, 2)


def test_the_error_of_the_difference_is_paired(
    model: MeCoLM, tasks: Path, only_local: None
) -> None:
    evaluation = Evaluation(["local_group"], tasks)
    [result] = evaluate_task(evaluation, model, "local_group", PREFIX)
    [acc] = result.comparisons
    differences = []
    runs = []
    for prefix in ("", PREFIX):
        model.condition_on(prefix)
        runs.append(evaluation.run(model, evaluation.load("local_group"), None, None)["samples"])
    for task in ("local_choice", "local_empty"):
        for one, other in zip(*(run[task] for run in runs), strict=True):
            differences.append(float(other["acc"]) - float(one["acc"]))
    assert len(differences) == acc.num_documents == 60 and len(set(differences)) > 1
    assert acc.difference == pytest.approx(statistics.fmean(differences))
    assert acc.difference_stderr == pytest.approx(statistics.stdev(differences) / 60**0.5)
    assert acc.difference_stderr < (acc.plain_stderr**2 + acc.conditioned_stderr**2) ** 0.5


# ---- The command ----


def run(model_folder: Path, tasks: Path, *flags: str) -> int:
    fixed = ["--include-path", str(tasks), "--batch-size", "8", "--device", "cpu"]
    return cli.main(["eval", "--model", str(model_folder), *fixed, *flags])


def test_both_in_one_command(
    model_folder: Path,
    tasks: Path,
    only_local: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    per_task = tmp_path / "urls.yaml"
    per_task.write_text("local_empty: {url: 'https://en.wikipedia.org/x'}\n")
    flags = ["--tasks", "local_choice,local_empty", "--metadata-per-task", str(per_task)]
    flags += ["--metadata", "url=a.org", "--num-fewshot", "0", "2", "--limit", "5"]
    assert run(model_folder, tasks, *flags, "--output", str(tmp_path / "out.json")) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == [
        *("task", "shots", "metric", "documents", "plain", "conditioned", "difference"),
    ]
    assert [line.split()[:4] for line in out[1:9]] == [
        [task, shots, metric, "5"]
        for task in ("local_choice", "local_empty")
        for shots in ("0", "2")
        for metric in ("acc", "acc_norm")
    ]
    assert all(line.count("±") == 3 for line in out[1:9])
    assert out[9:] == [
        r"local_choice is conditioned on 'URL: a.org\n\n'",
        r"local_empty is conditioned on 'URL: en.wikipedia.org\n\n'",
    ]
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(r["task"], r["num_fewshot"]) for r in report["results"]] == [
        (task, shots) for task in ("local_choice", "local_empty") for shots in (0, 2)
    ]
    first = report["results"][0]["comparisons"][0]
    assert f"{first['plain']:.4f} ± {first['plain_stderr']:.4f}" in out[1]
    assert first["difference"] == first["conditioned"] - first["plain"]


def test_the_papers_tasks_with_its_urls(
    model_folder: Path,
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ten tasks, each on its URL, 0-shot and 5-shot, with local data in place of their own."""
    from lm_eval import tasks as harness_tasks

    asked = []

    def answer(evaluation: Any, model: Any, name: str, prefix: str, **options: Any) -> list[Any]:
        asked.append((name, prefix, options["num_fewshot"]))
        # It has its examples in its questions.
        shots = 0 if name == "truthfulqa_mc2" else options["num_fewshot"]
        numbers = {"plain": 0.5, "conditioned": 0.6 + shots / 100, "difference": 0.1 + shots / 100}
        errors = {f"{key}_stderr": 0.03 for key in numbers}
        rows = [
            Comparison(metric=metric, num_documents=9, **numbers, **errors)
            for metric in ("acc", "acc_norm")
        ]
        return [
            TaskResult(task=name, num_fewshot=shots, prefix=prefix, num_cut={}, comparisons=rows)
        ]

    # The folders of those ten alone: the whole index takes eight seconds.
    root = Path(harness_tasks.__file__).parent
    names = [
        "arc",
        "mmlu",
        "commonsense_qa",
        "hellaswag",
        "openbookqa",
        "piqa",
        "siqa",
        "winogrande",
        "truthfulqa",
    ]
    manager = harness_tasks.TaskManager
    folders = [root / name for name in names]
    monkeypatch.setattr(
        harness_tasks,
        "TaskManager",
        lambda include_path: manager(include_path=folders, include_defaults=False),
    )
    monkeypatch.setattr(evaluate_module, "evaluate_task", answer)
    monkeypatch.setattr(Evaluation, "load", lambda self, name: {})
    assert run(model_folder, tasks, "--tasks", "paper") == 0
    urls = {name: prefix for name, prefix, _ in asked}
    assert len(asked) == 20 and len(urls) == 10 and {shots for _, _, shots in asked} == {0, 5}
    assert urls["openbookqa"] == "URL: www.factquizmaster.com\n\n"
    assert urls["arc_easy"] == urls["arc_challenge"] == "URL: www.sciencestudyquiz.com\n\n"
    averages = [x.split()[-8:] for x in capsys.readouterr().out.splitlines() if "average" in x]
    error = f"{0.03 / 10**0.5:.4f}"
    for number, difference, line in zip((0.6, 0.645), (0.1, 0.145), averages, strict=True):
        assert line[-6:] == [f"{number:.4f}", "±", error, f"+{difference:.4f}", "±", error]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "local_chioce"], r"unknown task 'local_chioce'. Near it: local_choice"),
        (["--tasks", "local_missing"], r"'local_missing': its data set 'json' cannot be loaded"),
        (["--tasks", "local_choice", "--num-fewshot", "9"], "harness refuses it"),
        (["--tasks", "local_rolling", "--metadata", "url=a.org"], "'local_rolling'.*no prefix"),
        (["--tasks", "local_choice", "--metadata", "topic=x"], "unknown field 'topic'"),
        (["--tasks", "local_choice", "--template", "{a"], "--template: unbalanced"),
        (["--tasks", "local_choice", "--model", "FILE"], "no such folder"),
        (["--tasks", "local_choice", "--limit", "0"], "--limit: invalid value 0"),
        (["--tasks", "local_choice", "--batch-size", "many"], "--batch-size: invalid value .many"),
        (["--tasks", "local_choice", "--device", "tpu"], "--device tpu: cannot be used"),
        (["--tasks", "local_choice", "--output", "/no/where"], "no folder that can be written"),
        (["--tasks", "local_choice", "--metadata-per-task", "FILE"], "which is not evaluated"),
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
    import re

    (tmp_path / "urls.json").write_text('{"local_other": {"url": "a.org"}}')
    flags = [str(tmp_path / "urls.json") if flag == "FILE" else flag for flag in flags]
    assert run(model_folder, tasks, *flags) == 1
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("meco: error: ") and re.search(message, last), err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *(
            (["--limit", value], "--limit: invalid value")
            for value in ("nan", "inf", "-1", "1.5", "1e300")
        ),
        *(
            (["--batch-size", value], "--batch-size: invalid value")
            for value in ("0", "auto:0", "auto:", "\u0665", "", "1" + "0" * 12, "auto:x")
        ),
        *((["--num-fewshot", value], "--num-fewshot: invalid value") for value in ("-1", "99999")),
        (["--tasks", ","], "--tasks: names no task"),
        (["--metadata", "url=a", "url=b"], "has two values"),
        (["--device", "meta"], "--device meta: cannot be used"),
    ],
)
def test_flags_out_of_range(
    model_folder: Path, tasks: Path, flags: list[str], message: str, capsys: Any
) -> None:
    assert run(model_folder, tasks, "--tasks", "local_choice", *flags) == 1
    err = capsys.readouterr().err
    assert message in err and err.startswith("meco: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("local_choice: {url: a}\nlocal_choice: {url: b}\n", "a key is repeated"),
        ("local_choice: {url: a, url: b}\n", "a key is repeated"),
        ("local_choice: {url: 2024-01-01}\n", "no fields with texts"),
        ("local_choice: {url: }\n", "no fields with texts"),
        ("local_choice: {link: a}\n", "local_choice: unknown field 'link'"),
        ("local_choice: !!python/object/apply:os.mkdir [MARK]\n", "cannot be read"),
        ("[" * 50_000, "cannot be read"),
        (b"\xff", "byte 0 is not UTF-8"),
        (b"a\x00b", "cannot be read"),
        ("", "holds no tasks"),
    ],
)
def test_metadata_files_that_cannot_be_used(
    model_folder: Path,
    tasks: Path,
    tmp_path: Path,
    content: str | bytes,
    message: str,
    capsys: Any,
) -> None:
    file, mark = tmp_path / "urls.yaml", tmp_path / "mark"
    data = content.encode() if isinstance(content, str) else content
    file.write_bytes(data.replace(b"MARK", str(mark).encode()))
    flags = ["--tasks", "local_choice", "--metadata-per-task", str(file)]
    assert run(model_folder, tasks, *flags) == 1
    err = capsys.readouterr().err
    assert message in err and err.startswith(f"meco: error: --metadata-per-task {file}"), err
    assert err.count("\n") == 1 and not mark.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("broken", "task: broken\ndataset_path: [unclosed\n"),
        (
            "broken",
            "task: broken\noutput_type: generate_until\ndataset_path: json\nx: !function no.f\n",
        ),
        ("local_choice", "task: local_choice\noutput_type: no_such_type\ndataset_path: json\n"),
    ],
)
def test_tasks_that_cannot_be_read(
    model_folder: Path, only_local: None, tmp_path: Path, name: str, text: str, capsys: Any
) -> None:
    (tmp_path / "task.yaml").write_text(text)
    assert run(model_folder, tmp_path, "--tasks", name) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("meco: error: ")


def test_spellings_of_the_harness_are_taken_and_not_shown(capsys: Any) -> None:
    for command in ("eval", "sweep-urls"):
        assert cli.main([command, "--help"]) == 0
        text = capsys.readouterr().out
        for flag in ("--batch-size", "--num-fewshot", "--include-path"):
            assert flag in text and flag[2:].replace("-", "_") not in text


def test_the_inputs_are_not_written_over(
    model_folder: Path, tasks: Path, only_local: None, capsys: Any
) -> None:
    config = model_folder / "config.json"
    before = config.read_bytes()
    for output in (config, tasks / "local_choice.yaml", model_folder):
        flags = ["--tasks", "local_choice", "--output", str(output)]
        assert run(model_folder, tasks, *flags) == 1
        assert "--output" in capsys.readouterr().err
    assert config.read_bytes() == before


def test_a_model_that_computes_nothing(
    model_folder: Path, tasks: Path, only_local: None, tmp_path: Path, capsys: Any
) -> None:
    """argmax of NaN is 0, which would give a meaningless accuracy."""
    import shutil

    from safetensors.torch import load_file, save_file

    model = shutil.copytree(model_folder, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for task in ("local_choice", "local_words"):
        assert run(model, tasks, "--tasks", task, "--limit", "2") == 1
        assert "computes NaN or infinity" in capsys.readouterr().err
