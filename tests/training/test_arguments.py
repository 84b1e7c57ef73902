"""Refusals before anything is built: each names the flag and the remedy."""

from __future__ import annotations

import argparse
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

    def run(flags: str, data: str = corpus) -> None:
        line = f"{MODEL} {RUN} --meco --data-path {data} --tokenizer-type HuggingFaceTokenizer "
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
        ("--dataloader-type cyclic", r"--dataloader-type cyclic.*only the `single` loader keeps"),
        ("--dataloader-type external", "--dataloader-type external"),
        ("--reset-attention-mask", r"--reset-attention-mask.*Transformer Engine ignores it"),
        ("--reset-position-ids", "--reset-position-ids"),
        ("--eod-mask-loss", "--eod-mask-loss"),
        ("--context-parallel-size 2", "--context-parallel-size 2.*Add --calculate-per-token-loss"),
        ("--phase-transition-iterations 5", "--phase-transition-iterations"),
        ("--rampup-batch-size 2 2 8", r"--rampup-batch-size.*--step-batch-size-schedule"),
        ("--multiple-validation-sets", "--multiple-validation-sets"),
        ("--full-validation", "--full-validation.*first evaluation"),
        ("--sft", "--sft"),
        ("--mock-data", "--mock-data"),
        ("--dataloader-fast-cache-load", "--dataloader-fast-cache-load"),
        ("--meco-packing first-fit", r"--meco-packing: unknown packing strategy 'first-fit'"),
        ("--meco-cooldown-fraction 2", "--meco-cooldown-fraction: 2.0 is not a share"),
        ("--meco-cooldown-start-iteration 11", r"iteration 11, after the run's last one \(10\)"),
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
def test_contradictions_are_refused_by_name(check, flags: str, message: str) -> None:
    with pytest.raises(FlagError, match=message):
        check(flags)


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
