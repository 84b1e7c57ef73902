"""The launchers of the paper's four sizes: figures, refusals, Slurm, and runs at toy size."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, Result, free_port

EXAMPLES = ROOT / "examples"
SIZES = ("600m", "1.6b", "3b", "8b")

# Figures of arXiv 2501.01956: table 7 (and the configurations in princeton-pli/MeCo) for models,
# table 6 for the optimizer, section A.3 for the cooldown of the 8B model, and the arithmetic for
# steps: 512 * 8,192 tokens each, 40,000 for the nominal 160 billion, half as many for 80 billion.
#       layers hidden  ffn  heads groups body  total (million parameters)
MODELS = {
    "600m": (24, 1024, 4096, 16, 16, 403, 665),
    "1.6b": (24, 2048, 5504, 16, 8, 1114, 1639),
    "3b": (28, 3072, 8192, 24, 8, 2819, 3607),
    "8b": (32, 4096, 14336, 32, 8, 6980, 8030),
}
#           lr    min-lr  weight decay  steps  cooldown
RECIPES = {
    "600m": (3e-3, 3e-4, 0.033, 40_000, 0.1),
    "1.6b": (3e-3, 3e-4, 0.033, 40_000, 0.1),
    "3b": (3e-3, 3e-4, 0.033, 40_000, 0.1),
    "8b": (5e-4, 5e-5, 0.1, 20_000, 0.125),
}
EVERY_SIZE = {
    "--adam-beta1": 0.9,
    "--adam-beta2": 0.95,
    "--lr-warmup-fraction": 0.05,
    "--seq-length": 8192,
    "--global-batch-size": 4_194_304 / 8192,
    "--rotary-base": 5e5,
    "--norm-epsilon": 1e-5,
    "--init-method-std": 0.02,
    "--attention-dropout": 0,
    "--hidden-dropout": 0,
}
VOCABULARY = 128_256


def call(
    size: str, *arguments: str, script: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Call a launcher in an environment of its own."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    return subprocess.run(
        [script or str(EXAMPLES / f"train_llama_{size}.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )


def printed(size: str, *arguments: str, **variables: str) -> list[str]:
    """The words of the command that a dry run prints, without the memory estimate."""
    result = call(size, "--dry-run", *arguments, MECO_PYTHON="/bin/true", **variables)
    assert result.returncode == 0, result.stderr
    return split(result.stdout)


def split(command: str) -> list[str]:
    """The words of a command, as a shell would split it."""
    # shlex takes an escaped end of line for a character.
    return shlex.split(command.replace("\\\n", " "))


def value(words: list[str], flag: str) -> str:
    """What follows a flag the last time it is given, as argparse reads it."""
    return words[len(words) - words[::-1].index(flag)]


def number(words: list[str], flag: str) -> float:
    return float(value(words, flag))


@pytest.mark.parametrize("size", SIZES)
def test_the_printed_configuration_is_the_papers(size: str) -> None:
    words = printed(size)
    flags = ("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads")
    shape = [number(words, f"--{flag}") for flag in (*flags, "num-query-groups")]
    assert shape == list(MODELS[size][:5])
    recipe = ("lr", "min-lr", "weight-decay", "train-iters", "meco-cooldown-fraction")
    assert [number(words, f"--{flag}") for flag in recipe] == list(RECIPES[size])
    assert {flag: number(words, flag) for flag in EVERY_SIZE} == EVERY_SIZE
    assert value(words, "--lr-decay-style") == "cosine"
    assert value(words, "--optimizer") == "adam"
    assert value(words, "--meco-template") == r"URL: {url.host}\n\n"
    assert value(words, "--meco-packing") == "truncate"
    for flag in ("swiglu", "untie-embeddings-and-output-weights", "disable-bias-linear", "bf16"):
        assert f"--{flag}" in words
    assert value(words, "--normalization") == "RMSNorm"
    assert value(words, "--position-embedding-type") == "rope"
    assert "--use-rope-scaling" not in words


@pytest.mark.parametrize("size", SIZES)
def test_the_flags_give_the_papers_parameter_counts(size: str) -> None:
    words = printed(size)
    layers, hidden, ffn, heads, groups = (
        int(value(words, f"--{flag}"))
        for flag in (
            "num-layers",
            "hidden-size",
            "ffn-hidden-size",
            "num-attention-heads",
            "num-query-groups",
        )
    )
    head = hidden // heads
    attention = hidden * heads * head + 2 * hidden * groups * head + heads * head * hidden
    body = layers * (attention + 3 * hidden * ffn + 2 * hidden) + hidden
    assert (round(body / 1e6), round((body + 2 * VOCABULARY * hidden) / 1e6)) == MODELS[size][5:]


def test_the_learning_rate_at_the_switch_is_the_papers() -> None:
    """Paper: 12.4 % of the peak after 36,000 of 40,000 steps, 2,000 of them warm-up."""
    from unittest.mock import MagicMock

    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    words = printed("1.6b")
    steps = int(value(words, "--train-iters"))
    warmup = int(steps * number(words, "--lr-warmup-fraction"))
    optimizer = MagicMock(param_groups=[{}])
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=number(words, "--lr"),
        min_lr=number(words, "--min-lr"),
        lr_warmup_steps=warmup,
        lr_decay_steps=steps,
        lr_decay_style=value(words, "--lr-decay-style"),
        start_wd=0.033,
        end_wd=0.033,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )
    rates = {}
    for done in (2000, 36_000, 40_000):
        scheduler.num_steps = done
        rates[done] = scheduler.get_lr({"max_lr": 3e-3, "min_lr": 3e-4})
    assert rates == {
        2000: pytest.approx(3e-3),
        36_000: pytest.approx(3.73e-4, rel=2e-3),
        40_000: pytest.approx(3e-4),
    }


@pytest.mark.parametrize("size", SIZES)
def test_the_baseline_differs_in_template_and_output_alone(size: str) -> None:
    meco, baseline = printed(size), printed(size, MECO_CONDITIONING="0")
    differing = {
        (before, a, b) for before, a, b in zip(["", *meco], meco, baseline, strict=False) if a != b
    }
    name = f"runs/llama-{size}"
    assert len(meco) == len(baseline)
    assert differing == {
        ("--meco-template", r"URL: {url.host}\n\n", ""),
        ("--save", f"{name}-meco/checkpoints", f"{name}-baseline/checkpoints"),
        ("--load", f"{name}-meco/checkpoints", f"{name}-baseline/checkpoints"),
        ("--tensorboard-dir", f"{name}-meco/tensorboard", f"{name}-baseline/tensorboard"),
    }


def test_the_variant_for_32k_is_the_8b_model_with_context_parallelism() -> None:
    """As many tokens in a step, and on each rank, as the paper's 8B model has."""
    long, paper = printed("8b_32k"), printed("8b")
    assert (number(long, "--seq-length"), number(long, "--context-parallel-size")) == (32768, 4)
    assert number(long, "--max-position-embeddings") == 32768
    assert number(long, "--rotary-base") == 4 * number(paper, "--rotary-base")
    assert (
        number(long, "--global-batch-size") * 32768 == number(paper, "--global-batch-size") * 8192
    )
    assert "--calculate-per-token-loss" in long
    for flag in ("num-layers", "hidden-size", "num-query-groups", "lr", "weight-decay"):
        assert value(long, f"--{flag}") == value(paper, f"--{flag}")
    assert value(long, "--train-iters") == value(paper, "--train-iters")
    result = call("8b_32k", "--dry-run", MECO_PYTHON="/bin/true", GPUS_PER_NODE="4")
    assert "MECO_CP=4: NNODES * GPUS_PER_NODE = 4 GPUs are not a multiple" in result.stderr


