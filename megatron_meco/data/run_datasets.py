"""The training, validation and test datasets of a run.

`build_datasets` composes them from `MeCoGPTDataset`s: training switches phase at a sample index,
validation and test show every pack once in each view, evaluation by evaluation.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_meco.config import CONDITIONED, COOLDOWN, PHASES, PLAIN, View
from megatron_meco.data.dataset import MeCoGPTDataset, MeCoGPTDatasetConfig, Sample
from megatron_meco.data.evaluation import EVALUATION_VIEWS, EvaluationBlocks, FullEvaluation
from megatron_meco.data.phases import Schedule
from megatron_meco.errors import DataError

Blend = tuple[list[str], list[float] | None]
"""Corpora, and their weights or None, as Megatron's dataset configuration has them."""


class _Composed(torch.utils.data.Dataset[Sample]):
    """Samples that each come from one of several datasets."""

    split: Split

    def locate(self, idx: int) -> tuple[Any, int]:
        """The dataset of sample `idx`, and the sample's index in it."""
        raise NotImplementedError

    def __getitem__(self, idx: int | None) -> Sample:
        dataset, index = self.locate(idx or 0)
        sample: Sample = dataset[index if idx is not None else None]
        return sample


class PhasedDataset(_Composed):
    """Training samples, phase by phase.

    They are plain below `schedule.start_sample`, conditioned below `schedule.switch_sample` and
    cooldown from there on. The phase depends on the sample index alone, so neither rank nor order
    of access matters.

    Attributes:
        split: Megatron's loader asks for it.
        plain: The phase before the conditioned one, or None if it has no samples (the default).
        conditioned: The phase with metadata, or None if it has no samples.
        cooldown: The last phase, or None if it has no samples.
        num_spare: Number of extra samples, which repeat the last one. Megatron's loader needs at
            least one sample, even where a finished run is started again.
    """

    split = Split.train
    num_spare = 0

    def __init__(
        self,
        conditioned: Any | None,
        cooldown: Any | None,
        schedule: Schedule,
        plain: Any | None = None,
    ) -> None:
        self.plain = plain
        self.conditioned = conditioned
        self.cooldown = cooldown
        self.schedule = schedule

    def __len__(self) -> int:
        return self.schedule.num_samples + self.num_spare

    @property
    def parts(self) -> tuple[Any | None, ...]:
        """The phases, in the order of `config.PHASES`."""
        return self.plain, self.conditioned, self.cooldown

    def locate(self, idx: int) -> tuple[Any, int]:
        """The phase's dataset and the index within it of global sample `idx`."""
        if not 0 <= idx < len(self):
            raise IndexError(idx)
        idx = min(idx, self.schedule.num_samples - 1)
        phase = self.schedule.phase_of_sample(idx)
        return getattr(self, phase), idx - self.schedule.samples_of(phase).start


class ViewsDataset(_Composed):
    """Validation samples: every pack once in each view, pack by pack.

    All views of a pack have the same body tokens, so their losses differ by the metadata alone.
    Samples carry `meco_view`, an int64 scalar: the number of their `View`, and `meco_compared`, see
    `MeCoGPTDataset`. Nothing is compared of a pack that an evaluation does not show in all views,
    which is the last one if the evaluation's samples are not a multiple of the views.

    Attributes:
        views: The same packs in each view.
        split: Megatron's loader asks for it.
        blocks: Which samples belong to one evaluation.
    """

    def __init__(
        self,
        views: Mapping[View, Any],
        split: Split,
        blocks: EvaluationBlocks,
        num_samples: int | None = None,
    ) -> None:
        self.views = dict(views)
        self.split = split
        self.blocks = blocks
        available = blocks.samples_of(min(len(dataset) for dataset in self.parts))
        self._num_samples = available if num_samples is None else min(available, num_samples)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, idx: int | None) -> Sample:
        _, view, is_complete = self.blocks.locate(idx or 0)
        sample = {**super().__getitem__(idx), "meco_view": torch.tensor(int(view))}
        if not is_complete:
            sample["meco_compared"] = torch.zeros_like(sample["meco_compared"])
        return sample

    @property
    def parts(self) -> tuple[Any, ...]:
        """The datasets of all views."""
        return tuple(self.views.values())

    def locate(self, idx: int) -> tuple[Any, int]:
        """The dataset of the view, and the number of the pack, of sample `idx`."""
        if not 0 <= idx < len(self):
            raise IndexError(idx)
        pack, view, _ = self.blocks.locate(idx)
        return self.views[view], pack


