"""The phase of each sample and iteration: plain if asked for, conditioned, then cooldown.

A run consumes samples 0, 1, 2, ... in order (Megatron's `single` sampler), and the phase depends on
the sample index alone. So the switches depend neither on world size nor on restarts.
`make_schedule` computes their indices from the flags, also for a batch size that grows in steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from itertools import pairwise

from megatron_meco.config import CONDITIONED, COOLDOWN, PHASES, PLAIN, MeCoConfig
from megatron_meco.errors import FlagError


@dataclass(frozen=True, slots=True)
class BatchSize:
    """Megatron's global batch size, constant or growing in steps.

    Attributes:
        steps: (first consumed sample, samples per training step from there on), in rising order;
            the first entry starts at 0.
    """

    steps: tuple[tuple[int, int], ...]

    @classmethod
    def constant(cls, global_batch_size: int) -> BatchSize:
        """A constant `--global-batch-size`."""
        return cls(((0, global_batch_size),))

    @classmethod
    def parse(cls, schedule: str, sequence_length: int) -> BatchSize:
        """Read `--step-batch-size-schedule`: "0:768 250B:1536", thresholds in tokens.

        Raises:
            FlagError: It has another format, or does not rise from 0.
        """
        flag = "--step-batch-size-schedule"
        try:
            pairs = [entry.split(":") for entry in schedule.replace(",", " ").split()]
            steps = tuple(
                sorted((_number(at) // sequence_length, _number(size)) for at, size in pairs)
            )
        except ValueError as error:
            raise FlagError(
                f"cannot read {schedule!r} ({error})",
                where=flag,
                remedy="Write TOKENS:BATCH_SIZE pairs, as in '0:768 250B:1536'.",
            ) from error
        rising = all(a[0] < b[0] for a, b in pairwise(steps))
        if not steps or steps[0][0] != 0 or not rising or min(size for _, size in steps) < 1:
            raise FlagError(
                f"{schedule!r} must start at 0, rise, and hold positive sizes",
                where=flag,
                remedy="Write TOKENS:BATCH_SIZE pairs, as in '0:768 250B:1536'.",
            )
        return cls(steps)

    def at(self, consumed_samples: int) -> int:
        """Samples in the training step that starts after `consumed_samples`."""
        return next(size for first, size in reversed(self.steps) if consumed_samples >= first)

    def samples_after(self, iterations: int) -> int:
        """Samples consumed by the first `iterations` training steps."""
        consumed = 0
        for taken, size in self._stretches():
            if taken is None or iterations <= taken:
                return consumed + iterations * size
            consumed += taken * size
            iterations -= taken
        raise AssertionError("the last stretch is endless")

    def iterations_for(self, samples: int) -> int:
        """Training steps of a run of `samples`, as in Megatron.

        With a constant size the last, partial step is dropped; with a schedule it is a full step.
        """
        if len(self.steps) == 1:
            return samples // self.steps[0][1]
        iterations = 0
        for taken, size in self._stretches():
            if taken is None or samples <= taken * size:
                return iterations + -(-samples // size)
            samples -= taken * size
            iterations += taken
        raise AssertionError("the last stretch is endless")

    def _stretches(self) -> Iterator[tuple[int | None, int]]:
        """(training steps, size) of each stretch of equal size; None: endless."""
        consumed = 0
        for (_, size), following in zip(self.steps, (*self.steps[1:], None), strict=True):
            if following is None:
                yield None, size
                return
            taken = -(-max(following[0] - consumed, 0) // size)
            consumed += taken * size
            yield taken, size


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Length of a run, and where its phases end.

    Attributes:
        num_iterations: Steps of the whole run.
        num_samples: Samples of the whole run.
        switch_iteration: Steps before the cooldown.
        switch_sample: Samples before the cooldown; sample `i` is conditioned when
            `start_sample <= i < switch_sample`.
        start_iteration: Steps before the conditioned phase, on plain documents.
        start_sample: Samples before the conditioned phase.
    """

    num_iterations: int
    num_samples: int
    switch_iteration: int
    switch_sample: int
    start_iteration: int = 0
    start_sample: int = 0

    def describe(self) -> str:
        """The whole run in one line."""
        if self.start_iteration:
            return (
                f"iterations 1 to {self.start_iteration} plain, "
                f"{self.start_iteration + 1} to {self.switch_iteration} conditioned, "
                f"{self.switch_iteration + 1} to {self.num_iterations} cooldown (switches at "
                f"samples {self.start_sample} and {self.switch_sample} of {self.num_samples})"
            )
        return (
            f"iterations 1 to {self.switch_iteration} conditioned, "
            f"{self.switch_iteration + 1} to {self.num_iterations} cooldown "
            f"(switch at sample {self.switch_sample} of {self.num_samples})"
        )

    @property
    def switches(self) -> tuple[tuple[int, int, str, str], ...]:
        """Each switch: iteration, sample, the phase before it and the phase after it."""
        cooldown = (self.switch_iteration, self.switch_sample, CONDITIONED, COOLDOWN)
        if not self.start_iteration:
            return (cooldown,)
        return (self.start_iteration, self.start_sample, PLAIN, CONDITIONED), cooldown

    def phase_of_sample(self, index: int) -> str:
        """The phase of a global sample index."""
        if index < self.start_sample:
            return PLAIN
        return CONDITIONED if index < self.switch_sample else COOLDOWN

    def phase_of_iteration(self, iteration: int) -> str:
        """The phase of the step that follows `iteration` finished steps."""
        if iteration < self.start_iteration:
            return PLAIN
        return CONDITIONED if iteration < self.switch_iteration else COOLDOWN

    def samples_of(self, phase: str) -> range:
        """The global sample indices of a phase."""
        ends = (0, self.start_sample, self.switch_sample, self.num_samples)
        number = PHASES.index(phase)
        return range(ends[number], ends[number + 1])

    def documents_held_out(self, config: MeCoConfig) -> float:
        """Share of the training documents held out for the cooldown.

        Raises:
            FlagError: A phase has samples and no documents.
        """
        num_cooldown = self.num_samples - self.switch_sample
        share = config.cooldown_documents
        if share is None:
            return num_cooldown / self.num_samples if self.num_samples else 0.0
        for num_samples, left, phase in (
            (self.switch_sample, 1 - share, CONDITIONED),
            (num_cooldown, share, COOLDOWN),
        ):
            if num_samples and not left:
                raise FlagError(
                    f"{share!r} leaves no document to the {phase} phase",
                    where="--meco-cooldown-documents",
                    remedy="Give a share between 0 and 1, or --meco-cooldown-data-path.",
                )
        return share

    def documents_of_start(self, config: MeCoConfig, held_out: float) -> float:
        """Share of the training documents for the plain phase; the conditioned one has the rest.

        Args:
            config: Gives the share, if the user does.
            held_out: Share held out for the cooldown.

        Raises:
            FlagError: The plain phase or the conditioned phase has no documents.
        """
        if not self.start_sample:
            return 0.0
        share = config.start_documents
        if share is None:
            return (1 - held_out) * self.start_sample / self.switch_sample
        if not 0 < share < 1 - held_out:
            phase = CONDITIONED if share else PLAIN
            rest = f", after the cooldown's share {held_out!r}" if share and held_out else ""
            raise FlagError(
                f"{share!r} leaves no document to the {phase} phase{rest}",
                where="--meco-start-documents",
                remedy="Give a larger share." if phase == PLAIN else "Give a smaller share.",
            )
        return share

    def document_shares(
        self, config: MeCoConfig, *, own_cooldown: bool
    ) -> dict[str, tuple[float, float]]:
        """Training documents of each phase: half-open ranges of the permuted order, as fractions.

        Args:
            config: Gives the shares, if the user does.
            own_cooldown: Whether the cooldown has corpora of its own, and all of their documents.

        Raises:
            FlagError: A phase has samples and no documents.
        """
        held_out = 0.0 if own_cooldown else self.documents_held_out(config)
        start = self.documents_of_start(config, held_out)
        # 0 and 1, not 0.0 and 1.0: they are part of the names of Megatron's caches.
        return {
            PLAIN: (0, start),
            CONDITIONED: (start or 0, 1 - held_out),
            COOLDOWN: (0, 1) if own_cooldown else (1 - held_out, 1),
        }