def test_variables_make_the_layout() -> None:
    words = printed(
        "3b",
        *("--", "--lr", "1e-3"),
        NNODES="4",
        NODE_RANK="3",
        MECO_TP="4",
        MECO_FP8="1",
        MECO_DATA_PATH="0.3 data/a 0.7 data/b",
        MECO_COOLDOWN_DATA_PATH="data/c",
    )
    assert (value(words, "--nnodes"), value(words, "--node-rank")) == ("4", "3")
    assert "--sequence-parallel" in words
    # The vocabulary is padded to the same multiple in every layout.
    assert value(words, "--make-vocab-size-divisible-by") == "32"
    assert value(words, "--fp8-format") == "hybrid"
    data = words.index("--data-path")
    assert words[data + 1 : data + 5] == ["0.3", "data/a", "0.7", "data/b"]
    assert value(words, "--meco-cooldown-data-path") == "data/c"
    assert words[-2:] == ["--lr", "1e-3"]
    own = printed("3b", MECO_TRAIN_SCRIPT="mine/train.py")
    assert own[own.index("--master-port") + 2] == "mine/train.py"
    plain = printed("3b")
    assert plain[plain.index("--master-port") + 2].endswith("examples/pretrain_gpt.py")
    for flag in ("--sequence-parallel", "--fp8-format", "--meco-cooldown-data-path"):
        assert flag not in plain
    for flag in (
        "--use-distributed-optimizer",
        "--overlap-grad-reduce",
        "--overlap-param-gather",
        "--calculate-per-token-loss",
        "--tensorboard-dir",
    ):
        assert flag in plain
    assert value(plain, "--transformer-impl") == "transformer_engine"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MECO_NUM_LAYERS": "24.5"}, "MECO_NUM_LAYERS=24.5: not a whole number above 0"),
        ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0: not a whole number above 0"),
        ({"MECO_NUM_WORKERS": "-1"}, "MECO_NUM_WORKERS=-1: not a whole number"),
        ({"MECO_LR": "3,e-3"}, "MECO_LR=3,e-3: not a number"),
        ({"MECO_MIN_LR": "none"}, "MECO_MIN_LR=none: not a number"),
        ({"MECO_CONDITIONING": "yes"}, "MECO_CONDITIONING=yes: neither 0 nor 1"),
        (
            {"MECO_TRANSFORMER_IMPL": "te"},
            "MECO_TRANSFORMER_IMPL=te: give transformer_engine or local",
        ),
        ({"MECO_FP8": "1", "MECO_TRANSFORMER_IMPL": "local"}, "MECO_FP8=1 needs"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2: there are NNODES=2, counted from 0"),
        ({"MECO_TP": "3"}, "MECO_TP=3: MECO_NUM_QUERY_GROUPS=8"),
        ({"MECO_TP": "8", "GPUS_PER_NODE": "4"}, "4 GPUs are not a multiple of MECO_TP * MECO_PP"),
        ({"MECO_PP": "5"}, "MECO_PP=5: MECO_NUM_LAYERS=24 is not a multiple of it"),
        ({"MECO_GLOBAL_BATCH_SIZE": "500"}, "MECO_GLOBAL_BATCH_SIZE=500: not a multiple of 8"),
        (
            {"MECO_HIDDEN_SIZE": "2050"},
            "MECO_HIDDEN_SIZE=2050: not a multiple of MECO_NUM_ATTENTION_HEADS=16",
        ),
        ({"MECO_DATA_PATH": " "}, "MECO_DATA_PATH is blank"),
    ],
)
def test_bad_values_are_refused_in_one_line(variables: dict[str, str], message: str) -> None:
    result = call("1.6b", "--dry-run", MECO_PYTHON="/bin/true", **variables)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("train_llama_1.6b.sh: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SEED": "7"}, "SEED=7 is not read: the name is MECO_SEED. Set that, or unset SEED."),
        ({"NUM_LAYERS": "3"}, "NUM_LAYERS=3 is not read: the name is MECO_NUM_LAYERS."),
        ({"OUTPUT": ""}, "OUTPUT= is not read: the name is MECO_OUTPUT."),
        ({"MECO": "0"}, "MECO=0 is not read: the name is MECO_CONDITIONING."),
        ({"MECO_SEQLENGTH": "4096"}, "MECO_SEQLENGTH: unknown variable."),
    ],
)
def test_a_variable_that_would_have_no_effect_stops(
    variables: dict[str, str], message: str
) -> None:
    result = call("1.6b", "--dry-run", MECO_PYTHON="/bin/true", **variables)
    assert (result.returncode, result.stdout) == (1, "")
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_variables_of_other_programs_change_nothing() -> None:
    """Of the earlier names, one that is taken for another purpose gives way to ours."""
    expected = printed("1.6b", MECO_SEED="5", MECO_CONDITIONING="0")
    others = {"MECO": "/opt/meco", "SEED": "7", "SIZE": "9", "MECO_ROOT": "/x"}
    assert printed("1.6b", MECO_SEED="5", MECO_CONDITIONING="0", **others) == expected


