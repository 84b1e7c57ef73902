"""MeCo's samples for trainers that are not Megatron's: ready-made batches in a plain DataLoader.

    run = PlainRun("corpus/pages", tokenizer="tokenizer", sequence_length=8192, num_steps=1000,
                   global_batch_size=64)
    batches = run.training_batches(micro_batch_size=4, borders="document_ids")
    for batch in DataLoader(batches, batch_size=None, num_workers=2): ...

Batches come ready-made and in order, because phases follow the order of the samples: a DataLoader
refuses to shuffle them or to give them a sampler. Rank `r` of `n` has the samples that Megatron's
data-parallel rank `r` has. Where a model must not train, `targets` holds -100, which PyTorch's
cross entropy leaves out. The caller says how attention is kept within documents (`borders`); a
batch whose tokens are read and whose borders are not is warned of.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.datasets.utils import get_blend_from_list

from megatron_meco.config import MeCoConfig
from megatron_meco.corpus.tokenizer import build_tokenizer
from megatron_meco.data.borders import documents_of, merged
from megatron_meco.data.dataset import MeCoGPTDatasetConfig
from megatron_meco.data.phases import BatchSize, make_schedule
from megatron_meco.data.run_datasets import build_datasets
from megatron_meco.errors import FlagError

Borders = Literal["document_ids", "cu_seqlens", "none"]
BORDERS: dict[str, tuple[str, ...]] = {
    "document_ids": ("document_ids",),
    "cu_seqlens": ("cu_seqlens",),
    "none": (),
}
"""Values of `borders`, and the keys of a batch of which a trainer must read one."""

IGNORED_TARGET = -100
"""`targets` where nothing is predicted: `ignore_index` of PyTorch's cross entropy."""


class PackedBatch(Mapping[str, Any]):
    """A micro-batch; a read-only mapping that remembers which of its keys were read.

    Args:
        values: The tensors by name.

    Raises:
        FlagError: When batches were batched again.
    """

    _warned = False

    def __init__(self, values: Mapping[str, Any]) -> None:
        if values["tokens"].dim() != 2:
            raise FlagError(
                "a batch of batches: they come ready-made from the dataset",
                where="DataLoader(batch_size)",
                remedy="Give DataLoader(..., batch_size=None), and the size to training_batches.",
            )
        self._values = dict(values)
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        # Mapping's own reads the value.
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        shapes = {k: tuple(getattr(v, "shape", ())) for k, v in self._values.items()}
        return f"{type(self).__name__}({shapes})"

    def to(self, device: Any, non_blocking: bool = False) -> PackedBatch:
        """The same batch on a device."""
        moved = {
            key: value.to(device, non_blocking=non_blocking) if torch.is_tensor(value) else value
            for key, value in self._values.items()
        }
        return PackedBatch(moved)

    def __del__(self) -> None:
        # While Python ends, this module's own names may be None.
        if sys is None or sys.is_finalizing():
            return
        values: dict[str, Any] = getattr(self, "_values", {})
        read: set[str] = getattr(self, "_read", set())
        unread = {name for names in BORDERS.values() for name in names} & values.keys()
        ignored = unread and "tokens" in read and not unread & read
        if ignored and not PackedBatch._warned:
            PackedBatch._warned = True
            name = " / ".join(sorted(unread))
            warnings.warn(
                f"MeCo: tokens of a batch were read and its {name} never was: attention that does "
                "not use it goes from one document to the next, and from its prefix too.",
                RuntimeWarning,
                stacklevel=2,
            )


