"""`meco plan` and `meco inspect`: what a run will train on, without training.

Both take the flags of the training script and build the datasets by the very function that the
script calls (`build_datasets`), so what they show is what a run gets. `plan` adds up what each
phase holds and loses; `inspect` shows one sample. Without `plan --build` the caches go to a
temporary folder. What was given up: a second implementation of anything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_meco.config import CONDITIONED, COOLDOWN, MeCoConfig, add_meco_arguments
from megatron_meco.data.corpora import check_corpora
from megatron_meco.data.packing import PlanCounts
from megatron_meco.data.phases import BatchSize, Schedule, make_schedule
from megatron_meco.data.template import Template
from megatron_meco.errors import FlagError

_SPLITS = ("train", "valid", "test")
_DEFAULT_SPLIT = "969, 30, 1"
_PER_PACK = ("median", "p99", "max")
_PREFIX_STYLE = "dim cyan"
_BORDER_STYLE = "magenta"
_JSON_COUNTS = (
    "documents",
    "packs",
    "body_tokens",
    "prefix_tokens",
    "discarded_tokens",
    "padding_tokens",
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


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco plan`."""
    _add_run_arguments(parser)
    parser.add_argument(
        "--build",
        action="store_true",
        help="Write the plans and prefix tables to --data-cache-path, ahead of the job.",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")


def run_plan(args: argparse.Namespace) -> int:
    """Run `meco plan`."""
    with _datasets(args, keep=args.build) as run:
        report = plan_report(run)
        if args.json:
            print(json.dumps(report))
        else:
            _print_plan(report, args)
    return 0


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco inspect`."""
    _add_run_arguments(parser)
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="Sample of the split.")
    parser.add_argument(
        "--max-characters",
        type=int,
        default=400,
        metavar="N",
        help="Text shown of each document. Default: %(default)s.",
    )
    parser.add_argument("--json", action="store_true", help="Print the raw arrays as JSON.")


def run_inspect(args: argparse.Namespace) -> int:
    """Run `meco inspect`."""
    name = args.split_name
    with _datasets(args, keep=False) as run:
        dataset = getattr(run, name)
        if dataset is None:
            raise FlagError(
                f"the {name} split has no documents", where="--split", remedy="Choose another."
            )
        if not 0 <= args.sample < len(dataset):
            raise FlagError(
                f"{args.sample} is not among the {len(dataset)} samples of the {name} split",
                where="--sample",
                remedy=f"Give 0 to {len(dataset) - 1}.",
            )
        report, source = sample_report(dataset, args.sample)
        if args.json:
            print(json.dumps(report))
        else:
            _print_sample(report, source, name, args.max_characters)
    return 0


def plan_report(run: Run) -> dict[str, Any]:
    """The numbers of a run's training plans, JSON-serialisable.

    Returns:
        `phases` ({conditioned, cooldown}), `total` (each with the counts of `PlanCounts`),
        `switch_iteration`, `switch_sample`, `num_iterations`, `num_samples`, `valid_packs`,
        `test_packs`, `documents_without_value`, `documents_with_long_prefix`.
    """
    parts = {
        CONDITIONED: _corpora(run.train.conditioned),
        COOLDOWN: _corpora(run.train.cooldown),
    }
    counts = {
        phase: PlanCounts.total(corpus.plan.counts for corpus in corpora)
        for phase, corpora in parts.items()
    }
    tables = [c.prefixes for c in parts[CONDITIONED] if c.prefixes is not None]
    s = run.schedule
    return {
        "switch_iteration": s.switch_iteration,
        "switch_sample": s.switch_sample,
        "num_iterations": s.num_iterations,
        "num_samples": s.num_samples,
        "phases": {phase: _counts_json(c) for phase, c in counts.items()},
        "total": _counts_json(PlanCounts.total(counts.values())),
        "valid_packs": 0 if run.valid is None else len(run.valid),
        "test_packs": 0 if run.test is None else len(run.test),
        "documents_without_value": sum(t.documents_without_value for t in tables),
        "documents_with_long_prefix": sum(t.documents_with_long_prefix for t in tables),
    }


def most_documents(run: Run) -> int:
    """Pieces in the largest pack of all plans of a run; 0 on a rank that holds no datasets."""
    splits = (run.train, run.valid, run.test)
    plans = [corpus.plan for split in splits for corpus in _corpora(split)]
    return max((int(p.counts.documents_per_pack["max"]) for p in plans if len(p)), default=0)


def summary_lines(report: dict[str, Any], sequence_length: int) -> list[str]:
    """What a run is about to train on, for its log: one line a phase, and warnings."""
    lines = []
    for phase, c in report["phases"].items():
        if not c["packs"]:
            continue
        tokens = c["packs"] * sequence_length
        body = c["body_tokens"] + c["discarded_tokens"]
        per_pack = " / ".join(f"{c['documents_per_pack'][k]:.0f}" for k in _PER_PACK)
        lines.append(
            f"{phase}: {c['packs']:,} packs of {c['documents']:,} documents ({per_pack} a pack: "
            f"median / p99 / max), {_percent(c['prefix_tokens'], tokens)} prefix, "
            f"{_percent(c['padding_tokens'], tokens)} padding, "
            f"{_percent(c['discarded_tokens'], body)} of the documents' tokens discarded"
        )
        if c["num_epochs"] > 1:
            lines.append(f"warning: the documents do not suffice, {c['num_epochs']} epochs")
    missing, long = report["documents_without_value"], report["documents_with_long_prefix"]
    if missing:
        lines.append(f"warning: {missing:,} documents lack a value and train plain")
    if long:
        lines.append(f"warning: {long:,} documents have too long a prefix and train plain")
    return lines


def sample_report(dataset: Any, index: int) -> tuple[dict[str, Any], Any]:
    """One sample, JSON-serialisable, and the `MeCoGPTDataset` it comes from.

    Returns:
        `sample`, `phase` ("conditioned", "cooldown", or "plain" for a validation pack that hides
        prefixes), `corpus`, `pack`, the arrays of the sample, `cu_seqlens` without its fixed-length
        tail, and `documents`.
    """
    arrays = dataset[index]
    source, pack = dataset.locate(index) if hasattr(dataset, "locate") else (dataset, index)
    if hasattr(source, "dataset_index"):  # Megatron's BlendedDataset
        part = int(source.dataset_index[pack])
        source, pack = source.datasets[part], int(source.dataset_sample_index[pack])
    cu_seqlens = np.unique(arrays["cu_seqlens"].numpy())
    return {
        "sample": index,
        "phase": "plain" if source.config.hide_prefixes else source.config.phase,
        "corpus": source.corpus_prefix,
        "pack": pack,
        **{key: arrays[key].tolist() for key in ("tokens", "labels", "loss_mask", "position_ids")},
        "cu_seqlens": cu_seqlens.tolist(),
        "max_seqlen": int(arrays["max_seqlen"]),
        "documents": source.documents_of(pack),
    }, source


@contextlib.contextmanager
def _datasets(args: argparse.Namespace, *, keep: bool) -> Iterator[Run]:
    """The datasets that the training script would build for these flags."""
    if args.full_validation:
        raise FlagError(
            "no run accepts it: Megatron ends it at the first evaluation",
            where="--full-validation",
            remedy="Drop the flag and give --eval-iters.",
        )
    meco = MeCoConfig.from_args(args)
    batch_size = _batch_size(args)
    schedule = make_schedule(
        meco, batch_size, train_iterations=args.train_iters, train_samples=args.train_samples
    )
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        # Megatron logs its whole configuration, torch that this host compiles no CUDA code.
        for name in ("megatron", "torch.utils.cpp_extension"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # Late: torch and Megatron take seconds, and a usage error should not wait for them.
        from megatron_meco.corpus.tokenizer import TOKENIZER_DEFAULTS, build_tokenizer
        from megatron_meco.data import dataset

        blend, blend_per_split = _blends(args)
        cooldown = _blend(args.meco_cooldown_data_path)
        blends = [b for b in (blend, *(blend_per_split or [])) if b is not None]
        check_corpora((p for b in blends for p in b[0]), Template.parse(meco.template))
        check_corpora(cooldown[0] if cooldown else [], None)
        cache = args.data_cache_path
        if not keep:
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="meco-plan-"))
        extra = {name: getattr(args, name) for name in TOKENIZER_DEFAULTS}
        config = dataset.MeCoGPTDatasetConfig(
            random_seed=args.seed,
            sequence_length=args.seq_length,
            blend=blend,
            blend_per_split=blend_per_split,
            split=None if blend_per_split else args.split,
            path_to_cache=cache,
            mid_level_dataset_surplus=args.mid_level_dataset_surplus,
            tokenizer=build_tokenizer(args.tokenizer_type, args.tokenizer_model, **extra),
            meco=meco,
        )
        sizes = _sizes(args, schedule, batch_size)
        yield Run(
            schedule, *dataset.build_datasets(sizes, lambda: True, config, schedule, cooldown)
        )


class _SplitAction(argparse.Action):
    """`--split 99,1,0` sets the ratios, `--split valid` names one of the three."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, "split_name" if values in _SPLITS else "split", values)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a training command that decide its samples, as Megatron has them."""
    data = parser.add_argument_group("data")
    for name in ("data", "train-data", "valid-data", "test-data"):
        data.add_argument(f"--{name}-path", nargs="*", metavar="PATH")
    data.add_argument("--data-args-path", metavar="FILE")
    data.add_argument("--per-split-data-args-path", metavar="FILE")
    data.add_argument(
        "--split",
        action=_SplitAction,
        default=_DEFAULT_SPLIT,
        help="Megatron's ratios of train, valid and test documents. `inspect` takes the name of "
        "one of the three too (in a further --split), and shows a sample of that one.",
    )
    parser.set_defaults(split_name="train")
    data.add_argument("--data-cache-path", metavar="DIR")
    data.add_argument("--mid-level-dataset-surplus", type=float, default=0.005)
    data.add_argument("--seed", type=int, default=1234)
    run = parser.add_argument_group("run")
    run.add_argument("--seq-length", type=int, required=True)
    run.add_argument("--train-iters", type=int)
    run.add_argument("--train-samples", type=int)
    run.add_argument("--micro-batch-size", type=int, default=1)
    run.add_argument("--global-batch-size", type=int)
    run.add_argument("--step-batch-size-schedule")
    run.add_argument("--eval-interval", type=int, default=1000)
    run.add_argument("--eval-iters", type=int, default=100)
    run.add_argument("--full-validation", action="store_true")
    run.add_argument("--meco", action="store_true", help="Accepted, and taken for granted here.")
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer-type", required=True)
    tokenizer.add_argument("--tokenizer-model")
    for name, kind in (("vocab-size", int), ("vocab-file", str), ("merge-file", str)):
        tokenizer.add_argument(f"--{name}", type=kind)
    from megatron_meco.corpus.tokenizer import TOKENIZER_DEFAULTS

    given = {action.dest for action in parser._actions}
    parser.set_defaults(**{k: v for k, v in TOKENIZER_DEFAULTS.items() if k not in given})
    add_meco_arguments(parser)


def _batch_size(args: argparse.Namespace) -> BatchSize:
    if args.step_batch_size_schedule:
        return BatchSize.parse(args.step_batch_size_schedule, args.seq_length)
    return BatchSize.constant(args.global_batch_size or args.micro_batch_size)


def _sizes(args: argparse.Namespace, schedule: Schedule, batch_size: BatchSize) -> list[int | None]:
    """Samples of the splits, as Megatron counts them."""
    last_batch = batch_size.steps[-1][1]
    evaluations = schedule.num_iterations // args.eval_interval + 1
    valid = evaluations * args.eval_iters * last_batch
    return [schedule.num_samples, valid, args.eval_iters * last_batch]


def _blends(args: argparse.Namespace) -> tuple[Any, Any]:
    """(blend, blend per split), from the flags that Megatron reads them from."""
    if args.data_args_path:
        with open(args.data_args_path) as file:
            return _blend(file.read().split()), None
    if args.data_path:
        return _blend(args.data_path), None
    per_split = {name: getattr(args, f"{name}_data_path") for name in _SPLITS}
    if args.per_split_data_args_path:
        with open(args.per_split_data_args_path) as file:
            per_split = json.load(file)
    blends = []
    for name in _SPLITS:
        value = per_split.get(name)
        blends.append(_blend(value.split() if isinstance(value, str) else value))
    if not any(blends):
        raise FlagError(
            "no corpus is given",
            where="--data-path",
            remedy="Give the path of a prepared corpus, without .bin or .idx.",
        )
    return None, blends


def _blend(paths: list[str] | None) -> Any:
    if not paths:
        return None
    from megatron.core.datasets.utils import get_blend_from_list

    return get_blend_from_list(paths)


def _counts_json(counts: PlanCounts) -> dict[str, Any]:
    return {name: getattr(counts, name) for name in _JSON_COUNTS}


def _corpora(dataset: Any | None) -> list[Any]:
    """The `MeCoGPTDataset`s behind a split, a phase or a view: one, or those of blends."""
    if dataset is None:
        return []
    for name in ("parts", "datasets"):
        if hasattr(dataset, name):
            return [corpus for part in getattr(dataset, name) for corpus in _corpora(part)]
    return [dataset]


def _print_plan(report: dict[str, Any], args: argparse.Namespace) -> None:
    console = Console()
    console.print(
        f"[bold]{report['num_iterations']:,}[/] iterations, {report['num_samples']:,} samples of "
        f"{args.seq_length:,} tokens. Switch after iteration "
        f"[bold]{report['switch_iteration']:,}[/] (sample {report['switch_sample']:,})."
    )
    template = args.meco_template or "(none: the matched baseline)"
    console.print(
        f"Template {template}, packing {args.meco_packing}.", highlight=False, markup=False
    )
    columns = {**report["phases"], "total": report["total"]}
    table = Table("")
    for name in columns:
        table.add_column(name, justify="right")
    for label, show in _ROWS:
        table.add_row(label, *(_cell(show, c, args.seq_length) for c in columns.values()))
    console.print(table)
    missing, long = report["documents_without_value"], report["documents_with_long_prefix"]
    if missing:
        console.print(f"[yellow]{missing:,} documents lack a value and train plain.[/]")
    if long:
        console.print(f"[yellow]{long:,} documents have too long a prefix and train plain.[/]")
    epochs = max(c["num_epochs"] for c in report["phases"].values())
    if epochs > 1:
        console.print(f"[yellow]The documents do not suffice: up to {epochs} epochs.[/]")
    console.print(
        f"Validation: {report['valid_packs']:,} packs; test: {report['test_packs']:,} packs."
    )


def _cell(show: Callable[[dict[str, Any], int], str], counts: dict[str, Any], length: int) -> str:
    return show(counts, length) if counts["packs"] else "-"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "-"


_ROWS: tuple[tuple[str, Callable[[dict[str, Any], int], str]], ...] = (
    ("documents", lambda c, _: f"{c['documents']:,}"),
    ("packs", lambda c, _: f"{c['packs']:,}"),
    ("body tokens", lambda c, _: f"{c['body_tokens']:,}"),
    ("prefix tokens", lambda c, _: f"{c['prefix_tokens']:,}"),
    ("  of all tokens", lambda c, n: _percent(c["prefix_tokens"], c["packs"] * n)),
    ("discarded tokens", lambda c, _: f"{c['discarded_tokens']:,}"),
    (
        "  of the documents' tokens",
        lambda c, _: _percent(c["discarded_tokens"], c["discarded_tokens"] + c["body_tokens"]),
    ),
    ("padding", lambda c, n: _percent(c["padding_tokens"], c["packs"] * n)),
    ("documents cut", lambda c, _: _percent(c["documents_cut"], c["documents"])),
    ("documents without prefix", lambda c, _: f"{c['documents_plain']:,}"),
    ("empty documents skipped", lambda c, _: f"{c['documents_empty']:,}"),
    (
        "documents per pack",
        lambda c, _: " / ".join(f"{c['documents_per_pack'][k]:.0f}" for k in _PER_PACK),
    ),
)


def _print_sample(report: dict[str, Any], source: Any, split: str, max_characters: int) -> None:
    """Show a pack as a person wants to see it."""
    console = Console()
    tokenizer = source.config.tokenizer
    length = len(report["tokens"])
    trained = int(sum(report["loss_mask"]))
    console.print(
        f"[bold]Sample {report['sample']}[/] of {split} ([bold]{report['phase']}[/]): pack "
        f"{report['pack']} of {report['corpus']}, {len(report['documents'])} documents, {trained} "
        f"of {length} labels in the loss.",
        highlight=False,
    )
    console.print(
        Text.assemble(
            ("BOS and prefix, not in the loss", _PREFIX_STYLE),
            "   body, in the loss   ",
            ("| document border, not in the loss", _BORDER_STYLE),
        )
    )
    bounds = report["cu_seqlens"]
    for document, begin, end in zip(report["documents"], bounds, bounds[1:], strict=False):
        body = document["body_end"] - document["body_begin"]
        head = end - begin - body
        in_loss = int(sum(report["loss_mask"][begin:end]))
        console.rule(
            Text(
                f" document {document['document']} | tokens {begin} to {end} | body "
                f"{document['body_begin']} to {document['body_end']} | {in_loss} in the loss ",
                _BORDER_STYLE,
            ),
            align="left",
            characters="-",
        )
        tokens = report["tokens"][begin:end]
        text = tokenizer.detokenize(tokens[head:])
        shown = text if len(text) <= max_characters else text[:max_characters] + " [...]"
        console.print(
            Text.assemble((tokenizer.detokenize(tokens[:head]), _PREFIX_STYLE), shown),
            highlight=False,
        )
    padding = length - bounds[len(report["documents"])]
    if padding:
        console.rule(Text(f" {padding} tokens of padding ", _BORDER_STYLE), align="left")
