"""MeCo samples behind Megatron's own dataset classes.

`MeCoGPTDataset` is one phase of one corpus: it opens (or builds) the prefix table and the plan, and
lets C++ assemble each sample. It works with `BlendedMegatronDatasetBuilder`, blends, splits and
`--data-cache-path`. `build_datasets` composes the datasets of a whole run from it: training
switches phase at a sample index, validation and test show every pack twice, with and without its
prefixes. Samples carry the keys of Megatron's `--dataloader-inter-document-masking`, so its own
batch code takes them from there. What was given up: Megatron's index and shuffle, its dense
attention mask, and every mask made by scanning for a token id.
"""

from __future__ import annotations

import dataclasses
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path, get_idx_path
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.datasets.utils import Split

from megatron_meco import _core
from megatron_meco.config import CONDITIONED, COOLDOWN, PHASES, MeCoConfig
from megatron_meco.corpus.index_file import check_arrays, header_of
from megatron_meco.corpus.tokenizer import (
    check_tokenizer,
    resolve_bos,
    resolve_eod,
    text_encoder,
    token_id,
)
from megatron_meco.data.corpora import check_files
from megatron_meco.data.fingerprint import file_identity
from megatron_meco.data.packing import Plan, PlanRequest, load_plan
from megatron_meco.data.phases import Schedule
from megatron_meco.data.prefix_table import PrefixTable, load_prefix_table
from megatron_meco.data.template import Template
from megatron_meco.errors import DataError, FlagError
from megatron_meco.refusals import refusal, shown

_MAX_DOCUMENTS = np.iinfo(np.int32).max
_EOD_CHECKS = 1000
_SECONDS_TO_TELL = 5.0
_IDS_CHECKED = 1024  # at the end of a document, in the page or two that hold its EOD
_COPY_AGAIN = "Copy the corpus again from where it is whole, or prepare it again."
_OTHER_TOKENS = (
    "Name the tokenizer that made the corpus. If it is this one, the file is damaged "
    f"(`meco verify` looks at all of it). {_COPY_AGAIN}"
)
_CANARY = "URL: en.wikipedia.org/wiki/Bill_Gates?a=1\n\nTopic: 0123456789 \u00e9\u4e2d"


@dataclass
class MeCoGPTDatasetConfig(GPTDatasetConfig):
    """Megatron's GPT dataset configuration plus `meco`.

    The options of the stock dataset that would undo document masks or boundary masks are refused,
    and need not be given.

    Raises:
        FlagError: When a stock option contradicts MeCo; names the flag and the remedy.
    """

    reset_position_ids: bool | None = False
    reset_attention_mask: bool | None = False
    eod_mask_loss: bool | None = False
    create_attention_mask: bool = False
    inter_document_masking: bool = True

    meco: MeCoConfig = dataclasses.field(default_factory=MeCoConfig)
    """What a user chose about metadata."""

    phase: str = CONDITIONED
    """Which phase the samples belong to: with prefixes, or plain."""

    document_share: tuple[float, float] = (0.0, 1.0)
    """The part of each training split's permuted documents that this phase draws from."""

    vocab_size: int | None = None
    """Token ids are below it, or the corpus is refused; None: the tokenizer's. Training gives the
    number of embeddings, padding among them."""

    hide_prefixes: bool = False
    """Show the packs of the conditioned plan without their prefixes: the same body tokens."""

    def __post_init__(self) -> None:
        _refuse_stock_options(self)
        if self.tokenizer is not None:
            check_tokenizer(self.tokenizer)
        super().__post_init__()
        assert self.phase in PHASES, self.phase
        if not 4 <= self.sequence_length <= _core.MAX_CAPACITY:
            raise FlagError(
                f"{self.sequence_length:,} tokens make no pack",
                where="--seq-length",
                remedy=f"Give 4 to {_core.MAX_CAPACITY:,}.",
            )

    @property
    def num_ids(self) -> int:
        """How many token ids there are."""
        return self.vocab_size or int(self.tokenizer.vocab_size)

    @cached_property
    def template(self) -> Template:
        """The parsed template; without parts when there is none."""
        return Template.parse(self.meco.template)


