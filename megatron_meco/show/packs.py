"""Training samples on both sides of each switch, token by token."""

from __future__ import annotations

from typing import Any

from megatron_meco.data.report import Run, sample_report

BOS, PREFIX, BODY, SUFFIX, PADDING = "b", "p", "t", "s", "."
_KINDS = {"bos": BOS, "prefix": PREFIX, "body": BODY, "suffix": SUFFIX, "padding": PADDING}
_MOST_CHARACTERS = 400


def packs_report(run: Run, number: int) -> dict[str, Any]:
    """Describe the samples around the switch, or around both.

    Args:
        run: The datasets and the schedule of a run.
        number: How many samples around a switch; half of them, as far as there are, on each side.

    Returns:
        `switch_sample`, in a run with a plain phase `start_sample`; `vocabulary` ({token id: its
        text}); and `packs`, each with `sample`, `phase`, `corpus`, `pack`, `tokens` (ids), `kinds`
        (one character for each token: b BOS, p prefix, t body, s suffix, . padding), `in_loss` (one
        character for each token: 1 where the label that stands at this token, the next token, is in
        the loss), `positions`, and `documents` ({document, begin, end, body_begin, prefix, text}).
    """
    last = len(run.train)
    shown: set[int] = set()
    for _, switch, *_ in run.schedule.switches:
        begin = max(0, min(switch - number // 2, last - number))
        shown.update(range(begin, min(begin + number, last)))
    packs = [_pack(run.train, sample) for sample in sorted(shown)]
    vocabulary: dict[int, str] = {}
    for pack in packs:
        source = pack.pop("source")
        for token in pack["tokens"]:
            if token not in vocabulary:
                vocabulary[token] = source.config.tokenizer.detokenize([token])
    switches = {"switch_sample": run.schedule.switch_sample}
    if run.schedule.start_sample:
        switches["start_sample"] = run.schedule.start_sample
    return {**switches, "vocabulary": vocabulary, "packs": packs}


def _pack(dataset: Any, index: int) -> dict[str, Any]:
    report, source = sample_report(dataset, index)
    tokenizer = source.config.tokenizer
    tokens, bounds = report["tokens"], report["cu_seqlens"]
    kinds = [PADDING] * len(tokens)
    documents = []
    for piece, begin, end in zip(report["documents"], bounds, bounds[1:], strict=False):
        text = ""
        for part, first, last in piece["parts"]:
            kinds[first:last] = [_KINDS[part]] * (last - first)
            if part == "body":
                text += tokenizer.detokenize(tokens[first:last])
        documents.append(
            {
                "document": piece["document"],
                "begin": begin,
                "end": end,
                "body_begin": piece["body_begin"],
                "prefix": piece["prefix"],
                **({"suffix": piece["suffix"]} if piece.get("suffix") is not None else {}),
                "text": text[:_MOST_CHARACTERS]
                + (" [...]" if len(text) > _MOST_CHARACTERS else ""),
            }
        )
    return {
        "sample": report["sample"],
        "phase": report["phase"],
        "corpus": report["corpus"],
        "pack": report["pack"],
        "tokens": tokens,
        "kinds": "".join(kinds),
        "in_loss": "".join("1" if value else "0" for value in report["loss_mask"]),
        "positions": report["position_ids"],
        "documents": documents,
        "source": source,
    }