class PackedBatches(torch.utils.data.IterableDataset[PackedBatch]):
    """Micro-batches of one rank, in the order of training, for `DataLoader(batch_size=None)`.

    Workers of a DataLoader take turns, so the order does not depend on their number.

    Args:
        dataset: Samples as `MeCoGPTDataset` has them.
        micro_batch_size: Samples in a batch.
        borders: How documents are told apart, see `PlainRun.training_batches`.
        rank: This data-parallel rank.
        world_size: Number of data-parallel ranks.
        num_samples: Samples to go through, over all ranks; fillers without targets complete the
            last batches.
        first_sample: Where to begin, a multiple of `micro_batch_size * world_size`.

    Raises:
        FlagError: When a number or `borders` cannot be honoured.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        micro_batch_size: int,
        borders: Borders,
        rank: int = 0,
        world_size: int = 1,
        num_samples: int | None = None,
        first_sample: int = 0,
    ) -> None:
        if borders not in BORDERS:
            raise FlagError(
                f"{borders!r} is none of {', '.join(BORDERS)}",
                where="borders",
                remedy="Say what your attention takes: document_ids for a block mask "
                "(FlexAttention), cu_seqlens for varlen kernels.",
            )
        _check_whole("micro_batch_size", micro_batch_size, 1)
        _check_whole("world_size", world_size, 1)
        _check_whole("rank", rank, 0, world_size - 1)
        if borders == "none":
            warnings.warn(
                "MeCo: borders='none': attention goes across documents, and later documents of a "
                "sequence see the prefixes of earlier ones.",
                UserWarning,
                stacklevel=3,
            )
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.borders = borders
        self.rank = rank
        self.world_size = world_size
        self.num_samples = len(dataset) if num_samples is None else num_samples
        step = micro_batch_size * world_size
        _check_whole("first_sample", first_sample, 0, self.num_samples)
        assert first_sample % step == 0, (first_sample, step)
        self._chunks = range(first_sample // step, -(-self.num_samples // step))

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[PackedBatch]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for chunk in self._chunks[first::step]:
            begin = (chunk * self.world_size + self.rank) * self.micro_batch_size
            indices = range(begin, begin + self.micro_batch_size)
            samples = [self.dataset[i if i < self.num_samples else None] for i in indices]
            yield make_batch(samples, self.borders)


class PlainRun:
    """The samples of a MeCo run without Megatron's flags.

    The same samples as a Megatron run with these numbers. With several ranks it is made on all of
    them, after `torch.distributed.init_process_group`: the first rank builds the caches.

    Args:
        data_path: The corpus without suffix, or a list as Megatron's `--data-path` takes it:
            corpora, or weights and corpora in turn.
        tokenizer: Folder or name of the Hugging Face tokenizer that the corpus was prepared with.
        sequence_length: Tokens of a sample.
        num_steps: Optimizer steps of the whole run; the cooldown is its last part.
        global_batch_size: Samples of an optimizer step, over all ranks.
        meco: What was chosen about metadata.
        num_valid_samples: Samples for `validation_batches`; each pack makes three.
        split: Megatron's `--split`: weights of training, validation and test documents.
        seed: Megatron's `--seed`.
        vocab_size: Number of embeddings of the model; None: that of the tokenizer.
        cache_folder: Where plans and prefix tables are kept; None: beside the corpus.

    Raises:
        DataError: When corpus, metadata or caches are damaged or do not fit one another.
        FlagError: When a number, the template or the tokenizer cannot be honoured.
    """

    def __init__(
        self,
        data_path: str | Path | Sequence[str | float],
        *,
        tokenizer: str | Path,
        sequence_length: int,
        num_steps: int,
        global_batch_size: int,
        meco: MeCoConfig | None = None,
        num_valid_samples: int = 0,
        split: str = "1,0,0",
        seed: int = 1234,
        vocab_size: int | None = None,
        cache_folder: str | Path | None = None,
    ) -> None:
        meco = meco or MeCoConfig()
        for name, value, least in (
            ("num_steps", num_steps, 1),
            ("global_batch_size", global_batch_size, 1),
            ("num_valid_samples", num_valid_samples, 0),
        ):
            _check_whole(name, value, least)
        paths = [data_path] if isinstance(data_path, str | Path) else list(data_path)
        config = MeCoGPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend=get_blend_from_list([str(path) for path in paths]),
            split=split,
            path_to_cache=None if cache_folder is None else str(cache_folder),
            tokenizer=build_tokenizer("HuggingFaceTokenizer", str(tokenizer)),
            vocab_size=vocab_size,
            meco=meco,
        )
        self.global_batch_size = global_batch_size
        self.schedule = make_schedule(
            meco, BatchSize.constant(global_batch_size), train_iterations=num_steps
        )
        cooldown = get_blend_from_list(list(meco.cooldown_data_path) or None)
        sizes = (self.schedule.num_samples, num_valid_samples, 0)
        self.train, self.valid, _ = build_datasets(
            sizes, lambda: True, config, self.schedule, cooldown
        )
        self._num_valid_samples = num_valid_samples

    def training_batches(
        self,
        *,
        micro_batch_size: int,
        borders: Borders,
        rank: int = 0,
        world_size: int = 1,
        first_step: int = 0,
    ) -> PackedBatches:
        """Micro-batches of one rank: `global_batch_size / (micro_batch_size * world_size)` a step.

        Args:
            micro_batch_size: Samples in a batch.
            borders: What the trainer's attention tells documents apart by. "document_ids": a block
                mask (FlexAttention), shapes as in `make_batch`. "cu_seqlens": varlen kernels; the
                batch is one flat row. "none": nothing, attention goes across documents; warned of.
            rank: This data-parallel rank.
            world_size: Number of data-parallel ranks.
            first_step: Optimizer steps taken before, for a run that is resumed.

        Raises:
            FlagError: When the sizes do not divide one another.
        """
        _check_whole("micro_batch_size", micro_batch_size, 1)
        _check_whole("world_size", world_size, 1)
        _check_whole("first_step", first_step, 0, self.schedule.num_iterations)
        if self.global_batch_size % (micro_batch_size * world_size):
            raise FlagError(
                f"{micro_batch_size} x {world_size} ranks does not divide the global batch size "
                f"{self.global_batch_size}",
                where="micro_batch_size",
                remedy="Choose sizes that divide it, or accumulate over more micro-batches.",
            )
        return PackedBatches(
            self.train,
            micro_batch_size=micro_batch_size,
            borders=borders,
            rank=rank,
            world_size=world_size,
            num_samples=self.schedule.num_samples,
            first_sample=first_step * self.global_batch_size,
        )

    def validation_batches(
        self, *, micro_batch_size: int, borders: Borders, rank: int = 0, world_size: int = 1
    ) -> PackedBatches:
        """Micro-batches in which each pack appears with prefixes and suffixes and without.

        Args:
            micro_batch_size: Samples in a batch.
            borders: As in `training_batches`.
            rank: This data-parallel rank.
            world_size: Number of data-parallel ranks.

        Raises:
            FlagError: When no validation samples were asked for.
        """
        if self.valid is None:
            raise FlagError(
                "the run has no validation samples",
                where="PlainRun(num_valid_samples, split)",
                remedy="Give num_valid_samples, and a split such as '99,1,0'.",
            )
        return PackedBatches(
            self.valid,
            micro_batch_size=micro_batch_size,
            borders=borders,
            rank=rank,
            world_size=world_size,
            num_samples=self._num_valid_samples,
        )


def make_batch(samples: Sequence[Mapping[str, torch.Tensor]], borders: Borders) -> PackedBatch:
    """A micro-batch of samples with Megatron's keys.

    Args:
        samples: As `MeCoGPTDataset` has them, of one length S each.
        borders: As in `PlainRun.training_batches`.

    Returns:
        tokens, position_ids: (samples, S), int64; positions restart at each document.
        targets: (samples, S), int64: the next token, or -100 where it is not trained on.
        view: (samples,), int64: the `View` of a validation sample; of a training sample, 1 when it
            holds a prefix or suffix, else 0.
        document_ids: (samples, S), int32, with borders="document_ids": a token may attend to
            earlier tokens of its sample with the same number.
        cu_seqlens: (documents + 1,), int32, with borders="cu_seqlens": borders in the flat batch,
            empty documents among them; tokens, position_ids and targets are then (1, samples * S).
        max_seqlen: int, likewise: an upper bound of a document's length.
    """

    def stack(key: str) -> torch.Tensor:
        return torch.stack([sample[key] for sample in samples])

    tokens, positions, bounds = stack("tokens"), stack("position_ids"), stack("cu_seqlens")
    targets = stack("labels").masked_fill(stack("loss_mask") == 0, IGNORED_TARGET)
    views = [s.get("meco_view", (s["meco_prefix_tokens"] > 0).long()) for s in samples]
    values: dict[str, Any] = {"view": torch.stack(views)}
    length = tokens.size(1)
    if borders == "document_ids":
        values["document_ids"] = documents_of(bounds, length).int()
    elif borders == "cu_seqlens":
        values["cu_seqlens"] = merged(bounds, length)
        values["max_seqlen"] = length
        tokens, positions, targets = (x.view(1, -1) for x in (tokens, positions, targets))
    return PackedBatch({"tokens": tokens, "targets": targets, "position_ids": positions, **values})


def _check_whole(name: str, value: int, least: int, most: int | None = None) -> None:
    if value < least or (most is not None and value > most):
        upto = "" if most is None else f" to {most:,}"
        more = " or more" if most is None else ""
        raise FlagError(f"{value!r}", where=name, remedy=f"Give {least:,}{upto}{more}.")
