"""MeCo in Megatron-Bridge: a dataset provider, a forward step and a callback.

    from megatron.bridge.training.pretrain import pretrain
    from megatron_meco.bridge import MeCoCallback, MeCoDatasetProvider, forward_step

    config.dataset = MeCoDatasetProvider(data_path=["corpus/pages"], seq_length=8192,
                                         global_batch_size=config.train.global_batch_size)
    pretrain(config, forward_step, callbacks=[MeCoCallback(config.dataset)])

Written against the signatures of Megatron-Bridge 0.6.0, and tested against a stand-in with these
signatures; docs/bridge.md says what was run and what was not. Samples are those of a run of
Megatron-LM with the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.datasets.utils import get_blend_from_list

from megatron_meco.config import MeCoConfig
from megatron_meco.data.borders import merged
from megatron_meco.data.dataset import MeCoGPTDatasetConfig
from megatron_meco.data.evaluation import EVALUATION_VIEWS
from megatron_meco.data.phases import BatchSize, Schedule, make_schedule
from megatron_meco.data.run_datasets import ViewsDataset, build_datasets
from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.training.phase_switch import PhaseSwitch

try:
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.config import DatasetBuildContext, DatasetProvider
    from megatron.bridge.training.gpt_step import forward_step as bridge_forward_step
    from megatron.bridge.training.state import GlobalState
except ImportError as error:
    raise MeCoError(
        f"cannot be imported ({error})",
        where="megatron.bridge",
        remedy="Install Megatron-Bridge 0.6 with its GPU stack, or train with Megatron-LM.",
    ) from error


class BridgeSamples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Samples with the collate function that Bridge's loader asks a dataset for.

    Args:
        dataset: Samples as `MeCoGPTDataset` has them.
        num_stages: Pipeline stages of the run.
    """

    def __init__(self, dataset: Any, num_stages: int) -> None:
        self.dataset = dataset
        self.num_stages = num_stages

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample: dict[str, torch.Tensor] = self.dataset[idx]
        return sample

    def collate_fn(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
        """A micro-batch as one row, in Bridge's keys.

        Args:
            samples: Samples of one length S.

        Returns:
            tokens, labels, position_ids: (1, samples * S), int64.
            loss_mask: Likewise, float32.
            attention_mask: None.
            cu_seqlens_q, cu_seqlens_kv: (1, documents + 1), int32, one tensor; its tail repeats the
                end of the row. Bridge passes these keys on as they are.
            max_seqlen_q, max_seqlen_kv: int32 scalars: an upper bound, one more than S, because
                Megatron's RoPE does not restart in a pack as long as its table of angles.

        Raises:
            FlagError: With pipeline stages and more than one sample.
        """
        if self.num_stages > 1 and len(samples) > 1:
            raise FlagError(
                f"{len(samples)} samples make one row, and pipeline stages expect as many rows",
                where="train.micro_batch_size",
                remedy="Use a micro-batch size of 1 with pipeline stages.",
            )

        def row(key: str) -> torch.Tensor:
            return torch.cat([sample[key] for sample in samples])[None]

        length = len(samples[0]["tokens"])
        bounds = merged(torch.stack([sample["cu_seqlens"] for sample in samples]), length)[None]
        longest = torch.tensor(length + 1, dtype=torch.int32)
        return {
            **{key: row(key) for key in ("tokens", "labels", "loss_mask", "position_ids")},
            "attention_mask": None,
            "cu_seqlens_q": bounds,
            "cu_seqlens_kv": bounds,
            "max_seqlen_q": longest,
            "max_seqlen_kv": longest,
        }


@dataclass(kw_only=True)
class MeCoDatasetProvider(DatasetProvider):  # type: ignore[misc]
    """MeCo's datasets as a dataset configuration of Bridge.

    Raises:
        FlagError: From `finalize`, for a setting that cannot be honoured.
    """

    data_path: list[str]
    """Corpora, or weights and corpora in turn, as Megatron's `--data-path`."""

    seq_length: int
    """Tokens of a sample."""

    global_batch_size: int
    """That of the training configuration: phases switch between steps."""

    meco: MeCoConfig = field(default_factory=MeCoConfig)
    """What was chosen about metadata."""

    split: str = "9999,8,2"
    """Weights of training, validation and test documents."""

    random_seed: int = 1234
    """Megatron's `--seed`."""

    path_to_cache: str | None = None
    """Where plans and prefix tables are kept; None: beside the corpus."""

    vocab_size: int | None = None
    """Number of embeddings of the model; None: that of the tokenizer."""

    separate_views: bool = False
    """Whether validation is one dataset for each view (conditioned, plain, shuffled), for
    `ValidationConfig.multiple_validation_sets`. Otherwise views alternate in one dataset, and
    Bridge's one validation loss is their mean."""

    dataloader_type: str = "single"
    """Phases follow the order of the samples, which no other keeps."""

    enable_in_batch_packing: bool = True
    """Declares packed samples to Bridge, which otherwise gives no document borders to pipeline
    stages in the middle."""

    def finalize(self) -> None:
        """Check the settings, as Bridge does before it builds anything."""
        super().finalize()
        for name, value, needed in (
            ("dataloader_type", self.dataloader_type, "single"),
            ("enable_in_batch_packing", self.enable_in_batch_packing, True),
            ("data_sharding", self.data_sharding, True),
        ):
            if value != needed:
                raise FlagError(
                    f"{value!r} does not go with MeCo",
                    where=f"dataset.{name}",
                    remedy=f"Leave it at {needed!r}.",
                )

    def schedule(self, num_samples: int) -> Schedule:
        """Where the run switches.

        Args:
            num_samples: Training samples of the run.

        Raises:
            FlagError: When they are no whole number of steps.
        """
        if num_samples % self.global_batch_size:
            raise FlagError(
                f"{num_samples:,} training samples are no whole number of steps of "
                f"{self.global_batch_size}",
                where="dataset.global_batch_size",
                remedy="Give that of the training configuration, without ramp-up.",
            )
        steps = num_samples // self.global_batch_size
        batch_size = BatchSize.constant(self.global_batch_size)
        return make_schedule(self.meco, batch_size, train_iterations=steps)

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, Any]:
        """Build the three datasets; Bridge calls it on every rank.

        Args:
            context: Sample counts, tokenizer and process groups.

        Returns:
            Training, validation and test dataset, None for a split without documents. With
            `separate_views` the second is a list.

        Raises:
            DataError: When corpus, metadata or caches are damaged or do not fit one another.
            FlagError: When the run cannot be honoured.
        """
        groups = context.pg_collection
        num_parts = 1 if groups is None else groups.cp.size()
        if num_parts > 1:
            raise FlagError(
                "not tested in Megatron-Bridge",
                where=f"model.context_parallel_size {num_parts}",
                remedy="Use 1, or train with Megatron-LM.",
            )
        config = MeCoGPTDatasetConfig(
            random_seed=self.random_seed,
            sequence_length=self.seq_length,
            blend=get_blend_from_list([str(word) for word in self.data_path]),
            split=self.split,
            path_to_cache=self.path_to_cache,
            tokenizer=context.tokenizer,
            vocab_size=self.vocab_size,
            meco=self.meco,
        )
        sizes = (context.train_samples, context.valid_samples, context.test_samples)
        if self.separate_views and self.meco.has_metadata:
            # Each view is a dataset of that many samples.
            sizes = (sizes[0], len(EVALUATION_VIEWS) * sizes[1], sizes[2])
        cooldown = get_blend_from_list(list(self.meco.cooldown_data_path) or None)
        train, valid, test = build_datasets(
            sizes, lambda: True, config, self.schedule(context.train_samples), cooldown
        )
        stages = 1 if groups is None else groups.pp.size()
        if self.separate_views and isinstance(valid, ViewsDataset):
            return (
                _for_bridge(train, stages),
                [BridgeSamples(part, stages) for part in valid.parts],
                _for_bridge(test, stages),
            )
        return tuple(_for_bridge(dataset, stages) for dataset in (train, valid, test))  # type: ignore[return-value]


