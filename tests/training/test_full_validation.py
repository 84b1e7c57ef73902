"""`--full-validation` and `--multiple-validation-sets`: each pack once, each set by its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Result, command, launch, prepare_pages

from megatron_meco.run.training_log import History, Validation

LOSSES = {"conditioned", "plain", "shuffled", "shuffled minus conditioned"}
SETS = ("wiki", "code-v1.2")
NAMED = f"--multiple-validation-sets --validation-set-names {' '.join(SETS)}"
# The packs are not a multiple of it.
NAMED += " --eval-micro-batch-size 3 --eval-global-batch-size 30"
ONE_BY_ONE = "--skip-train --eval-micro-batch-size 1 --eval-global-batch-size 1"

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def sets(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two validation corpora."""
    return [
        prepare_pages(tmp_path_factory.mktemp("valid"), tokenizer_folder, size) for size in (40, 25)
    ]


@pytest.fixture(scope="module")
def run(corpus: str, tokenizer_folder: Path, folder: Path) -> Callable[..., Result]:
    """Runs of one model, with room for several documents in a pack, so that views differ."""

    def start(flags: str, valid: list[str], ranks: int) -> Result:
        always = "--meco --meco-cooldown-fraction 0.3 --seq-length 256 --full-validation"
        always += f" --max-position-embeddings 256 --load {folder}/ckpt --eval-iters 100"
        words = command(corpus, tokenizer_folder, *f"{always} {flags}".split())
        words[words.index("--data-path")] = "--train-data-path"
        split = words.index("--split")
        words[split : split + 2] = ["--valid-data-path", *valid]
        result = launch(words, ranks)
        assert result.status == 0, result.log[-3000:]
        return result

    return start


@pytest.fixture(scope="module")
def undisturbed(run: Callable[..., Result], sets: list[str], folder: Path) -> Result:
    """Two data-parallel ranks, ten iterations, two evaluations of both sets."""
    return run(f"{NAMED} --save {folder}/ckpt --save-interval 5", sets, ranks=2)


def evaluations(result: Result) -> dict[int, Validation]:
    return History.of(result.log.splitlines()).validations


def test_losses_are_told_of_each_set_and_of_all(undisturbed: Result) -> None:
    found = evaluations(undisturbed)
    assert set(found) == {5, 10}
    for validation in found.values():
        assert set(validation.losses) == LOSSES
        assert list(validation.sets) == list(SETS)
        assert all(set(losses) == LOSSES for losses in validation.sets.values())
        for loss in ("conditioned", "plain", "shuffled"):
            low, high = sorted(losses[loss] for losses in validation.sets.values())
            assert low < validation.losses[loss] < high


def test_a_run_goes_on_bit_by_bit_also_with_external_loaders(
    undisturbed: Result, run: Callable[..., Result], sets: list[str]
) -> None:
    resumed = run(f"{NAMED} --ckpt-step 5 --dataloader-type external", sets, ranks=2)
    assert list(resumed.losses) == [6, 7, 8, 9, 10]
    # The second line of a process is Megatron's average of two steps.
    for step in (6, 8, 9, 10):
        assert resumed.losses[step] == undisturbed.losses[step]
        assert resumed.samples[step] == undisturbed.samples[step]
    lines = [
        line[line.index("validation loss") :]
        for result in (undisturbed, resumed)
        for line in result.log.splitlines()
        if "validation loss at iteration 10 |" in line
    ]
    assert len(lines) == 2
    assert lines[0] == lines[1]


def test_neither_ranks_nor_batches_nor_other_sets_matter(
    undisturbed: Result, run: Callable[..., Result], sets: list[str]
) -> None:
    """Batches of one sample have nothing that fills them up."""
    found = evaluations(undisturbed)[10]
    whole = evaluations(run(ONE_BY_ONE, sets, ranks=1))[10]
    assert whole.losses == pytest.approx(found.losses, rel=1e-5, abs=1e-6)
    assert not whole.sets
    flags = f"{ONE_BY_ONE} --multiple-validation-sets"
    log = run(flags, sets[:1], ranks=1)
    alone = evaluations(log)[10]
    assert alone.losses == pytest.approx(found.sets["wiki"], rel=1e-5, abs=1e-6)
    # Without a name a set has a number, as in Megatron.
    assert alone.sets == {"0": alone.losses}
    assert len(re.findall("Evaluating iter 1/", log.log)) == 1
