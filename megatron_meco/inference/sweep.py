"""`meco sweep-urls`: which metadata suits a task or a kind of text, without fooling oneself.

The best of many candidates looks good on the documents it was chosen on, whatever it is worth. So a
seeded half of the documents ranks the candidates, and the best few are measured anew on the other
half, beside the model without metadata: that figure, with the standard error of its paired
difference, is what the choice is worth. Texts are scored by the log-likelihood of a token, tasks by
the harness's metric. Costs a pass over the first half for each candidate. What was given up: any
search; candidates come from a file, or are what stood most often before the corpus's documents.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_meco.errors import FlagError
from megatron_meco.flag_range import COUNT, SEED, InRange
from megatron_meco.inference.candidates import (
    Candidate,
    most_frequent,
    read_candidates,
    read_texts,
)
from megatron_meco.inference.conditioning import Conditioning
from megatron_meco.inference.harness_tasks import mean_and_error, open_evaluation
from megatron_meco.inference.model import (
    LoadedModel,
    check_finite,
    encode_prompt,
    encode_text,
    enough_memory,
    load_model,
)
from megatron_meco.inference.model_flags import (
    MOST_AT_ONCE,
    OWN_TASKS,
    SHOTS,
    add_model_arguments,
    add_spelled,
)
from megatron_meco.inference.model_folder import check_model
from megatron_meco.inference.output_file import check_result_file, write_json
from megatron_meco.wording import counted

# Positions whose logits exist at the same time: 1,024 of 128,256 float32 are half a gigabyte.
_POSITIONS_AT_ONCE = 1024
_FEWEST_DOCUMENTS = 4

Score = Callable[[str, list[int]], list[float]]
"""Scores documents, given by their numbers, under a prefix; higher is better."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """How a candidate did.

    Attributes:
        name: Its name.
        prefix: Its prefix.
        first_half: Mean score on the half that ranks.
        second_half: Mean score on the other; None: not among the best.
        second_half_stderr: Its standard error.
        difference: Second half, less that without metadata.
        difference_stderr: Standard error of the paired difference.
    """

    name: str
    prefix: str
    first_half: float
    second_half: float | None = None
    second_half_stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None


def sweep(
    score: Score,
    candidates: Sequence[Candidate],
    num_documents: int,
    *,
    num_reported: int = 5,
    seed: int = 0,
) -> list[Ranked]:
    """Rank candidates on one half of the documents, and measure the best on the other.

    Args:
        score: Scores documents under a prefix.
        candidates: What to rank.
        num_documents: How many documents there are, 4 or more.
        num_reported: How many of the best are measured on the second half.
        seed: Decides which documents are in which half.

    Returns:
        Without metadata first, then the candidates, the best on the first half first.
    """
    order = list(range(num_documents))
    random.Random(seed).shuffle(order)
    first, second = sorted(order[: num_documents // 2]), sorted(order[num_documents // 2 :])
    plain = Candidate(name="no metadata", prefix="")
    on_first = {c: mean_and_error(score(c.prefix, first))[0] for c in [plain, *candidates]}
    ranked = sorted(candidates, key=lambda c: (-on_first[c], c.name))
    without = score("", second)
    results = []
    for place, candidate in enumerate([plain, *ranked]):
        result: dict[str, Any] = {**asdict(candidate), "first_half": on_first[candidate]}
        if place <= num_reported:
            scores = score(candidate.prefix, second) if place else without
            result["second_half"], result["second_half_stderr"] = mean_and_error(scores)
            if place:
                pairs = zip(scores, without, strict=True)
                difference, error = mean_and_error([one - other for one, other in pairs])
                result |= {"difference": difference, "difference_stderr": error}
        results.append(Ranked(**result))
    return results


# ---- Scores ----


class TextScore:
    """The mean log-likelihood of a text's tokens, in nats, behind `[BOS] + prefix`.

    Every candidate is measured on the same tokens: texts are cut to what the longest prefix leaves.

    Args:
        loaded: The model.
        texts: The documents.
        longest: The longest prefix that will be asked for.

    Raises:
        FlagError: When the prefix leaves no room.
    """

    def __init__(self, loaded: LoadedModel, texts: Sequence[str], longest: str) -> None:
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        begin = encode_prompt(self._model, self._tokenizer, longest, "")
        room = self._model.config.max_position_embeddings - len(begin)
        # Without BOS and prefix nothing predicts the first token; it is left out everywhere.
        self._skipped = int(self._model.config.bos_token_id is None)
        if room <= self._skipped:
            raise FlagError(
                f"the prefix {longest!r} has {len(begin)} tokens, and the model takes "
                f"{self._model.config.max_position_embeddings}",
                where="--candidates",
                remedy="Leave it out.",
            )
        self._texts = [encode_text(self._tokenizer, text)[:room] for text in texts]
        for number, text in enumerate(self._texts, 1):
            if len(text) <= self._skipped:
                raise FlagError(
                    f"text {number:,} has no token to predict",
                    where="--text",
                    remedy="Leave it out.",
                )

    @torch.no_grad()
    def __call__(self, prefix: str, documents: list[int]) -> list[float]:
        """Score documents."""
        begin = encode_prompt(self._model, self._tokenizer, prefix, "")
        decoder, head = self._model.get_decoder(), self._model.get_output_embeddings()
        scores = []
        for number in documents:
            text = self._texts[number]
            ids = torch.tensor([begin + text], device=self._model.device)
            first = len(begin) + self._skipped
            hidden = decoder(ids[:, :-1]).last_hidden_state[0, first - 1 :]
            total = 0.0
            targets = ids[0, first:].split(_POSITIONS_AT_ONCE)
            for part, labels in zip(hidden.split(_POSITIONS_AT_ONCE), targets, strict=True):
                logits = head(part).float()
                check_finite(logits.amax(-1))
                total -= torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            scores.append(total / (len(text) - self._skipped))
        return scores


class TaskScore:
    """The harness's metric for each document of a task.

    Args:
        evaluation: The harness, with one name looked up.
        model: A `MeCoLM`.
        num_fewshot: Examples before each question; None: as the task says.
        metric: The metric; None: `acc_norm` where the task has it, else `acc`.

    Raises:
        FlagError: When it is not one task.
    """

    def __init__(
        self, evaluation: Any, model: Any, num_fewshot: int | None, metric: str | None
    ) -> None:
        [name] = evaluation.names
        self._loaded = evaluation.load(name)
        if list(self._loaded["tasks"]) != [name]:
            raise FlagError(
                f"{name!r} stands for several tasks",
                where="--task",
                remedy=f"Name one of them: {', '.join(list(self._loaded['tasks'])[:5])}.",
            )
        self._evaluation, self._model, self._name = evaluation, model, name
        self._num_fewshot, self._metric = num_fewshot, metric
        self.num_documents = len(self._loaded["tasks"][name].eval_docs)

    def __call__(self, prefix: str, documents: list[int]) -> list[float]:
        """Score documents."""
        self._model.condition_on(prefix)
        results = self._evaluation.run(
            self._model,
            self._loaded,
            self._num_fewshot,
            None,
            samples={self._name: documents},
        )
        samples = results["samples"][self._name]
        known = samples[0]["metrics"]
        metric = self._metric or next((m for m in ("acc_norm", "acc") if m in known), known[0])
        try:
            scores = {s["doc_id"]: float(s[metric]) for s in reversed(samples)}
        except (KeyError, TypeError, ValueError):
            raise FlagError(
                f"{metric!r} gives no number for each document of {self._name!r}",
                where="--metric",
                remedy=f"The task has: {', '.join(known)}.",
            ) from None
        return [scores[number] for number in documents]


# ---- The command ----


def add_sweep_urls_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `meco sweep-urls` to its parser."""
    add_model_arguments(parser)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--candidates",
        type=Path,
        metavar="FILE",
        help="one in each line: FIELD=VALUE ..., quoted as in a shell, or a JSON object; or the "
        "bare value, where the template has one field",
    )
    source.add_argument(
        "--data-path", metavar="PREFIX", help="take what is most frequent in this corpus"
    )
    add("--top", **COUNT, default=20, metavar="N", help="how many of it; default: %(default)s")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--text", type=Path, metavar="FILE", help="a text in each line; .jsonl: the field `text`"
    )
    target.add_argument("--task", metavar="TASK", help="a task of lm-evaluation-harness")
    add_spelled(parser, "--num-fewshot", **SHOTS, metavar="N", help="default: as the task says")
    add_spelled(parser, "--include-path", type=Path, metavar="DIR", help=OWN_TASKS)
    add("--metric", metavar="M", help="of the task; default: acc_norm if it has that, else acc")
    add_spelled(
        parser,
        "--batch-size",
        type=int,
        action=InRange,
        low=1,
        high=MOST_AT_ONCE,
        default=1,
        metavar="N",
        help="of the task; default: 1",
    )
    add("--limit", **COUNT, metavar="N", help="use the first N documents only")
    add(
        "--report",
        **COUNT,
        default=5,
        metavar="N",
        help="how many of the best are measured on the second half; default: %(default)s",
    )
    add("--seed", **SEED, default=0, metavar="S", help="decides the halves; default: %(default)s")
    add("--output", type=Path, metavar="FILE", help="write everything as JSON")


