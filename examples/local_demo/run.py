"""Watch MeCo happen: `make demo` collects real text, trains on it twice, compares, generates.

Everything is done by commands that are printed before they run, the ones that one uses on a cluster
too; this script only strings them together (`recipe.py` has their flags). Costs about eight minutes
on two cores, most of it for the two training runs, and 200 MB in `demo-output`. A second call
trains again on what the first one collected and prepared. Given up: a run long enough to show the
paper's gain.

    python examples/local_demo/run.py --minutes 10      # longer training runs
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from commands import Command, CommandFailed, Commands, broken, changed
from recipe import BATCH_SIZE, HERE, ROOT, TEMPLATE, Recipe, shown
from results import comparison, print_comparison
from rich.console import Console
from training_log import TrainingLog
from training_progress import TrainingProgress, clock

from megatron_meco.corpus.metadata import open_metadata

# What two cores of a current server do; more cores are faster, more iterations are better.
ITERATIONS_PER_MINUTE = 120
DEFAULT_MINUTES = 2.5
# Where all kinds of projects live: such a host says little about a text.
CODE_HOSTS = ("github.com", "gitlab.com")
PROMPT = "Return the"
LINES_OF_INSPECT = 18


class Demo:
    """The steps of the demo, in order.

    Args:
        output: The folder for everything.
        minutes: Length of a training run on two cores.
        console: The terminal.
    """

    def __init__(self, output: Path, minutes: float, console: Console) -> None:
        self.output = output
        self.console = console
        iterations = 10 * max(1, round(minutes * ITERATIONS_PER_MINUTE / 10))
        self.recipe = Recipe(output, iterations)
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
            "Train with MeCo: 90 % with URLs, then 10 % without": self.train_meco,
            "Train the baseline: the same without metadata": self.train_baseline,
            "Compare the validation losses": self.compare,
            "Export, and generate under different URLs": self.generate,
            "Draw both losses": self.plot,
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

    def train_meco(self) -> None:
        """Train with metadata, then without."""
        # A run must not find the checkpoints of an earlier call.
        for name in ("meco", "baseline", "model"):
            shutil.rmtree(self.output / name, ignore_errors=True)
        command = self.recipe.train("meco", TEMPLATE)
        self.commands.print(command)
        self.follow(command, "meco", has_prefixes=True)

    def train_baseline(self) -> None:
        """Train without metadata, all else equal."""
        command = self.recipe.train("baseline", "")
        flags = changed(command, self.recipe.train("meco", TEMPLATE))
        self.note("The command above with other values of these flags:")
        self.note(broken(["...", *flags], self.console.width))
        self.commands.keep(command)
        self.follow(command, "baseline", has_prefixes=False)

    def follow(self, command: Command, name: str, *, has_prefixes: bool) -> None:
        """Run a training command behind a line of progress."""
        with TrainingProgress(self.console, has_prefixes=has_prefixes) as progress:
            self.logs[name] = self.commands.follow(command, self.log(name), progress.feed)

    # ---- What came out ----

    def compare(self) -> None:
        """Print the table of validation losses."""
        plan = json.loads((self.output / "plan.json").read_text())
        rows = comparison(*(TrainingLog.read(self.logs[name]) for name in ("meco", "baseline")))
        print_comparison(self.console, rows, plan)
        results = {"validation": rows, "plan": plan}
        (self.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    def generate(self) -> None:
        """Export the model and let it write under several URLs."""
        self.show(self.recipe.export(), "export")
        hosts = frequent_hosts(self.output / "data" / "corpus", 3)
        self.show(self.recipe.generate(hosts, PROMPT), "generate")

    def plot(self) -> None:
        """Draw the losses."""
        self.show(self.recipe.plot(self.logs["meco"], self.logs["baseline"]), "plot")

    def say_goodbye(self) -> None:
        """Say where everything lies and what to try next."""
        places = {
            "losses.png": "the picture of both losses",
            "results.json": "the table, and the plan behind it",
            "model": "the trained model, for Hugging Face transformers",
            "meco, baseline": "checkpoints and TensorBoard files of the two runs",
            "logs": "what every command wrote; Megatron's own logs",
            "commands.sh": "every command of this demo in full, to copy from",
        }
        self.console.print(f"\n[bold]Done in {self.elapsed()}.[/] In {shown(self.output)}:")
        for name, text in places.items():
            self.console.print(f"  {name:<16}{text}")
        first_of_cooldown = self.recipe.switch * BATCH_SIZE
        nexts = {
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
        "--minutes",
        type=float,
        default=DEFAULT_MINUTES,
        metavar="N",
        help="length of each training run, roughly, on two cores (default: %(default)s)",
    )
    args = parser.parse_args()
    console = Console(highlight=False)
    # A closed terminal and a `kill` end the children as an interrupt does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        output = args.output.absolute()
        open_output(output, fresh=args.fresh)
        Demo(output, args.minutes, console).run()
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
    scripts = [ROOT / HERE / name for name in ("collect_corpus.py", "train_tokenizer.py")]
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
        "OMP_NUM_THREADS": str(cores or 1),
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


def frequent_hosts(corpus: Path, number: int) -> list[str]:
    """Return the hosts with the most documents, code hosts left out."""
    urls = open_metadata(corpus)["url"].to_pylist()
    hosts = Counter(urlsplit(url).netloc for url in urls if url)
    return [host for host, _ in hosts.most_common() if host not in CODE_HOSTS][:number]


if __name__ == "__main__":
    raise SystemExit(main())
