"""Which validation sample shows which pack in which view. Needs neither torch nor Megatron.

Megatron averages the losses of `eval_iters` batches. Every view must have the same packs in each
such average, so views are dealt within an evaluation, never across two.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_meco.config import View

EVALUATION_VIEWS = (View.CONDITIONED, View.PLAIN, View.SHUFFLED)
"""Views of each validation and test pack, in the order of their samples."""


@dataclass(frozen=True)
class EvaluationBlocks:
    """Which samples belong to one evaluation, and so are averaged.

    Attributes:
        size: Samples of an evaluation: `eval_iters` times the evaluation's global batch size.
        begin: Any sample at which an evaluation begins. Not a multiple of `size` where a run goes
            on with another size.
    """

    size: int
    begin: int = 0

    @property
    def packs(self) -> int:
        """Packs that an evaluation shows, the last one perhaps not in all views."""
        return -(-self.size // len(EVALUATION_VIEWS))

    def packs_for(self, num_samples: int) -> int:
        """Packs that the first `num_samples` samples need."""
        return max(self.locate(num_samples - 1)[0] + 1, 0)

    def samples_of(self, num_packs: int) -> int:
        """How many samples, from the first on, need no more than `num_packs` packs."""
        blocks, rest = divmod(num_packs, self.packs)
        skipped = -self.begin % self.size
        return max(0, blocks * self.size + rest * len(EVALUATION_VIEWS) - skipped)

    def locate(self, idx: int) -> tuple[int, View, bool]:
        """Pack and view of a sample, and whether its evaluation has all views of the pack."""
        block, place = divmod(idx + -self.begin % self.size, self.size)
        number, turn = divmod(place, len(EVALUATION_VIEWS))
        complete = (number + 1) * len(EVALUATION_VIEWS) <= self.size
        return block * self.packs + number, EVALUATION_VIEWS[turn], complete


@dataclass(frozen=True)
class FullEvaluation:
    """Evaluations that each read a whole split: every pack once in each view.

    Attributes:
        batch: The evaluation's global batch size. Samples without labels in the loss fill the last
            batch of an evaluation.
        begin: Any sample at which an evaluation begins, as in `EvaluationBlocks`.
        number: Evaluations from there on.
        sets: Paths of the corpora whose losses are reported apart; empty: all in one.
    """

    batch: int
    begin: int
    number: int
    sets: tuple[str, ...] = ()
