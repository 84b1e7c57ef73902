"""The command line of `meco tokenizer`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_meco.corpus.outputs import check_local
from megatron_meco.errors import FlagError
from megatron_meco.wording import JSON_HELP, counted, json_line


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco tokenizer` to its parser."""
    kinds = parser.add_subparsers(dest="name", required=True, metavar="train|llama3")
    train = kinds.add_parser(
        "train", help="train a byte-level BPE on raw documents", allow_abbrev=False
    )
    train.add_argument(
        "inputs", nargs="+", metavar="CORPUS", help="files, folders or patterns, as for prepare"
    )
    train.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="tokens in all, BOS and EOS among them; 32000 suits most corpora",
    )
    train.add_argument("--output", required=True, metavar="DIR", help="the folder to make")
    train.add_argument("--text-field", default="text", metavar="NAME", help="default: %(default)s")
    train.add_argument(
        "--strict", action="store_true", help="stop at the first line that is no document"
    )
    train.add_argument("--json", action="store_true", help=JSON_HELP)
    llama3 = kinds.add_parser(
        "llama3", help="make the folder of Llama 3's tokenizer", allow_abbrev=False
    )
    # Where it was given before all commands had `--output`.
    llama3.add_argument("folder", nargs="?", metavar="DIR", help=argparse.SUPPRESS)
    llama3.add_argument("--output", metavar="DIR", help="the folder to make")
    llama3.add_argument("--json", action="store_true", help=JSON_HELP)


def run_tokenizer(args: argparse.Namespace) -> int:
    """Run `meco tokenizer`; returns the exit status, 0."""
    # Late: `--help` needs neither library.
    if args.name == "train":
        return _train(args)
    from megatron_meco.corpus.llama3 import write_llama3_tokenizer

    if (args.folder is None) == (args.output is None):
        raise FlagError("must be given once", where="--output", remedy="Name the folder to make.")
    given = args.folder if args.output is None else args.output
    check_local(given, "--output")
    folder = Path(given)
    ids = write_llama3_tokenizer(folder)
    if args.json:
        print(json_line({"tokens": ids, "folder": folder}))
        return 0
    print(f"written: {folder}")
    for token, number in ids.items():
        print(f"  {token} {number}")
    print(
        "Use it with: --tokenizer-type HuggingFaceTokenizer --tokenizer-model "
        f"{folder}\nIt falls under Meta's Llama 3 Community License."
    )
    return 0


def _train(args: argparse.Namespace) -> int:
    from megatron_meco.corpus.train_tokenizer import BOS, EOS, train_tokenizer

    check_local(args.output, "--output")
    folder = Path(args.output)
    made = train_tokenizer(
        args.inputs, folder, args.vocab_size, text_field=args.text_field, strict=args.strict
    )
    if args.json:
        print(json_line({**vars(made), "bos": BOS, "eos": EOS, "folder": folder}))
        return 0
    rows = [
        ("documents", f"{made.documents:,}"),
        ("text", f"{made.text_bytes / 1e6:,.1f} MB"),
        ("tokens", f"{made.vocab_size:,} (0 {BOS}, 1 {EOS})"),
        *(
            ("rejected", f"{counted(count, 'line')}: {reason}")
            for reason, count in sorted(made.rejected.items())
        ),
        ("written", str(folder)),
    ]
    for name, value in rows:
        print(f"{name:<10} {value}")
    if made.vocab_size < args.vocab_size:
        print(f"note: the corpus has no more than {made.vocab_size:,} tokens to learn")
    print(f"Use it with: --tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}")
    return 0