class FullViewsDataset(_Composed):
    """Validation samples: the whole split, again for each evaluation.

    An evaluation has the sets one after the other, each pack by pack, each pack once in each view.
    Samples without labels in the loss fill up its last batch. Samples carry `meco_view`, see
    `ViewsDataset`, and `meco_set`, an int64 scalar: the number of their set.

    Attributes:
        sets: Of each set, the same packs in each view.
        split: Megatron's loader asks for it.
        evaluations: How many evaluations there are, and of what batches.
        evaluation_size: Samples of an evaluation, a multiple of its batch.
    """

    def __init__(
        self, sets: Sequence[Mapping[View, Any]], split: Split, evaluations: FullEvaluation
    ) -> None:
        self.sets = [dict(views) for views in sets]
        self.split = split
        self.evaluations = evaluations
        # Where the samples of each set end.
        lengths = [len(views) * min(map(len, views.values())) for views in self.sets]
        self._ends = list(itertools.accumulate(lengths))
        self.evaluation_size = -(-self._ends[-1] // evaluations.batch) * evaluations.batch

    def __len__(self) -> int:
        return self.evaluations.begin + self.evaluations.number * self.evaluation_size

    def __getitem__(self, idx: int | None) -> Sample:
        place = self._place(idx or 0)
        sample = super().__getitem__(idx)
        number, view, _ = self._find(place)
        sample |= {"meco_view": torch.tensor(int(view)), "meco_set": torch.tensor(number)}
        if place >= self._ends[-1]:
            for mask in {"loss_mask", "meco_compared"} & sample.keys():
                sample[mask] = torch.zeros_like(sample[mask])
        return sample

    @property
    def parts(self) -> tuple[Any, ...]:
        """The datasets of all sets and views."""
        return tuple(dataset for views in self.sets for dataset in views.values())

    def locate(self, idx: int) -> tuple[Any, int]:
        """The dataset of the set and view, and the number of the pack, of sample `idx`."""
        if not 0 <= idx < len(self):
            raise IndexError(idx)
        number, view, pack = self._find(self._place(idx))
        return self.sets[number][view], pack

    def _place(self, idx: int) -> int:
        return (idx - self.evaluations.begin) % self.evaluation_size

    def _find(self, place: int) -> tuple[int, View, int]:
        # What fills up a batch repeats the last sample.
        place = min(place, self._ends[-1] - 1)
        number = bisect.bisect_right(self._ends, place)
        views = list(self.sets[number])
        begin = self._ends[number - 1] if number else 0
        pack, turn = divmod(place - begin, len(views))
        return number, views[turn], pack


def build_datasets(
    sizes: Sequence[int | None],
    is_built_on_rank: Callable[[], bool],
    config: MeCoGPTDatasetConfig,
    schedule: Schedule,
    cooldown_blend: Blend | None = None,
    evaluation: EvaluationBlocks | None = None,
    full: FullEvaluation | None = None,
) -> tuple[Any | None, Any | None, Any | None]:
    """Build the training, validation and test datasets of a run.

    Collective: must be called on all ranks, like Megatron's builder.

    Args:
        sizes: Samples of the three splits; None: one epoch. The first is ignored: the schedule has
            the number of training samples.
        is_built_on_rank: Whether this rank holds datasets.
        config: The configuration of the conditioned phase.
        schedule: Where the run switches.
        cooldown_blend: Corpora of the cooldown; None: a share of the training documents that the
            conditioned phase leaves out.
        evaluation: Which validation samples belong together; None: all of them. A test split is one
            evaluation of the same size.
        full: Each evaluation reads the whole validation split. `sizes[1]` and `evaluation` are not
            used, and a test split has as many samples as one evaluation.

    Returns:
        Training, validation and test dataset; None for a split without documents, and on a rank
        that holds no datasets.

    Raises:
        DataError: A corpus is damaged, or a blend has too few samples.
        FlagError: The template does not match the metadata.
    """
    build = _SplitBuilder(is_built_on_rank, config)
    train = _build_training(build, schedule, cooldown_blend)
    if full is not None:
        valid = _build_full_validation(build, full)
        if valid is not None:
            evaluation = EvaluationBlocks(valid.evaluation_size)
            sizes = [sizes[0], None, valid.evaluation_size if sizes[2] else 0]
    else:
        valid = _build_evaluation(build, sizes[1], Split.valid, evaluation)
    # Megatron reads it from the first sample on, whatever was read before.
    whole = None if evaluation is None else EvaluationBlocks(evaluation.size)
    test = _build_evaluation(build, sizes[2], Split.test, whole)
    if train is not None:
        path = "--meco-cooldown-data-path" if cooldown_blend else "--data-path"
        for phase, what, flag in (
            (PLAIN, "plain phase", "--data-path"),
            (CONDITIONED, "conditioned phase", "--data-path"),
            (COOLDOWN, "cooldown", path),
        ):
            needed = len(schedule.samples_of(phase))
            _check_enough(getattr(train, phase), needed, what, flag)
    for dataset, split in ((valid, Split.valid), (test, Split.test)):
        _check_enough(dataset, sizes[split.value], f"{split.name} split", "--data-path")
    return train, valid, test


class _SplitBuilder:
    """Builds one split at a time with Megatron's builder, which has the blends and barriers."""

    def __init__(self, is_built_on_rank: Callable[[], bool], config: MeCoGPTDatasetConfig) -> None:
        self.is_built_on_rank = is_built_on_rank
        self.config = config

    def __call__(self, size: int | None, split: Split, /, **changes: Any) -> Any | None:
        """The dataset of `split` with `changes` to the configuration; None without samples."""
        if size == 0:
            return None
        config = dataclasses.replace(self.config, **changes)
        if config.blend_per_split is not None:
            config.blend_per_split = _only(split, config.blend_per_split)
        else:
            assert config.split_matrix is not None
            config.split_matrix = _only(split, config.split_matrix)
        sizes = [size if part is split else 0 for part in Split]
        builder = BlendedMegatronDatasetBuilder(
            MeCoGPTDataset, sizes, self.is_built_on_rank, config
        )
        return builder.build()[split.value]


def _only[T](split: Split, by_split: Sequence[T]) -> list[T | None]:
    return [value if i == split.value else None for i, value in enumerate(by_split)]


def _build_training(
    build: _SplitBuilder, schedule: Schedule, cooldown_blend: Blend | None
) -> PhasedDataset | None:
    shares = schedule.document_shares(build.config.meco, own_cooldown=bool(cooldown_blend))
    parts: dict[str, Any] = {}
    for phase in PHASES:
        changes: dict[str, Any] = {"phase": phase, "document_share": shares[phase]}
        if phase == COOLDOWN and cooldown_blend:
            changes |= {"blend": cooldown_blend, "blend_per_split": None, "split": "1,0,0"}
        # Without samples nothing is built.
        parts[phase] = build(len(schedule.samples_of(phase)), Split.train, **changes)
    if not any(part is not None for part in parts.values()):
        return None
    return PhasedDataset(schedule=schedule, **parts)


def _build_evaluation(
    build: _SplitBuilder, size: int | None, split: Split, blocks: EvaluationBlocks | None
) -> Any | None:
    if not build.config.meco.has_metadata:
        return build(size, split)  # the baseline has no metadata to leave out
    if blocks is None or blocks.size == 0:
        # One evaluation has it all.
        blocks = EvaluationBlocks(size or len(EVALUATION_VIEWS))
    packs = None if size is None else blocks.packs_for(size)
    views = {view: build(packs, split, view=view, compare=True) for view in EVALUATION_VIEWS}
    return None if None in views.values() else ViewsDataset(views, split, blocks, size)


def _build_full_validation(build: _SplitBuilder, full: FullEvaluation) -> FullViewsDataset | None:
    """The whole validation split in each view; None on a rank that holds no datasets.

    Raises:
        DataError: There are no documents to validate on.
    """
    views = EVALUATION_VIEWS if build.config.meco.has_metadata else (View.CONDITIONED,)
    blends = [[None, ([corpus], None), None] for corpus in full.sets]
    sets = []
    for change in [{"blend_per_split": blend} for blend in blends] or [{}]:
        built = {
            view: build(None, Split.valid, view=view, compare=len(views) > 1, **change)
            for view in views
        }
        if None not in built.values():
            # The view of the baseline, which has no metadata to leave out.
            sets.append(built if len(views) > 1 else {View.PLAIN: built[View.CONDITIONED]})
    if not sets and build.is_built_on_rank():
        raise DataError(
            "there are no documents to validate on",
            where="--full-validation",
            remedy="Give --valid-data-path, or --split a share for validation, such as 99,1,0.",
        )
    return FullViewsDataset(sets, Split.valid, full) if sets else None


def _check_enough(dataset: Any | None, needed: int | None, what: str, flag: str) -> None:
    """Refuse a run that would run out of samples.

    Megatron repeats the documents of a single corpus and of a weighted blend as often as needed,
    but never those of a blend without weights.
    """
    if dataset is None or needed is None or len(dataset) >= needed:
        return
    raise DataError(
        f"the corpora give {len(dataset):,} samples to the {what}, which needs {needed:,}; a blend "
        "without weights shows each document once",
        where=flag,
        remedy="Give a weight before each corpus (0.5 A 0.5 B), add documents, or shorten the run.",
    )
