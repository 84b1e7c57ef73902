"""Refusals before anything is built: each names the flag and the remedy."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
from runs import MODEL, RUN

from megatron_meco.errors import DataError, FlagError, MeCoError
from megatron_meco.training import arguments
from megatron_meco.training.phase_switch import PhaseSwitch

Parse = argparse.Namespace


@pytest.fixture
def check(corpus: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Parse a command line as a run does, and check it."""

    def run(flags: str, data: str | None = corpus) -> None:
        words = RUN if data else RUN.replace("--split 80,20,0", "")
        line = f"{MODEL} {words} --meco --tokenizer-type HuggingFaceTokenizer "
        line += f"--data-path {data} " if data else ""
        line += f"--tokenizer-model {tokenizer_folder}"
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *line.split(), *flags.split()])
        command_line = arguments.CommandLine(None, on_cpu=True)
        arguments.check_arguments(command_line.parse(), command_line.flags)

    return run


def test_a_good_command_line_passes(check) -> None:
    check("")
    check("--meco-suffix-template {url.host} --meco-suffix-loss 0 --meco-repeat-every 9")
    check("--meco-template= --meco-suffix-template {url.host} --meco-plain-fraction 0.1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataloader-type cyclic", "--dataloader-type cyclic.*this loader shuffles.*external"),
        ("--reset-attention-mask", r"--reset-attention-mask.*Transformer Engine ignores it"),
        ("--reset-position-ids", "--reset-position-ids"),
        ("--eod-mask-loss", "--eod-mask-loss"),
        ("--context-parallel-size 2", "--context-parallel-size 2.*Add --calculate-per-token-loss"),
        ("--async-save", "--async-save: without --use-persistent-ckpt-worker"),
        (
            "--async-save --use-persistent-ckpt-worker --ckpt-format torch",
            "--async-save --ckpt-format torch: .*other formats",
        ),
        ("--phase-transition-iterations 5", "--phase-transition-iterations"),
        ("--rampup-batch-size 2 2 8", r"--rampup-batch-size.*--step-batch-size-schedule"),
        ("--multiple-validation-sets", "--multiple-validation-sets: needs --full-validation"),
        ("--full-validation", "--eval-iters 2: has no effect with --full-validation"),
        ("--validation-set-names a", "--validation-set-names a: has no effect without"),
        (
            "--full-validation --eval-iters 100 --multiple-validation-sets",
            "--multiple-validation-sets: the sets are the corpora of --valid-data-path",
        ),
        ("--sft", "--sft"),
        ("--mock-data", "--mock-data"),
        ("--dataloader-fast-cache-load", "--dataloader-fast-cache-load"),
        ("--meco-packing first-fit", r"--meco-packing: unknown packing strategy 'first-fit'"),
        ("--meco-cooldown-fraction 2", "--meco-cooldown-fraction: 2.0 is not a share"),
        ("--meco-cooldown-start-iteration 11", r"iteration 11, after the run's last one \(10\)"),
        ("--meco-start-fraction 1.5", "--meco-start-fraction: 1.5 is not a share"),
        ("--meco-start-fraction 0.9", "--meco-start-fraction 0.9: leaves no iteration with meta"),
        ("--meco-start-iteration -1", "--meco-start-iteration: -1 is too small"),
        ("--meco-start-iteration 9", "cooldown starts after iteration 9 of 10"),
        ("--meco-start-iteration 99", "the first 99 would be plain"),
        (
            "--meco-start-iteration 2 --meco-start-fraction 0.2",
            "--meco-start-iteration 2: does not go with --meco-start-fraction 0.2",
        ),
        ("--meco-start-documents 0.2", "--meco-start-documents: has no effect"),
        (
            "--meco-start-iteration 2 --meco-start-documents 0.95",
            "--meco-start-documents: 0.95 leaves no document to the conditioned phase",
        ),
        (
            "--meco-start-iteration 2 --meco-start-documents 1.0 --meco-cooldown-data-path {data}",
            "--meco-start-documents: 1.0 leaves no document to the conditioned phase. Give a",
        ),
        ("--meco-template {url.hots}", r"unknown transform 'hots'.*Did you mean 'host'"),
        ("--meco-template plain", "names no field"),
        ("--meco-pad-documents-to 0", "--meco-pad-documents-to: 0 is too small"),
        ("--meco-pad-documents-to 7", "--meco-pad-documents-to: 7 does not divide"),
        ("--meco-repeat-every 0", "--meco-repeat-every: 0 is too small"),
        ("--meco-repeat-every 9 --meco-template=", "every 9: does not go with an empty"),
        (
            "--meco-repeat-every 9 --meco-prefix-once --meco-packing split",
            "--meco-repeat-every 9: does not go with --meco-prefix-once",
        ),
        ("--meco-suffix-loss 0", "--meco-suffix-loss 0: has no effect: documents have no suffix"),
        ("--meco-suffix-template plain", "--meco-suffix-template: 'plain'.*the same suffix"),
        ("--meco-suffix-template {url.hots}", "--meco-suffix-template: unknown transform 'hots'"),
        ("--meco-template= --meco-plain-fraction 0.1", "--meco-plain-fraction: has no effect"),
    ],
)
def test_contradictions_are_refused_by_name(check, corpus: str, flags: str, message: str) -> None:
    with pytest.raises(FlagError, match=message):
        check(flags.replace("{data}", corpus))


