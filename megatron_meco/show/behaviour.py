"""Losses of held-out texts and generations of models under the metadata of each source."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_meco.data.report import sample_report
from megatron_meco.errors import FlagError
from megatron_meco.inference.generate import generate_text
from megatron_meco.inference.likelihood import TextScore
from megatron_meco.inference.model import LoadedModel
from megatron_meco.inference.paired import mean_and_error

_MOST_PACKS = 3000
_SHORTEST = 8  # tokens


@dataclass(frozen=True)
class Source:
    """Held-out texts that had the same prefix.

    Attributes:
        prefix: The prefix.
        texts: The texts.
    """

    prefix: str
    texts: tuple[str, ...]


def held_out_sources(valid: Any, num_sources: int, num_texts: int) -> list[Source]:
    """Collect texts of the validation split by their prefix.

    Args:
        valid: The validation dataset of a run.
        num_sources: How many prefixes: those with the most texts.
        num_texts: How many texts of each, the first ones.

    Returns:
        The sources with at least two texts, in the order of their prefixes; texts of fewer than 8
        tokens are left out, later parts of a document too.
    """
    found: dict[str, dict[tuple[str, int], str]] = defaultdict(dict)
    for index in range(min(len(valid), _MOST_PACKS)):
        report, source = sample_report(valid, index)
        if report["phase"] != "conditioned":
            continue
        tokenizer = source.config.tokenizer
        for piece in report["documents"]:
            runs = [(begin, end) for kind, begin, end in piece["parts"] if kind == "body"]
            body = [token for begin, end in runs for token in report["tokens"][begin:end]]
            if piece["prefix"] is None or piece["body_begin"] or len(body) < _SHORTEST:
                continue
            text = tokenizer.detokenize(body[:-1] if body[-1] == tokenizer.eod else body)
            found[piece["prefix"]].setdefault((report["corpus"], piece["document"]), text)
    most = sorted(found, key=lambda prefix: (-len(found[prefix]), prefix))[:num_sources]
    return [
        Source(prefix, tuple(found[prefix].values())[:num_texts])
        for prefix in sorted(most)
        if len(found[prefix]) > 1
    ]


def matrix_report(name: str, loaded: LoadedModel, sources: Sequence[Source]) -> dict[str, Any]:
    """The loss of each source's texts under each source's prefix and under none.

    Args:
        name: What to call the model.
        loaded: The model.
        sources: At least two.

    Returns:
        `name`; `sources` (their prefixes); `texts` (how many of each); `loss` (rows: the texts'
        source; columns: the prefix, the last one none; nats per token, the mean over texts);
        `wrong_minus_right`: mean, standard error and number over all texts of the mean loss under
        the other sources' prefixes minus the loss under its own.
    """
    texts = [text for source in sources for text in source.texts]
    prefixes = [source.prefix for source in sources]
    longest = max(prefixes, key=lambda prefix: len(loaded.tokenizer(prefix).input_ids))
    score = TextScore(loaded, texts, longest)
    everything = list(range(len(texts)))
    by_prefix = [[-x for x in score(prefix, everything)] for prefix in [*prefixes, ""]]
    loss, differences = [], []
    begin = 0
    for row, source in enumerate(sources):
        end = begin + len(source.texts)
        loss.append([sum(column[begin:end]) / (end - begin) for column in by_prefix])
        for text in range(begin, end):
            wrong = [by_prefix[c][text] for c in range(len(sources)) if c != row]
            differences.append(sum(wrong) / len(wrong) - by_prefix[row][text])
        begin = end
    mean, error = mean_and_error(differences)
    return {
        "name": name,
        "sources": prefixes,
        "texts": [len(source.texts) for source in sources],
        "loss": loss,
        "wrong_minus_right": {"mean": mean, "stderr": error, "texts": len(texts)},
    }


def generations_report(
    models: Sequence[tuple[str, LoadedModel]],
    prefixes: Sequence[str],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Continue each prompt by each model under each prefix and under none.

    Returns:
        A list of {model, prompt, seed, columns: a list of {prefix, text}, the first one plain}.

    Raises:
        FlagError: There is nothing to continue: an empty prompt and a tokenizer without BOS.
    """
    rows = []
    for prompt in prompts:
        for name, loaded in models:
            if not prompt and loaded.model.config.bos_token_id is None:
                raise FlagError("empty", where="--prompt", remedy="Give a text to continue.")
            columns = [
                {
                    "prefix": prefix,
                    "text": generate_text(
                        loaded.model,
                        loaded.tokenizer,
                        prefix,
                        prompt,
                        max_new_tokens=max_new_tokens,
                        seed=seed,
                        suffix=loaded.conditioning.suffix,
                    ),
                }
                for prefix in ["", *prefixes]
            ]
            rows.append({"model": name, "prompt": prompt, "seed": seed, "columns": columns})
    return rows