def test_arguments_and_help() -> None:
    result = call("8b", "--lr", "1")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "--lr: unknown argument" in result.stderr
    text = call("8b", "--help").stdout
    assert "MECO_CONDITIONING=1" in text
    # Every variable that has a default is in the help.
    source = (EXAMPLES / "train_llama.sh").read_text(encoding="utf-8")
    names = {part.split(":=")[0] for part in source.split('"${')[1:] if ":=" in part.split("}")[0]}
    names |= {f"MECO_{name}" for name in source.partition("variables=(")[2].split(")")[0].split()}
    assert len(names) > 25
    assert {name for name in names if name not in text} == set()


@pytest.mark.parametrize("size", (*SIZES, "8b_32k"))
def test_meco_train_has_the_same_flags(size: str, tmp_path: Path) -> None:
    """Both read one table; what follows from the numbers is worked out twice."""
    from megatron_meco.run.run_file import read_run

    variables = {"MECO_TP": "2", "MECO_LR": "1e-3", "MECO_TRAIN_ITERS": "100"}
    run = tmp_path / "run.yaml"
    model = f"llama-{size.replace('_', '-')}"
    run.write_text(
        f"model: {model}\ntensor-model-parallel-size: 2\nlr: 1e-3\ntrain-iters: 100\n"
        "data-path: data/dclm\ndata-cache-path: runs/cache\n"
        "tokenizer-model: data/llama3-tokenizer\n"
        f"save: runs/{model}-meco/checkpoints\n"
        f"tensorboard-dir: runs/{model}-meco/tensorboard\n"
    )

    def by_flag(words: list[str]) -> dict[str, str]:
        flags: dict[str, list[str]] = {}
        for word in words:
            if word.startswith("--"):
                flags[word] = found = []
            else:
                found.append(word)
        return {flag: " ".join(values) for flag, values in flags.items()}

    words = printed(size, **variables)
    first = next(i for i, word in enumerate(words) if word.endswith("pretrain_gpt.py")) + 1
    shell = by_flag(words[first : words.index("--sequence-parallel") + 1])
    assert by_flag(read_run(run).flags()) == shell


