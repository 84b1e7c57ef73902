"""The phase-switch hook: announce the switch, save a checkpoint there, check what follows.

The switch itself is nothing but the sample index passing `Schedule.switch_sample` (see
`megatron_meco.data.phases`); this module makes it visible and safe. `PhaseSwitch.before_step` runs
at the first micro-batch of each training step; `check_batch` looks at what the loader delivered, on
the host, before it goes to the device. The checkpoint itself is Megatron's, by
`megatron_patches.SaveInterval`. Costs a few comparisons of integers for each micro-batch.
"""

from __future__ import annotations

from typing import Any

from megatron_meco.config import CONDITIONED, COOLDOWN
from megatron_meco.data.phases import Schedule


class PhaseSwitch:
    """What a run says and checks about its phases.

    Args:
        schedule: Where the run switches.
        saves: Whether the run saves checkpoints.
    """

    def __init__(self, schedule: Schedule, *, saves: bool) -> None:
        self.schedule = schedule
        self.saves = saves
        self._last_step: int | None = None

    def before_step(
        self, iteration: int, writer: Any | None, wandb_writer: Any | None = None
    ) -> str | None:
        """Note the start of a training step; idempotent within a step.

        Args:
            iteration: Finished training steps.
            writer: TensorBoard's writer, or None on ranks without one.
            wandb_writer: Megatron's handle on W&B, or None.

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
        """Check that a batch of the cooldown carries no prefix.

        Args:
            iteration: Finished training steps.
            num_prefix_tokens: Prefix tokens in the micro-batch.

        Raises:
            RuntimeError: When it does: the run must not go on.
        """
        if self.schedule.phase_of_iteration(iteration) != CONDITIONED and num_prefix_tokens:
            raise RuntimeError(
                f"iteration {iteration + 1} belongs to the cooldown, but its batch holds "
                f"{num_prefix_tokens} prefix tokens; consumed samples and iteration disagree"
            )
