"""`meco plan` and `meco inspect` against the datasets that a run gets, and as a user sees them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from runs import prepare_pages, write_tokenizer

from megatron_meco.cli import main

LENGTH = 64


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a run on 300 prepared pages."""
    folder = tmp_path_factory.mktemp("report")
    tokenizer = write_tokenizer(folder / "tokenizer")
    prepare_pages(folder, tokenizer)
    return [
        *f"--data-path {folder}/pages --tokenizer-type HuggingFaceTokenizer".split(),
        *f"--tokenizer-model {tokenizer} --seq-length {LENGTH} --split 80,20,0".split(),
        *[
            "--train-iters",
            "10",
            "--global-batch-size",
            "4",
            "--eval-iters",
            "2",
            "--eval-interval",
            "5",
        ],
    ]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("strategy", ["truncate", "split", "best-fit"])
def test_plan_json_adds_up(
    flags: list[str], capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    status, out, _ = run(capsys, "plan", *flags, "--json", "--meco-packing", strategy)
    assert status == 0
    report = json.loads(out)
    assert (report["switch_iteration"], report["switch_sample"]) == (9, 36)
    phases = report["phases"]
    assert set(phases) == {"conditioned", "cooldown"}
    for counts in phases.values():
        parts = ("body_tokens", "prefix_tokens", "bos_tokens", "padding_tokens")
        assert sum(counts[p] for p in parts) == counts["packs"] * LENGTH
        assert set(counts["documents_per_pack"]) == {"median", "p99", "max"}
    assert (phases["conditioned"]["packs"], phases["cooldown"]["packs"]) == (36, 4)
    assert phases["conditioned"]["prefix_tokens"] > 0 == phases["cooldown"]["prefix_tokens"]
    assert report["total"]["body_tokens"] == sum(c["body_tokens"] for c in phases.values())
    # `split` leaves over the rest of the last document of a phase, at the end of the run.
    allowed = {"truncate": 10**9, "split": 2 * 60, "best-fit": 0}[strategy]
    assert report["total"]["discarded_tokens"] <= allowed
    assert (report["total"]["discarded_tokens"] > 120) == (strategy == "truncate")
    assert report["total"]["alignment_tokens"] == 0


def test_a_plain_start_has_a_phase_of_its_own(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["--meco-start-fraction", "0.3"]
    report = json.loads(run(capsys, "plan", *flags, *start, "--json")[1])
    assert (report["start_iteration"], report["start_sample"]) == (3, 12)
    assert (report["switch_iteration"], report["switch_sample"]) == (9, 36)
    phases = report["phases"]
    assert list(phases) == ["plain", "conditioned", "cooldown"]
    assert [counts["packs"] for counts in phases.values()] == [12, 24, 4]
    assert phases["plain"]["prefix_tokens"] == 0 < phases["conditioned"]["prefix_tokens"]
    assert report["total"]["packs"] == 40
    # Prefixes are counted of the conditioned phase's corpora, once.
    assert report["documents_of_conditioned_corpora"] == 300
    assert any(line.startswith("plain: ") for line in report["advice"])
    text = " ".join(run(capsys, "plan", *flags, *start)[1].split())
    assert "Plain up to iteration 3 (sample 12). Switch after iteration 9 (sample 36)." in text
    assert re.search(r"plain\W+conditioned\W+cooldown\W+total", text)
    without = run(capsys, "plan", *flags, "--json")[1]
    assert "start" not in without
    for sample, phase in ((0, "plain"), (11, "plain"), (12, "conditioned"), (36, "cooldown")):
        words = ("inspect", *flags, *start, "--sample", str(sample))
        found = json.loads(run(capsys, *words, "--json")[1])
        assert found["phase"] == phase
        prefixes = [document["prefix"] for document in found["documents"]]
        assert any(prefixes) == (phase == "conditioned")
        assert f"({phase}): pack" in run(capsys, *words)[1]


def test_padding_behind_documents_is_counted_and_shown(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    align = ["--meco-pad-documents-to", "8"]
    report = json.loads(run(capsys, "plan", *flags, *align, "--json")[1])
    for counts in report["phases"].values():
        parts = ("body_tokens", "prefix_tokens", "bos_tokens", "padding_tokens")
        assert sum(counts[p] for p in parts) == counts["packs"] * LENGTH
        assert 0 < counts["alignment_tokens"] <= counts["padding_tokens"]
    assert re.search(r"behind documents\W+\d+\.\d+ %", run(capsys, "plan", *flags, *align)[1])
    assert "behind documents" not in run(capsys, "plan", *flags)[1]
    sample = json.loads(run(capsys, "inspect", *flags, *align, "--json")[1])
    assert all(bound % 8 == 0 for bound in sample["cu_seqlens"])
    padding = [d["alignment_tokens"] for d in sample["documents"]]
    assert any(padding)
    assert all(0 <= tokens < 8 for tokens in padding)
    text = run(capsys, "inspect", *flags, *align)[1]
    assert text.count("of padding") >= sum(tokens > 0 for tokens in padding)
    status, _, err = run(capsys, "plan", *flags, "--meco-pad-documents-to", "7")
    assert status == 1
    assert err.strip() == (
        "meco: error: --meco-pad-documents-to: 7 does not divide --seq-length 64. Give a divisor "
        "of the sequence length."
    )


def test_suffixes_are_counted_and_shown(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    suffix = ["--meco-suffix-template", r"\nFrom {url.host}", "--meco-packing", "best-fit"]
    out = run(capsys, "plan", *flags, *suffix, "--json")[1]
    phases = json.loads(out)["phases"]
    for phase, counts in phases.items():
        kinds = ("body", "prefix", "suffix", "bos", "padding")
        assert sum(counts[f"{kind}_tokens"] for kind in kinds) == counts["packs"] * LENGTH
        assert (counts["suffix_tokens"] > 0) == (phase == "conditioned")
    shown = run(capsys, "plan", *flags, *suffix)[1]
    assert re.search(r"suffix tokens\W+[1-9]", shown)
    assert r"suffix template \nFrom {url.host}" in shown
    assert "suffix" not in run(capsys, "plan", *flags)[1]
    for loss in ([], ["--meco-suffix-loss", "0"]):
        given = [*flags, *suffix, *loss, "--meco-template", ""]
        report = json.loads(run(capsys, "inspect", *given, "--json")[1])
        parts = [part for d in report["documents"] for part in d["parts"]]
        [(_, begin, end)] = [part for part in parts if part[0] == "suffix"]
        [text] = [d["suffix"] for d in report["documents"] if d["suffix"]]
        assert text.startswith("\nFrom ")
        # EOD follows; the token before a suffix predicts its first one, its last one predicts EOD.
        assert parts[parts.index(["suffix", begin, end]) + 1] == ["body", end, end + 1]
        assert report["loss_mask"][begin - 1 : end] == [float(not loss)] * (end - begin) + [1]
        text = run(capsys, "inspect", *given)[1]
        assert f"suffix, {'not ' if loss else ''}in the loss" in " ".join(text.split())
        rows = run(capsys, "inspect", *given, "--tokens")[1].splitlines()[1:]
        assert [row.split()[2] for row in rows].count("suffix") == end - begin
        assert rows[end].split()[2] == "body"
    assert "suffix" not in run(capsys, "inspect", *flags)[1]


def test_the_parts_of_a_padded_pack_are_told_token_by_token(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*flags, "--meco-pad-documents-to", "16", "--meco-max-documents-per-pack", "1"]
    report = json.loads(run(capsys, "inspect", *given, "--json")[1])
    rows = run(capsys, "inspect", *given, "--tokens")[1].splitlines()[1:]
    found = [row.split()[2] for row in rows]
    padded = 0
    bounds = report["cu_seqlens"]
    for document, begin, end in zip(report["documents"], bounds, bounds[1:], strict=False):
        body = document["body_end"] - document["body_begin"]
        head = 1 + document["prefix_tokens"]
        padding = document["alignment_tokens"]
        assert found[begin:end] == ["prefix"] * head + ["body"] * body + ["padding"] * padding
        padded += padding
    assert padded > 0


def test_inspect_json_is_the_concatenation_of_its_documents(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer

    corpus = IndexedDataset(flags[1])
    tokenizer = Tokenizer.from_file(f"{flags[flags.index('--tokenizer-model') + 1]}/tokenizer.json")
    for sample, phase in ((0, "conditioned"), (39, "cooldown")):
        status, out, _ = run(capsys, "inspect", *flags, "--sample", str(sample), "--json")
        assert status == 0
        report = json.loads(out)
        assert report["phase"] == phase
        tokens: list[int] = []
        bounds = [0]
        for d in report["documents"]:
            prefix = (
                tokenizer.encode(d["prefix"], add_special_tokens=False).ids if d["prefix"] else []
            )
            body = np.array(corpus[d["document"]]).tolist()[d["body_begin"] : d["body_end"]]
            tokens += [0, *prefix, *body]
            bounds.append(len(tokens))
            assert (d["prefix"] is not None) == (phase == "conditioned")
        assert report["tokens"] == tokens
        assert report["labels"][:-1] == tokens[1:]
        assert report["cu_seqlens"] == bounds
        assert report["max_seqlen"] == max(np.diff(bounds))


def test_inspect_shows_a_validation_pack_with_and_without_prefixes(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = run(capsys, "inspect", *flags, "--split", "valid", "--sample", "0")[1]
    hidden = run(capsys, "inspect", *flags, "--split", "valid", "--sample", "1")[1]
    assert "valid (conditioned)" in shown
    assert "valid (plain)" in hidden
    assert "URL: " in shown
    assert "URL: " not in hidden
    wrong = run(capsys, "inspect", *flags, "--split", "valid", "--sample", "2")[1]
    assert "valid (shuffled)" in wrong
    assert "URL: " in wrong


def test_plan_build_makes_the_caches_that_a_run_opens(
    flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cache = ["--data-cache-path", str(tmp_path / "cache")]
    assert run(capsys, "plan", *flags, *cache)[0] == 0
    assert not (tmp_path / "cache").exists()
    assert run(capsys, "plan", *flags, *cache, "--build")[0] == 0
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    assert sum(name.endswith("-plan.meco") for name in files) == 3  # two phases and validation
    assert sum(name.endswith("-prefixes.meco") for name in files) == 1
    assert run(capsys, "plan", *flags, *cache, "--build")[0] == 0
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == files


def test_flags_of_training_are_taken_and_mistyped_ones_are_not(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "plan", *flags, "--lr", "1e-3", "--bf16")
    assert status == 0
    assert "checked the data alone; a run also needs --num-layers, --hidden-size" in err
    assert "--lr" not in err
    assert "Switch after iteration 9" in out
    status, _, err = run(capsys, "plan", *flags, "--meco-templte", "x")
    assert status == 2
    assert "Did you mean --meco-template?" in err
    status, _, err = run(capsys, "plan", *flags, "--eval-intervall", "5")
    assert status == 2
    assert err.strip() == (
        "meco: error: unrecognized arguments: --eval-intervall 5. Did you mean --eval-interval?"
    )


MODEL = [
    "--num-layers",
    "2",
    "--hidden-size",
    "32",
    "--num-attention-heads",
    "4",
    "--max-position-embeddings",
    "64",
    "--position-embedding-type",
    "rope",
    "--micro-batch-size",
    "1",
    "--lr",
    "1e-3",
]


def without(flags: list[str], name: str) -> list[str]:
    at = flags.index(name)
    return flags[:at] + flags[at + 2 :]


@pytest.mark.parametrize(
    "name",
    [
        "--num-layers",
        "--hidden-size",
        "--num-attention-heads",
        "--max-position-embeddings",
        "--micro-batch-size",
        "--eval-interval",
        "--lr",
        "--seq-length",
        "--train-iters",
        "--data-path",
        "--tokenizer-type",
        "--tokenizer-model",
    ],
)
def test_a_whole_command_needs_what_a_run_needs(
    flags: list[str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    status, _, err = run(capsys, "plan", *without([*flags, *MODEL], name))
    assert status == 1
    assert name in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--hidden-size 33", "hidden_size % args.num_attention_heads"),
        ("--tensor-model-parallel-size 3", "num_attention_heads (4) must be a multiple"),
        ("--lr-warmup-iters 10", "lr_warmup_steps < self.lr_decay_steps"),
        ("--lr-decay-style WSD", "wsd_decay_steps is not None"),
        ("--global-batch-size 3 --micro-batch-size 2", "--global-batch-size 3: not a multiple"),
        ("--save ck", "--save-interval: missing"),
        ("--save ck --save-interval 5 --iterations-to-skip 9", "--iterations-to-skip"),
        ("--kv-channels 7", "even number"),
        ("--group-query-attention --num-query-groups 3", "--num-query-groups 3: does not divide"),
        ("--train-samples 40", "--train-samples 40: given beside --train-iters 10"),
        ("--yaml-cfg x.yaml", "--yaml-cfg"),
        ("--min-lr 1", "--min-lr 1.0: above --lr"),
        (
            "--num-experts 4 --moe-expert-capacity-factor 1.0",
            "--moe-expert-capacity-factor 1.0",
        ),
        ("--meco-branch-iters 3", "--meco-branch-iters 3"),
    ],
)
def test_what_a_run_would_stumble_on_stops_the_plan(
    flags: list[str], capsys: pytest.CaptureFixture[str], extra: str, message: str
) -> None:
    status, _, err = run(capsys, "plan", *flags, *MODEL, *extra.split())
    assert status == 1
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--split 0,0,0", "--split 0,0,0: leaves no documents to train on"),
        ("--split 0,1,0", "--split 0,1,0: leaves no documents to train on"),
        ("--split a,b,c", "--split a,b,c: not ratios"),
        ("--split nan,1,1", "--split nan,1,1: not ratios"),
        ("--split=-1,2,3", "--split -1,2,3: not ratios"),
        ("--split 1e400,1,1", "not ratios"),
        ("--data-path nan A 1 A", "the weight nan is not a positive number"),
        ("--data-path 0 A 1 A", "the weight 0 is not a positive number"),
        ("--data-path -1 A 1 A", "the weight -1 is not"),
        ("--data-path 1 A B A", "mixes weights and paths"),
        ("--data-args-path nowhere", "--data-args-path nowhere: cannot be read"),
        ("--per-split-data-args-path nowhere", "cannot be read"),
        ("--meco-cooldown-data-path 0.5", "0.5 stands where a path is expected"),
        ("--meco-max-prefix-tokens 99999999999999999999", "is too large"),
    ],
)
def test_data_flags_that_megatron_would_misread(
    flags: list[str], capsys: pytest.CaptureFixture[str], extra: str, message: str
) -> None:
    words = [flags[1] if word == "A" else word for word in extra.split()]
    given = without(flags, "--data-path") if "args-path" in extra else flags
    status, _, err = run(capsys, "plan", *given, *words)
    assert status == 1
    assert message in err
    assert "Traceback" not in err


def test_data_lists_in_files(
    flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = without(flags, "--data-path")
    listed = tmp_path / "list.txt"
    for content, message in (("", "names no corpus"), ("\xff", "not UTF-8")):
        listed.write_bytes(content.encode("latin-1"))
        status, _, err = run(capsys, "plan", *given, "--data-args-path", str(listed))
        assert (status, message in err) == (1, True), err
    splits = tmp_path / "splits.json"
    for content, message in (
        ("{broken", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no list of corpora under 'train'"),
        ('{"train": [1], "valid": null, "test": null}', "no list of corpora under 'train'"),
    ):
        splits.write_text(content)
        status, _, err = run(capsys, "plan", *given, "--per-split-data-args-path", str(splits))
        assert (status, message in err) == (1, True), err


@pytest.mark.parametrize(
    ("extra", "phase"),
    [
        ("--data-path A A --train-iters 200", "the conditioned phase"),
        ("--meco-cooldown-data-path A A --train-iters 2000", "the cooldown"),
        ("--data-path A A --eval-iters 100", "the valid split"),
    ],
)
def test_a_blend_without_weights_that_runs_out_is_refused(
    flags: list[str], capsys: pytest.CaptureFixture[str], extra: str, phase: str
) -> None:
    words = [flags[1] if word == "A" else word for word in extra.split()]
    status, _, err = run(capsys, "plan", *flags, *words)
    assert status == 1
    assert phase in err
    weighted = [word for w in words for word in (["0.5", w] if w == flags[1] else [w])]
    assert run(capsys, "plan", *flags, *weighted)[0] == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--sample", "40"], "--sample: 40 is not among the 40 samples"),
        (["--split", "test"], "the test split has no documents"),
        (["--meco-template", "{topic}"], "no metadata field 'topic'"),
        (["--data-path", "nowhere"], "nowhere.idx: no such file"),
        (["--tokenizer-model", "./nowhere"], "no such folder or file"),
    ],
)
def test_refusals_are_one_line(
    flags: list[str], capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    status, _, err = run(capsys, "inspect", *flags, *extra)
    assert status == 1
    assert message in err
    assert "Traceback" not in err