def test_a_plain_start_needs_meco(
    corpus: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flag in ("--meco-start-iteration 2", "--meco-start-fraction 0.2"):
        line = f"{MODEL} {RUN} --data-path {corpus} {flag}"
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *line.split()])
        command_line = arguments.CommandLine(None, on_cpu=True)
        args = command_line.parse()
        with pytest.raises(FlagError, match=rf"{flag}: has no effect without --meco"):
            arguments._check_without_meco(args, command_line.own_flags)


@pytest.mark.parametrize("skipped", [3, 8])
def test_a_step_whose_checkpoint_is_that_of_a_switch_is_not_skipped(skipped: int) -> None:
    flags = {
        **vars(arguments.add_meco_arguments(argparse.ArgumentParser()).parse_args([])),
        **{"meco": True, "save": "somewhere", "train_iters": 10, "train_samples": None},
        **{"global_batch_size": 4, "seq_length": 64, "meco_cooldown_fraction": 0.2},
    }
    late = argparse.Namespace(**flags, iterations_to_skip=[1, skipped])
    late.meco_start_iteration = 3
    phase, flag = {3: ("plain", "--meco-start"), 8: ("conditioned", "--meco-cooldown")}[skipped]
    message = f"iteration {skipped} is the last one of the {phase} phase.*{flag}"
    with pytest.raises(FlagError, match=message):
        arguments._check_skipped_iterations(late)
    late.iterations_to_skip = [1, 2, 4, 7, 9]
    arguments._check_skipped_iterations(late)


def test_a_refused_flag_that_the_script_adds_is_refused(
    corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Megatron's own scripts add those of ModelOpt."""

    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--modelopt-enabled", action="store_true")
        parser.add_argument("--of-my-own", action="store_true")
        return parser

    line = f"{MODEL} {RUN} --meco --data-path {corpus} --of-my-own"
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *line.split()])
    command_line = arguments.CommandLine(add, on_cpu=True)
    arguments.check_arguments(command_line.parse(), command_line.flags)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--modelopt-enabled"])
    with pytest.raises(FlagError, match="--modelopt-enabled: does not go with --meco"):
        arguments.check_arguments(command_line.parse(), command_line.flags)


def test_a_default_of_the_script_is_checked_like_a_flag(
    corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"{MODEL} {RUN} --meco --data-path {corpus}"
    defaults = {"tokenizer_type": "GPT2BPETokenizer", "dataloader_type": "cyclic"}
    for given, refused in (("", True), ("--dataloader-type single", False)):
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *line.split(), *given.split()])
        command_line = arguments.CommandLine(None, on_cpu=True, defaults=defaults)
        args = command_line.parse()
        assert args.tokenizer_type == "GPT2BPETokenizer"
        if refused:
            with pytest.raises(FlagError, match="--dataloader-type cyclic"):
                arguments.check_arguments(args, command_line.flags)
        else:
            arguments.check_arguments(args, command_line.flags)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_background_saves_whose_worker_cannot_start_are_refused(on_cpu: bool) -> None:
    args = argparse.Namespace(async_save=True, async_strategy="nvrx")
    reason = "needs a CUDA device" if on_cpu else "nvidia-resiliency-ext is not installed"
    with pytest.raises(FlagError, match=rf"--async-strategy nvrx: .*{reason}.*strategy mcore"):
        arguments._check_checkpoint_worker(args, on_cpu)
    for change in ({"async_strategy": "mcore"}, {"async_save": False}):
        arguments._check_checkpoint_worker(argparse.Namespace(**vars(args) | change), on_cpu)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--split 9,1,0 --train-data-path C", "--split 9,1,0: has no effect on the corpora of"),
        ("--train-data-path C --valid-data-path 1 C 2 C", "--full-validation: .*weights.*valid-"),
        (
            "--data-path 1 C 2 C --split 9,1,0",
            "--full-validation: reads every validation pack",
        ),
        ("--train-data-path C", "--multiple-validation-sets: the sets are the corpora of --valid-"),
        (
            "--train-data-path C --valid-data-path C --validation-set-names a b",
            "--validation-set-names a b: 2 names for the 1 corpora",
        ),
        (
            "--train-data-path C --valid-data-path C C --validation-set-names a a",
            "--validation-set-names a a: 'a' is given twice",
        ),
        (
            "--train-data-path C --valid-data-path C C --validation-set-names a b|c",
            r"--validation-set-names a b\|c: 'b\|c' would make the log ambiguous",
        ),
    ],
)
def test_contradictions_of_validation_are_refused_by_name(
    check, corpus: str, flags: str, message: str
) -> None:
    sets = "--full-validation --multiple-validation-sets --eval-iters 100"
    with pytest.raises(FlagError, match=message):
        check(f"{sets} {flags.replace(' C', f' {corpus}')}", data=None)


