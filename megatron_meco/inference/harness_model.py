"""A model for lm-evaluation-harness that reads metadata before each request.

`MeCoLM` is the harness's `HFLM` with a prefix once, after BOS and before everything else, few-shot
examples included, for likelihoods and for generation, as in the paper's evaluation. Prefix and
context are tokenised apart, as in training. An empty context therefore stays empty; a prefix inside
the text would count as context and lose its trailing line breaks to the continuation. Without a
prefix every request is exactly `HFLM`'s.

`HFLM` cuts a request that is too long from the left, which would remove BOS and the prefix first.
With a prefix, the oldest tokens of the context are cut instead. Cuts are counted. Rolling
likelihoods (perplexity of whole documents) are refused with a prefix; the paper evaluates them
without. Response caches are not supported: their keys do not include the prefix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig

from megatron_meco.errors import MeCoError
from megatron_meco.inference.conditioning import not_an_export
from megatron_meco.inference.harness_tasks import Document
from megatron_meco.inference.model import check_finite, encode_text, finite_scores, load_model
from megatron_meco.inference.suffix import beginning
from megatron_meco.wording import one_line

_NAME = "meco"


class RequestError(MeCoError):
    """A request that the model cannot answer."""


@register_model(_NAME)
class MeCoLM(HFLM):  # type: ignore[misc] # lm_eval has no types
    """`HFLM` with a prefix after BOS.

    Args:
        pretrained: A Hugging Face folder, or a loaded model.
        prefix: The rendered prefix; empty for plain `HFLM`.
        options: Arguments of `HFLM`. `add_bos_token` defaults to the model's configuration.
    """

    def __init__(self, pretrained: Any, prefix: str = "", **options: Any) -> None:
        if options.get("add_bos_token") is None:
            if isinstance(pretrained, str):
                config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False)
            else:
                config = pretrained.config
            options["add_bos_token"] = config.bos_token_id is not None
        super().__init__(pretrained=pretrained, **options)
        self._prefix, self._prefix_ids = "", list[int]()
        self._by_document: Mapping[Document, str] = {}
        self.num_cut = 0
        """Number of requests since `condition_on` whose context was cut."""
        self.suffix_begin = ""
        """What all suffixes of the model begin with, which no answer holds; empty: nothing."""
        self.condition_on(prefix)

    def condition_on(self, prefix: str, by_document: Mapping[Document, str] | None = None) -> None:
        """Set the prefix of the following requests.

        Args:
            prefix: The rendered prefix; may be empty.
            by_document: Prefixes of single documents, in place of `prefix`.
        """
        self._prefix, self._by_document = prefix, by_document or {}
        self._prefix_ids = encode_text(self.tokenizer, prefix)
        self.num_cut = 0

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations, each behind the prefix of its document."""
        return self._by_prefix(requests, super().loglikelihood, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate answers, each behind the prefix of its document, up to a suffix."""
        if self.suffix_begin:
            requests = [_ending_before(request, self.suffix_begin) for request in requests]
        return self._by_prefix(requests, super().generate_until, disable_tqdm)

    def _by_prefix[Answer](
        self,
        requests: list[Any],
        answer: Callable[[list[Any], bool], list[Answer]],
        disable_tqdm: bool,
    ) -> list[Answer]:
        if not self._by_document:
            return answer(requests, disable_tqdm)
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            key = (request.task_name, request.doc_id)
            places.setdefault(self._by_document.get(key, self._prefix), []).append(place)
        answers: dict[int, Answer] = {}
        for prefix, group in places.items():
            self._prefix_ids = encode_text(self.tokenizer, prefix)
            found = answer([requests[place] for place in group], disable_tqdm)
            answers |= zip(group, found, strict=True)
        self._prefix_ids = encode_text(self.tokenizer, self._prefix)
        return [answers[place] for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole documents; without a prefix only.

        Raises:
            RequestError: If there is a prefix.
        """
        if self._prefix_ids:
            raise RequestError(
                "scores whole documents, which takes no prefix",
                where=f"task {requests[0].task_name!r}",
                remedy="Leave it out, or evaluate it without metadata.",
            )
        scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return scores

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode the contexts of requests to generate.

        Args:
            strings: The contexts.
            padding_side: Side on which shorter contexts are padded.
            left_truncate_len: Most tokens of a context, or None for no limit.
            truncation: Whether the tokenizer's own limit applies too.

        Returns:
            Tokens and attention mask, each int64 [contexts, longest].
        """
        rows = [self.tok_encode(string) for string in strings]
        room = left_truncate_len
        if not self._prefix_ids:
            self.num_cut += sum(room is not None and len(row) > room for row in rows)
            plain: tuple[torch.Tensor, torch.Tensor] = super().tok_batch_encode(
                strings, padding_side, left_truncate_len, truncation
            )
            return plain
        rows = [self._conditioned(row, room, is_empty=False) for row in rows]
        batch = self.tokenizer.pad(
            {"input_ids": rows}, padding_side=padding_side, return_tensors="pt"
        )
        return batch["input_ids"], batch["attention_mask"]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], *args: Any, **options: Any
    ) -> list[tuple[float, bool]]:
        longest = self.max_length + 1  # the last token is only predicted
        if self._prefix_ids:
            requests = [
                (
                    texts,
                    self._conditioned(
                        context, longest - len(continuation), is_empty=texts[0] == ""
                    ),
                    continuation,
                )
                for texts, context, continuation in requests
            ]
        else:
            self.num_cut += sum(
                len(context) + len(continuation) > longest for _, context, continuation in requests
            )
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **options)
        # An impossible answer scores minus infinity, which is valid.
        check_finite(torch.tensor([score for score, _ in found]).clamp(min=-1e30))
        return found

    def _model_generate(self, *args: Any, **options: Any) -> torch.Tensor:
        out: torch.Tensor = super()._model_generate(
            *args, **options, logits_processor=finite_scores()
        )
        return out

    def _conditioned(self, context: Sequence[int], room: int | None, is_empty: bool) -> list[int]:
        """Put the prefix after BOS, and cut the oldest context tokens that do not fit."""
        num_bos = self._num_bos()
        begin = [*context[:num_bos], *self._prefix_ids]
        # Without BOS the harness replaces an empty context by EOS; here the prefix replaces it.
        rest = [] if is_empty else list(context[num_bos:])
        if room is None or len(begin) + len(rest) <= room:
            return begin + rest
        if len(begin) > room:
            raise RequestError(
                f"the prefix has {len(self._prefix_ids)} tokens, and the model's "
                f"{self.max_length} leave {max(room - num_bos, 0)} for it in some request",
                where="--metadata",
                remedy="Give shorter metadata (also in --shuffled-from), or leave out the tasks "
                "with such long answers.",
            )
        self.num_cut += 1
        return begin + rest[len(begin) + len(rest) - room :]

    def _num_bos(self) -> int:
        return int(bool(self.add_bos_token))


def load_harness_model(
    folder: Path, device: str | None, template: str | None, batch_size: int | str
) -> MeCoLM:
    """Load a model for the harness, without prefix and with the checks of the other commands.

    Args:
        folder: The model.
        device: Device, or None for the first GPU or the CPU.
        template: Template in place of the model's own, or None.
        batch_size: Requests at once, or `auto`.

    Raises:
        FlagError: If the folder cannot be loaded.
    """
    loaded = load_model(folder, device, template, own_sampling=True)
    try:
        found = MeCoLM(loaded.model, tokenizer=str(folder), batch_size=batch_size)
    # Other libraries raise anything for files that are not theirs.
    except Exception as error:
        raise not_an_export(folder, one_line(error)) from error
    found.suffix_begin = beginning(loaded.conditioning.suffix)
    return found


def _ending_before(request: Any, text: str) -> Any:
    """A copy of a request to generate, with one more text to stop at."""
    context, options = request.args
    given = options.get("until") or []
    until = [given] if isinstance(given, str) else list(given)
    changed = copy.copy(request)
    changed.arguments = (context, {**options, "until": [*until, text]})
    return changed
