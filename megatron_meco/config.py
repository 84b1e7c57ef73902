"""The configuration of a MeCo run: all options with their defaults and checks.

`MeCoConfig` is immutable and checked on construction. The `--meco-*` flags set its fields
(`add_meco_arguments`, `MeCoConfig.from_args`), so the training script, `meco plan` and `meco
inspect` have the same defaults. Imports neither torch nor megatron.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from megatron_meco.errors import FlagError

PACKING_STRATEGIES = ("truncate", "split", "best-fit")
"""Names of the packing strategies; see `megatron_meco.data.packing`."""

PLAIN = "plain"
CONDITIONED = "conditioned"
COOLDOWN = "cooldown"
PHASES = (PLAIN, CONDITIONED, COOLDOWN)
"""The phases of a run in order: plain documents (by default no samples), documents with prefixes,
then plain documents again."""


class View(IntEnum):
    """How a validation sample shows the metadata of its pack; the number is its `meco_view`."""

    PLAIN = 0
    CONDITIONED = 1
    SHUFFLED = 2
    """Each document with the prefix and the suffix of other ones of the pack."""


FINGERPRINT_KEYS = (
    "meco",
    "template",
    "packing",
    "prefix_once",
    "plain_fraction",
    "max_prefix_tokens",
    "max_documents_per_pack",
    "pad_documents_to",
    "train_on_prefix",
    "suffix_template",
    "suffix_loss",
    "repeat_every",
    "seq_length",
    "seed",
    "split",
    "tokenizer",
    "corpora",
    "cooldown_corpora",
    "schedule",
)
"""What determines the samples of a run; see `megatron_meco.training.run_fingerprint`."""

FINGERPRINT_DEFAULTS: Mapping[str, Any] = {
    "pad_documents_to": 1,
    "suffix_template": "",
    "suffix_loss": True,
    "repeat_every": None,
}
"""Values of fingerprints that lack a key, because they were made before it or do without it."""

DEFAULT_TEMPLATE = r"URL: {url.host}\n\n"
"""The paper's template (section 2), as typed in a shell: backslash escapes are interpreted."""


_LARGEST = 2**53


