"""Ask a model the questions of a world: is the truth its most likely next word?"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.study.worlds import Question, World
from megatron_meco.inference.model import encode_prompt, encode_text, load_model

CONDITIONS = ("useful", "other", "none")
_AT_ONCE = 512


def ask(folder: Path, world: World, template: str) -> dict[str, dict[str, float]]:
    """Ask all questions of a world under each condition.

    Args:
        folder: What `meco export` wrote.
        world: The world.
        template: What precedes a question under a URL; also for a model that has no template.

    Returns:
        By condition - a URL of a useful host, a URL of another one, none - the accuracy (the answer
        is the argmax over the whole vocabulary) and the mean bits of the answer, -log2 p.
    """
    loaded = load_model(folder, "cpu", template)
    render = loaded.conditioning.render
    fields = loaded.conditioning.columns
    questions = world.questions()

    def prefix_of(url: str) -> str:
        values = {"url": url, "topic": world.topic_of(url)}
        return render({name: values[name] for name in fields})

    prefixes: dict[str, Callable[[Question], str]] = {
        "useful": lambda question: prefix_of(question.useful_url),
        "other": lambda question: prefix_of(question.other_url),
        "none": lambda question: "",
    }
    answers = [_one_token(loaded.tokenizer, question.answer) for question in questions]
    found = {}
    for condition, prefix in prefixes.items():
        contexts = [
            encode_prompt(loaded.model, loaded.tokenizer, prefix(question), question.prompt)
            for question in questions
        ]
        found[condition] = _scores(loaded.model, contexts, answers)
    return found


def _one_token(tokenizer: object, word: str) -> int:
    ids = encode_text(tokenizer, word)
    assert len(ids) == 1, f"{word} is {len(ids)} tokens"
    return ids[0]


@torch.no_grad()
def _scores(
    model: torch.nn.Module, contexts: list[list[int]], answers: list[int]
) -> dict[str, float]:
    # Contexts of one condition are equally long: person and attribute are words of the vocabulary.
    ids = torch.tensor(contexts)
    right = torch.tensor(answers)
    logits = torch.cat([model(part).logits[:, -1].float() for part in ids.split(_AT_ONCE)])
    bits = -logits.log_softmax(-1).gather(1, right[:, None]) / math.log(2)
    accuracy = (logits.argmax(-1) == right).double().mean()
    return {"accuracy": float(accuracy), "bits": float(bits.double().mean())}