def make_schedule(
    config: MeCoConfig,
    batch_size: BatchSize,
    *,
    train_iterations: int | None = None,
    train_samples: int | None = None,
) -> Schedule:
    """The schedule of a run, from the flags that decide it.

    Args:
        config: Gives the fractions or first iterations of the phases.
        batch_size: The global batch size, constant or growing.
        train_iterations: `--train-iters`; exactly one of this and `train_samples` is given.
        train_samples: `--train-samples`.

    Raises:
        FlagError: When neither or both are given, the cooldown starts after the run ends, or the
            conditioned phase does not start before the cooldown.
    """
    if (train_iterations is None) == (train_samples is None):
        raise FlagError(
            "the length of the run must be given once",
            where="--train-iters / --train-samples",
            remedy="Give exactly one of the two.",
        )
    if train_iterations is None:
        assert train_samples is not None
        train_iterations = batch_size.iterations_for(train_samples)
    num_samples = batch_size.samples_after(train_iterations)
    switch = config.cooldown_start_iteration
    if switch is None:
        switch = train_iterations - _share_of(train_iterations, config.cooldown_fraction)
    elif switch > train_iterations:
        raise FlagError(
            f"the cooldown would start at iteration {switch}, after the run's last one "
            f"({train_iterations})",
            where="--meco-cooldown-start-iteration",
            remedy=f"Give {train_iterations} for a run without cooldown, or a smaller number.",
        )
    start, flag = config.start_iteration, "--meco-start-iteration"
    if start is None:
        flag = "--meco-start-fraction"
        start = _share_of(train_iterations, config.start_fraction)
    if start and start >= switch:
        given = start if config.start_iteration is not None else config.start_fraction
        raise FlagError(
            f"leaves no iteration with metadata: the first {start} would be plain, and the "
            f"cooldown starts after iteration {switch} of {train_iterations}",
            where=f"{flag} {given}",
            remedy="Start earlier, or move the cooldown (--meco-cooldown-start-iteration).",
        )
    return Schedule(
        num_iterations=train_iterations,
        num_samples=num_samples,
        switch_iteration=switch,
        switch_sample=batch_size.samples_after(switch),
        start_iteration=start,
        start_sample=batch_size.samples_after(start),
    )


def _share_of(count: int, share: float) -> int:
    """`share` of `count`, rounded half up; decimal, since 0.1 * 30 is not 3 in binary."""
    return int((Decimal(str(share)) * count).quantize(Decimal(1), rounding=ROUND_HALF_UP))


def _number(text: str) -> int:
    """A number with an optional suffix K, M, B or T, as Megatron reads it."""
    text = text.strip().upper()
    scale = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}.get(text[-1:], 1)
    number = float(text[:-1] if scale > 1 else text) * scale
    if not 0 <= number < 2**53:
        raise ValueError(f"{text} is out of range")
    return int(number)
