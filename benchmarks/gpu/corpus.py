"""A synthetic corpus for timing: web-like lengths, random tokens, hosts as metadata.

Written with Megatron's own builder and PyArrow, so that a host needs nothing else of `meco
prepare`. The tokenizer is made on the spot from the hosts, so that prefixes have as many tokens as
those of a real one; token ids of the documents are drawn from the whole vocabulary of the model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
_SUFFIXES = ("com", "org", "net", "edu", "co.uk", "de")
_SYLLABLES = ("news", "wiki", "tech", "shop", "blog", "art", "med", "law", "sport", "home", "data")


def write_tokenizer(folder: Path, hosts: list[str]) -> Path:
    """A byte-level BPE of 4,000 tokens at most, as a Hugging Face folder with BOS and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"URL: {host}\n\n" for host in hosts], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_corpus(
    folder: Path, *, num_documents: int, vocab_size: int, median: float, longest: int
) -> None:
    """Write corpus and tokenizer; what is there already is kept.

    Args:
        folder: Where to: `corpus` is the path prefix, `tokenizer` the tokenizer's folder.
        num_documents: Documents.
        vocab_size: Token ids are below it.
        median: Of the lognormal lengths, whose mean is twice as large.
        longest: Lengths are clipped there.
    """
    prefix, tokenizer = folder / "corpus", folder / "tokenizer"
    done = folder / "done"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    hosts = [
        "www." + "".join(draw.choice(_SYLLABLES, 2)) + f"{i}." + str(draw.choice(_SUFFIXES))
        for i in range(500)
    ]
    write_tokenizer(tokenizer, hosts)
    eod = 1  # EOS, the second special token
    lengths = np.clip(draw.lognormal(np.log(median), 1.177, num_documents), 2, longest).astype(int)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for length in lengths:
        tokens = draw.integers(2, vocab_size, length, dtype=np.int32)
        tokens[-1] = eod
        builder.add_document(tokens, [length])
    builder.finalize(f"{prefix}.idx")
    urls = [f"https://{draw.choice(hosts)}/{i}" for i in range(num_documents)]
    table = pa.table({"url": pa.array(urls, pa.string())})
    with pa.ipc.new_file(f"{prefix}.metadata.arrow", table.schema) as writer:
        writer.write_table(table)
    done.touch()


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--median", type=float, required=True)
    parser.add_argument("--longest", type=int, required=True)
    args = parser.parse_args()
    write_corpus(
        args.folder,
        num_documents=args.documents,
        vocab_size=args.vocab_size,
        median=args.median,
        longest=args.longest,
    )


if __name__ == "__main__":
    main()
