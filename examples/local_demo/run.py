"""Watch MeCo happen: `make demo` trains on real text with and without URLs and compares.

Everything is done by commands that are printed before they run, the same as on a cluster. This
script only strings them together (`recipe.py` has their flags). Both runs train side by side, each
on half of the cores, for a fixed number of tokens. At the end a classifier judges whether generated
texts look like the source that their URL names. Needs 300 MB in `demo-output`. A second call trains
again on what the first one collected and prepared.

    python examples/local_demo/run.py --iterations 2400      # longer training runs
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from commands import Command, CommandFailed, Commands, broken, changed
from recipe import BATCH_SIZE, HERE, ROOT, SEQUENCE_LENGTH, TEMPLATE, Recipe, shown
from registers import REGISTERS
from results import comparison, print_comparison
from rich.console import Console
from training_progress import TrainingProgress

from megatron_meco.run.training_log import History
from megatron_meco.run.watch import clock

# 2.5 million tokens. No document is seen twice.
DEFAULT_ITERATIONS = 1200
PROMPT = "The"
LINES_OF_INSPECT = 18


class Demo:
    """The steps of the demo, in order.

    Args:
        output: The folder for everything.
        iterations: Training steps of each run, a multiple of ten.
        seed: Of the training runs and the samples.
        console: The terminal.
    """

    def __init__(self, output: Path, iterations: int, seed: int, console: Console) -> None:
        self.output = output
        self.console = console
        self.recipe = Recipe(output, iterations, seed)
        self.commands = Commands(ROOT, output, console, environment(output))
        self.begin = time.monotonic()
        self.step = 0
        # What rests on something new is made again.
        self.renewed = False
        self.logs: dict[str, Path] = {}

    def run(self) -> None:
        """Do all steps."""
        steps: dict[str, Callable[[], None]] = {
            "Collect real documents from this Python environment": self.collect,
            "Train a tokenizer on them": self.train_tokenizer,
            "Prepare: text becomes tokens and metadata": self.prepare,
            "Plan: what the run will train on": self.plan,
            "Inspect: the first training sequence": self.inspect,
            "Train: MeCo (90 % with URLs, then 10 % without) and a baseline": self.train,
            "Compare the validation losses": self.compare,
            "Draw both losses": self.plot,
            "Export: before the cooldown, after it, and the baseline": self.export,
            "Sample texts under every URL and under none": self.sample,
            "Judge: do the texts look like the source that their URL names?": self.judge,
            "Show: a page about all of it": self.page,
        }
        for self.step, (title, do) in enumerate(steps.items(), start=1):
            left, right = f"{self.step}/{len(steps)}  {title} ", f" {self.elapsed()}"
            rule = "-" * max(3, self.console.width - len(left) - len(right))
            self.console.print(f"\n[bold]{left}[/][cyan]{rule}[/]{right}")
            do()
        self.say_goodbye()

    # ---- Data ----

    def collect(self) -> None:
        """Collect the corpus."""
        if not self.is_there("corpus.jsonl"):
            self.show(self.recipe.collect(), "collect")

    def train_tokenizer(self) -> None:
        """Train the tokenizer."""
        if not self.is_there("tokenizer/special_tokens_map.json"):
            self.show(self.recipe.tokenizer(), "tokenizer")

    def prepare(self) -> None:
        """Tokenise the corpus."""
        if not self.is_there("data/corpus.idx"):
            shutil.rmtree(self.output / "data", ignore_errors=True)
            self.show(self.recipe.prepare(), "prepare")

    # ---- Look ----

    def plan(self) -> None:
        """Show what will be trained on."""
        command = self.recipe.plan()
        as_json = [*command, "--json"]
        with self.commands.background(as_json, self.log("plan-json"), self.output / "plan.json"):
            self.show(command, "plan")

    def inspect(self) -> None:
        """Show the beginning of a training sequence."""
        command = [*self.recipe.inspect(0), "--max-characters", "160"]
        self.show(command, "inspect", LINES_OF_INSPECT)
        whole = shown(self.commands.log_path(self.log("inspect")))
        self.note(f"[...] the first {LINES_OF_INSPECT} lines; all of it: {whole}")

    # ---- Train ----

    def train(self) -> None:
        """Train with metadata, and beside it without, all else equal."""
        # A run must not find the checkpoints of an earlier call.
        for name in ("meco", "baseline", "models", "samples"):
            shutil.rmtree(self.output / name, ignore_errors=True)
        command, other = self.recipe.train("meco", TEMPLATE), self.recipe.train("baseline", "")
        self.commands.print(command)
        self.note("Beside it the baseline, with other values of these flags:")
        self.note(broken(["...", *changed(other, command)], self.console.width))
        self.commands.keep(other)
        self.logs["baseline"] = self.commands.log_path(f"{self.log('baseline')}-output")
        with self.commands.background(other, self.log("baseline"), self.logs["baseline"]):
            with TrainingProgress(self.console, has_prefixes=True) as progress:
                self.logs["meco"] = self.commands.follow(command, self.log("meco"), progress.feed)
            self.note("waiting for the baseline")

    # ---- What came out ----

    def compare(self) -> None:
        """Print the table of validation losses."""
        plan = json.loads((self.output / "plan.json").read_text())
        rows = comparison(*(History.read(self.logs[name]) for name in ("meco", "baseline")))
        print_comparison(self.console, rows, plan)
        results = {"validation": rows, "plan": plan}
        (self.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    def plot(self) -> None:
        """Draw the losses."""
        self.show(self.recipe.plot(self.logs["meco"], self.logs["baseline"]), "plot")

    def export(self) -> None:
        """Export the three checkpoints that are compared."""
        self.together(
            {f"export-{run}-{at}": self.recipe.export(run, at) for run, at in self.models}
        )

    def sample(self) -> None:
        """Let each of them write."""
        hosts = collected_hosts(self.output / "held-out.jsonl")
        commands = {
            f"steer-{run}-{at}": self.recipe.steer(run, at, hosts) for run, at in self.models
        }
        self.together(commands)

    def judge(self) -> None:
        """Classify the texts and say what follows."""
        self.show(self.recipe.judge(), "judge")

    def page(self) -> None:
        """Write the page."""
        self.show(self.recipe.page(self.logs["meco"], self.logs["baseline"]), "show")

    @property
    def models(self) -> list[tuple[str, int]]:
        """The checkpoints that are compared: run and iteration."""
        end = self.recipe.iterations
        return [("meco", end), ("meco", self.recipe.switch), ("baseline", end)]

    def say_goodbye(self) -> None:
        """Say where everything lies and what to try next."""
        places = {
            "show.html": "a page about all of it, for a browser",
            "losses.png": "the picture of both losses",
            "results.json": "the losses, and the plan behind them",
            "steering.json": "the steering accuracies, with intervals",
            "samples": "all generated texts",
            "models": "the three models, for Hugging Face transformers",
            "meco, baseline": "checkpoints and TensorBoard files of the two runs",
            "logs": "what every command wrote; Megatron's own logs",
            "commands.sh": "every command of this demo in full, to copy from",
        }
        self.console.print(f"\n[bold]Done in {self.elapsed()}.[/] In {shown(self.output)}:")
        for name, text in places.items():
            self.console.print(f"  {name:<16}{text}")
        first_of_cooldown = self.recipe.switch * BATCH_SIZE
        hosts = collected_hosts(self.output / "held-out.jsonl")[:3]
        nexts = {
            "the same prompt under three URLs": self.recipe.generate(hosts, PROMPT),
            "what a run on this machine would really use": self.recipe.doctor(),
            "both runs in the browser": self.recipe.tensorboard(),
            "the first sequence of the cooldown": self.recipe.inspect(first_of_cooldown),
        }
        self.console.print(f"\n[bold]Try next[/], in {ROOT}:")
        for title, command in nexts.items():
            self.console.print(f"  {title}")
            self.note(broken(command, self.console.width))

    # ---- Small things ----

    def show(self, command: Command, name: str, max_lines: int | None = None) -> None:
        """Print a command, run it and show what it writes."""
        self.commands.print(command)
        self.commands.show(command, self.log(name), max_lines)

    def together(self, commands: dict[str, Command]) -> None:
        """Print commands, run them side by side and show what the first one writes.

        Args:
            commands: By the name of the log.
        """
        (name, command), *others = commands.items()
        self.commands.print(command)
        with ExitStack() as stack:
            for other_name, other in others:
                self.commands.print(other)
                output = self.commands.log_path(f"{self.log(other_name)}-output")
                stack.enter_context(self.commands.background(other, self.log(other_name), output))
            self.commands.show(command, self.log(name))

    def is_there(self, name: str) -> bool:
        """Say whether something of an earlier call can be used again."""
        if not (self.output / name).exists() or self.renewed:
            self.renewed = True
            return False
        self.note(f"{self.recipe.path(name)} is there from an earlier call (--fresh starts anew)")
        return True

    def log(self, name: str) -> str:
        """Return the name of a log of the current step."""
        return f"{self.step:02d}-{name}"

    def elapsed(self) -> str:
        """Return the time since the beginning."""
        return clock(time.monotonic() - self.begin)

    def note(self, text: str) -> None:
        """Print something of less importance."""
        self.console.print(text, style="dim", markup=False, soft_wrap=True)


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", metavar="DIR")
    parser.add_argument("--fresh", action="store_true", help="collect and prepare again")
    parser.add_argument(
        "--iterations",
        type=tens,
        default=DEFAULT_ITERATIONS,
        metavar="N",
        help=f"training steps of {BATCH_SIZE * SEQUENCE_LENGTH:,} tokens in each run, a multiple "
        "of 10 (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="above 0")
    args = parser.parse_args()
    console = Console(highlight=False)
    # A closed terminal and a `kill` end the children as an interrupt does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        output = args.output.absolute()
        open_output(output, fresh=args.fresh)
        Demo(output, args.iterations, args.seed, console).run()
    except CommandFailed as failure:
        report(console, failure)
        return 1
    except OSError as error:
        console.print(f"demo: error: {error}", style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("\ndemo: interrupted; nothing of it is running any more")
        return 130
    return 0


def open_output(output: Path, *, fresh: bool) -> None:
    """Make the output folder, or empty an earlier one that cannot be used again.

    Raises:
        FileExistsError: When the folder holds something else.
    """
    mark = output / ".made-by-demo"
    # Data that other scripts collected is not what these would collect.
    names = ("collect_corpus.py", "registers.py", "train_tokenizer.py", "recipe.py")
    scripts = [ROOT / HERE / name for name in names]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in scripts)).hexdigest()
    if output.is_dir() and any(output.iterdir()):
        if not mark.is_file():
            raise FileExistsError(f"{output} holds something else; give another --output")
        if fresh or mark.read_text() != digest:
            shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    mark.write_text(digest)


def report(console: Console, failure: CommandFailed) -> None:
    """Say which command failed, where its log is and how that ends."""
    console.print(
        f"\ndemo: error: exit status {failure.status}; see {shown(failure.log)}, which ends:",
        style="bold red",
        markup=False,
        soft_wrap=True,
    )
    console.print("\n".join(failure.last_lines(15)), markup=False, soft_wrap=True)


def environment(output: Path) -> dict[str, str]:
    """Return what the commands find in their environment."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    caches = output / "cache"
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        # Two runs share the cores.
        "OMP_NUM_THREADS": str(max(1, (cores or 1) // 2)),
        # Waiting threads that spin make a step several times slower where others need the cores.
        "OMP_WAIT_POLICY": "passive",
        # The demo is about the CPU, on hosts with a GPU too.
        "CUDA_VISIBLE_DEVICES": "-1",
        "TORCH_LOGS": "-torch.utils.cpp_extension",
        "HF_HUB_OFFLINE": "1",
        # Nothing is written outside of the output folder: a home may be read-only.
        "HF_HOME": str(caches / "huggingface"),
        "MPLCONFIGDIR": str(caches / "matplotlib"),
        "XDG_CACHE_HOME": str(caches),
    }


def collected_hosts(held_out: Path) -> list[str]:
    """Return the hosts that the corpus has, in the order of the registers."""
    lines = held_out.read_text(encoding="utf-8").splitlines()
    found = {urlsplit(json.loads(line)["url"]).netloc for line in lines}
    return [register.host for register in REGISTERS if register.host in found]


def tens(text: str) -> int:
    """Return a number of iterations.

    Raises:
        argparse.ArgumentTypeError: It is not a positive multiple of ten, so the switch would not
            fall between two iterations.
    """
    number = int(text) if text.isdecimal() else 0
    if number < 10 or number % 10:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive multiple of 10")
    return number


if __name__ == "__main__":
    raise SystemExit(main())
