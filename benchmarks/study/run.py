"""The study: `make study` runs setting 1, `make study ARGS=--full` all settings.

The recipe and its seeds are in `recipe.toml`. Runs go side by side, one thread each. An interrupted
study goes on where it was when it is called again. Results are written to `results/` whatever they
are; the exit status is 0 unless a command failed.

    python -m benchmarks.study.run                        # 16 runs
    python -m benchmarks.study.run --shuffle-labels       # control: must say `not shown`
    python -m benchmarks.study.run --choices              # which choice about metadata matters
    python -m benchmarks.study.run --seeds 11 12 13 14    # other worlds
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.study import trainer
from benchmarks.study.execute import Executor
from benchmarks.study.figure import draw
from benchmarks.study.recipe import HERE, Recipe, Run
from benchmarks.study.rows import (
    Results,
    Row,
    best_rates,
    choice_rows,
    contradiction_rows,
    junk_rows,
    steering,
    steering_rows,
    value,
    variant_rows,
)
from benchmarks.study.trainer import ROOT, RunFailed


class Study:
    """The stages of the study, in order.

    Args:
        recipe: The recipe.
        work: Folder for everything that is not a result.
        jobs: Runs at the same time.
        tell: Told a line for each run that is finished.
    """

    def __init__(
        self, recipe: Recipe, work: Path, jobs: int, tell: Callable[[str], None] = print
    ) -> None:
        self.recipe = recipe
        self._work = work
        self._executor = Executor(work)
        self._jobs = jobs
        self._tell = tell
        self.results: list[dict[str, Any]] = []
        self.steering: list[dict[str, Any]] = []
        self.rates: dict[str, float] | None = None

    def run_default(self) -> None:
        """Run setting 1."""
        self._run("contradicting sources", self.recipe.contradiction())

    def run_full(self) -> None:
        """Run the other settings, and the variants of setting 1."""
        settings = self.recipe.content
        self._run("learning rates of setting 2", self.recipe.tuning())
        rates = best_rates(Results(self.results), settings["junk"]["learning_rates"])
        assert rates is not None, "the tuning runs are complete"
        self.rates = rates
        self._tell(f"learning rates: {rates}")
        self._run("knowledge under junk", self.recipe.junk(rates))
        self._run("kinds of metadata", self.recipe.kinds())
        self._run("cooldown, setting 1", self.recipe.cooldowns("contradiction"))
        self._run("cooldown, setting 2", self.recipe.cooldowns("junk", rates["meco"]))
        for seed in self.recipe.seeds("steering"):
            self._steer(seed, settings["steering"]["iterations"])

    def run_choices(self) -> None:
        """Run setting 1 with one choice about metadata changed at a time."""
        self._run("choices", self.recipe.choices())

    def rows(self) -> list[Row]:
        """Return the rows of everything that is complete."""
        settings, results = self.recipe.content, Results(self.results)
        contradiction = settings["contradiction"]
        rows = contradiction_rows(
            results, self.recipe.seeds("contradiction"), contradiction["lies"]
        )
        few = self.recipe.variant_seeds("contradiction")
        rows += variant_rows(
            results,
            "contradiction",
            [f"kind-{kind}" for kind in contradiction["kinds"]]
            + [f"cooldown-{share:g}" for share in contradiction["cooldowns"]],
            steering("end", "accuracy"),
            "reliable - unreliable URL",
            few,
        )
        rows += choice_rows(results, contradiction["choices"], self.recipe.seeds("contradiction"))
        for setting in ("junk", "clean"):
            seeds = self.recipe.seeds(setting)
            rows += junk_rows(results, setting, settings[setting]["budgets"], seeds)
        rows += variant_rows(
            results,
            "junk",
            [f"cooldown-{share:g}" for share in settings["junk"]["cooldowns"]],
            value("end", "none", "accuracy"),
            "accuracy without URL (chance 0.03)",
            self.recipe.variant_seeds("junk"),
        )
        accuracies: dict[str, dict[int, float]] = {}
        for found in self.steering:
            for name, model in found["models"].items():
                accuracies.setdefault(name, {})[found["seed"]] = model["accuracy"]["value"]
        chance = self.steering[0]["chance"] if self.steering else 0.0
        return rows + steering_rows(accuracies, self.recipe.seeds("steering"), chance)

    def _run(self, title: str, runs: list[Run]) -> None:
        """Carry out runs, side by side."""
        missing = sum(self._executor.result(run) is None for run in runs)
        self._tell(f"{title}: {len(runs)} runs, {len(runs) - missing} of them there already")
        begin = time.monotonic()
        with ThreadPoolExecutor(self._jobs) as pool:
            futures = {pool.submit(self._executor.execute, run): run for run in runs}
            try:
                for done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    elapsed = time.monotonic() - begin
                    self._tell(f"  {done}/{len(runs)} {elapsed:5.0f} s  {futures[future].name}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                trainer.interrupt()
                raise
        self.results += [future.result() for future in futures]

    def _steer(self, seed: int, iterations: int) -> None:
        """Run the demo with a seed and read what it measured."""
        folder = self._work / "steering" / f"{iterations}-{seed}"
        path = folder / "steering.json"
        if not path.is_file():
            self._tell(f"steering on real text, seed {seed}: log in {folder}.log")
            folder.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "examples/local_demo/run.py", "--output", str(folder)]
            command += ["--iterations", str(iterations), "--seed", str(seed)]
            with folder.with_name(f"{folder.name}.log").open("w") as log:
                status = subprocess.run(
                    command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False
                ).returncode
            if status:
                raise RunFailed(f"exit status {status}, see {log.name}")
        self.steering.append({"seed": seed, **json.loads(path.read_text())})


def main() -> int:
    """Run the study, print the rows, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--full", action="store_true", help="all settings: about two hours on two idle cores")
    add("--choices", action="store_true", help="one choice about metadata changed at a time")
    add("--shuffle-labels", action="store_true", help="every document gets another's metadata")
    add("--seeds", type=int, nargs="+", metavar="N", help="instead of the recipe's")
    add("--recipe", type=Path, default=HERE / "recipe.toml", metavar="FILE")
    add("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="runs side by side")
    add("--work", type=Path, default=ROOT / "study-output", metavar="DIR", help="for checkpoints")
    add("--results", type=Path, default=HERE / "results", metavar="DIR")
    args = parser.parse_args()
    if args.seeds and (min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds)):
        parser.error("--seeds: give different numbers, 0 or more")
    if args.jobs < 1:
        parser.error("--jobs: give 1 or more")
    recipe = Recipe(args.recipe, args.seeds, shuffle_labels=args.shuffle_labels)
    study = Study(recipe, args.work.absolute(), args.jobs, lambda line: print(line, flush=True))
    # A closed terminal and a `kill` end the runs as an interrupt does.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    name = name_of(args.full, args.shuffle_labels, args.seeds, choices=args.choices)
    stages = [study.run_default, *([study.run_full] if args.full else [])]
    stages += [study.run_choices] if args.choices else []
    try:
        for stage in stages:
            stage()
            write(study, args.results / name)
    except RunFailed as failure:
        print(f"study: error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstudy: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print_rows(study.rows())
    print(f"written to {args.results / name}.json and .png")
    return 0


def name_of(
    full: bool, shuffle_labels: bool, seeds: list[int] | None, *, choices: bool = False
) -> str:
    """Return the name of the result files."""
    parts = ["full" if full else "default", *(["choices"] if choices else [])]
    parts += ["shuffled-labels"] if shuffle_labels else []
    return "-".join([*parts, *(["seeds", *map(str, seeds)] if seeds else [])])


def write(study: Study, path: Path) -> None:
    """Write rows, raw results and the figure.

    Args:
        study: The study.
        path: Of the files, without a suffix.
    """
    rows = study.rows()
    content = {
        "recipe_sha256": study.recipe.digest,
        "shuffled_labels": study.recipe.shuffle_labels,
        "recipe": study.recipe.content,
        "learning_rates": study.rates,
        "rows": [row.to_json() for row in rows],
        "runs": study.results,
        "steering": study.steering,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    if rows:
        title = "Synthetic worlds, 2 layers"
        if len({row.seeds for row in rows}) == 1:
            title += f", seeds {', '.join(map(str, rows[0].seeds))}"
        if study.recipe.shuffle_labels:
            title += ", control: each document has another one's metadata"
        draw(rows, title, path.with_name(f"{path.name}.png"))


def print_rows(rows: list[Row]) -> None:
    """Print the rows."""
    table = Table("setting", "question", "arms", "unit", "mean [95 %]", "baseline", "verdict")
    for row in rows:
        verdict = f"{row.verdict}{' (primary)' if row.primary else ''}"
        control = str(row.control) if row.control else ""
        table.add_row(
            row.setting, row.question, row.arms, row.unit, str(row.effect), control, verdict
        )
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