def test_a_missing_corpus_field_or_metadata(check, corpus: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.idx: no such file"):
        check("", data=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no metadata field 'topic'.*It holds: url"):
        check("--meco-template {topic}")
    with pytest.raises(DataError, match=r"no metadata field 'topic'.*in --meco-suffix-template"):
        check("--meco-template= --meco-suffix-template {topic}")
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus + suffix, tmp_path / f"bare{suffix}")
    with pytest.raises(DataError, match=r"bare\.metadata\.arrow: no metadata file"):
        check("", data=str(tmp_path / "bare"))
    with pytest.raises(DataError, match=r"other\.idx: no such file"):
        check(f"--meco-cooldown-data-path {tmp_path}/other")


def test_no_corpus_at_all(check) -> None:
    with pytest.raises(MeCoError, match="--data-path"):
        check("", data="")


class TestPhaseSwitch:
    schedule = arguments.Schedule(
        num_iterations=10, num_samples=40, switch_iteration=8, switch_sample=32
    )

    def test_it_speaks_at_the_start_and_at_the_switch_once(self) -> None:
        switch = PhaseSwitch(self.schedule, saves=True)
        said = [switch.before_step(i, None) for i in range(5, 10) for _ in range(3)]
        assert [s for s in said if s] == [said[0], said[9]]
        assert "iteration 6 begins in the conditioned phase" in said[0]
        assert "switch after iteration 8" in said[9]

    def test_a_prefix_in_the_cooldown_stops_the_run(self) -> None:
        switch = PhaseSwitch(self.schedule, saves=True)
        switch.check_batch(7, 100)
        switch.check_batch(8, 0)
        with pytest.raises(RuntimeError, match="iteration 9 belongs to the cooldown"):
            switch.check_batch(8, 1)

    def test_a_run_that_starts_plain_speaks_at_both_switches(self) -> None:
        schedule = dataclasses.replace(self.schedule, start_iteration=3, start_sample=12)
        switch = PhaseSwitch(schedule, saves=False)
        shown: list[tuple[str, int, int]] = []

        class Writer:
            def add_scalar(self, name: str, value: int, step: int) -> None:
                shown.append((name, value, step))

            def add_text(self, name: str, text: str, step: int) -> None:
                assert name == "meco/switch" and str(step) in text

        said = {i: switch.before_step(i, Writer()) for i in range(10)}
        assert {i for i, text in said.items() if text} == {0, 3, 8}
        assert said[0] == "> MeCo: iteration 1 begins in the plain phase"
        assert said[3] == (
            "> MeCo: switch after iteration 3, at sample 12: plain -> conditioned "
            "(no --save, so no checkpoint)"
        )
        assert "at sample 32: conditioned -> cooldown" in (said[8] or "")
        for name, steps in (("meco/conditioned", range(4, 9)), ("meco/cooldown", range(9, 11))):
            assert [s for n, value, s in shown if n == name and value] == list(steps)
        with pytest.raises(RuntimeError, match="iteration 3 belongs to the plain phase"):
            switch.check_batch(2, 1)
        switch.check_batch(3, 1)


def test_megatrons_own_masking_with_context_parallelism_is_refused_without_meco(
    corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loader cuts sequences where its attention counts in documents."""
    line = f"{MODEL} {RUN} --data-path {corpus} --context-parallel-size 2"
    command_line = arguments.CommandLine(None, on_cpu=True)
    for masking in (False, True):
        flags = [*line.split(), *(["--dataloader-inter-document-masking"] * masking)]
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *flags])
        args = command_line.parse()
        if not masking:
            arguments._check_without_meco(args, command_line.own_flags)
            continue
        with pytest.raises(FlagError, match="documents would reach each other"):
            arguments._check_without_meco(args, command_line.own_flags)
