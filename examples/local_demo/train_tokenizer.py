"""Train the demo's tokenizer: byte-level BPE on the corpus, saved as a Hugging Face folder.

Megatron reads the folder with `--tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER`.
Costs some seconds and about 1 GB of memory for 40 MB of text. The folder's files are written here
rather than by transformers, whose version 5 names a tokenizer class that version 4 refuses. Given
up: a padding token (Megatron packs and never pads with it) and a post-processor that adds BOS
(tokens at document borders belong to the packer).

    python examples/local_demo/train_tokenizer.py demo-output/corpus.jsonl demo-output/tokenizer
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"


def main() -> int:
    """Train on the corpus and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="JSONL file with a `text` field")
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--vocab-size", type=int, default=8192)
    args = parser.parse_args()
    begin = time.monotonic()
    tokenizer = train(texts(args.corpus), args.vocab_size)
    save(tokenizer, args.output)
    seconds = time.monotonic() - begin
    print(f"{tokenizer.get_vocab_size():,} tokens, written to {args.output} in {seconds:.0f} s")
    return 0


def texts(corpus: Path) -> Iterator[str]:
    """Yield the text of every document."""
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            yield str(json.loads(line)["text"])


def train(documents: Iterator[str], vocab_size: int) -> Tokenizer:
    """Return a tokenizer of `vocab_size` tokens, the two special ones first.

    Args:
        documents: The texts to learn merges from.
        vocab_size: Tokens in all; at least 258 (every byte and the two special tokens).

    Returns:
        A tokenizer that encodes any text without unknown tokens and adds none of its own.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that transformers 4 and 5 open as `PreTrainedTokenizerFast`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        # No limit of its own: the packer decides how long a sequence is.
        "model_max_length": 10**30,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {"bos_token": BOS, "eos_token": EOS}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