def run_sweep_urls(args: argparse.Namespace) -> int:
    """Run `meco sweep-urls`.

    Args:
        args: The parsed flags of `add_sweep_urls_arguments`.

    Returns:
        The exit status, 0.
    """
    for flag, value in (("--num-fewshot", args.num_fewshot), ("--metric", args.metric)):
        if args.text is not None and value is not None:
            raise FlagError(
                "says something about a task, and --text is none",
                where=flag,
                remedy="Leave it out, or give --task.",
            )
    if args.output is not None:
        check_result_file(args.output)
    conditioning = Conditioning.of_folder(args.model, args.template)
    check_model(args.model)
    if not conditioning.template:
        raise FlagError(
            "was trained without metadata",
            where=f"--model {args.model}",
            remedy="Give a --template to try metadata on it all the same.",
        )
    if args.candidates is not None:
        candidates = read_candidates(args.candidates, conditioning, _tell)
    else:
        candidates = most_frequent(args.data_path, conditioning, args.top)
    score: Score
    if args.text is not None:
        texts = read_texts(args.text)[: args.limit]
        loaded = load_model(args.model, args.device, args.template)
        longest = max(
            (c.prefix for c in candidates),
            key=lambda prefix: len(encode_text(loaded.tokenizer, prefix)),
            default="",
        )
        score, num_documents, unit = TextScore(loaded, texts, longest), len(texts), "nats/token"
    else:
        # lm-evaluation-harness is an extra.
        from megatron_meco.inference.harness_model import load_harness_model

        evaluation = open_evaluation([args.task], args.include_path)
        model = load_harness_model(args.model, args.device, args.template, args.batch_size)
        score = TaskScore(evaluation, model, args.num_fewshot, args.metric)
        num_documents = min(score.num_documents, args.limit or score.num_documents)
        unit = args.task
    if num_documents < _FEWEST_DOCUMENTS:
        raise FlagError(
            f"{counted(num_documents, 'document')} cannot be parted into two halves",
            where="--text" if args.text else "--task",
            remedy=f"Give {_FEWEST_DOCUMENTS} or more; some hundred tell something.",
        )
    with enough_memory("--device", "Give one with more memory, or a smaller --batch-size."):
        results = sweep(score, candidates, num_documents, num_reported=args.report, seed=args.seed)
    _print_results(results, num_documents, unit)
    if args.output is not None:
        settings = {"model": str(args.model), "documents": num_documents, "seed": args.seed}
        write_json(args.output, {**settings, "results": [asdict(result) for result in results]})
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _print_results(results: list[Ranked], num_documents: int, unit: str) -> None:
    half = num_documents // 2
    width = max(len(result.name) for result in results)
    print(
        f"score: {unit}, higher is better; ranked on {half:,} documents, measured anew on ", end=""
    )
    print(f"the other {num_documents - half:,}")
    print(f"{'':{width}}  first half           second half       against no metadata")
    for result in results:
        line = f"{result.name:{width}}  {result.first_half:10.4f}"
        if result.second_half is not None:
            line += f"  {result.second_half:9.4f} ± {result.second_half_stderr:.4f}"
        if result.difference is not None:
            line += f"       {result.difference:+.4f} ± {result.difference_stderr:.4f}"
        print(line)
    best = results[1]
    print(
        f"The choice is '{best.name}'; what it is worth stands on its right. Choosing another by "
        "its second half would make that half useless."
    )