@dataclass(frozen=True, kw_only=True, slots=True)
class MeCoConfig:
    """The user's choices about metadata conditioning.

    Raises:
        FlagError: A value is invalid; names the flag, the value and the remedy.
    """

    template: str = DEFAULT_TEMPLATE
    """Prefix of each document in the conditioned phase. Empty: none; without a `suffix_template`
    either, the matched baseline."""

    suffix_template: str = ""
    """Suffix of each document in the conditioned phase, between its last token and EOD. Empty:
    none."""

    suffix_loss: bool = True
    """Whether suffix tokens are in the training loss."""

    packing: str = "truncate"
    """How documents become packs, one of `PACKING_STRATEGIES`."""

    cooldown_fraction: float = 0.1
    """Share of the iterations, at the end, that train on plain documents. 0: never, 1: always."""

    cooldown_start_iteration: int | None = None
    """Number of conditioned iterations; overrides `cooldown_fraction`."""

    cooldown_data_path: tuple[str, ...] = ()
    """Corpora of the cooldown, as Megatron's `--data-path`; empty: held out of the training
    split."""

    cooldown_documents: float | None = None
    """Share of the training documents held out for the cooldown; None: the cooldown's share of the
    samples."""

    start_fraction: float = 0.0
    """Share of the iterations, at the start, that train on plain documents: the `plain` phase."""

    start_iteration: int | None = None
    """Number of iterations of the `plain` phase; instead of `start_fraction`."""

    start_documents: float | None = None
    """Share of the training documents that the `plain` phase draws from; None: in proportion to
    the samples, of what the cooldown leaves."""

    plain_fraction: float = 0.0
    """Seeded share of documents that have no prefix in the conditioned phase either."""

    repeat_prefix: bool = True
    """Whether the prefix is repeated in a piece that continues a document."""

    repeat_every: int | None = None
    """Tokens of a document after which its prefix is repeated within a piece, never in the loss;
    None: no such repetition."""

    max_documents_per_pack: int | None = None
    """Cap on documents in a pack; None: `max(127, sequence_length // 64 - 1)`; 0: no cap.

    At the usual sequence lengths the default, plus the padding segment, is a power of two."""

    pad_documents_to: int = 1
    """Tokens of which every segment of a pack is a multiple: a document or a part of one, with the
    padding behind it, and the padding at the end of the pack. Divides the sequence length."""

    max_prefix_tokens: int | None = None
    """Longest prefix in tokens, and longest suffix; None: half the sequence. A document has none
    that is longer."""

    train_on_prefix: bool = False
    """Whether prefix tokens are in the loss (the paper found that this hurts slightly)."""

    def __post_init__(self) -> None:
        if self.packing not in PACKING_STRATEGIES:
            raise FlagError(
                f"unknown packing strategy {self.packing!r}",
                where="--meco-packing",
                remedy=f"Choose one of: {', '.join(PACKING_STRATEGIES)}.",
            )
        _check_share(self.cooldown_fraction, "--meco-cooldown-fraction")
        _check_share(self.plain_fraction, "--meco-plain-fraction")
        if self.cooldown_documents is not None:
            _check_share(self.cooldown_documents, "--meco-cooldown-documents")
            if self.cooldown_data_path:
                raise FlagError(
                    "has no effect: the cooldown has corpora of its own",
                    where="--meco-cooldown-documents",
                    remedy="Drop it, or --meco-cooldown-data-path.",
                )
        _check_at_least(self.cooldown_start_iteration, 0, "--meco-cooldown-start-iteration")
        self._check_start()
        _check_at_least(self.max_documents_per_pack, 0, "--meco-max-documents-per-pack")
        _check_at_least(self.max_prefix_tokens, 1, "--meco-max-prefix-tokens")
        _check_at_least(self.pad_documents_to, 1, "--meco-pad-documents-to")
        _check_at_least(self.repeat_every, 1, "--meco-repeat-every")
        if self.train_on_prefix and not self.template:
            raise FlagError(
                "there is no prefix to train on, the template is empty",
                where="--meco-train-on-prefix",
                remedy="Give a --meco-template, or drop the flag.",
            )
        if not self.suffix_loss and not self.suffix_template:
            raise FlagError(
                "has no effect: documents have no suffix",
                where="--meco-suffix-loss 0",
                remedy="Give a --meco-suffix-template, or drop the flag.",
            )
        if not self.repeat_prefix and (not self.template or self.packing == "truncate"):
            raise FlagError(
                "has no effect: no document is continued with a prefix",
                where="--meco-prefix-once",
                remedy="Use it with a --meco-template and --meco-packing split or best-fit.",
            )
        if self.repeat_every is not None and not (self.template and self.repeat_prefix):
            what = "--meco-prefix-once" if self.template else "an empty --meco-template"
            raise FlagError(
                f"does not go with {what}",
                where=f"--meco-repeat-every {self.repeat_every}",
                remedy="Drop one of the two.",
            )
        if self.plain_fraction and not self.has_metadata:
            raise FlagError(
                "has no effect on an empty template: every document is plain already",
                where="--meco-plain-fraction",
                remedy="Give a --meco-template, or drop the flag.",
            )

    def _check_start(self) -> None:
        _check_share(self.start_fraction, "--meco-start-fraction")
        _check_at_least(self.start_iteration, 0, "--meco-start-iteration")
        if self.start_fraction and self.start_iteration is not None:
            raise FlagError(
                f"does not go with --meco-start-fraction {self.start_fraction!r}",
                where=f"--meco-start-iteration {self.start_iteration}",
                remedy="Give one of the two.",
            )
        if self.start_documents is not None:
            _check_share(self.start_documents, "--meco-start-documents")
            if not (self.start_fraction or self.start_iteration):
                raise FlagError(
                    "has no effect: the conditioned phase comes first",
                    where="--meco-start-documents",
                    remedy="Give --meco-start-iteration or --meco-start-fraction, or drop it.",
                )

    @property
    def has_metadata(self) -> bool:
        """Whether documents of the conditioned phase have prefixes or suffixes."""
        return bool(self.template or self.suffix_template)

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """Everything that determines a sample, for Megatron's cache keys (JSON-serializable)."""
        values = asdict(self)
        if self.pad_documents_to == 1:
            del values["pad_documents_to"]  # the key of caches from before there was the flag
        for name in ("start_fraction", "start_iteration", "start_documents"):
            if not values[name]:
                del values[name]  # likewise; 0 has no plain phase either
        if not self.suffix_template:
            del values["suffix_template"], values["suffix_loss"]  # likewise
        if self.repeat_every is None:
            del values["repeat_every"]
        return values

    def check_sequence_length(self, sequence_length: int) -> None:
        """Refuse an alignment of documents that does not divide the sequence.

        Raises:
            FlagError: Names the flag.
        """
        if sequence_length % self.pad_documents_to:
            raise FlagError(
                f"{self.pad_documents_to:,} does not divide --seq-length {sequence_length:,}",
                where="--meco-pad-documents-to",
                remedy="Give a divisor of the sequence length.",
            )

    def prefix_cap(self, sequence_length: int) -> int:
        """Longest prefix and longest suffix in tokens at this sequence length."""
        return self.max_prefix_tokens or max(1, sequence_length // 2)

    def documents_cap(self, sequence_length: int) -> int:
        """Largest number of documents in a pack at this sequence length."""
        cap = self.max_documents_per_pack
        if cap is None:
            cap = max(127, sequence_length // 64 - 1)
        return min(cap or sequence_length, sequence_length)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> MeCoConfig:
        """Read the `--meco-*` flags of a parsed command line."""
        return cls(
            template=args.meco_template,
            suffix_template=args.meco_suffix_template,
            suffix_loss=bool(args.meco_suffix_loss),
            packing=args.meco_packing,
            cooldown_fraction=args.meco_cooldown_fraction,
            cooldown_start_iteration=args.meco_cooldown_start_iteration,
            cooldown_data_path=tuple(args.meco_cooldown_data_path or ()),
            cooldown_documents=args.meco_cooldown_documents,
            start_fraction=args.meco_start_fraction,
            start_iteration=args.meco_start_iteration,
            start_documents=args.meco_start_documents,
            plain_fraction=args.meco_plain_fraction,
            repeat_prefix=not args.meco_prefix_once,
            repeat_every=args.meco_repeat_every,
            max_documents_per_pack=args.meco_max_documents_per_pack,
            pad_documents_to=alignment_from_args(args),
            max_prefix_tokens=args.meco_max_prefix_tokens,
            train_on_prefix=args.meco_train_on_prefix,
        )


def alignment_from_args(args: argparse.Namespace) -> int:
    """Tokens of which every segment is a multiple: the flag's value, or what the layout needs."""
    # Checkpoints of before there was the flag lack it.
    given: int | None = getattr(args, "meco_pad_documents_to", None)
    return layout_alignment(args) if given is None else given


def layout_alignment(args: argparse.Namespace) -> int:
    """What the tokens of every document must be a multiple of, for the layout of a run.

    With context parallelism each document is cut into two chunks for each rank. With sequence
    parallelism chunks also divide among the tensor-parallel ranks, and FP8 and FP4 kernels take
    multiples of their block.

    Args:
        args: Megatron's parsed flags.

    Returns:
        1 without context parallelism.
    """
    ranks = int(getattr(args, "context_parallel_size", 1) or 1)
    if ranks <= 1:
        return 1
    alignment = 2 * ranks
    if getattr(args, "sequence_parallel", False):
        alignment *= int(args.tensor_model_parallel_size)
    # As Megatron's get_fp8_align_size and get_fp4_align_size have it.
    if getattr(args, "fp4", None) or (
        getattr(args, "fp8", None) and getattr(args, "fp8_recipe", None) == "mxfp8"
    ):
        return math.lcm(alignment, 32)
    return math.lcm(alignment, 16) if getattr(args, "fp8", None) else alignment


def add_meco_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `--meco-*` flags that decide samples (not `--meco` itself) to a parser."""
    defaults = MeCoConfig()
    group = parser.add_argument_group("MeCo: metadata conditioning, then cooldown")
    group.add_argument(
        "--meco-template",
        default=defaults.template,
        metavar="T",
        help="Prefix of each document in the conditioned phase, e.g. 'URL: {url.host}\\n\\n'. "
        "Fields come from PREFIX.metadata.arrow; transforms of a URL: {url} {url.host} "
        "{url.domain} {url.suffix} {url.hash}; filters: {url.host|top=0.2%%} and "
        "{url.host|min_documents=100} keep the frequent values and write 'unknown' for the rest, "
        "{topic|default=none} replaces a missing value; [[...{topic}...]] is left out where the "
        "topic is missing; {token:NAME} is a special token. docs/data.md lists all filters. "
        "Empty: no prefixes; without a suffix either, the matched baseline. "
        "Default: %(default)r.",
    )
    group.add_argument(
        "--meco-suffix-template",
        default=defaults.suffix_template,
        metavar="T",
        help="Suffix of each document in the conditioned phase, between its last token and EOD. "
        "Written like --meco-template, as in '\\nTopic: {topic}'. A document that is cut has it on "
        "its last piece only. For suffixes without prefixes give --meco-template '', too. Default: "
        "no suffixes.",
    )
    group.add_argument(
        "--meco-suffix-loss",
        type=int,
        choices=(0, 1),
        default=int(defaults.suffix_loss),
        help="Whether suffix tokens are in the training loss; EOD behind them always is. "
        "Default: %(default)s.",
    )
    group.add_argument(
        "--meco-packing",
        default=defaults.packing,
        metavar="S",
        help=f"How documents become packs: {', '.join(PACKING_STRATEGIES)}. Default: %(default)s.",
    )
    group.add_argument(
        "--meco-cooldown-fraction",
        type=float,
        default=defaults.cooldown_fraction,
        metavar="F",
        help="Share of the iterations that train on plain documents, at the end. "
        "Default: %(default)s.",
    )
    group.add_argument(
        "--meco-cooldown-start-iteration",
        type=int,
        metavar="N",
        help="Start the cooldown after N iterations; overrides the fraction.",
    )
    group.add_argument(
        "--meco-cooldown-data-path",
        nargs="*",
        metavar="PATH",
        help="Corpora of the cooldown, in the format of --data-path. Without it, a seeded share of "
        "the training documents is held out for the cooldown: the phases share no document.",
    )
    group.add_argument(
        "--meco-cooldown-documents",
        type=float,
        metavar="F",
        help="Share of the training documents held out for the cooldown. Default: the cooldown's "
        "share of the samples.",
    )
    group.add_argument(
        "--meco-start-fraction",
        type=float,
        default=defaults.start_fraction,
        metavar="F",
        help="Share of the iterations that train on plain documents before the conditioned phase. "
        "Default: %(default)s.",
    )
    group.add_argument(
        "--meco-start-iteration",
        type=int,
        metavar="N",
        help="Start the conditioned phase after N iterations on plain documents; instead of "
        "--meco-start-fraction.",
    )
    group.add_argument(
        "--meco-start-documents",
        type=float,
        metavar="F",
        help="Share of the training documents for the iterations before the conditioned phase. "
        "Default: in proportion to the samples, of the documents that the cooldown leaves. The "
        "phases share no document.",
    )
    group.add_argument(
        "--meco-plain-fraction",
        type=float,
        default=defaults.plain_fraction,
        metavar="P",
        help="Seeded share of documents without prefix in the whole run. Default: %(default)s.",
    )
    group.add_argument(
        "--meco-prefix-once",
        action="store_true",
        help="Give a split document its prefix only at its beginning. Default: on every piece.",
    )
    group.add_argument(
        "--meco-repeat-every",
        type=int,
        metavar="N",
        help="Repeat the prefix after every N tokens of a document within a piece, never in the "
        "loss. Default: no such repetition.",
    )
    group.add_argument(
        "--meco-max-documents-per-pack",
        type=int,
        metavar="N",
        help="Cap on documents in a pack: all ranks wait for one with hundreds of tiny documents. "
        "Default: max(127, seq_length // 64 - 1). 0: no cap.",
    )
    group.add_argument(
        "--meco-pad-documents-to",
        type=int,
        metavar="A",
        help="Pad each document in a pack, and each part of one, to a multiple of A tokens. The "
        "padding is not in the loss. Default: what --context-parallel-size needs; without it 1, no "
        "padding.",
    )
    group.add_argument(
        "--meco-max-prefix-tokens",
        type=int,
        metavar="N",
        help="Documents with a longer prefix train plain, those with a longer suffix without it; "
        "both are counted. Default: half the sequence.",
    )
    group.add_argument(
        "--meco-train-on-prefix",
        action="store_true",
        help="Include prefix tokens in the loss.",
    )
    return parser


def _check_share(value: float, flag: str) -> None:
    if not 0.0 <= value <= 1.0:
        raise FlagError(
            f"{value!r} is not a share between 0 and 1", where=flag, remedy="For 10 % write 0.1."
        )


def _check_at_least(value: int | None, least: int, flag: str) -> None:
    if value is None:
        return
    if value < least:
        raise FlagError(
            f"{value!r} is too small", where=flag, remedy=f"Give {least} or more, or drop the flag."
        )
    if value > _LARGEST:
        raise FlagError(f"{value!r} is too large", where=flag, remedy=f"Give up to {_LARGEST:,}.")
