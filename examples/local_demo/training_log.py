"""Read Megatron's training log: losses, learning rate, validation, and where the phase switches.

Lines go in one at a time, so the same reader follows a run that is still going and reads a finished
log. Costs a few regular expressions for each line. Given up: everything else that Megatron prints;
a line that is not understood is passed over, since warnings of all kinds stand between the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

_STEP = re.compile(r"\biteration +(\d+)/ *(\d+) \|")
_FIELD = re.compile(r"([a-z ]+?)(?: \(ms\))?: +([-+.\deEnaif]+) \|")
_VALIDATION = re.compile(r"^ *validation loss at iteration (\d+)[^|]*\|(.*)")
_LOSS = re.compile(r"lm loss ?([a-z ]*?) value: ([-+.\deEnaif]+) \|")
_PHASES = re.compile(r"> MeCo: iterations 1 to (\d+) conditioned, \d+ to (\d+) cooldown")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One line about a training step.

    Attributes:
        iteration: Finished training steps, this one included.
        num_iterations: Steps of the whole run.
        loss: Training loss in nats per token, averaged since the line before.
        learning_rate: Learning rate of the step.
        seconds: Time of a step.
    """

    iteration: int
    num_iterations: int
    loss: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """One evaluation.

    Attributes:
        iteration: Finished training steps.
        losses: Nats per token by view: "conditioned" (the right metadata), "shuffled" (wrong),
            "plain" (none); "shuffled minus conditioned", on the same tokens. A baseline has
            "plain", a run without MeCo "".
    """

    iteration: int
    losses: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Phases:
    """How the run is divided.

    Attributes:
        switch_iteration: Steps before the cooldown.
        num_iterations: Steps of the whole run.
    """

    switch_iteration: int
    num_iterations: int

    def phase_of(self, iteration: int) -> str:
        """Return the phase that training step `iteration`, counted from 1, belongs to."""
        return "conditioned" if iteration <= self.switch_iteration else "cooldown"


@dataclass
class TrainingLog:
    """What a run has logged so far."""

    steps: list[Step] = field(default_factory=list)
    """The training steps, in order."""

    validations: dict[int, Validation] = field(default_factory=dict)
    """The evaluations by iteration; of two at the same one, the later."""

    phases: Phases | None = None
    """How the run is divided; None before the run says so, and without MeCo."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a finished log."""
        with path.open(encoding="utf-8", errors="replace") as lines:
            return cls.of(lines)

    @classmethod
    def of(cls, lines: Iterable[str]) -> Self:
        """Read a log that is at hand."""
        log = cls()
        for line in lines:
            log.feed(line)
        return log

    def feed(self, line: str) -> Step | Validation | Phases | None:
        """Take in one line.

        Returns:
            What the line tells, or None when it tells nothing of interest.
        """
        # A quick look first: most lines are of no interest.
        if "iteration" not in line:
            return None
        event = _step(line) or _validation(line) or _phases(line)
        if isinstance(event, Step):
            self.steps.append(event)
        elif isinstance(event, Validation):
            self.validations[event.iteration] = event
        elif isinstance(event, Phases):
            self.phases = event
        return event


def _step(line: str) -> Step | None:
    match = _STEP.search(line)
    if match is None:
        return None
    fields = {name.strip(): value for name, value in _FIELD.findall(line[match.end() :])}
    if "lm loss" not in fields:
        # Megatron leaves the loss out when every step of the interval was skipped.
        return None
    return Step(
        iteration=int(match[1]),
        num_iterations=int(match[2]),
        loss=float(fields["lm loss"]),
        learning_rate=float(fields["learning rate"]),
        seconds=float(fields["elapsed time per iteration"]) / 1000,
    )


def _validation(line: str) -> Validation | None:
    match = _VALIDATION.match(line)
    if match is None:
        return None
    losses = {name: float(value) for name, value in _LOSS.findall(match[2])}
    return Validation(iteration=int(match[1]), losses=losses)


def _phases(line: str) -> Phases | None:
    match = _PHASES.search(line)
    if match is None:
        return None
    return Phases(switch_iteration=int(match[1]), num_iterations=int(match[2]))
