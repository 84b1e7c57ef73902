"""Announces the phase switches and checks the batches of phases without prefixes.

A switch itself happens where the sample index reaches that of `Schedule.switches` (see
`megatron_meco.data.phases`). `PhaseSwitch.before_step` runs at the first micro-batch of each
training step. `check_batch` checks what the loader delivered, on the host. Megatron saves the
checkpoint at the switch (`megatron_patches.SaveInterval`).
"""

from __future__ import annotations

from typing import Any

from megatron_meco.config import CONDITIONED, COOLDOWN
from megatron_meco.data.phases import Schedule


class PhaseSwitch:
    """Reports and checks the phase of each training step.

    Args:
        schedule: The run's schedule.
        saves: Whether the run saves checkpoints.
    """

    def __init__(self, schedule: Schedule, *, saves: bool) -> None:
        self.schedule = schedule
        self.saves = saves
        self._last_step: int | None = None

    def before_step(
        self, iteration: int, writer: Any | None, wandb_writer: Any | None = None
    ) -> str | None:
        """Report the start of a training step; further calls in a step do nothing.

        Args:
            iteration: Finished training steps.
            writer: TensorBoard's writer, or None on ranks without one.
            wandb_writer: Megatron's W&B writer, or None.

        Returns:
            What to print on rank 0, or None.
        """
        if iteration == self._last_step:
            return None
        first, self._last_step = self._last_step is None, iteration
        phase = self.schedule.phase_of_iteration(iteration)
        values = {"meco/cooldown": int(phase == COOLDOWN)}
        if self.schedule.start_iteration:
            # 0 before and after the conditioned phase.
            values["meco/conditioned"] = int(phase == CONDITIONED)
        if writer is not None:
            for name, value in values.items():
                writer.add_scalar(name, value, iteration + 1)
        if wandb_writer is not None:
            wandb_writer.log(values, iteration + 1)
        for at, sample, before, after in self.schedule.switches:
            if iteration != at or iteration == 0:
                continue
            saved = "checkpoint saved" if self.saves else "no --save, so no checkpoint"
            text = (
                f"> MeCo: switch after iteration {iteration}, at sample {sample}: "
                f"{before} -> {after} ({saved})"
            )
            if writer is not None:
                writer.add_text("meco/switch", text, iteration)
            return text
        return f"> MeCo: iteration {iteration + 1} begins in the {phase} phase" if first else None

    def check_batch(self, iteration: int, num_prefix_tokens: int) -> None:
        """Check that a batch of the plain phase or of the cooldown has no prefix.

        Args:
            iteration: Finished training steps.
            num_prefix_tokens: Number of prefix and suffix tokens in the micro-batch.

        Raises:
            RuntimeError: It has one.
        """
        phase = self.schedule.phase_of_iteration(iteration)
        if phase != CONDITIONED and num_prefix_tokens:
            name = COOLDOWN if phase == COOLDOWN else f"{phase} phase"
            raise RuntimeError(
                f"iteration {iteration + 1} belongs to the {name}, but its batch holds "
                f"{num_prefix_tokens} prefix tokens; consumed samples and iteration disagree"
            )