class MeCoGPTDataset(GPTDataset):
    """Document-aligned packs of one corpus and one phase.

    Args:
        indexed_dataset: The corpus, `document = body tokens + EOD`.
        dataset_path: Its path prefix.
        indexed_indices: The split's document numbers, contiguous.
        num_samples: Packs to provide at least; None: one epoch.
        index_split: The split.
        config: The configuration.

    Raises:
        DataError: When corpus, metadata or caches are damaged or do not fit one another.
        FlagError: When the template does not fit the metadata.
    """

    config: MeCoGPTDatasetConfig

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: MeCoGPTDatasetConfig,
    ) -> None:
        # Not GPTDataset.__init__: it would build Megatron's own index. Everything else is
        # inherited.
        MegatronDataset.__init__(
            self, indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config
        )
        self.corpus_prefix = str(dataset_path or indexed_dataset.path_prefix)
        _check_split(self.corpus_prefix, indexed_indices, index_split)
        # Again for those who opened the corpus themselves; where it is remembered it costs little.
        _check_files(self.corpus_prefix, config)
        _check_documents(indexed_dataset, config, self.corpus_prefix)
        # The split's documents are contiguous: Megatron's list of them is 4 bytes for each.
        self.indices = range(int(indexed_indices[0]), int(indexed_indices[-1]) + 1)
        self.prefixes = self._load_prefixes()
        self.plan = self._load_plan()

    @staticmethod
    def build_low_level_dataset(  # type: ignore[override]
        dataset_path: str, config: MeCoGPTDatasetConfig
    ) -> IndexedDataset:
        """Open a corpus by Megatron's reader, which trusts its files, after a look at them.

        Args:
            dataset_path: The corpus, without suffix; a URL of Megatron's object storage cannot be
                looked at before.
            config: The configuration.

        Returns:
            Megatron's reader.

        Raises:
            DataError: A file is missing or damaged; names what is wrong.
        """
        try:
            _check_files(dataset_path, config)
        except DataError:
            # All ranks find it. The first one tells it, and its end ends the others.
            if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
                time.sleep(_SECONDS_TO_TELL)
            raise
        try:
            dataset = GPTDataset.build_low_level_dataset(dataset_path, config)
        except (AssertionError, AttributeError, ValueError, struct.error) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(
                f"Megatron cannot open it ({reason})", where=dataset_path, remedy=_COPY_AGAIN
            ) from error
        _check_opened(dataset, dataset_path)
        return dataset

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """Number of documents: splits fall between these, not between their sequences."""
        num_documents = len(low_level_dataset.document_indices) - 1
        if num_documents > _MAX_DOCUMENTS:
            raise DataError(
                f"{num_documents:,} documents; Megatron numbers those of one file with 32 bits",
                where=str(low_level_dataset.path_prefix),
                remedy=f"Split it into files of at most {_MAX_DOCUMENTS:,} and blend them.",
            )
        return num_documents

    @staticmethod
    def _key_config_attributes() -> list[str]:
        """Megatron's cache-key hook: everything that decides a sample."""
        own = ["meco", "phase", "document_share", "hide_prefixes"]
        return [*GPTDataset._key_config_attributes(), *own]

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """One pack.

        Args:
            idx: The pack; None: a filler for an incomplete batch, with nothing in the loss.

        Returns:
            tokens, labels, position_ids: (sequence_length,), int64; labels and tokens are views of
                one array, which batching copies.
            loss_mask: (sequence_length,), float32; `loss_mask[t]` governs predicting token `t + 1`.
            cu_seqlens: (min(max documents + 2, sequence_length + 1),), int32; the tail repeats
                sequence_length.
            max_seqlen: int32 scalar, the longest segment.
            meco_prefix_tokens: int64 scalar, prefix tokens in the pack.
        """
        arrays = self._assemble(0 if idx is None else int(idx))
        tokens, labels, loss_mask, position_ids, cu_seqlens, longest, prefix_tokens = arrays
        sample = {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(loss_mask),
            "position_ids": torch.from_numpy(position_ids),
            "cu_seqlens": torch.from_numpy(cu_seqlens),
            "max_seqlen": torch.from_numpy(longest),
            "meco_prefix_tokens": torch.from_numpy(prefix_tokens),
        }
        if idx is None:
            sample["loss_mask"].zero_()
        return sample

    def documents_of(self, idx: int) -> list[dict[str, Any]]:
        """What pack `idx` holds: document, body_begin, body_end, prefix (text, None when plain)."""
        return [
            {
                "document": piece.document,
                "body_begin": piece.body_begin,
                "body_end": piece.body_end,
                "prefix": self._prefix_text(piece),
                "prefix_tokens": piece.prefix_tokens,
            }
            for piece in self._assembler.pieces(idx)
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Workers that are not forked open the maps and the C++ objects for themselves."""
        dropped = ("_assembler", "_corpus", "_bin")
        return {k: v for k, v in self.__dict__.items() if k not in dropped}

    def _prefix_text(self, piece: _core.Piece) -> str | None:
        if self.prefixes is None or piece.prefix_id < 0:
            return None
        tokens = self.prefixes.tokens_of(piece.prefix_id)[: piece.prefix_tokens]
        return str(self.config.tokenizer.detokenize(tokens.tolist()))

    def _assemble(self, pack: int) -> _core.SampleArrays:
        try:
            if self._bin is None:
                return self._assembler.sample_from_bodies(pack, self._read_bodies(pack))
            return self._assembler.sample(pack)
        except IndexError as error:  # std::out_of_range
            if not 0 <= pack < len(self):
                raise
            raise DataError(
                f"pack {pack} does not fit the corpus ({error})",
                where=self.corpus_prefix,
                remedy="The corpus changed under its cache: delete the data cache and start again.",
            ) from error
        except ValueError as error:  # std::domain_error, or bodies cut short
            raise DataError(
                f"pack {pack} cannot be made ({error})",
                where=get_bin_path(self.corpus_prefix),
                remedy=_OTHER_TOKENS,
            ) from error

    def _read_bodies(self, pack: int) -> np.ndarray:
        """Bodies through Megatron's reader, for corpora that are not local mapped files."""
        bodies = [
            self._read_body(p.document)[p.body_begin : p.body_end]
            for p in self._assembler.pieces(pack)
        ]
        return np.concatenate(bodies).astype(np.int64)

    def _read_body(self, document: int) -> np.ndarray:
        begin, end = self.dataset.document_indices[document : document + 2]
        return np.concatenate([self.dataset.get(int(s)) for s in range(begin, end)])

    def _load_prefixes(self) -> PrefixTable | None:
        if self.config.phase == COOLDOWN or not self.config.meco.template:
            return None
        tokenizer = self.config.tokenizer
        return load_prefix_table(
            self.corpus_prefix,
            self.numel_low_level_dataset(self.dataset),
            self.config.template,
            # Made when it is called: the table is usually in the cache.
            lambda texts: text_encoder(tokenizer).encode_batch(texts),
            tokenizer_identity(tokenizer),
            self.config.meco.prefix_cap(self.config.sequence_length),
            _cache_folder(self.corpus_prefix, self.config),
            token_ids=token_ids(tokenizer, self.config.template),
            seed=self.config.random_seed,
        )

    def _load_plan(self) -> Plan:
        config = self.config
        training = self.index_split == Split.train
        request = PlanRequest(
            strategy=config.meco.packing,
            capacity=config.sequence_length,
            max_documents=config.meco.documents_cap(config.sequence_length),
            num_packs=self.num_samples,
            first_document=self.indices[0],
            num_documents=len(self.indices),
            share_begin=config.document_share[0] if training else 0.0,
            share_end=config.document_share[1] if training else 1.0,
            seed=config.random_seed,
            repeat_prefix=config.meco.repeat_prefix,
        )
        return load_plan(
            lambda: self._corpus,
            request,
            self._identity(),
            _cache_folder(self.corpus_prefix, self.config),
            self.corpus_prefix,
        )

    def _identity(self) -> dict[str, Any]:
        """What decides lengths of documents and prefixes."""
        identity: dict[str, Any] = {
            "index": file_identity(get_idx_path(self.dataset.path_prefix)),
            "bos": resolve_bos(self.config.tokenizer) is not None,
        }
        if self.prefixes is not None:
            identity["prefixes"] = self.prefixes.identity
            identity["plain_fraction"] = self.config.meco.plain_fraction
        return identity

    @cached_property
    def _corpus(self) -> _core.Corpus:
        fraction = self.config.meco.plain_fraction
        bos = resolve_bos(self.config.tokenizer)
        prefixes: dict[str, Any] = {}
        if self.prefixes is not None:
            names = ("prefix_ids", "prefix_tokens", "prefix_offsets")
            prefixes = {name: getattr(self.prefixes, name) for name in names}
        plan: Plan | None = getattr(self, "plan", None)  # None while it is being built
        one_sequence_each = _check_arrays(self.dataset) if plan is None else plan.one_sequence_each
        return _core.Corpus(
            sequence_lengths=np.asarray(self.dataset.sequence_lengths),
            document_indices=(
                None if one_sequence_each else np.asarray(self.dataset.document_indices)
            ),
            **prefixes,
            bos_id=-1 if bos is None else bos,
            plain_seed=self.config.random_seed & 0xFFFF_FFFF_FFFF_FFFF,
            plain_threshold=min(int(fraction * 2**64), 2**64 - 1),
        )

    @cached_property
    def _assembler(self) -> _core.Assembler:
        meco, index = self.config.meco, self.dataset.index
        return _core.Assembler(
            corpus=self._corpus,
            pack_offsets=self.plan.pack_offsets,
            piece_document=self.plan.piece_document,
            continued_piece=self.plan.continued_piece,
            continued_begin=self.plan.continued_begin,
            capacity=self.config.sequence_length,
            max_documents=meco.documents_cap(self.config.sequence_length),
            pad_id=resolve_eod(self.config.tokenizer),  # any id will do: padding is masked
            hide_prefixes=self.config.hide_prefixes,
            train_on_prefix=meco.train_on_prefix,
            strategy=meco.packing,
            repeat_prefix=meco.repeat_prefix,
            bin=self._bin,
            sequence_pointers=None if self._bin is None else np.asarray(index.sequence_pointers),
            token_bytes=index.dtype_size,
            vocab_size=self.config.num_ids,
        )

    @cached_property
    def _bin(self) -> np.ndarray | None:
        path = get_bin_path(self.dataset.path_prefix)
        if not self.config.mmap_bin_files or not Path(path).is_file():
            return None
        return np.memmap(path, dtype=np.uint8, mode="r")


class PhasedDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The training samples of a run: conditioned below the switch, cooldown from there on.

    A pure function of the sample index, so it does not matter which rank asks, or in which order.

    Attributes:
        split: Megatron's name of the split, which its loader asks for.
        conditioned: The first phase, or None when it has no samples.
        cooldown: The second phase, or None when it has no samples.
        num_spare: Further samples that repeat the last one, for a loader that must not be empty.
    """

    split = Split.train
    num_spare = 0

    def __init__(self, conditioned: Any | None, cooldown: Any | None, schedule: Schedule) -> None:
        self.conditioned = conditioned
        self.cooldown = cooldown
        self.schedule = schedule

    def __len__(self) -> int:
        return self.schedule.num_samples + self.num_spare

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        dataset, index = self.locate(idx or 0)
        sample: dict[str, torch.Tensor] = dataset[index if idx is not None else None]
        return sample

    @property
    def parts(self) -> tuple[Any | None, Any | None]:
        """Both phases."""
        return self.conditioned, self.cooldown

    def locate(self, idx: int) -> tuple[Any, int]:
        """The phase's dataset and the index within it of global sample `idx`."""
        if not 0 <= idx < len(self):
            raise IndexError(idx)
        idx = min(idx, self.schedule.num_samples - 1)
        if idx < self.schedule.switch_sample:
            return self.conditioned, idx
        return self.cooldown, idx - self.schedule.switch_sample


class PairedDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Validation samples: every pack twice, with its prefixes (even index) and without (odd).

    Both show the same body tokens, so the two losses differ by the metadata alone. Samples carry
    `meco_view`, an int64 scalar: 1 with prefixes, 0 without.
    """

    def __init__(self, conditioned: Any, plain: Any, split: Split) -> None:
        self.conditioned = conditioned
        self.plain = plain
        self.split = split

    def __len__(self) -> int:
        return 2 * min(len(self.conditioned), len(self.plain))

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        dataset, index = self.locate(idx or 0)
        sample: dict[str, torch.Tensor] = dataset[index if idx is not None else None]
        return {**sample, "meco_view": torch.tensor(int(dataset is self.conditioned))}

    @property
    def parts(self) -> tuple[Any, Any]:
        """Both views."""
        return self.conditioned, self.plain

    def locate(self, idx: int) -> tuple[Any, int]:
        """The view and the pack of sample `idx`."""
        if not 0 <= idx < len(self):
            raise IndexError(idx)
        return (self.plain if idx % 2 else self.conditioned), idx // 2


Blend = tuple[list[str], list[float] | None]


def build_datasets(
    sizes: Sequence[int | None],
    is_built_on_rank: Callable[[], bool],
    config: MeCoGPTDatasetConfig,
    schedule: Schedule,
    cooldown_blend: Blend | None = None,
) -> tuple[Any | None, Any | None, Any | None]:
    """The training, validation and test datasets of a run.

    Must be called on all ranks, as Megatron's builder must.

    Args:
        sizes: Samples of the three splits; the first is the schedule's, whatever is given; None:
        one
            epoch.
        is_built_on_rank: Whether this rank holds datasets.
        config: The configuration of the conditioned phase.
        schedule: Where the run switches.
        cooldown_blend: Corpora of the cooldown and their weights; None: the share of the training
            documents that the conditioned phase leaves over.

    Returns:
        Training, validation and test dataset; None for a split without documents, and everywhere on
        a rank that holds none.
    """
    held_out = 0.0 if cooldown_blend else schedule.documents_held_out(config.meco)
    num_cooldown = schedule.num_samples - schedule.switch_sample

    def build(size: int | None, part: Split, /, **changes: Any) -> Any | None:
        return _build_split(size, part, is_built_on_rank, dataclasses.replace(config, **changes))

    conditioned = cooldown = None
    if schedule.switch_sample:
        conditioned = build(schedule.switch_sample, Split.train, document_share=(0, 1 - held_out))
    if num_cooldown:
        changes: dict[str, Any] = {"phase": COOLDOWN, "document_share": (1 - held_out, 1)}
        if cooldown_blend:
            changes |= {"blend": cooldown_blend, "blend_per_split": None, "split": "1,0,0"}
            changes |= {"document_share": (0, 1)}
        cooldown = build(num_cooldown, Split.train, **changes)
    train = None
    if conditioned is not None or cooldown is not None:
        train = PhasedDataset(conditioned, cooldown, schedule)

    def build_evaluation(split: Split) -> Any | None:
        size = sizes[split.value]
        if not config.meco.template:
            return build(size, split)  # the baseline has one view only
        pairs = None if size is None else -(-size // 2)
        shown = build(pairs, split)
        hidden = build(pairs, split, hide_prefixes=True)
        return None if shown is None else PairedDataset(shown, hidden, split)

    valid, test = build_evaluation(Split.valid), build_evaluation(Split.test)
    _check_enough(conditioned, schedule.switch_sample, "the conditioned phase", "--data-path")
    path = "--meco-cooldown-data-path" if cooldown_blend else "--data-path"
    _check_enough(cooldown, num_cooldown, "the cooldown", path)
    for dataset, split in ((valid, Split.valid), (test, Split.test)):
        _check_enough(dataset, sizes[split.value], f"the {split.name} split", "--data-path")
    return train, valid, test


def _check_enough(dataset: Any | None, needed: int | None, what: str, flag: str) -> None:
    """Refuse a run that would end for want of samples.

    Megatron repeats the documents of a single corpus and of a blend with weights as often as it
    takes, and those of a blend without weights not at all.
    """
    if dataset is None or needed is None or len(dataset) >= needed:
        return
    raise DataError(
        f"the corpora give {len(dataset):,} samples to {what}, which needs {needed:,}; a blend "
        "without weights shows each document once",
        where=flag,
        remedy="Give a weight before each corpus (0.5 A 0.5 B), add documents, or shorten the run.",
    )


def _build_split(
    size: int | None,
    split: Split,
    is_built_on_rank: Callable[[], bool],
    config: MeCoGPTDatasetConfig,
) -> Any | None:
    """Build one split by Megatron's own builder, so that blends and barriers are its own."""
    if size == 0:
        return None
    if config.blend_per_split is not None:
        config.blend_per_split = [
            blend if i == split.value else None for i, blend in enumerate(config.blend_per_split)
        ]
    else:
        assert config.split_matrix is not None
        config.split_matrix = [
            part if i == split.value else None for i, part in enumerate(config.split_matrix)
        ]
    sizes = [size if i == split.value else 0 for i in range(len(Split))]
    builder = BlendedMegatronDatasetBuilder(MeCoGPTDataset, sizes, is_built_on_rank, config)
    return builder.build()[split.value]


# Options of Megatron's dataset configuration, and the flags (argparse's `dest`) behind them.
_STOCK_OPTIONS = {
    "reset_attention_mask": "reset_attention_mask",
    "reset_position_ids": "reset_position_ids",
    "eod_mask_loss": "eod_mask_loss",
    "create_attention_mask": "create_attention_mask_in_dataloader",
    "fast_cache_load": "dataloader_fast_cache_load",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
    "multiple_validation_sets": "multiple_validation_sets",
    "context_parallel_size": "context_parallel_size",
}


def _refuse_stock_options(config: MeCoGPTDatasetConfig) -> None:
    """Refuse stock options that would undo what MeCo relies on."""
    for option, dest in _STOCK_OPTIONS.items():
        value = getattr(config, option)
        # 1 is a context parallel size that is honoured.
        if (value and value != 1) or value is True:
            reason, remedy = refusal(dest)
            raise FlagError(
                f"does not go with MeCo: {reason}",
                where=shown(f"--{dest.replace('_', '-')}", value),
                remedy=remedy,
            )


def tokenizer_identity(tokenizer: Any) -> list[Any]:
    """What names a tokenizer: Megatron's own description, and the ids of a fixed text.

    The same folder may hold another vocabulary tomorrow; the ids tell.
    """
    try:
        ids = list(tokenizer.tokenize(_CANARY))
    except ValueError:  # NullTokenizer reads numbers only
        ids = []
    return [tokenizer.unique_identifiers, tokenizer.vocab_size, ids]


def token_ids(tokenizer: Any, template: Template) -> dict[str, int]:
    """The ids of a template's special tokens by name.

    Raises:
        FlagError: The vocabulary lacks one.
    """
    return {name: token_id(tokenizer, name, template.flag) for name in template.tokens}


def _check_split(where: str, indices: np.ndarray | None, split: Split) -> None:
    if indices is None or len(indices) == 0:
        raise DataError(
            f"no documents in the {split.name} split",
            where=where,
            remedy="Use a larger corpus or another --split.",
        )
    assert indices[-1] - indices[0] + 1 == len(indices), "Megatron's splits are contiguous"


def _cache_folder(corpus_prefix: str, config: MeCoGPTDatasetConfig) -> Path:
    if config.path_to_cache is not None:
        return Path(config.path_to_cache)
    # Where stock Megatron puts the index of a dataset without --data-cache-path.
    return Path(corpus_prefix, "cache", f"{MeCoGPTDataset.__name__}_indices")


def _check_files(corpus_prefix: str, config: MeCoGPTDatasetConfig) -> None:
    """Check the files of a local corpus, once for each data cache."""
    if not is_object_storage_path(corpus_prefix):
        check_files(corpus_prefix, _cache_folder(corpus_prefix, config))


def _check_arrays(dataset: IndexedDataset) -> bool:
    """Check an index as Megatron opened it; return whether document `i` is sequence `i`."""
    index = dataset.index
    arrays = index.sequence_lengths, index.sequence_pointers, index.document_indices
    return check_arrays(*arrays, index.dtype_size, get_idx_path(dataset.path_prefix))


def _check_opened(dataset: IndexedDataset, where: str) -> None:
    """Check that Megatron opened what was checked, or check what it opened."""
    index = dataset.index
    if is_object_storage_path(where):
        _check_arrays(dataset)
        return
    expected = header_of(Path(get_idx_path(where)))
    found = np.dtype(index.dtype), len(index.sequence_lengths), len(index.document_indices)
    if found != expected:
        raise DataError(
            f"the index holds {expected[1]:,} sequences and {expected[2] - 1:,} documents of "
            f"{expected[0]}, this run was told {found[1]:,} and {found[2] - 1:,} of {found[0]}",
            where=get_idx_path(where),
            remedy="Drop --per-dataset-sequences-path, or write that file again.",
        )


def _check_documents(dataset: IndexedDataset, config: MeCoGPTDatasetConfig, where: str) -> None:
    """Check that documents end in EOD and that ids are in the vocabulary.

    Looks at documents that are evenly spread and the same each time; a corpus made without EOD
    fails at the first of them. Ids that it does not see are checked sample by sample.
    """
    bounds = np.asarray(dataset.document_indices)
    eod, num_ids = resolve_eod(config.tokenizer), config.num_ids
    step = max(1, (len(bounds) - 1) // _EOD_CHECKS)
    for document in range(0, len(bounds) - 1, step):
        first, end = int(bounds[document]), int(bounds[document + 1])
        lengths = np.asarray(dataset.sequence_lengths[first:end])
        filled = np.flatnonzero(lengths)
        if not len(filled):
            continue
        last = int(filled[-1])
        length = int(lengths[last])
        ids = dataset.get(first + last, offset=max(0, length - _IDS_CHECKED))
        if int(ids[-1]) != eod:
            raise DataError(
                f"document {document} does not end in the tokenizer's EOD ({eod})",
                where=where,
                remedy="Prepare the corpus with EOD (meco prepare, or Megatron's --append-eod) and "
                "with this tokenizer.",
            )
        if ids.min() < 0 or ids.max() >= num_ids:
            found = int(ids.min() if ids.min() < 0 else ids.max())
            raise DataError(
                f"document {document} holds token id {found}, outside the vocabulary of {num_ids}",
                where=where,
                remedy=_OTHER_TOKENS,
            )
