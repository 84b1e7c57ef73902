"""Tokens per second of a training step on the CPU: the real trainer against a plain PyTorch loop.

Both train the same Llama (`plain_loop.py`) on the same packs with the same number of threads, in
alternating rounds, each in a process of its own. Times are processor seconds of the steps alone,
without start-up, evaluation and checkpoints.

    python benchmarks/bench_cpu_step.py --size demo
    python benchmarks/bench_cpu_step.py --size study
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WARM_UP = 10


def sizes() -> dict[str, Any]:
    """The models of the demo and of the study."""
    from plain_loop import Size

    demo = Size(layers=3, hidden=128, ffn=352, heads=4, vocabulary=2048, length=256, batch=8)
    study = Size(layers=2, hidden=64, ffn=176, heads=4, vocabulary=512, length=64, batch=4)
    return {"demo": demo, "study": study}


def write_corpus(folder: Path, num_ids: int) -> None:
    """A byte-level BPE tokenizer, and 6,000 prepared pages of random words."""
    from megatron_meco.corpus.train_tokenizer import train_tokenizer

    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(4000)]
    pages = []
    for number in range(6000):
        length = max(5, min(400, int(draw.lognormvariate(3.5, 1))))
        url = f"https://host{number % 50}.example.org/{number}"
        pages.append({"text": " ".join(draw.choices(words, k=length)), "url": url})
    (folder / "pages.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
    train_tokenizer([folder / "pages.jsonl"], folder / "tokenizer", num_ids)
    meco = ["prepare", "pages.jsonl", "--output", "pages"]
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "tokenizer"]
    command = [sys.executable, "-m", "megatron_meco", *meco, *flags]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=environment())


def environment(threads: int = 1) -> dict[str, str]:
    """The environment of a process of one rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    counts = {"OMP_NUM_THREADS": str(threads), "MASTER_PORT": str(port)}
    return {**os.environ, **launched, **paths, **counts}


def trainer_flags(size: Any, folder: Path, steps: int) -> list[str]:
    """The flags of `examples/pretrain_gpt.py`."""
    model = (
        f"--num-layers {size.layers} --hidden-size {size.hidden} --ffn-hidden-size {size.ffn} "
        f"--num-attention-heads {size.heads} --position-embedding-type rope --swiglu "
        "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights "
        f"--attention-dropout 0 --hidden-dropout 0 --seq-length {size.length} "
        f"--max-position-embeddings {size.length} --micro-batch-size {size.batch} "
        f"--global-batch-size {size.batch} --make-vocab-size-divisible-by {size.vocabulary}"
    )
    run = (
        f"--train-iters {steps} --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --split 100,0,0 "
        "--log-interval 10 --eval-interval 100000 --eval-iters 0 --num-workers 0 --seed 7 --meco "
        f"--meco-cooldown-fraction 0 --data-path {folder}/pages --data-cache-path {folder}/cache "
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}/tokenizer"
    )
    return [*model.split(), *run.split()]


def trainer(size: Any, folder: Path, steps: int) -> None:
    """Run the example script in this process; print seconds per step."""
    sys.argv = ["pretrain_gpt.py", *trainer_flags(size, folder, steps + WARM_UP)]
    from megatron_meco.training import arguments

    stock = arguments.parse_and_validate_args

    def parse(*args: Any, **options: Any) -> Any:
        parsed = stock(*args, **options)
        from megatron_meco.training import provider

        step = provider.forward_step

        def timed(iterator: Any, model: Any, *rest: Any) -> Any:
            if provider.get_args().curr_iteration == WARM_UP and "begin" not in marks:
                marks["begin"] = time.process_time()
            marks["steps"] = provider.get_args().curr_iteration
            return step(iterator, model, *rest)

        provider.forward_step = timed
        return parsed

    marks: dict[str, float] = {}
    arguments.parse_and_validate_args = parse
    runpy.run_path(str(ROOT / "examples/pretrain_gpt.py"), run_name="__main__")
    seconds = (time.process_time() - marks["begin"]) / (marks["steps"] - WARM_UP + 1)
    print(json.dumps({"seconds": seconds}))


def plain(size: Any, folder: Path, steps: int) -> None:
    """Run the plain loop in this process; print seconds per step."""
    from plain_loop import train

    from megatron_meco.config import MeCoConfig
    from megatron_meco.corpus.tokenizer import build_tokenizer
    from megatron_meco.data.dataset import MeCoGPTDatasetConfig, build_datasets
    from megatron_meco.data.phases import Schedule

    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(folder / "tokenizer"))
    number = size.batch * (steps + WARM_UP)
    config = MeCoGPTDatasetConfig(
        random_seed=7,
        sequence_length=size.length,
        blend=([str(folder / "pages")], None),
        split="100,0,0",
        path_to_cache=str(folder / "cache"),
        tokenizer=tokenizer,
        meco=MeCoConfig(cooldown_fraction=0.0),
    )
    iterations = steps + WARM_UP
    schedule = Schedule(
        num_iterations=iterations,
        num_samples=number,
        switch_iteration=iterations,
        switch_sample=number,
    )
    dataset = build_datasets([number, 0, 0], lambda: True, config, schedule)[0]
    samples = (dataset[i] for i in range(number))
    print(json.dumps({"seconds": train(size, samples, steps, WARM_UP)}))


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["demo", "study"], default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", choices=["trainer", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = sizes()[args.size]
    steps = 40 if args.size == "demo" else 300
    if args.child:
        {"trainer": trainer, "plain": plain}[args.child](size, args.folder, steps)
        return
    tokens = size.length * size.batch
    seconds: dict[str, list[float]] = {"trainer": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), size.vocabulary)
        for _ in range(args.rounds):
            for kind, found in seconds.items():
                words = ["--size", args.size, "--child", kind, "--folder", folder]
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", __file__, *words],
                    check=True,
                    capture_output=True,
                    text=True,
                    env=environment(args.threads),
                )
                line = next(x for x in reversed(done.stdout.splitlines()) if x.startswith("{"))
                found.append(json.loads(line)["seconds"])
    ratios = [p / t for p, t in zip(seconds["plain"], seconds["trainer"], strict=True)]
    print(
        json.dumps(
            {
                "size": args.size,
                "tokens_in_a_step": tokens,
                "threads": args.threads,
                "trainer_share_of_plain_tokens_per_second": round(statistics.median(ratios), 3),
                "rounds": [round(ratio, 3) for ratio in ratios],
                "trainer_ms": round(1000 * statistics.median(seconds["trainer"]), 1),
                "plain_ms": round(1000 * statistics.median(seconds["plain"]), 1),
            }
        )
    )


if __name__ == "__main__":
    main()
