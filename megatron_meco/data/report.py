"""Statistics of a run's plans, and the content of a sample.

For the datasets of `build_datasets`. `meco plan`, `meco inspect` and the log of a run show them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_meco.config import CONDITIONED, PHASES, PLAIN, View
from megatron_meco.data.packing import PlanCounts
from megatron_meco.data.phases import Schedule

PER_PACK = ("median", "p99", "max")
"""Keys of `documents_per_pack`."""

_JSON_COUNTS = (
    "documents",
    "packs",
    "body_tokens",
    "prefix_tokens",
    "suffix_tokens",
    "discarded_tokens",
    "padding_tokens",
    "alignment_tokens",
    "documents_cut",
    "documents_per_pack",
    "documents_plain",
    "documents_empty",
    "bos_tokens",
    "num_epochs",
)


@dataclass(frozen=True)
class Run:
    """The datasets of a run and its schedule."""

    schedule: Schedule
    train: Any
    valid: Any
    test: Any


def plan_report(run: Run) -> dict[str, Any]:
    """Statistics of a run's training plans, JSON-serializable.

    Returns:
        `phases` ({conditioned, cooldown}, before them `plain` in a run that has it), `total` (each
        with the counts of `PlanCounts`), `switch_iteration`, `switch_sample`, in a run with a plain
        phase `start_iteration`, `start_sample`, `num_iterations`, `num_samples`, `valid_packs`,
        `test_packs`, and of the corpora of the conditioned phase, the documents of all splits:
        `documents_of_conditioned_corpora`, `documents_without_value`, `documents_with_long_prefix`,
        `documents_without_suffix_value`, `documents_with_long_suffix`.
    """
    s = run.schedule
    parts = {
        phase: corpora_of(getattr(run.train, phase))
        for phase in PHASES
        if phase != PLAIN or s.start_sample
    }
    counts = {
        phase: PlanCounts.total(corpus.plan.counts for corpus in corpora)
        for phase, corpora in parts.items()
    }
    tables = [c.prefixes for c in parts[CONDITIONED] if c.prefixes is not None]
    suffixes = [c.suffixes for c in parts[CONDITIONED] if c.suffixes is not None]
    return {
        "switch_iteration": s.switch_iteration,
        "switch_sample": s.switch_sample,
        **start_of(s),
        "num_iterations": s.num_iterations,
        "num_samples": s.num_samples,
        "phases": {phase: _counts_json(c) for phase, c in counts.items()},
        "total": _counts_json(PlanCounts.total(counts.values())),
        "valid_packs": 0 if run.valid is None else len(run.valid),
        "test_packs": 0 if run.test is None else len(run.test),
        "documents_of_conditioned_corpora": sum(len(t.prefix_ids) for t in tables or suffixes),
        "documents_without_value": sum(t.documents_without_value for t in tables),
        "documents_with_long_prefix": sum(t.documents_with_long_prefix for t in tables),
        "documents_without_suffix_value": sum(t.documents_without_value for t in suffixes),
        "documents_with_long_suffix": sum(t.documents_with_long_prefix for t in suffixes),
    }


def start_of(schedule: Schedule) -> dict[str, int]:
    """`start_iteration` and `start_sample` of a run with a plain phase; else nothing."""
    if not schedule.start_sample:
        return {}
    return {
        "start_iteration": schedule.start_iteration,
        "start_sample": schedule.start_sample,
    }


def most_documents(run: Run) -> int:
    """Largest number of pieces in a pack of the run; 0 on a rank that holds no datasets."""
    splits = (run.train, run.valid, run.test)
    plans = [corpus.plan for split in splits for corpus in corpora_of(split)]
    return max((int(p.counts.documents_per_pack["max"]) for p in plans if len(p)), default=0)


def summary_lines(report: dict[str, Any], sequence_length: int) -> list[str]:
    """Lines for the log of a run: its plan in one line per phase, and warnings."""
    lines = []
    for phase, c in report["phases"].items():
        if not c["packs"]:
            continue
        tokens = c["packs"] * sequence_length
        body = c["body_tokens"] + c["discarded_tokens"]
        per_pack = " / ".join(f"{c['documents_per_pack'][k]:.0f}" for k in PER_PACK)
        lines.append(
            f"{phase}: {c['packs']:,} packs of {c['documents']:,} documents ({per_pack} a pack: "
            f"median / p99 / max), {percent(c['prefix_tokens'], tokens)} prefix, "
            + (f"{percent(c['suffix_tokens'], tokens)} suffix, " if c["suffix_tokens"] else "")
            + f"{percent(c['padding_tokens'], tokens)} padding, "
            f"{percent(c['discarded_tokens'], body)} of the documents' tokens discarded"
        )
        if c["num_epochs"] > 1:
            lines.append(f"warning: the documents do not suffice, {c['num_epochs']} epochs")
    missing, long = report["documents_without_value"], report["documents_with_long_prefix"]
    if missing:
        lines.append(f"warning: {missing:,} documents lack a value and train plain")
    if long:
        lines.append(f"warning: {long:,} documents have too long a prefix and train plain")
    lines += [f"warning: {line}" for line in suffix_warnings(report)]
    return lines


def suffix_warnings(report: dict[str, Any]) -> list[str]:
    """How many documents have no suffix, and why; nothing in a run without suffixes."""
    missing, long = report["documents_without_suffix_value"], report["documents_with_long_suffix"]
    lines = []
    if missing:
        lines.append(f"{missing:,} documents lack a value of the suffix and train without it")
    if long:
        lines.append(f"{long:,} documents have too long a suffix and train without it")
    return lines


def sample_report(dataset: Any, index: int) -> tuple[dict[str, Any], Any]:
    """One sample, JSON-serializable, and the `MeCoGPTDataset` it comes from.

    Returns:
        `sample`, `phase` ("plain", "conditioned", "cooldown", or the view of a validation pack:
        "plain" without metadata, "shuffled" with that of other documents), `corpus`, `pack`, the
        arrays of the sample, `cu_seqlens` without its fixed-length tail, and `documents`.
    """
    arrays = dataset[index]
    source, pack = dataset.locate(index) if hasattr(dataset, "locate") else (dataset, index)
    if hasattr(source, "dataset_index"):  # Megatron's BlendedDataset
        part = int(source.dataset_index[pack])
        source, pack = source.datasets[part], int(source.dataset_sample_index[pack])
    cu_seqlens = np.unique(arrays["cu_seqlens"].numpy())
    phase, view = source.config.phase, source.config.view
    return {
        "sample": index,
        "phase": phase if view is View.CONDITIONED else view.name.lower(),
        "corpus": source.corpus_prefix,
        "pack": pack,
        **{key: arrays[key].tolist() for key in ("tokens", "labels", "loss_mask", "position_ids")},
        "cu_seqlens": cu_seqlens.tolist(),
        "max_seqlen": int(arrays["max_seqlen"]),
        "documents": source.documents_of(pack),
    }, source


def _counts_json(counts: PlanCounts) -> dict[str, Any]:
    return {name: getattr(counts, name) for name in _JSON_COUNTS}


def corpora_of(dataset: Any | None) -> list[Any]:
    """The `MeCoGPTDataset`s behind a split, a phase or a view: one, or those of blends."""
    if dataset is None:
        return []
    for name in ("parts", "datasets"):
        if hasattr(dataset, name):
            return [corpus for part in getattr(dataset, name) for corpus in corpora_of(part)]
    return [dataset]


def percent(part: int, whole: int) -> str:
    """A formatted share such as `0.12 %`; `-` if `whole` is 0."""
    return f"{100 * part / whole:.2f} %" if whole else "-"
