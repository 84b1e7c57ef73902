"""The example script inside the real trainer, on one CPU rank."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from runs import Result, train

STOCK = Path(__file__).parent / "stock_pretrain.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def meco_run(corpus: str, tokenizer_folder: Path, folder: Path) -> Result:
    """Ten iterations, the last two of them cooldown."""
    result = train(
        corpus,
        tokenizer_folder,
        *f"--meco --meco-cooldown-fraction 0.2 --save {folder}/ckpt --save-interval 5".split(),
        *f"--data-cache-path {folder}/cache --tensorboard-dir {folder}/tensorboard".split(),
        # Room for several hosts in a pack.
        *["--seq-length", "256", "--max-position-embeddings", "256"],
    )
    assert result.status == 0, result.log[-3000:]
    return result


@pytest.mark.distributed
def test_a_run_switches_saves_there_and_says_so(meco_run: Result, folder: Path) -> None:
    lines = [line for line in meco_run.log.splitlines() if line.startswith("> MeCo")]
    assert lines[0] == "> MeCo: no CUDA device; training on the CPU over Gloo"
    assert lines[1] == (
        "> MeCo: attention: torch scaled_dot_product_attention, document by document (CPU); "
        "layers: Megatron's linear layers, torch norm (CPU); optimizer: torch AdamW"
    )
    assert "iterations 1 to 8 conditioned, 9 to 10 cooldown (switch at sample 32 of 40)" in lines[2]
    assert lines[3].startswith("> MeCo: conditioned: 32 packs of ")
    assert lines[4].startswith("> MeCo: cooldown: 8 packs of ")
    assert "0.00 % prefix" not in lines[3]
    assert "0.00 % prefix" in lines[4]
    assert lines[5] == "> MeCo: iteration 1 begins in the conditioned phase"
    assert lines[6].startswith("> MeCo: switch after iteration 8, at sample 32")
    assert len(lines) == 7
    log = meco_run.log
    assert log.index("iteration        8/") < log.index(lines[6]) < log.index("iteration        9/")
    saved = sorted(p.name for p in (folder / "ckpt").glob("iter_*"))
    assert saved == ["iter_0000005", "iter_0000008", "iter_0000010"]


@pytest.mark.distributed
def test_three_validation_losses_in_both_phases(meco_run: Result) -> None:
    assert set(meco_run.validation) == {5, 10}
    for losses in meco_run.validation.values():
        views = [f"lm loss {view}" for view in ("conditioned", "plain", "shuffled")]
        assert set(losses) == {*views, "lm loss shuffled minus conditioned"}
        assert losses["lm loss conditioned"] != losses["lm loss plain"]
        assert len({losses[view] for view in views}) == 3
        assert abs(float(losses["lm loss shuffled minus conditioned"])) < 0.5
    shares = re.findall(r"\| compared share value: (\S+) ", meco_run.log)
    assert len(shares) >= 2
    assert all(0.5 < float(share) <= 1 for share in shares)
    assert float(meco_run.losses[10]) < float(meco_run.losses[1]) - 0.3


@pytest.mark.distributed
def test_tensorboard_shows_the_switch(meco_run: Result, folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    phases = {e.step: e.value for e in events.Scalars("meco/cooldown")}
    assert phases == {i: float(i > 8) for i in range(1, 11)}
    assert "lm loss conditioned validation" in events.Tags()["scalars"]
    assert "lm loss plain validation" in events.Tags()["scalars"]
    assert "lm loss shuffled validation" in events.Tags()["scalars"]
    assert "lm loss shuffled minus conditioned validation" in events.Tags()["scalars"]


@pytest.mark.distributed
def test_a_checkpoint_can_be_read_without_this_package(meco_run: Result, folder: Path) -> None:
    """`args.save_interval` is a plain int in the file, whatever the run held."""
    found = [
        p.name
        for p in (folder / "ckpt" / "iter_0000008").rglob("*")
        if p.is_file() and b"megatron_meco.training.phase_switch" in p.read_bytes()
    ]
    assert found == []


@pytest.mark.distributed
def test_the_matched_baseline_needs_no_metadata(
    corpus: str, tokenizer_folder: Path, folder: Path
) -> None:
    bare = folder / "bare"
    for suffix in (".bin", ".idx"):
        bare.with_suffix(suffix).symlink_to(corpus + suffix)
    result = train(str(bare), tokenizer_folder, "--meco", "--meco-template", "")
    assert result.status == 0, result.log[-3000:]
    assert set(result.validation[10]) == {"lm loss plain"}


@pytest.mark.distributed
@pytest.mark.parametrize("flags", [[], ["--dataloader-inter-document-masking"]])
def test_without_meco_the_losses_are_stock_megatrons(
    corpus: str, tokenizer_folder: Path, tmp_path: Path, flags: list[str]
) -> None:
    flags = [*flags, "--no-create-attention-mask-in-dataloader"]
    ours = train(corpus, tokenizer_folder, *flags, "--data-cache-path", f"{tmp_path}/a")
    theirs = train(
        corpus, tokenizer_folder, *flags, "--data-cache-path", f"{tmp_path}/b", script=STOCK
    )
    assert theirs.status == 0, theirs.log[-3000:]
    assert ours.status == 0, ours.log[-3000:]
    assert len(ours.losses) == 10
    assert ours.losses == theirs.losses
    assert ours.validation == theirs.validation


@pytest.mark.distributed
def test_a_refusal_is_one_line_and_no_trace(corpus: str, tokenizer_folder: Path) -> None:
    result = train(corpus, tokenizer_folder, "--meco", "--context-parallel-size", "2", ranks=2)
    assert result.status != 0
    errors = [line for line in result.log.splitlines() if "meco: error" in line]
    assert len(errors) == 1
    assert "--context-parallel-size 2:" in errors[0]
    assert 'pretrain_gpt.py", line' not in result.log  # torchrun prints a trace of its own


@pytest.mark.distributed
def test_skipped_steps_and_the_switch_checkpoint_under_tensor_parallelism(
    corpus: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Megatron's own skip would wait for ever, and its retention would delete the checkpoint."""
    result = train(
        corpus,
        tokenizer_folder,
        *["--meco", "--tensor-model-parallel-size", "2", "--iterations-to-skip", "2", "3"],
        *f"--save {tmp_path} --save-interval 2 --save-retain-interval 4".split(),
        *["--meco-cooldown-start-iteration", "5", "--check-for-spiky-loss"],
        ranks=2,
    )
    assert result.status == 0, result.log[-3000:]
    assert sorted(result.losses) == [1, 4, 5, 6, 7, 8, 9, 10]
    assert "skipped samples:            8" in result.log
    saved = sorted(p.name for p in tmp_path.glob("iter_*"))
    assert saved == ["iter_0000004", "iter_0000005", "iter_0000008", "iter_0000010"]
