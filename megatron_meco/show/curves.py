"""The losses of a run, from its log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_meco.errors import FlagError
from megatron_meco.run.training_log import History

_MOST_POINTS = 4000


def curves_report(name: str, path: Path) -> dict[str, Any]:
    """Read a training log.

    Args:
        name: What to call the run.
        path: Its log, finished or growing.

    Returns:
        `name`; `switch` (the last iteration of the conditioned phase, or None); `start` (the last
        one of the plain phase before it, or None); `steps`: lists
        `iteration` and `loss` (nats per token), at most 4,000 of them, evenly spaced; and
        `validations`: {iteration, losses}, the latest where an iteration was evaluated twice.

    Raises:
        FlagError: The log cannot be read or tells of no step.
    """

    def refuse(reason: str) -> FlagError:
        return FlagError(reason, where=f"--log {path}", remedy="Name the output of a training run.")

    try:
        if not path.is_file():
            raise refuse("is not a plain file" if path.exists() else "no such file")
        history = History.read(path)
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror})") from error
    # A run that was restarted tells some steps twice: the later ones count.
    steps = {step.iteration: step.loss for step in history.steps if math.isfinite(step.loss)}
    if not steps:
        raise refuse("holds no training step")
    iterations = sorted(steps)[:: math.ceil(len(steps) / _MOST_POINTS)]
    return {
        "name": name,
        "switch": None if history.phases is None else history.phases.switch_iteration,
        "start": (history.phases and history.phases.start_iteration) or None,
        "steps": {"iteration": iterations, "loss": [steps[i] for i in iterations]},
        "validations": [
            {"iteration": i, "losses": _finite(validation.losses)}
            for i, validation in sorted(history.validations.items())
        ],
    }


def _finite(losses: dict[str, float]) -> dict[str, float | None]:
    return {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}
