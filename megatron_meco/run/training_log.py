"""Read what a training run prints: steps, validation, phases, checkpoints, warnings.

Lines go in one at a time, so the same reader follows a run that is still going and reads a finished
log, whoever started it. What is not understood is passed over; it is all in the log.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

_NUMBER = r"[-+.\deEnaifNAIF]+"
_STEP = re.compile(r"\biteration +(\d+)/ *(\d+) \|")
_FIELD = re.compile(rf"([a-z ]+?)(?: \(ms\))?: +({_NUMBER}) \|")
_VALIDATION = re.compile(r"\bvalidation loss at iteration (\d+)[^|]*\|(.*)")
_LOSS = re.compile(rf"lm loss ?([a-z ]*?)(?:-([\w.-]+))? value: ({_NUMBER}) \|")
_PHASES = re.compile(
    r"> MeCo: iterations (?:1 to (\d+) plain, \d+|1) to (\d+) conditioned, \d+ to (\d+) cooldown"
)
_ARGUMENT = re.compile(r"(?:^|\s)(seq_length|micro_batch_size) \.+ (\d+)\s*$")
_SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+) to (\S+)")
_LOADED = re.compile(r"successfully loaded checkpoint from (\S+).*? at iteration +(\d+)")
_EXITING = re.compile(r"exiting program (?:at iteration (\d+)|after|on) ?(.*)")
_OURS = re.compile(r"(?:> MeCo|meco: note): (.*)")
_WARNING = re.compile(r"(?:\bWARNING:(?:[\w.]+:)?|\b[A-Z]\w*Warning:) *(.*)")

# Printed by every run, whatever it does, and nothing that a user could change.
_NOISE = (
    "one_logger",
    "RerunStateMachine",
    "Result validation enabled",
    "is deprecated",
    "IS DEPRECATED",
    "is experimental",
    "could not find the metadata file",
    "transformer-engine>=",
    "Transformer Engine",
    "Apex",
    "apex",
    "Overriding default arguments for tokenizer_type",
    "Could not determine rank",
    "NVML",
    "CUDA initialization",
    "OMP_NUM_THREADS",
)
# Of our own lines, those that the reader of a progress bar gets in another form.
_TOLD_OTHERWISE = ("begins in the",)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line about training steps.

    Attributes:
        iteration: Finished training steps.
        num_iterations: Steps of the whole run.
        loss: Training loss in nats per token since the line before; NaN where every step of the
            interval was skipped.
        learning_rate: Learning rate of the step.
        seconds: Time of a step.
        batch_size: Samples of a step.
        skipped: Steps without an update, since the line before.
        nan: Steps with a loss that is not a number, likewise.
    """

    iteration: int
    num_iterations: int
    loss: float
    learning_rate: float
    seconds: float
    batch_size: int
    skipped: int
    nan: int


