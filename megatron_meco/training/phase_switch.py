"""Announces the phase switch and checks the batches after it.

The switch itself happens where the sample index reaches `Schedule.switch_sample` (see
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
        if writer is not None:
            writer.add_scalar("meco/cooldown", int(phase == COOLDOWN), iteration + 1)
        if wandb_writer is not None:
            wandb_writer.log({"meco/cooldown": int(phase == COOLDOWN)}, iteration + 1)
        if iteration == self.schedule.switch_iteration and iteration > 0:
            saved = "checkpoint saved" if self.saves else "no --save, so no checkpoint"
            text = (
                f"> MeCo: switch after iteration {iteration}, at sample "
                f"{self.schedule.switch_sample}: conditioned -> cooldown ({saved})"
            )
            if writer is not None:
                writer.add_text("meco/switch", text, iteration)
            return text
        return f"> MeCo: iteration {iteration + 1} begins in the {phase} phase" if first else None

    def check_batch(self, iteration: int, num_prefix_tokens: int) -> None:
        """Check that a batch of the cooldown has no prefix.

        Args:
            iteration: Finished training steps.
            num_prefix_tokens: Number of prefix and suffix tokens in the micro-batch.

        Raises:
            RuntimeError: It has one.
        """
        if self.schedule.phase_of_iteration(iteration) != CONDITIONED and num_prefix_tokens:
            raise RuntimeError(
                f"iteration {iteration + 1} belongs to the cooldown, but its batch holds "
                f"{num_prefix_tokens} prefix tokens; consumed samples and iteration disagree"
            )
