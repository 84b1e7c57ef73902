"""Real training runs for tests: a small corpus, the example script under torchrun, its log read."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "pretrain_gpt.py"
# A host may have its packages there as well.
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SEQ_LENGTH = 64

MODEL = """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --position-embedding-type rope --swiglu
    --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0
"""
RUN = f"""
    --seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH} --micro-batch-size 1
    --global-batch-size 4 --train-iters 10 --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine
    --split 80,20,0 --log-interval 1 --eval-interval 5 --eval-iters 2 --num-workers 0 --seed 7
"""


def train_bpe(text: str) -> Tokenizer:
    """A byte-level BPE of 300 tokens, BOS 0 and EOS 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 20, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **config: str) -> Path:
    """Write a tokenizer as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of 300 tokens, as a Hugging Face folder with BOS and EOS."""
    tokenizer = train_bpe("the quick brown fox and the lazy dog")
    return save_tokenizer(tokenizer, folder, bos_token=BOS, eos_token=EOS)


def write_pages(path: Path, num_documents: int = 300) -> Path:
    """JSONL of short pages whose words depend on their host."""
    draw = random.Random(3)
    words = {
        "animals.example.org": ["fox", "dog", "cat", "horse", "cow"],
        "www.colours.example.com": ["red", "green", "blue", "brown", "white"],
        "numbers.example.net": ["one", "two", "three", "four", "five"],
    }
    with path.open("w") as file:
        for i in range(num_documents):
            host = draw.choice(list(words))
            length = max(3, int(draw.lognormvariate(2.5, 0.8)))
            text = " ".join(draw.choice(words[host]) for _ in range(length))
            file.write(json.dumps({"text": text, "url": f"https://{host}/{i}"}) + "\n")
    return path


def prepare_pages(folder: Path, tokenizer: Path, num_documents: int = 300) -> str:
    """Write pages and prepare them by `meco prepare`'s own function; returns the corpus."""
    # Here: collecting tests stays fast.
    from megatron_meco.corpus.prepare import PrepareConfig, prepare

    prepare(
        PrepareConfig(
            inputs=(write_pages(folder / "pages.jsonl", num_documents),),
            output=folder / "pages",
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(tokenizer),
        )
    )
    return str(folder / "pages")


def write_gpu_libraries(folder: Path) -> Path:
    """Transformer Engine and apex as they look installed, in a state that no import survives."""
    error = 'raise RuntimeError("{} used on a CPU")\n'
    for name, content in {
        "transformer_engine/__init__.py": "__version__ = '2.20.2'\n",
        "transformer_engine/pytorch/__init__.py": error.format("Transformer Engine"),
        "transformer_engine-2.20.2.dist-info/METADATA": (
            "Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.20.2\n"
        ),
        "apex/__init__.py": "",
        "apex/optimizers/__init__.py": error.format("apex"),
        "apex/multi_tensor_apply/__init__.py": error.format("apex"),
        "apex/normalization/__init__.py": error.format("apex"),
        "amp_C.py": "",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@dataclass
class Result:
    """What a run printed."""

    status: int
    log: str
    losses: dict[int, str] = field(default_factory=dict)
    samples: dict[int, tuple[str, str]] = field(default_factory=dict)
    validation: dict[int, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, status: int, log: str) -> Result:
        """Losses are kept as printed, so that equal means equal to the last digit shown."""
        result = cls(status, log)
        for match in re.finditer(r"iteration +(\d+)/ +\d+ \|.*?lm loss: (\S+) ", log):
            result.losses[int(match[1])] = match[2]
        # What of a step depends on its samples alone: share of prefix tokens, trained tokens.
        pattern = r"iteration +(\d+)/ .*?prefix share: (\S+) \| trained tokens: (\S+) "
        for match in re.finditer(pattern, log):
            result.samples[int(match[1])] = (match[2], match[3])
        for match in re.finditer(r"validation loss at iteration (\d+) \|(.*)", log):
            values = re.findall(r"(lm loss[a-z ]*) value: (\S+) ", match[2])
            result.validation[int(match[1])] = {name.strip(): value for name, value in values}
        return result


def _torchrun(command: list[str], ranks: int, nodes: tuple[int, int, int] | None) -> list[str]:
    """`command` under torchrun; `nodes`: (number of nodes, this one's rank, port)."""
    count, node_rank, port = nodes or (1, 0, free_port())
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={count}",
        f"--node-rank={node_rank}",
        f"--nproc-per-node={ranks}",
        "--master-addr=127.0.0.1",
        f"--master-port={port}",
        *command,
    ]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    command: list[str], ranks: int, nodes: tuple[int, int, int] | None = None, **variables: str
) -> subprocess.Popen[str]:
    """Start a script under torchrun, its output in one pipe."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, **variables}
    return subprocess.Popen(
        _torchrun(command, ranks, nodes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def launch(command: list[str], ranks: int, timeout: int = 240, **variables: str) -> Result:
    """Run a script under torchrun and wait; its output comes back whatever happens."""
    process = start(command, ranks, **variables)
    try:
        log, _ = process.communicate(timeout=timeout)
    finally:
        # torchrun ends its ranks, which are in sessions of their own, when it is asked to.
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        process.kill()
    return Result.read(process.returncode, log)


def kill_at(command: list[str], ranks: int, text: str, **variables: str) -> Result:
    """Run a script under torchrun and SIGKILL every process of it once its log holds `text`."""
    mark = f"MECO_TEST_RUN={os.getpid()}-{time.monotonic_ns()}"
    process = start(command, ranks, **dict([mark.split("=")]), **variables)
    assert process.stdout is not None
    log = ""
    for line in process.stdout:
        log += line
        if text in line:
            break
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
    log += process.stdout.read()
    process.wait()
    assert text in log, log[-3000:]
    return Result.read(process.returncode, log)


def report_of(script: Path, *arguments: object) -> Any:
    """Run a script that prints JSON on its last line."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def command(corpus: str, tokenizer: Path, *flags: str, script: Path = SCRIPT) -> list[str]:
    """The example script on a corpus; later flags win over the defaults above."""
    data = ["--data-path", corpus, "--tokenizer-type", "HuggingFaceTokenizer"]
    data += ["--tokenizer-model", str(tokenizer)]
    return [str(script), *MODEL.split(), *RUN.split(), *data, *flags]


def train(
    corpus: str, tokenizer: Path, *flags: str, ranks: int = 1, script: Path = SCRIPT
) -> Result:
    """Run the example script on a corpus; later flags win over the defaults above."""
    return launch(command(corpus, tokenizer, *flags, script=script), ranks)
