"""One corpus in one phase, as a Megatron dataset.

`MeCoGPTDataset` subclasses `GPTDataset`, so `BlendedMegatronDatasetBuilder`, blends, splits and
`--data-cache-path` work as usual. It replaces Megatron's sample index and shuffle by a prefix table
and a plan, and assembles samples in C++. Samples have the keys of Megatron's
`--dataloader-inter-document-masking`. There is no dense attention mask.
"""

from __future__ import annotations

import dataclasses
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path, get_idx_path
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from megatron_meco import _core
from megatron_meco.config import CONDITIONED, COOLDOWN, PHASES, MeCoConfig, View
from megatron_meco.corpus.encoder import fast_encoder
from megatron_meco.corpus.metadata import open_metadata
from megatron_meco.corpus.tokenizer import (
    check_tokenizer,
    resolve_bos,
    resolve_eod,
    text_encoder,
    token_ids,
)
from megatron_meco.data.fingerprint import file_identity, tokenizer_identity
from megatron_meco.data.opened_corpus import (
    COPY_AGAIN,
    OTHER_TOKENS,
    check_arrays_of,
    check_documents,
    check_files_of,
    check_opened,
)
from megatron_meco.data.packing import Plan, PlanCounts, PlanRequest, build_plan, load_plan
from megatron_meco.data.prefix_table import PrefixTable, load_prefix_table
from megatron_meco.data.template import SUFFIX_FLAG, Draws, Template, kind_of
from megatron_meco.errors import DataError, FlagError
from megatron_meco.refusals import check_dataset_options

_MAX_DOCUMENTS = np.iinfo(np.int32).max
# How long the other ranks wait for rank 0 to print an error that all of them found.
_SECONDS_TO_PRINT = 5.0
_UINT64 = 2**64 - 1

Sample = dict[str, torch.Tensor]


@dataclass
class MeCoGPTDatasetConfig(GPTDatasetConfig):  # type: ignore[misc]  # Megatron has no types
    """Megatron's GPT dataset configuration plus MeCo's.

    Megatron options that contradict MeCo have other defaults here and are refused when set.

    Raises:
        FlagError: A Megatron option contradicts MeCo, or `sequence_length` is out of range.
    """

    reset_position_ids: bool | None = False
    reset_attention_mask: bool | None = False
    eod_mask_loss: bool | None = False
    create_attention_mask: bool = False
    inter_document_masking: bool = True

    meco: MeCoConfig = dataclasses.field(default_factory=MeCoConfig)
    """The user's choices about metadata."""

    phase: str = CONDITIONED
    """`CONDITIONED` (documents with prefixes); `PLAIN` or `COOLDOWN` (documents alone)."""

    document_share: tuple[float, float] = (0.0, 1.0)
    """Training documents of this phase: a half-open range of the permuted order, as fractions."""

    vocab_size: int | None = None
    """Upper bound of token ids; None: the tokenizer's. Training sets the padded vocabulary size."""

    view: View = View.CONDITIONED
    """The packs of the conditioned phase with their own prefixes and suffixes, without any, or with
    those of other documents."""

    compare: bool = False
    """Whether samples have `meco_compared`, and the loss leaves suffixes out; for evaluation, where
    the losses of all views are those of the same tokens."""

    mark_padding: bool = False
    """Whether samples have `meco_padding`; for models that count the tokens of each expert."""

    def __post_init__(self) -> None:
        check_dataset_options(self)
        if self.tokenizer is not None:
            check_tokenizer(self.tokenizer)
        super().__post_init__()
        assert self.phase in PHASES, self.phase
        if not 4 <= self.sequence_length <= _core.MAX_CAPACITY:
            raise FlagError(
                f"{self.sequence_length:,} is out of range",
                where="--seq-length",
                remedy=f"Give 4 to {_core.MAX_CAPACITY:,}.",
            )
        self.meco.check_sequence_length(self.sequence_length)

    @property
    def num_ids(self) -> int:
        """Upper bound of token ids."""
        return self.vocab_size or int(self.tokenizer.vocab_size)

    @property
    def hide_prefixes(self) -> bool:
        """Whether packs are shown without prefixes and suffixes. Part of Megatron's cache key.

        The key names Megatron's index of a blend, which is the same in all views.
        """
        return self.view is View.PLAIN

    @cached_property
    def template(self) -> Template:
        """The parsed template; it has no placeholder when the template is empty."""
        return Template.parse(self.meco.template)

    @cached_property
    def suffix_template(self) -> Template:
        """The parsed template of the suffixes, likewise."""
        return Template.parse(self.meco.suffix_template, SUFFIX_FLAG)

    def cache_folder(self, corpus_prefix: str) -> Path:
        """Folder of the plans and prefix tables of a corpus."""
        if self.path_to_cache is not None:
            return Path(self.path_to_cache)
        # Where Megatron puts a dataset's index without --data-cache-path.
        return Path(corpus_prefix, "cache", f"{MeCoGPTDataset.__name__}_indices")