@dataclass(frozen=True)
class Validation:
    """One evaluation: finished steps, and losses in nats per token.

    Losses are "conditioned", "plain", "shuffled" and "shuffled minus conditioned" (the value of
    metadata, on the tokens that both can be compared on), or "" for a run without MeCo.

    Attributes:
        iteration: Finished training steps.
        losses: Of all validation samples.
        sets: Likewise of each set of `--multiple-validation-sets`, by its name.
    """

    iteration: int
    losses: dict[str, float]
    sets: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Phases:
    """How the run is divided: steps before the cooldown, all steps, steps before metadata."""

    switch_iteration: int
    num_iterations: int
    start_iteration: int = 0

    def describe(self) -> str:
        """The phases in one line."""
        start = self.start_iteration
        return (f"iterations 1 to {start:,} plain, {start + 1:,}" if start else "iterations 1") + (
            f" to {self.switch_iteration:,} conditioned, "
            f"{self.switch_iteration + 1:,} to {self.num_iterations:,} cooldown"
        )

    def phase_of(self, iteration: int) -> str:
        """The phase of a training step, counted from 1."""
        if iteration <= self.start_iteration:
            return "plain"
        return "conditioned" if iteration <= self.switch_iteration else "cooldown"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written: its iteration and its folder."""

    iteration: int
    folder: str


@dataclass(frozen=True)
class Message:
    """A line for the reader; a warning or not."""

    text: str
    is_warning: bool = False


Event = Step | Validation | Phases | Saved | Message


@dataclass
class TrainingLog:
    """What a run has logged so far.

    Attributes:
        first: The first line about a step; None before it.
        last: The latest one.
        phases: How the run is divided; None before the run says so, and without MeCo.
        seq_length: Tokens of a sample, or None before the run says it.
        saved: The latest checkpoint, or None.
        recent_seconds: Times of the latest steps.
    """

    first: Step | None = None
    last: Step | None = None
    phases: Phases | None = None
    seq_length: int | None = None
    saved: Saved | None = None
    recent_seconds: list[float] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)

    @property
    def is_complete(self) -> bool:
        """Whether the last step has been logged."""
        return self.last is not None and self.last.iteration >= self.last.num_iterations

    def feed(self, line: str) -> Event | None:
        """Take in one line; returns what it tells, or None when it tells nothing of interest."""
        if "iteration" in line:
            if (step := _step(line)) is not None:
                self.first = self.first or step
                self.last = step
                self.recent_seconds = [*self.recent_seconds[-19:], step.seconds]
                return step
            if match := _VALIDATION.search(line):
                validation = Validation(int(match[1]), {})
                for name, of_set, value in _LOSS.findall(match[2]):
                    losses = validation.sets.setdefault(of_set, {}) if of_set else validation.losses
                    losses[name] = float(value)
                return validation
            if match := _PHASES.search(line):
                self.phases = Phases(int(match[2]), int(match[3]), int(match[1] or 0))
                return self.phases
            if match := _SAVED.search(line):
                self.saved = Saved(int(match[1]), match[2])
                return self.saved
            if match := _LOADED.search(line):
                return Message(f"goes on from the checkpoint of iteration {int(match[2]):,}")
        if "_length ." in line and (match := _ARGUMENT.search(line)):
            self.seq_length = int(match[2])
            return None
        if match := _EXITING.search(line):
            return Message(line[match.start() :].strip().rstrip("]"))
        return self._message(line)

    def tokens_per_second(self) -> float | None:
        """Tokens that all ranks together train on in a second, prefixes and padding included."""
        if self.last is None or self.seq_length is None or not self.recent_seconds:
            return None
        seconds = self._typical_seconds()
        return self.last.batch_size * self.seq_length / seconds if seconds > 0 else None

    def seconds_left(self) -> float | None:
        """Time of the steps that are left, evaluations and checkpoints not counted."""
        if self.last is None:
            return None
        return self._typical_seconds() * (self.last.num_iterations - self.last.iteration)

    def _typical_seconds(self) -> float:
        # The median: a step that waited for another program says nothing about the next one.
        return sorted(self.recent_seconds)[len(self.recent_seconds) // 2]

    def _message(self, line: str) -> Message | None:
        found: Message | None = None
        if match := _OURS.search(line):
            if not any(told in line for told in _TOLD_OTHERWISE):
                found = Message(match[1].strip())
        elif ("WARNING" in line or "Warning: " in line) and (match := _WARNING.search(line)):
            text = match[1].strip()
            if text and not any(noise in line for noise in _NOISE):
                found = Message(text, is_warning=True)
        # Each rank prints it.
        if found is None or found.text in self._told:
            return None
        self._told.add(found.text)
        return found


@dataclass
class History:
    """The losses of a run so far.

    Attributes:
        steps: The lines about training steps that tell a loss, in order.
        validations: The evaluations by iteration; of two at the same one, the later.
        phases: How the run is divided; None before the run says so, and without MeCo.
    """

    steps: list[Step] = field(default_factory=list)
    validations: dict[int, Validation] = field(default_factory=dict)
    phases: Phases | None = None
    _reader: TrainingLog = field(default_factory=TrainingLog, compare=False, repr=False)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a log, finished or growing.

        Raises:
            OSError: It cannot be read.
        """
        with path.open(encoding="utf-8", errors="replace") as lines:
            return cls.of(lines)

    @classmethod
    def of(cls, lines: Iterable[str]) -> Self:
        """Read a log that is at hand."""
        history = cls()
        for line in lines:
            history.feed(line)
        return history

    def feed(self, line: str) -> Step | Validation | Phases | None:
        """Take in one line; returns what it adds to the history."""
        event = self._reader.feed(line)
        # Megatron leaves the loss out when it skipped every step of the interval.
        if isinstance(event, Step) and "lm loss:" in line:
            self.steps.append(event)
        elif isinstance(event, Validation):
            self.validations[event.iteration] = event
        elif isinstance(event, Phases):
            self.phases = event
        else:
            return None
        return event

    def seconds_left(self) -> float | None:
        """As `TrainingLog.seconds_left`."""
        return self._reader.seconds_left()


def _step(line: str) -> Step | None:
    match = _STEP.search(line)
    if match is None:
        return None
    fields = {name.strip(): value for name, value in _FIELD.findall(line[match.end() :])}
    try:
        return Step(
            iteration=int(match[1]),
            num_iterations=int(match[2]),
            # Megatron leaves the loss out when every step of the interval was skipped.
            loss=float(fields.get("lm loss", math.nan)),
            learning_rate=float(fields.get("learning rate", math.nan)),
            seconds=float(fields["elapsed time per iteration"]) / 1000,
            batch_size=int(fields.get("global batch size", 0)),
            skipped=int(fields.get("number of skipped iterations", 0)),
            nan=int(fields.get("number of nan iterations", 0)),
        )
    except (KeyError, ValueError):
        # A line that was cut, or two ranks' lines in one.
        return None
