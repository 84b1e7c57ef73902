"""Follow a Megatron run in one line: phase, iteration, loss, learning rate, time left.

A terminal gets a live bar; anything else a line at every tenth of the run. What validation says is
printed as it comes. Costs nothing beside a training step. Given up: everything else that Megatron
prints, which is in the log.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from megatron_meco.run.training_log import History, Phases, Step, Validation
from megatron_meco.run.watch import clock


class TrainingProgress:
    """Shows a run.

    Args:
        console: The terminal.
        has_prefixes: Whether the run has any; the phases of a baseline differ in nothing.
    """

    def __init__(self, console: Console, *, has_prefixes: bool) -> None:
        self.log = History()
        self._has_prefixes = has_prefixes
        self._console = console
        self._begin = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[state]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task("starting", total=None, state="Megatron is being loaded")

    def __enter__(self) -> Self:
        self._bar.start()
        if not self._console.is_terminal:
            self._console.print("starting: Megatron is being loaded")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if kind is None and self.log.steps:
            self._print_summary()

    def feed(self, line: str) -> None:
        """Take in one line of the run's log."""
        event = self.log.feed(line)
        if isinstance(event, Phases) and self._has_prefixes:
            self._print_phases(event)
        elif isinstance(event, Validation):
            self._print_validation(event)
        elif isinstance(event, Step):
            self._show(event)

    def _show(self, step: Step) -> None:
        phase = "plain"
        if self.log.phases is not None and self._has_prefixes:
            phase = self.log.phases.phase_of(step.iteration)
        state = (
            f"{step.iteration}/{step.num_iterations}  loss {step.loss:.3f}  "
            f"lr {step.learning_rate:.1e}  {clock(self.log.seconds_left() or 0)} left"
        )
        self._bar.update(
            self._task,
            description=phase,
            completed=step.iteration,
            total=step.num_iterations,
            state=state,
        )
        tenth = max(1, step.num_iterations // 10)
        if not self._console.is_terminal and step.iteration % tenth == 0:
            self._console.print(f"{phase:<11} {state}")

    def _print_phases(self, phases: Phases) -> None:
        self._console.print(
            f"iterations 1 to {phases.switch_iteration} conditioned, "
            f"{phases.switch_iteration + 1} to {phases.num_iterations} cooldown"
        )

    def _print_validation(self, validation: Validation) -> None:
        losses = f"{validation.losses.get('plain', float('nan')):.3f}"
        if "conditioned" in validation.losses:
            right, wrong = (validation.losses[view] for view in ("conditioned", "shuffled"))
            losses = f"{right:.3f} with URL, {wrong:.3f} with a wrong one, {losses} without"
        switch = self.log.phases.switch_iteration if self.log.phases else None
        note = " (at the switch)" if validation.iteration == switch else ""
        self._console.print(f"iteration {validation.iteration}{note}: validation loss {losses}")

    def _print_summary(self) -> None:
        steps = self.log.steps
        mean = sum(step.seconds for step in steps) / len(steps)
        self._console.print(
            f"{len(steps)} iterations in {clock(time.monotonic() - self._begin)}, {mean:.2f} s "
            f"each; training loss {steps[0].loss:.2f} -> {steps[-1].loss:.2f}"
        )