def test_memory_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and state against arithmetic: bf16 weights, float32 gradients, Adam over DP."""
    from examples import estimate_memory

    for size, gpus, data_parallel in (("600m", 8, 8), ("1.6b", 32, 32), ("8b", 8, 4)):
        words = printed(size)
        flags = words[words.index("--num-layers") :]
        monkeypatch.setattr("sys.argv", list(words))
        found = estimate_memory.estimate(gpus, VOCABULARY, flags)
        assert round(found.parameters / 1e6) == MODELS[size][6]
        tensor_parallel = gpus // data_parallel
        state = found.parameters / tensor_parallel * (6 + 12 / data_parallel)
        assert found.state_bytes == pytest.approx(state, rel=1e-3)
        # The layouts are meant for 80 GB.
        assert (found.state_bytes + found.activation_bytes) < 65 * estimate_memory.GIB
    # Ranks that share a sequence share its activations, and the optimizer's state.
    words = printed("8b")
    flags = words[words.index("--num-layers") :]
    alone, shared = (
        estimate_memory.estimate(16, VOCABULARY, [*flags, "--context-parallel-size", ranks])
        for ranks in ("1", "4")
    )
    assert shared.parameters == alone.parameters
    assert shared.state_bytes == alone.state_bytes
    assert shared.activation_bytes == pytest.approx(alone.activation_bytes / 4, rel=1e-3)
    with pytest.raises(SystemExit):
        estimate_memory.estimate(8, VOCABULARY, [*flags, "--no-such-flag"])


def test_megatron_accepts_the_flags_of_every_layout(corpus: str, tokenizer_folder: Path) -> None:
    """Its own validation, for 8 and 32 GPUs, bf16 and FP8."""
    variables = {"MECO_DATA_PATH": corpus, "MECO_TOKENIZER_MODEL": str(tokenizer_folder)}
    runs, expected = [], []
    for size in SIZES:
        for nodes, fp8 in (("1", "0"), ("4", "1")):
            words = printed(size, NNODES=nodes, MECO_FP8=fp8, **variables)
            runs.append((8 * int(nodes), words[words.index("--num-layers") :]))
            tensor_parallel = 2 if size == "8b" else 1
            expected.append(
                {
                    "data_parallel_size": str(8 * int(nodes) // tensor_parallel),
                    "params_dtype": "torch.bfloat16",
                    # Its kernel is apex's, which is not there.
                    "gradient_accumulation_fusion": "False",
                    "sequence_parallel": str(size == "8b"),
                    "fp8": "hybrid" if fp8 == "1" else "None",
                    "transformer_impl": "transformer_engine",
                }
            )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).parent / "validated_flags.py")],
        input=json.dumps(runs),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("validated:")]
    assert [json.loads(line.removeprefix("validated:")) for line in lines] == expected


def test_slurm_starts_one_launcher_on_each_node(tmp_path: Path) -> None:
    # srun: one task for each node, as Slurm would, one after the other.
    (tmp_path / "srun").write_text(
        "#!/usr/bin/env bash\n"
        "[[ $1 == --kill-on-bad-exit=1 && $2 == --mem=0 ]] || exit 9\nshift 2\n"
        'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n'
    )
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node7\\nnode9\\n'\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    job = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[7,9]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "MECO_SRUN_ARGS": "--mem=0",
        "MECO_PYTHON": "/bin/true",
    }
    script = str(EXAMPLES / "slurm" / "train_llama.sbatch")
    result = call("", "1.6b", "--dry-run", script=script, **job)
    assert result.returncode == 0, result.stderr
    ranks = [split(part) for part in result.stdout.split("/bin/true")[1:]]
    assert [value(words, "--node-rank") for words in ranks] == ["0", "1"]
    for words in ranks:
        assert value(words, "--nnodes") == "2"
        assert value(words, "--nproc-per-node") == "4"
        assert value(words, "--master-addr") == "node7"
        assert value(words, "--master-port") == "23456"
    unknown = call("", "7b", script=script, **job)
    assert unknown.returncode == 1
    assert "train_llama_7b.sh: no such file" in unknown.stderr
    renamed = call("", "1.6b", script=script, SRUN_ARGS="x", **job | {"MECO_SRUN_ARGS": ""})
    assert "SRUN_ARGS=x is not read: the name is MECO_SRUN_ARGS" in renamed.stderr
    outside = call("", "1.6b", script=script)
    assert "not inside a Slurm job" in outside.stderr


TOY = {
    "MECO_HIDDEN_SIZE": "32",
    "MECO_FFN_HIDDEN_SIZE": "64",
    "MECO_NUM_ATTENTION_HEADS": "4",
    "MECO_NUM_QUERY_GROUPS": "2",
    "MECO_NUM_LAYERS": "2",
    "MECO_SEQ_LENGTH": "64",
    "MECO_GLOBAL_BATCH_SIZE": "4",
    "MECO_TRAIN_ITERS": "5",
    "MECO_COOLDOWN_FRACTION": "0.4",
    "MECO_SPLIT": "80,20,0",
    "MECO_EVAL_INTERVAL": "5",
    "MECO_EVAL_ITERS": "2",
    "MECO_SAVE_INTERVAL": "5",
    "MECO_LOG_INTERVAL": "1",
    "MECO_NUM_WORKERS": "0",
    # The one kernel choice that a CPU cannot follow.
    "MECO_TRANSFORMER_IMPL": "local",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


# 8b has two tensor-parallel ranks by default, and so runs sequence parallel.
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "ranks", "meco"),
    [
        pytest.param("600m", 1, "0", marks=pytest.mark.slow),
        ("1.6b", 1, "1"),
        pytest.param("3b", 2, "1", marks=pytest.mark.slow),
        pytest.param("8b", 2, "1", marks=pytest.mark.slow),
    ],
)
def test_a_launcher_trains_at_toy_size(
    size: str, ranks: int, meco: str, corpus: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    variables = TOY | {
        "MECO_CONDITIONING": meco,
        "MECO_DATA_PATH": corpus,
        "MECO_TOKENIZER_MODEL": str(tokenizer_folder),
        "MECO_DATA_CACHE": str(tmp_path / "cache"),
        "MECO_OUTPUT": str(tmp_path / "run"),
        "GPUS_PER_NODE": str(ranks),
        "MASTER_PORT": str(free_port()),
    }
    done = call(size, **variables)
    result = Result.read(done.returncode, done.stdout + done.stderr)
    assert result.status == 0, result.log[-3000:]
    assert sorted(result.losses) == [1, 2, 3, 4, 5]
    assert float(result.losses[5]) < float(result.losses[1])
    named = ("conditioned", "shuffled", "shuffled minus conditioned") if meco == "1" else ()
    assert set(result.validation[5]) == {"lm loss plain", *(f"lm loss {name}" for name in named)}
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").glob("iter_*")}
    assert saved == {"iter_0000003", "iter_0000005"}
    assert list((tmp_path / "run" / "tensorboard").iterdir())