class MeCoGPTDataset(GPTDataset):  # type: ignore[misc]  # Megatron has no types
    """Packs of one corpus in one phase.

    Args:
        indexed_dataset: The corpus. Each document is its tokens + EOD.
        dataset_path: Its path without suffix.
        indexed_indices: Document numbers of the split, contiguous.
        num_samples: Minimum number of packs; None: one epoch.
        index_split: The split.
        config: The configuration.

    Attributes:
        corpus_prefix: Path of the corpus without suffix.
        prefixes: Prefix of each document; None outside of the conditioned phase and with an empty
            template.
        suffixes: Suffix of each document, likewise.
        plan: Documents of each pack.

    Raises:
        DataError: The corpus, its metadata or a cache is damaged, or they do not match.
        FlagError: The template does not match the metadata.
    """

    config: MeCoGPTDatasetConfig

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: NDArray[np.int32],
        num_samples: int | None,
        index_split: Split,
        config: MeCoGPTDatasetConfig,
    ) -> None:
        # GPTDataset.__init__ would build Megatron's own sample index.
        MegatronDataset.__init__(
            self, indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config
        )
        self.corpus_prefix = str(dataset_path or indexed_dataset.path_prefix)
        if indexed_indices is None or len(indexed_indices) == 0:
            raise DataError(
                f"no documents in the {index_split.name} split",
                where=self.corpus_prefix,
                remedy="Use a larger corpus or another --split.",
            )
        # build_low_level_dataset has done this already, unless the caller opened the corpus.
        check_files_of(self.corpus_prefix, self._cache_folder)
        check_documents(indexed_dataset, config.tokenizer, config.num_ids, self.corpus_prefix)
        first, last = int(indexed_indices[0]), int(indexed_indices[-1])
        assert last - first + 1 == len(indexed_indices), "Megatron's splits are contiguous"
        # Megatron's array takes 4 bytes for each document.
        self.indices = range(first, last + 1)
        self.prefixes = self._load_texts(config.template)
        self.suffixes = self._load_texts(config.suffix_template)
        self.plan = self._load_plan()

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: MeCoGPTDatasetConfig) -> IndexedDataset:
        """Check a corpus, then open it with Megatron's reader, which trusts its files.

        Args:
            dataset_path: The corpus without suffix. URLs of Megatron's object storage are checked
                after opening.
            config: The configuration.

        Returns:
            Megatron's reader.

        Raises:
            DataError: A file is missing or damaged.
        """
        try:
            check_files_of(dataset_path, config.cache_folder(dataset_path))
        except DataError:
            # All ranks find the error. Rank 0 prints it, and its exit ends the others.
            if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
                time.sleep(_SECONDS_TO_PRINT)
            raise
        try:
            dataset = GPTDataset.build_low_level_dataset(dataset_path, config)
        except (AssertionError, AttributeError, ValueError, struct.error) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(
                f"Megatron cannot open it ({reason})", where=dataset_path, remedy=COPY_AGAIN
            ) from error
        check_opened(dataset, dataset_path)
        return dataset

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """Number of documents. Splits are ranges of documents, not of sequences."""
        num_documents = len(low_level_dataset.document_indices) - 1
        if num_documents > _MAX_DOCUMENTS:
            raise DataError(
                f"it has {num_documents:,} documents, above Megatron's 32-bit limit for one file",
                where=str(low_level_dataset.path_prefix),
                remedy=f"Split it into files of at most {_MAX_DOCUMENTS:,} and blend them.",
            )
        return num_documents

    @staticmethod
    def _key_config_attributes() -> list[str]:
        """Attributes of the configuration in Megatron's cache keys: all that decide a sample."""
        own = ["meco", "phase", "document_share", "hide_prefixes"]
        return [*GPTDataset._key_config_attributes(), *own]

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, idx: int | None) -> Sample:
        """One pack.

        Args:
            idx: Number of the pack; None: a filler for an incomplete batch, with an empty mask.

        Returns:
            tokens, labels, position_ids: (sequence_length,), int64. Tokens and labels are views of
                one array, which collation copies.
            loss_mask: (sequence_length,), float32; `loss_mask[t]` applies to the prediction of
                token `t + 1`.
            cu_seqlens: (min(max_documents + 2, sequence_length + 1),), int32; the tail repeats
                sequence_length.
            max_seqlen: int32 scalar, length of the longest segment.
            meco_prefix_tokens: int64 scalar, number of prefix and suffix tokens in the pack.
            meco_compared: With `config.compare` only. (sequence_length,), float32, 1 where the
                label is a body token that the comparison of views counts, else 0: those of
                documents whose prefix or suffix differs between the conditioned and the shuffled
                view. They are in the loss, and the same tokens in all views of a pack.
            meco_padding: With `config.mark_padding` only. (sequence_length,), bool: tokens of no
                document, behind the last one or behind each (`--meco-pad-documents-to`).
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
        if self.config.compare:
            sample["meco_compared"] = torch.from_numpy(self._assembler.compared(idx or 0))
        if self.config.mark_padding:
            sample["meco_padding"] = self._padding(idx or 0)
        if idx is None:
            for mask in {"loss_mask", "meco_compared"} & sample.keys():
                sample[mask].zero_()
        return sample

    def _padding(self, idx: int) -> torch.Tensor:
        padding = torch.ones(self.config.sequence_length, dtype=torch.bool)
        for _, parts in self._pieces(idx):
            for kind, begin, end in parts:
                padding[begin:end] = kind == "padding"
        return padding

    def _pieces(self, idx: int) -> Iterator[tuple[_core.Piece, list[tuple[str, int, int]]]]:
        """Each piece of a pack with its tokens from left to right: (kind, begin, end)."""
        begin = 0
        for piece in self._assembler.pieces(idx):
            parts = []
            for kind, count in piece.runs:
                parts.append((kind, begin, begin + count))
                begin += count
            yield piece, parts

    def documents_of(self, idx: int) -> list[dict[str, Any]]:
        """Pieces of pack `idx`, as people and tests read them.

        Each with document, body_begin, body_end, prefix and suffix (text or None), prefix_tokens
        (without repetitions), suffix_tokens, and alignment_tokens: the padding behind it.

        `parts` are its tokens from left to right, as (kind, begin, end) in the sample: bos, prefix,
        body, suffix, body once more (EOD behind a suffix), padding; prefix and body in turn where
        the prefix is repeated.

        Those without a prefix say why: `plain_because`, else None; those without a suffix:
        `no_suffix_because`. Texts are decoded, so this is for people and tests, not for training.
        """
        return [
            {
                "document": piece.document,
                "body_begin": piece.body_begin,
                "body_end": piece.body_end,
                "prefix": self._text(self.prefixes, piece.prefix_id, piece.prefix_tokens),
                "prefix_tokens": piece.prefix_tokens,
                "plain_because": self._why_plain(piece),
                "suffix": self._text(self.suffixes, piece.suffix_id, piece.suffix_tokens) or None,
                "suffix_tokens": piece.suffix_tokens,
                "no_suffix_because": self._why_no_suffix(piece),
                "alignment_tokens": piece.padding,
                "parts": parts,
            }
            for piece, parts in self._pieces(idx)
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out memory maps and C++ objects: spawned loader workers open their own."""
        dropped = ("_assembler", "_corpus", "_bin")
        return {k: v for k, v in self.__dict__.items() if k not in dropped}

    @property
    def _cache_folder(self) -> Path:
        return self.config.cache_folder(self.corpus_prefix)

    def _text(self, table: PrefixTable | None, number: int, num_tokens: int) -> str | None:
        if table is None or number < 0:
            return None
        tokens = table.tokens_of(number)[:num_tokens]
        return str(self.config.tokenizer.detokenize(tokens.tolist()))

    def _why_plain(self, piece: _core.Piece) -> str | None:
        if piece.prefix_tokens:
            return None
        if self.config.phase == COOLDOWN:
            return "the cooldown has no prefixes"
        if self.config.phase != CONDITIONED:
            return "the plain phase has no prefixes"
        if not self.config.meco.template:
            return "there is no template"
        if self.config.hide_prefixes:
            return "this view of the validation set hides prefixes"
        if piece.body_begin and not self.config.meco.repeat_prefix:
            return "it continues a document, and prefixes are not repeated"
        assert self.prefixes is not None
        if piece.prefix_id >= 0:
            is_empty = not len(self.prefixes.tokens_of(piece.prefix_id))
            return "its prefix has no tokens" if is_empty else "the pack ends before its prefix"
        return self._why_none(piece.document, self.prefixes, self.config.template)

    def _why_no_suffix(self, piece: _core.Piece) -> str | None:
        if piece.suffix_tokens:
            return None
        if self.config.phase == COOLDOWN:
            return "the cooldown has no suffixes"
        if self.config.phase != CONDITIONED:
            return "the plain phase has no suffixes"
        if not self.config.meco.suffix_template:
            return "there is no template"
        if self.config.hide_prefixes:
            return "this view of the validation set hides suffixes"
        assert self.suffixes is not None
        if piece.suffix_id >= 0:
            is_empty = not len(self.suffixes.tokens_of(piece.suffix_id))
            return "its suffix has no tokens" if is_empty else "its end is not in this piece"
        return self._why_none(piece.document, self.suffixes, self.config.suffix_template)

    def _why_none(self, document: int, table: PrefixTable, template: Template) -> str:
        """Why a document has no text of a table."""
        if table.prefix_ids[document] >= 0:
            return f"meco-plain-fraction {self.config.meco.plain_fraction:g} drew it"
        # The table does not keep which of these it is.
        where = self.corpus_prefix
        if template.placeholders:
            metadata = open_metadata(where)
            row = metadata.slice(document, 1)
            draws = Draws(self.config.random_seed, metadata)
            if not template.render(row, where, None, draws, document)[0].is_valid:
                lacking = [
                    placeholder.name
                    for placeholder in template.required_placeholders
                    if not template.values(placeholder, row, where)[0].is_valid
                ]
                if lacking:
                    return f"it has no {', no '.join(lacking)}"
                if template.is_seeded:
                    return "keep or shuffled left it without a value"
                return "all groups of the template lack a value"
        cap = self.config.meco.prefix_cap(self.config.sequence_length)
        kind = kind_of(template.flag)
        return f"its {kind} is longer than {cap:,} tokens (meco-max-prefix-tokens)"

    def _assemble(self, pack: int) -> _core.SampleArrays:
        try:
            if self._bin is None:
                return self._assembler.sample_from_bodies(pack, self._read_bodies(pack))
            return self._assembler.sample(pack)
        except IndexError as error:  # std::out_of_range
            if not 0 <= pack < len(self):
                raise
            raise DataError(
                f"pack {pack} does not match the corpus ({error})",
                where=self.corpus_prefix,
                remedy="The corpus changed after its plan was made: delete the data cache and "
                "start again.",
            ) from error
        except ValueError as error:  # std::domain_error, or bodies of the wrong length
            raise DataError(
                f"pack {pack} cannot be assembled ({error})",
                where=get_bin_path(self.corpus_prefix),
                remedy=OTHER_TOKENS,
            ) from error

    def _read_bodies(self, pack: int) -> NDArray[np.int64]:
        """Bodies of a pack by Megatron's reader, for corpora that are not local mapped files."""
        bodies = [
            self._read_body(p.document)[p.body_begin : p.body_end]
            for p in self._assembler.pieces(pack)
        ]
        return np.concatenate(bodies).astype(np.int64)

    def _read_body(self, document: int) -> NDArray[Any]:
        begin, end = self.dataset.document_indices[document : document + 2]
        return np.concatenate([self.dataset.get(int(s)) for s in range(begin, end)])

    def _load_texts(self, template: Template) -> PrefixTable | None:
        if self.config.phase != CONDITIONED or not template.source:
            return None
        tokenizer = self.config.tokenizer
        return load_prefix_table(
            self.corpus_prefix,
            self.numel_low_level_dataset(self.dataset),
            template,
            # The encoder is made when it is called: the table is usually in the cache.
            lambda texts: text_encoder(tokenizer).encode_batch(texts),
            tokenizer_identity(tokenizer),
            self.config.meco.prefix_cap(self.config.sequence_length),
            self._cache_folder,
            token_ids=token_ids(tokenizer, template.tokens, template.flag),
            seed=self.config.random_seed,
            fast_encoder=lambda sample: fast_encoder(text_encoder(tokenizer), sample),
        )

    @property
    def trains_on_suffix(self) -> bool:
        """Whether suffix tokens are in the loss of its samples."""
        return self.config.meco.suffix_loss and not self.config.compare

    @property
    def num_documents(self) -> int:
        """Documents that this dataset draws from: its phase's share of the split."""
        begin, end = self._request().range
        return end - begin

    def counts_with(self, most_packs: int, **changes: Any) -> PlanCounts:
        """What another plan of the same documents would hold; built in memory, cached nowhere.

        Args:
            most_packs: A larger plan is cut off there.
            **changes: Fields of `PlanRequest`.
        """
        packs = min(len(self), most_packs)
        request = replace(self._request(), num_packs=packs, **changes)
        return build_plan(self._corpus, request, self.corpus_prefix).counts

    def _request(self) -> PlanRequest:
        config = self.config
        share = config.document_share if self.index_split == Split.train else (0.0, 1.0)
        return PlanRequest(
            strategy=config.meco.packing,
            capacity=config.sequence_length,
            max_documents=config.meco.documents_cap(config.sequence_length),
            num_packs=self.num_samples,
            first_document=self.indices[0],
            num_documents=len(self.indices),
            share_begin=share[0],
            share_end=share[1],
            seed=config.random_seed,
            repeat_prefix=config.meco.repeat_prefix,
            # Nothing is repeated where there are no prefixes; such plans keep their names.
            repeat_every=(config.meco.repeat_every or 0) if self.prefixes is not None else 0,
            alignment=config.meco.pad_documents_to,
        )

    def _load_plan(self) -> Plan:
        return load_plan(
            lambda: self._make_corpus(check_arrays_of(self.dataset)),
            self._request(),
            self._lengths_identity(),
            self._cache_folder,
            self.corpus_prefix,
        )

    def _lengths_identity(self) -> dict[str, Any]:
        """Cache key of the lengths of documents, prefixes and suffixes."""
        identity: dict[str, Any] = {
            "index": file_identity(get_idx_path(self.dataset.path_prefix)),
            "bos": resolve_bos(self.config.tokenizer) is not None,
        }
        if self.prefixes is not None:
            identity["prefixes"] = self.prefixes.identity
        if self.suffixes is not None:
            identity["suffixes"] = self.suffixes.identity
        if self.prefixes is not None or self.suffixes is not None:
            identity["plain_fraction"] = self.config.meco.plain_fraction
        return identity

    def _make_corpus(self, one_sequence_each: bool) -> _core.Corpus:
        """Lengths of documents, prefixes and suffixes, for C++.

        Args:
            one_sequence_each: Whether document `i` is sequence `i`.
        """
        bos = resolve_bos(self.config.tokenizer)
        index = self.dataset
        texts: dict[str, Any] = {}
        for kind, table in (("prefix", self.prefixes), ("suffix", self.suffixes)):
            if table is not None:
                texts[f"{kind}_ids"] = table.prefix_ids
                texts[f"{kind}_tokens"] = table.prefix_tokens
                texts[f"{kind}_offsets"] = table.prefix_offsets
        return _core.Corpus(
            sequence_lengths=np.asarray(index.sequence_lengths),
            document_indices=None if one_sequence_each else np.asarray(index.document_indices),
            **texts,
            bos_id=-1 if bos is None else bos,
            plain_seed=self.config.random_seed & _UINT64,
            plain_threshold=min(int(self.config.meco.plain_fraction * 2**64), _UINT64),
        )

    @cached_property
    def _corpus(self) -> _core.Corpus:
        return self._make_corpus(self.plan.one_sequence_each)

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
            pad_id=resolve_eod(self.config.tokenizer),  # any id would do: padding is masked
            view=self.config.view.name.lower(),
            train_on_prefix=meco.train_on_prefix,
            train_on_suffix=self.trains_on_suffix,
            strategy=meco.packing,
            repeat_prefix=meco.repeat_prefix,
            repeat_every=meco.repeat_every or 0,
            alignment=meco.pad_documents_to,
            bin=self._bin,
            sequence_pointers=None if self._bin is None else np.asarray(index.sequence_pointers),
            token_bytes=index.dtype_size,
            vocab_size=self.config.num_ids,
        )

    @cached_property
    def _bin(self) -> NDArray[np.uint8] | None:
        path = get_bin_path(self.dataset.path_prefix)
        if not self.config.mmap_bin_files or not Path(path).is_file():
            return None
        return np.memmap(path, dtype=np.uint8, mode="r")
