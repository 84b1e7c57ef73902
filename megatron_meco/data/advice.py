"""What a plan's numbers ask for: other packing, shorter prefixes, more documents.

Every advice is measured: alternatives are planned in memory on the same documents, up to
`_MOST_PACKS` packs of each corpus, before they are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_meco.config import CONDITIONED, COOLDOWN, PACKING_STRATEGIES, PLAIN, MeCoConfig
from megatron_meco.data.packing import PlanCounts
from megatron_meco.data.report import Run, corpora_of, percent
from megatron_meco.errors import MeCoError

_MOST_PACKS = 5000
_MUCH_DISCARDED = 0.1
_MUCH_PREFIX = 0.3
_MUCH_PADDING = 0.05
_MANY_PLAIN = 0.01
_FEW_DOCUMENTS = 100


def advice(run: Run, report: Mapping[str, Any], config: MeCoConfig, seq_length: int) -> list[str]:
    """One line for each thing that a run could do better.

    Args:
        run: Its datasets.
        report: What `plan_report` says of them.
        config: MeCo's part of the configuration.
        seq_length: Tokens of a sample.
    """
    lines = []
    for phase, counts in report["phases"].items():
        if counts["packs"]:
            corpora = corpora_of(getattr(run.train, phase))
            lines += _of_packing(phase, counts, corpora, config, seq_length)
            lines += _of_length(phase, counts, corpora, config)
    lines += _of_prefixes(report, config, seq_length)
    return lines


def discarded(counts: Mapping[str, Any]) -> float:
    """Share of the documents' tokens that no sample holds."""
    whole = counts["discarded_tokens"] + counts["body_tokens"]
    return float(counts["discarded_tokens"] / whole) if whole else 0.0


def _of_packing(
    phase: str, counts: Mapping[str, Any], corpora: Sequence[Any], config: MeCoConfig, length: int
) -> list[str]:
    lines = []
    if discarded(counts) > _MUCH_DISCARDED:
        others = {
            f"meco-packing {name}": _share(corpora, strategy=name)
            for name in PACKING_STRATEGIES
            if name != config.packing
        }
        others[f"seq-length {4 * length}"] = _share(
            corpora, strategy=config.packing, capacity=4 * length
        )
        better = [
            f"{name} {100 * share:.0f} %"
            for name, share in others.items()
            if share is not None and share < discarded(counts) / 2
        ]
        if better:
            lines.append(
                f"{phase}: {100 * discarded(counts):.0f} % of the documents' tokens are discarded. "
                f"Of the same documents would be: {', '.join(better)}."
            )
    tokens = counts["packs"] * length
    cap = config.documents_cap(length)
    if counts["padding_tokens"] > _MUCH_PADDING * tokens and (
        counts["documents_per_pack"]["p99"] >= cap
    ):
        lines.append(
            f"{phase}: {percent(counts['padding_tokens'], tokens)} of the tokens are padding, "
            f"since packs end at {cap} documents. Raise meco-max-documents-per-pack."
        )
    return lines


def _of_length(
    phase: str, counts: Mapping[str, Any], corpora: Sequence[Any], config: MeCoConfig
) -> list[str]:
    distinct = sum(corpus.num_documents for corpus in corpora)
    lines = []
    if counts["num_epochs"] > 1:
        remedies = ["fewer samples (train-iters)"]
        if discarded(counts) > _MUCH_DISCARDED:
            remedies.insert(0, "meco-packing best-fit, which discards nothing")
        if phase == COOLDOWN and not config.cooldown_data_path:
            remedies.append(
                f"a larger meco-cooldown-documents (now {distinct:,} documents), or corpora of its "
                "own (meco-cooldown-data-path)"
            )
        if phase == PLAIN:
            remedies.append(f"a larger meco-start-documents (now {distinct:,} documents)")
        lines.append(
            f"{phase}: its {distinct:,} documents are shown up to {counts['num_epochs']} times. "
            f"That needs more documents, or {', or '.join(remedies)}."
        )
    elif distinct < _FEW_DOCUMENTS:
        lines.append(
            f"{phase}: it has {distinct:,} documents, so its samples tell little of a corpus. Use "
            "a larger corpus, or more shards."
        )
    return lines


def _of_prefixes(report: Mapping[str, Any], config: MeCoConfig, length: int) -> list[str]:
    counts = report["phases"][CONDITIONED]
    if not config.has_metadata or not counts["packs"]:
        return []
    lines = []
    tokens = counts["packs"] * length
    metadata = counts["prefix_tokens"] + counts["suffix_tokens"]
    if metadata > _MUCH_PREFIX * tokens:
        kinds = [("prefixes", config.template), ("suffixes", config.suffix_template)]
        given = " and ".join(kind for kind, template in kinds if template)
        each = metadata / max(1, counts["documents"])
        body = counts["body_tokens"] / max(1, counts["documents"])
        has_urls = "{url}" in config.template + config.suffix_template
        host = ", as with {url.host} in place of {url}" if has_urls else ""
        lines.append(
            f"{given} are {percent(metadata, tokens)} of the conditioned tokens "
            f"({each:.0f} of {each + body:.0f} a document). A shorter template{host}, or longer "
            "documents leave more to train on."
        )
    whole = max(1, report["documents_of_conditioned_corpora"])
    cap = config.prefix_cap(length)
    for kind, suffix, then in (("prefix", "", "train plain"), ("suffix", "suffix_", "have none")):
        without_value = report[f"documents_without_{suffix}value"]
        if report[f"documents_with_long_{kind}"] > _MANY_PLAIN * whole:
            lines.append(
                f"{percent(report[f'documents_with_long_{kind}'], whole)} of the documents have a "
                f"{kind} of more than {cap:,} tokens and {then}. Raise meco-max-prefix-tokens, or "
                "use a shorter template."
            )
        if without_value > _MANY_PLAIN * whole:
            of = f"the {kind} template" if suffix else "the template"
            lines.append(
                f"{percent(without_value, whole)} of the documents lack a value of {of} and "
                f"{then}. `meco metadata` shows which fields a corpus has."
            )
    return lines


def _share(corpora: Sequence[Any], **changes: Any) -> float | None:
    """Share of the tokens that another plan discards; None where there is no such plan."""
    try:
        counts = [corpus.counts_with(_MOST_PACKS, **changes) for corpus in corpora]
    except MeCoError:
        return None
    return discarded(vars(PlanCounts.total(counts)))
