"""`meco plan` and `meco inspect`: what a run will train on, without training.

Both take the flags of the training script, parse and validate them with Megatron's own parser
(`parse_run`) and build the datasets with the script's own function (`build_datasets`), so they show
what a run gets. Without `plan --build` the caches go to a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_meco.config import CONDITIONED, MeCoConfig, add_meco_arguments
from megatron_meco.data.advice import advice
from megatron_meco.data.phases import Schedule
from megatron_meco.data.report import (
    PER_PACK,
    Run,
    percent,
    plan_report,
    sample_report,
    suffix_warnings,
)
from megatron_meco.errors import FlagError
from megatron_meco.wording import counted

_SPLITS = ("train", "valid", "test")
_PREFIX_STYLE = "dim cyan"
_SUFFIX_STYLE = "cyan"
_BORDER_STYLE = "magenta"
_STYLES = {"prefix": _PREFIX_STYLE, "body": "", "suffix": _SUFFIX_STYLE}


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco plan` that a training script does not have."""
    _describe_flags(parser)
    parser.add_argument(
        "--build",
        action="store_true",
        help="Write the plans and prefix tables to --data-cache-path, ahead of the job.",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")


def run_plan(args: argparse.Namespace) -> int:
    """Run `meco plan`; `args.training_flags` are the flags of the run."""
    with datasets_of(args.training_flags, keep=args.build) as (run, flags):
        report = plan_report(run)
        report["advice"] = advice(run, report, MeCoConfig.from_args(flags), flags.seq_length)
        if args.json:
            print(json.dumps(report))
        else:
            _print_plan(report, flags)
    return 0


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco inspect` that a training script does not have."""
    _describe_flags(parser)
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="Sample of the split.")
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME",
        help="train, valid or test: the split of the sample. Ratios such as 99,1,0 are Megatron's "
        "flag of the same name.",
    )
    parser.add_argument(
        "--max-characters",
        type=int,
        default=400,
        metavar="N",
        help="Text shown of each document. Default: %(default)s.",
    )
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="Show the sample token by token: what each predicts, and whether the loss has it.",
    )
    parser.add_argument("--json", action="store_true", help="Print the raw arrays as JSON.")


def run_inspect(args: argparse.Namespace) -> int:
    """Run `meco inspect`; `args.training_flags` are the flags of the run."""
    if args.max_characters < 0:
        raise FlagError(
            "must not be negative",
            where=f"--max-characters {args.max_characters}",
            remedy="Give 0 or more.",
        )
    name = ([s for s in args.split if s in _SPLITS] or ["train"])[-1]
    ratios = [word for s in args.split if s not in _SPLITS for word in ("--split", s)]
    with datasets_of([*args.training_flags, *ratios], keep=False) as (run, _):
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
        elif args.tokens:
            _print_tokens(report, source)
        else:
            _print_sample(report, source, name, args.max_characters)
    return 0


def _describe_flags(parser: argparse.ArgumentParser) -> None:
    """Show the flags of a run in the help. Megatron's parser parses them, not this one."""
    flags = argparse.ArgumentParser(
        add_help=False, usage=argparse.SUPPRESS, formatter_class=parser.formatter_class
    )
    add_meco_arguments(flags)
    parser.usage = f"{parser.prog} [options] FLAGS_OF_THE_RUN"
    parser.epilog = (
        "FLAGS_OF_THE_RUN are those of the training script, Megatron's and MeCo's. Flags of the\n"
        "model may be left out altogether.\n\n"
        f"{flags.format_help().strip()}\n\n{parser.epilog or ''}"
    )


@contextlib.contextmanager
def datasets_of(flags: list[str], *, keep: bool) -> Iterator[tuple[Run, argparse.Namespace]]:
    """The datasets that the training script would build for these flags, and the parsed flags."""
    with _few_messages():
        # Late: torch and Megatron take seconds to import, and `--help` does not need them.
        from megatron_meco.training.arguments import parse_run

        args, notes = parse_run(flags)
        for note in notes:
            print(f"meco: note: {note}", file=sys.stderr)
        with _cache_folder(args, keep=keep) as args.data_cache_path:
            yield _build(args), args


@contextlib.contextmanager
def _few_messages() -> Iterator[None]:
    """Leave out warnings, and what Megatron and torch log about their configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("megatron", "torch.utils.cpp_extension"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


@contextlib.contextmanager
def _cache_folder(args: argparse.Namespace, *, keep: bool) -> Iterator[str]:
    """`--data-cache-path` to keep plans and prefix tables, else a temporary folder."""
    if not keep:
        with tempfile.TemporaryDirectory(prefix="meco-plan-") as folder:
            yield folder
    elif args.data_cache_path is None:
        raise FlagError(
            "missing", where="--data-cache-path", remedy="Name the folder that --build fills."
        )
    else:
        yield args.data_cache_path


def _build(args: argparse.Namespace) -> Run:
    # Late: the platform must be chosen before Megatron is imported.
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding

    from megatron_meco.corpus.tokenizer import TOKENIZER_DEFAULTS, build_tokenizer
    from megatron_meco.data.dataset import MeCoGPTDatasetConfig
    from megatron_meco.data.run_datasets import build_datasets
    from megatron_meco.training.arguments import (
        evaluation_from_args,
        full_evaluation_from_args,
        schedule_from_args,
    )
    from megatron_meco.training.blends import cooldown_blend
    from megatron_meco.training.stock import dataset_options

    extra = {name: getattr(args, name) for name in TOKENIZER_DEFAULTS}
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, **extra)
    schedule = schedule_from_args(args)
    config = MeCoGPTDatasetConfig(
        **dataset_options(args, tokenizer),
        # The number of embeddings of the run.
        vocab_size=vocab_size_with_padding(tokenizer.vocab_size, args, logging_enabled=False),
        meco=MeCoConfig.from_args(args),
    )
    sizes = _split_sizes(args, schedule)
    built = build_datasets(
        sizes,
        lambda: True,
        config,
        schedule,
        cooldown_blend(args),
        evaluation_from_args(args),
        full_evaluation_from_args(args, sizes[1]),
    )
    return Run(schedule, *built)


def _split_sizes(args: argparse.Namespace, schedule: Schedule) -> list[int | None]:
    """Samples of the splits, as in Megatron's `get_train_valid_test_num_samples`."""
    skipped = (args.start_eval_at_iter or 0) // args.eval_interval
    evaluations = max(0, schedule.num_iterations // args.eval_interval + 1 - skipped)
    each = args.eval_iters * args.eval_global_batch_size
    return [schedule.num_samples, evaluations * each, each]


def _print_plan(report: dict[str, Any], args: argparse.Namespace) -> None:
    console = Console()
    start = ""
    if "start_iteration" in report:
        start = (
            f"Plain up to iteration [bold]{report['start_iteration']:,}[/] "
            f"(sample {report['start_sample']:,}). "
        )
    console.print(
        f"[bold]{report['num_iterations']:,}[/] iterations, {report['num_samples']:,} samples of "
        f"{args.seq_length:,} tokens. {start}Switch after iteration "
        f"[bold]{report['switch_iteration']:,}[/] (sample {report['switch_sample']:,})."
    )
    suffix = args.meco_suffix_template
    template = args.meco_template or ("(none)" if suffix else "(none: the matched baseline)")
    of_suffixes = f", suffix template {suffix}" if suffix else ""
    console.print(
        f"Template {template}{of_suffixes}, packing {args.meco_packing}.",
        highlight=False,
        markup=False,
    )
    columns = {**report["phases"], "total": report["total"]}
    table = Table("")
    for name in columns:
        table.add_column(name, justify="right")
    for label, show in _ROWS:
        if label == _ALIGNMENT and not report["total"]["alignment_tokens"]:
            continue
        if label in _SUFFIXES and not suffix:
            continue
        shown = f"{label} and suffix" if label == _PLAIN and suffix else label
        table.add_row(shown, *(_cell(show, c, args.seq_length) for c in columns.values()))
    console.print(table)
    missing, long = report["documents_without_value"], report["documents_with_long_prefix"]
    if missing:
        console.print(f"[yellow]{missing:,} documents lack a value and train plain.[/]")
    if long:
        console.print(f"[yellow]{long:,} documents have too long a prefix and train plain.[/]")
    for line in suffix_warnings(report):
        console.print(f"[yellow]{line}.[/]")
    epochs = max(c["num_epochs"] for c in report["phases"].values())
    if epochs > 1:
        console.print(f"[yellow]The documents do not suffice: up to {epochs} epochs.[/]")
    console.print(
        f"Validation: {report['valid_packs']:,} packs; test: {report['test_packs']:,} packs."
    )
    for line in report["advice"]:
        console.print(f"Advice: {line}", highlight=False, markup=False)


def _cell(show: Callable[[dict[str, Any], int], str], counts: dict[str, Any], length: int) -> str:
    return show(counts, length) if counts["packs"] else "-"


_ALIGNMENT = "  behind documents"
_PLAIN = "documents without prefix"
_SUFFIXES = ("suffix tokens", "  suffixes of all tokens")
_ROWS: tuple[tuple[str, Callable[[dict[str, Any], int], str]], ...] = (
    ("documents", lambda c, _: f"{c['documents']:,}"),
    ("packs", lambda c, _: f"{c['packs']:,}"),
    ("body tokens", lambda c, _: f"{c['body_tokens']:,}"),
    ("prefix tokens", lambda c, _: f"{c['prefix_tokens']:,}"),
    ("  of all tokens", lambda c, n: percent(c["prefix_tokens"], c["packs"] * n)),
    (_SUFFIXES[0], lambda c, _: f"{c['suffix_tokens']:,}"),
    (_SUFFIXES[1], lambda c, n: percent(c["suffix_tokens"], c["packs"] * n)),
    ("discarded tokens", lambda c, _: f"{c['discarded_tokens']:,}"),
    (
        "  of the documents' tokens",
        lambda c, _: percent(c["discarded_tokens"], c["discarded_tokens"] + c["body_tokens"]),
    ),
    ("padding", lambda c, n: percent(c["padding_tokens"], c["packs"] * n)),
    (_ALIGNMENT, lambda c, n: percent(c["alignment_tokens"], c["packs"] * n)),
    ("documents cut", lambda c, _: percent(c["documents_cut"], c["documents"])),
    (_PLAIN, lambda c, _: f"{c['documents_plain']:,}"),
    ("empty documents skipped", lambda c, _: f"{c['documents_empty']:,}"),
    (
        "documents per pack",
        lambda c, _: " / ".join(f"{c['documents_per_pack'][k]:.0f}" for k in PER_PACK),
    ),
)


def _print_sample(report: dict[str, Any], source: Any, split: str, max_characters: int) -> None:
    """Show a pack in colors, document by document."""
    console = Console()
    tokenizer = source.config.tokenizer
    length = len(report["tokens"])
    documents = counted(len(report["documents"]), "document")
    trained = int(sum(report["loss_mask"]))
    console.print(
        f"[bold]Sample {report['sample']}[/] of {split} ([bold]{report['phase']}[/]): pack "
        f"{report['pack']} of {report['corpus']}, {documents}, {trained} of {length} labels in the "
        "loss.",
        highlight=False,
    )
    has_suffixes = any(document["suffix_tokens"] for document in report["documents"])
    negation = "" if source.trains_on_suffix else "not "
    console.print(
        Text.assemble(
            ("BOS and prefix, not in the loss", _PREFIX_STYLE),
            "   body, in the loss   ",
            (f"suffix, {negation}in the loss   " if has_suffixes else "", _SUFFIX_STYLE),
            ("| document border, not in the loss", _BORDER_STYLE),
        )
    )
    bounds = report["cu_seqlens"]
    for document, begin, end in zip(report["documents"], bounds, bounds[1:], strict=False):
        aligned = document["alignment_tokens"]
        in_loss = int(sum(report["loss_mask"][begin:end]))
        console.rule(
            Text(
                f" document {document['document']} | tokens {begin} to {end} | body "
                f"{document['body_begin']} to {document['body_end']} | {in_loss} in the loss "
                + (f"| {aligned} of padding " if aligned else ""),
                _BORDER_STYLE,
            ),
            align="left",
            characters="-",
        )
        if report["phase"] == CONDITIONED:
            meco = source.config.meco
            if document["plain_because"] and (meco.template or not meco.suffix_template):
                console.print(Text(f"plain: {document['plain_because']}", _BORDER_STYLE))
            if document["no_suffix_because"] and meco.suffix_template:
                console.print(Text(f"no suffix: {document['no_suffix_because']}", _BORDER_STYLE))
        head: list[int] = []
        texts: list[tuple[str, str]] = []
        left = max_characters
        for part, part_begin, part_end in document["parts"]:
            tokens = report["tokens"][part_begin:part_end]
            if part == "bos" or (part == "prefix" and not texts):
                head += tokens
            elif part != "padding":
                text = tokenizer.detokenize(tokens)
                if part == "body":
                    shown = text if len(text) <= left else text[:left] + " [...]"
                    left, text = left - min(left, len(text)), shown
                texts.append((text, _STYLES[part]))
        console.print(
            Text.assemble((tokenizer.detokenize(head), _PREFIX_STYLE), *texts), highlight=False
        )
    padding = length - bounds[len(report["documents"])]
    if padding:
        console.rule(Text(f" {padding} tokens of padding ", _BORDER_STYLE), align="left")


def _print_tokens(report: dict[str, Any], source: Any) -> None:
    """Show a pack token by token."""
    detokenize = source.config.tokenizer.detokenize
    table = Table("", "document", "part", "token", "text", "predicts", "in the loss", box=None)
    parts: list[tuple[str, str]] = []
    for document in report["documents"]:
        for part, begin, end in document["parts"]:
            shown = "prefix" if part == "bos" else part
            parts += [(str(document["document"]), shown)] * (end - begin)
    parts += [("-", "padding")] * (len(report["tokens"]) - len(parts))
    for position, (token, (name, part)) in enumerate(zip(report["tokens"], parts, strict=True)):
        table.add_row(
            *(str(position), name, part, str(token)),
            Text(repr(detokenize([token]))),
            Text(repr(detokenize([report["labels"][position]]))),
            "yes" if report["loss_mask"][position] else "",
            style=_STYLES.get(part, ""),
        )
    Console(soft_wrap=True).print(table)