def _for_bridge(dataset: Any | None, stages: int) -> BridgeSamples | None:
    return None if dataset is None else BridgeSamples(dataset, stages)


class MeCoCallback(Callback):  # type: ignore[misc]
    """Says in which phase a run begins and where it switches, and that its samples are in order.

    Bridge saves at multiples of its interval alone: choose one that divides the step of the switch
    to keep a checkpoint there.

    Args:
        provider: The dataset configuration of the run.
    """

    def __init__(self, provider: MeCoDatasetProvider) -> None:
        self.provider = provider
        self._switch: PhaseSwitch | None = None

    def on_train_step_start(self, context: Any) -> None:
        """Say and check, before each training step.

        Args:
            context: Bridge's `CallbackContext`.

        Raises:
            RuntimeError: When consumed samples and finished steps disagree: the run would be in
                another phase than its step says.
        """
        progress, train = context.state.train_state, context.state.cfg.train
        if self._switch is None:
            samples = train.train_samples or train.train_iters * train.global_batch_size
            saves = bool(getattr(context.state.cfg.checkpoint, "save", None))
            self._switch = PhaseSwitch(self.provider.schedule(samples), saves=saves)
        expected = progress.step * self.provider.global_batch_size
        if progress.consumed_train_samples != expected:
            raise RuntimeError(
                f"step {progress.step} begins at sample {progress.consumed_train_samples:,}, not "
                f"{expected:,}: phases are counted in steps of {self.provider.global_batch_size}"
            )
        text = self._switch.before_step(progress.step, None)
        if text and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
            print(text, flush=True)


def forward_step(
    state: GlobalState, data_iterator: Any, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """Bridge's own forward step, with the loss mask given to the model.

    Bridge 0.6 masks the model's loss afterwards, and hands the model no mask: further heads of
    multi-token prediction would train on prefixes.

    Args:
        state: Bridge's global state.
        data_iterator: Gives batches of `BridgeSamples.collate_fn`.
        model: The model chunk.
        return_schedule_plan: As Bridge takes it.

    Returns:
        The output tensor and the loss function.
    """
    batches = _Recorded(data_iterator)
    stock: tuple[Any, Any] = bridge_forward_step(
        state, batches, _GivesLossMask(model, batches), return_schedule_plan
    )
    return stock


class _Recorded:
    """An iterator that remembers the loss mask of its last batch."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self.loss_mask: torch.Tensor | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        self.loss_mask = batch["loss_mask"]
        return batch


class _GivesLossMask:
    """A model that is given the loss mask wherever it is given labels."""

    def __init__(self, model: Any, batches: _Recorded) -> None:
        self._model = model
        self._batches = batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is not None and kwargs.get("loss_mask") is None:
            mask = self._batches.loss_mask
            assert mask is not None and mask.shape == labels.shape
            kwargs["loss_mask"] = mask.to(labels.device, non_blocking=True)
        return self._model(*args, **kwargs)
