"""The demo's command lines: what is trained, on what, and with which flags.

`Recipe` turns an output folder and a length into commands and does nothing else, so that `run.py`
reads as the list of its steps. Paths are written as one types them in the repository root. Given
up: a choice of models; `commands.sh` in the output folder is there to be edited.
"""

from __future__ import annotations

import shlex
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path("examples/local_demo")

VOCABULARY = 2048
SEQUENCE_LENGTH = 512
TEMPLATE = r"URL: {url.host}\n\n"

# 1.1 million parameters. A larger model learns less in the same minutes.
MODEL = shlex.split(
    "--num-layers 3 --hidden-size 128 --ffn-hidden-size 352 --num-attention-heads 4 "
    "--position-embedding-type rope --swiglu "
    "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0"
)
OPTIMIZER = shlex.split(
    "--lr 4e-3 --min-lr 4e-4 --lr-decay-style cosine --lr-warmup-fraction 0.05 "
    "--adam-beta2 0.95 --weight-decay 0.1"
)
BATCH_SIZE = 4
# Each view - right, wrong, no URL - has a third of them.
EVALUATION_BATCHES = 36
# The texts that are judged: so many under each URL, and as many under none.
SAMPLES = 100
SAMPLE_TOKENS = 96


class Recipe:
    """Builds the commands.

    Args:
        output: The folder for everything.
        iterations: Training steps of a run, a multiple of ten.
        seed: Of the order of documents, the initial weights and the samples; above 0.
    """

    def __init__(self, output: Path, iterations: int, seed: int = 1234) -> None:
        assert iterations % 10 == 0, "the switch must fall between two iterations"
        self.output = output
        self.iterations = iterations
        self.seed = seed
        self.switch = 9 * iterations // 10

    def path(self, name: str) -> str:
        """Return a path in the output folder as commands name it."""
        return shown(self.output / name)

    def collect(self) -> list[str]:
        """Return the command that collects the corpus."""
        command = [*python(), str(HERE / "collect_corpus.py")]
        command += ["--output", self.path("corpus.jsonl")]
        return [*command, "--held-out", self.path("held-out.jsonl")]

    def tokenizer(self) -> list[str]:
        """Return the command that trains the tokenizer."""
        command = [*python(), str(HERE / "train_tokenizer.py")]
        command += [self.path("corpus.jsonl"), self.path("tokenizer")]
        return [*command, "--vocab-size", str(VOCABULARY)]

    def prepare(self) -> list[str]:
        """Return the command that tokenises the corpus."""
        command = [*meco("prepare"), self.path("corpus.jsonl"), "--metadata-fields", "url"]
        return [*command, "--output", self.path("data/corpus"), *self._tokenizer_flags()]

    def plan(self) -> list[str]:
        """Return the command that shows what will be trained on."""
        return [*meco("plan"), *self._data_flags(), "--meco-template", TEMPLATE]

    def inspect(self, sample: int) -> list[str]:
        """Return the command that shows a training sequence."""
        command = [*meco("inspect"), *self._data_flags(), "--meco-template", TEMPLATE]
        return [*command, "--sample", str(sample)]

    def train(self, name: str, template: str) -> list[str]:
        """Return the command that trains a model.

        Args:
            name: Its folder in the output folder.
            template: What precedes each document; empty for the baseline.
        """
        # The baseline has one validation loss where MeCo has three, on the same packs.
        batches = EVALUATION_BATCHES if template else EVALUATION_BATCHES // 3
        return [
            *torchrun(),
            "examples/pretrain_gpt.py",
            *MODEL,
            *("--max-position-embeddings", str(SEQUENCE_LENGTH)),
            *OPTIMIZER,
            *("--micro-batch-size", str(BATCH_SIZE)),
            *self._data_flags(batches),
            *("--meco", "--meco-template", template),
            *("--log-interval", "1", "--num-workers", "0"),
            *("--save", self.path(f"{name}/checkpoints")),
            *("--save-interval", str(self.iterations)),
            *("--tensorboard-dir", self.path(f"{name}/tensorboard")),
        ]

    def export(self, run: str, iteration: int) -> list[str]:
        """Return the command that writes a checkpoint for Hugging Face.

        Args:
            run: Folder of the run in the output folder.
            iteration: Training steps before the checkpoint.
        """
        command = [*meco("export"), "--load", self.path(f"{run}/checkpoints")]
        command += ["--iteration", str(iteration)]
        return [*command, "--output", self.model(run, iteration)]

    def model(self, run: str, iteration: int) -> str:
        """Return the folder of an exported checkpoint."""
        return self.path(f"models/{run}-{iteration}")

    def steer(self, run: str, iteration: int, hosts: list[str]) -> list[str]:
        """Return the command that samples under each host's URL and under none.

        The template is spelled out: the baseline has none of its own.
        """
        command = [*meco("steer"), "--model", self.model(run, iteration), "--template", TEMPLATE]
        for host in hosts:
            command += ["--metadata", f"url={url_of(host)}"]
        command += ["--num-samples", str(SAMPLES), "--max-new-tokens", str(SAMPLE_TOKENS)]
        command += ["--batch-size", str(SAMPLES), "--seed", str(self.seed)]
        return [*command, "--output", self.path(f"samples/{run}-{iteration}")]

    def judge(self) -> list[str]:
        """Return the command that classifies the samples and prints the result."""
        samples = {
            "conditioned": f"samples/meco-{self.switch}",
            "cooled-down": f"samples/meco-{self.iterations}",
            "baseline": f"samples/baseline-{self.iterations}",
        }
        command = [*python(), str(HERE / "steering.py"), self.path("held-out.jsonl")]
        command += [f"{name}={self.path(folder)}" for name, folder in samples.items()]
        return [*command, "--output", self.path("steering.json")]

    def generate(self, hosts: list[str], prompt: str) -> list[str]:
        """Return the command that continues a prompt under no URL and under several."""
        command = [*meco("generate"), "--model", self.model("meco", self.iterations)]
        for host in hosts:
            command += ["--metadata", f"url={url_of(host)}"]
        return [*command, "--prompt", prompt, "--max-new-tokens", "40"]

    def plot(self, meco_log: Path, baseline_log: Path) -> list[str]:
        """Return the command that draws the losses."""
        command = [*python(), str(HERE / "plots.py"), shown(meco_log), shown(baseline_log)]
        return [*command, "--output", self.path("losses.png")]

    def page(self, meco_log: Path, baseline_log: Path) -> list[str]:
        """Return the command that writes an HTML page about corpus, packs, losses and models."""
        command = [*meco("show"), "--log", f"meco={shown(meco_log)}"]
        command += ["--log", f"baseline={shown(baseline_log)}"]
        for name, run, iteration in (
            ("cooled-down", "meco", self.iterations),
            ("conditioned", "meco", self.switch),
            ("baseline", "baseline", self.iterations),
        ):
            command += ["--model", f"{name}={self.model(run, iteration)}"]
        command += ["--sampling-seed", str(self.seed), "--output", self.path("show.html")]
        return [*command, *self._data_flags(), "--meco-template", TEMPLATE]

    def doctor(self) -> list[str]:
        """Return the command that checks the installation."""
        return meco("doctor")

    def tensorboard(self) -> list[str]:
        """Return the command that shows both runs in a browser."""
        return [*tool("tensorboard", "tensorboard.main"), "--logdir", shown(self.output)]

    def _data_flags(self, evaluation_batches: int = EVALUATION_BATCHES) -> list[str]:
        """The flags that decide samples: the same for plan, inspect and training."""
        return [
            *("--data-path", self.path("data/corpus")),
            *("--split", "94,6,0"),
            *("--data-cache-path", self.path("cache")),
            *self._tokenizer_flags(),
            *("--seq-length", str(SEQUENCE_LENGTH)),
            *("--global-batch-size", str(BATCH_SIZE)),
            *("--train-iters", str(self.iterations)),
            *("--seed", str(self.seed)),
            # The third of these evaluations falls on the switch; Megatron adds one at the end.
            *("--eval-interval", str(self.switch // 3)),
            *("--eval-iters", str(evaluation_batches)),
        ]

    def _tokenizer_flags(self) -> list[str]:
        name = self.path("tokenizer")
        return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", name]


def url_of(host: str) -> str:
    """Return a URL of a host; the template uses nothing else of it."""
    return f"https://{host}/"


def shown(path: Path) -> str:
    """Return a path as one types it in the repository root."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def python() -> list[str]:
    """Return the command of this interpreter."""
    return [shown(Path(sys.executable))]


def meco(command: str) -> list[str]:
    """Return the beginning of a `meco` command."""
    return [*tool("meco", "megatron_meco"), command]


def torchrun() -> list[str]:
    """Return Megatron's launcher for one process, with a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = tool("torchrun", "torch.distributed.run")
    return [*command, "--nproc-per-node", "1", "--master-port", port]


def tool(name: str, module: str) -> list[str]:
    """Return a program of this environment, or the same as a module where there is none."""
    program = Path(sys.executable).with_name(name)
    return [shown(program)] if program.exists() else [*python(), "-m", module]
