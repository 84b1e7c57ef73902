"""`meco show`: collect the facts of the page."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from megatron_meco import __version__
from megatron_meco.errors import FlagError
from megatron_meco.run.run_file import original_words, training_flags
from megatron_meco.run.run_folder import last_log
from megatron_meco.show.page import check_page_file, write_page

_MOST = 64


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco show` that a training script does not have."""
    parser.usage = f"{parser.prog} [options] RUN.yaml | RUN_FOLDER | PREFIX | FLAGS_OF_THE_RUN"
    add = parser.add_argument
    add(
        "-o",
        "--output",
        type=_absolute,
        default=_absolute("meco-show.html"),
        metavar="FILE",
        help="the page; default: meco-show.html",
    )
    add(
        "--log",
        action="append",
        type=_named,
        default=[],
        metavar="[NAME=]FILE",
        help="the log of a run, for its losses; may be repeated",
    )
    add(
        "--model",
        action="append",
        type=_named,
        default=[],
        metavar="[NAME=]DIR",
        help="what `meco export` wrote, for losses under each metadata and generations; may be "
        "repeated",
    )
    add("--packs", type=int, default=12, metavar="N", help="samples; default: %(default)s")
    add(
        "--top",
        type=int,
        default=30,
        metavar="N",
        help="metadata values to list; default: %(default)s",
    )
    add(
        "--sources",
        type=int,
        default=6,
        metavar="N",
        help="sources to compare with --model; default: %(default)s",
    )
    add(
        "--texts",
        type=int,
        default=12,
        metavar="N",
        help="held-out texts of each; default: %(default)s",
    )
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="to continue with --model; may be repeated; default: an empty one",
    )
    add(
        "--max-new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="of each continuation; default: %(default)s",
    )
    add(
        "--sampling-seed",
        type=int,
        default=0,
        metavar="N",
        help="of the continuations; default: %(default)s",
    )
    add("--device", help="for --model; default: a GPU where there is one")
    add("--json", action="store_true", help="print the numbers as JSON and write no page")


def run_show(args: argparse.Namespace) -> int:
    """Run `meco show`; `args.training_flags` name a run or a corpus, or are a run's flags."""
    _check_numbers(args)
    if not args.json:
        check_page_file(args.output)
    facts = gather(args)
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    write_page(args.output, facts)
    print(f"meco: wrote {args.output}")
    return 0


def gather(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the facts of a page; see the modules of this package."""
    words: list[str] = list(args.training_flags)
    if not words and not args.log:
        raise FlagError(
            "nothing to show",
            where="meco show",
            remedy="Give a run file, the folder of a run, a corpus (as in --data-path), the flags "
            "of a run, or --log.",
        )
    facts: dict[str, Any] = {"version": __version__, "corpora": []}
    is_corpus = len(words) == 1 and Path(f"{words[0]}.idx").exists()
    if args.model and (is_corpus or not words):
        raise FlagError(
            "needs a run",
            where="--model",
            remedy="Give its run file or its flags: texts come from its validation split.",
        )
    corpora = words if is_corpus else []
    logs = list(args.log)
    if words and not is_corpus:
        with training_flags(_of_folder(words)) as flags:
            if not logs and (log := _log_of(flags)) is not None:
                logs = [log]
            corpora = _gather_run(args, flags, facts)
    if logs:
        from megatron_meco.show.curves import curves_report

        facts["curves"] = [curves_report(name, path) for name, path in logs]
    from megatron_meco.show.corpus_facts import corpus_facts

    facts["corpora"] = [corpus_facts(each, args.top) for each in corpora]
    names = [*(name for name, _ in logs), *(Path(each).name for each in corpora)]
    facts["title"] = "meco: " + ", ".join(dict.fromkeys(names))
    return facts


def _of_folder(words: list[str]) -> list[str]:
    """Replace the folder of a run by the words of its run file."""
    folder = Path(words[0])
    if words[0].startswith("-") or not folder.is_dir():
        return words
    log = last_log(folder)
    copy = None if log is None else log.with_name("run.yaml")
    if copy is None or not copy.is_file():
        raise FlagError(
            "is no folder of a run that `meco train` started",
            where=words[0],
            remedy="Give the run file, or the flags of the run.",
        )
    return [*original_words(copy), *words[1:]]


def _gather_run(args: argparse.Namespace, flags: list[str], facts: dict[str, Any]) -> list[str]:
    """Add plan, packs, losses and generations; return the corpora of the run."""
    from megatron_meco.data.report import corpora_of, plan_report
    from megatron_meco.training.plan import datasets_of

    with datasets_of(flags, keep=False) as (run, _):
        from megatron_meco.show.packs import packs_report

        facts["plan"] = plan_report(run)
        facts["packs"] = packs_report(run, args.packs)
        splits = (run.train, run.valid, run.test)
        corpora = [corpus.corpus_prefix for split in splits for corpus in corpora_of(split)]
        if args.model:
            from megatron_meco.inference.model import load_model
            from megatron_meco.show import behaviour

            sources = (
                []
                if run.valid is None
                else behaviour.held_out_sources(run.valid, args.sources, args.texts)
            )
            if len(sources) < 2:
                raise FlagError(
                    f"the validation split has {len(sources)} sources with two texts or more",
                    where="--model",
                    remedy="Give a --split with more validation documents, or a template whose "
                    "values repeat, such as {url.host}.",
                )
            loaded = [(name, load_model(folder, args.device)) for name, folder in args.model]
            facts["matrices"] = [
                behaviour.matrix_report(name, model, sources) for name, model in loaded
            ]
            facts["generations"] = behaviour.generations_report(
                loaded,
                [source.prefix for source in sources],
                args.prompt or [""],
                max_new_tokens=args.max_new_tokens,
                seed=args.sampling_seed,
            )
    return list(dict.fromkeys(os.path.abspath(each) for each in corpora))


def _absolute(text: str) -> Path:
    # A command that is given a run file works in its folder.
    return Path(text).absolute()


def _named(text: str) -> tuple[str, Path]:
    """Parse `NAME=PATH`, or a path, named after its stem."""
    name, sign, path = text.partition("=")
    if not sign or "/" in name:
        name, path = "", text
    if not path:
        raise argparse.ArgumentTypeError(f"{text!r} names no file: write [NAME=]PATH")
    return name or Path(path).stem, _absolute(path)


def _log_of(flags: list[str]) -> tuple[str, Path] | None:
    """Return the log that `meco train` keeps in the folder of a run, if there is one."""
    if "--save" not in flags[:-1]:
        return None
    folder = Path(flags[flags.index("--save") + 1])
    log = last_log(folder)
    return None if log is None else (folder.name, log)


def _check_numbers(args: argparse.Namespace) -> None:
    for flag, value, least in (
        ("--packs", args.packs, 1),
        ("--top", args.top, 1),
        ("--sources", args.sources, 2),
        ("--texts", args.texts, 2),
        ("--max-new-tokens", args.max_new_tokens, 1),
    ):
        most = _MOST if flag in ("--packs", "--sources") else 10_000
        if not least <= value <= most:
            raise FlagError(
                f"{value}", where=flag, remedy=f"Give a number from {least} to {most:,}."
            )
