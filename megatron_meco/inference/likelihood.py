"""The log-likelihood of texts behind different prefixes, on the same tokens for each prefix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from megatron_meco.errors import FlagError
from megatron_meco.inference.model import (
    LoadedModel,
    check_finite,
    encode_prompt,
    encode_text,
    end_tokens,
)

# Positions with logits in memory: 1,024 of 128,256 float32 are half a gigabyte.
_POSITIONS_AT_ONCE = 1024


def longest_prefix(loaded: LoadedModel, prefixes: Iterable[str]) -> str:
    """Return the prefix with most tokens, or an empty one if there are none."""
    return max(prefixes, key=lambda text: len(encode_text(loaded.tokenizer, text)), default="")


class SuffixScore:
    """Log-likelihoods of suffixes in nats, with EOD, behind `[BOS] + text`.

    Every suffix of a text is scored behind the same tokens: the last ones of the text that the
    longest suffix leaves room for, as in training a suffix stands behind the end of a document.

    Args:
        loaded: The model.
        texts: The documents.
        longest: The longest suffix that will be scored.

    Attributes:
        num_tokens: Number of tokens of each document that the suffixes are scored behind.
        num_cut: Number of documents that were cut.

    Raises:
        FlagError: If the suffix leaves no room, or a text has no token.
    """

    def __init__(self, loaded: LoadedModel, texts: Sequence[str], longest: str) -> None:
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._begin = encode_prompt(self._model, self._tokenizer, "", "")
        self._end = end_tokens(self._model)[:1]
        size = len(encode_text(self._tokenizer, longest)) + len(self._end)
        most = self._model.config.max_position_embeddings
        room = most - len(self._begin) - size
        if room <= 0:
            raise FlagError(
                f"the suffix {longest!r} has {size} tokens with EOD, and the model takes {most}",
                where="--candidates",
                remedy="Leave it out.",
            )
        whole = [encode_text(self._tokenizer, text) for text in texts]
        self._texts = [ids[-room:] for ids in whole]
        self.num_cut = sum(len(ids) > room for ids in whole)
        self.num_tokens = [len(ids) for ids in self._texts]
        for number, count in enumerate(self.num_tokens, 1):
            if not count:
                raise FlagError(
                    f"text {number:,} has no token", where="--text", remedy="Leave it out."
                )

    @torch.no_grad()
    def totals(self, suffix: str, documents: list[int]) -> list[float]:
        """Return the log-likelihood of a suffix behind each document, by its number."""
        labels = torch.tensor(
            encode_text(self._tokenizer, suffix) + self._end, device=self._model.device
        )
        totals = []
        for number in documents:
            context = torch.tensor(self._begin + self._texts[number], device=self._model.device)
            ids = torch.cat([context, labels])[None, :-1]
            hidden = self._model.get_decoder()(ids).last_hidden_state[0, len(context) - 1 :]
            logits = self._model.get_output_embeddings()(hidden).float()
            check_finite(logits.amax(-1))
            totals.append(
                -torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            )
        return totals


class TextScore:
    """Log-likelihoods of texts in nats, behind `[BOS] + prefix`.

    Every prefix is scored on the same tokens: texts are cut to the room that the longest prefix
    leaves. Without BOS nothing predicts the first token, which is then never scored.

    Args:
        loaded: The model.
        texts: The documents.
        longest: The longest prefix that will be scored.

    Attributes:
        num_tokens: Number of scored tokens of each document.
        num_cut: Number of documents that were cut.

    Raises:
        FlagError: If the prefix leaves no room, or a text has no token to predict.
    """

    def __init__(self, loaded: LoadedModel, texts: Sequence[str], longest: str) -> None:
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        begin = encode_prompt(self._model, self._tokenizer, longest, "")
        room = self._model.config.max_position_embeddings - len(begin)
        self._skipped = int(self._model.config.bos_token_id is None)
        if room <= self._skipped:
            raise FlagError(
                f"the prefix {longest!r} has {len(begin)} tokens, and the model takes "
                f"{self._model.config.max_position_embeddings}",
                where="--candidates",
                remedy="Leave it out.",
            )
        whole = [encode_text(self._tokenizer, text) for text in texts]
        self._texts = [ids[:room] for ids in whole]
        self.num_cut = sum(len(ids) > room for ids in whole)
        self.num_tokens = [len(ids) - self._skipped for ids in self._texts]
        for number, count in enumerate(self.num_tokens, 1):
            if count <= 0:
                raise FlagError(
                    f"text {number:,} has no token to predict",
                    where="--text",
                    remedy="Leave it out.",
                )

    def __call__(self, prefix: str, documents: list[int]) -> list[float]:
        """Return the mean log-likelihood per token of each document, by its number."""
        totals = self.totals(prefix, documents)
        return [
            total / self.num_tokens[number] for total, number in zip(totals, documents, strict=True)
        ]

    @torch.no_grad()
    def totals(self, prefix: str, documents: list[int]) -> list[float]:
        """Return the log-likelihood of each document, by its number."""
        begin = encode_prompt(self._model, self._tokenizer, prefix, "")
        decoder, head = self._model.get_decoder(), self._model.get_output_embeddings()
        totals = []
        for number in documents:
            ids = torch.tensor([begin + self._texts[number]], device=self._model.device)
            first = len(begin) + self._skipped
            hidden = decoder(ids[:, :-1]).last_hidden_state[0, first - 1 :]
            total = 0.0
            for at in range(0, len(hidden), _POSITIONS_AT_ONCE):
                logits = head(hidden[at : at + _POSITIONS_AT_ONCE]).float()
                check_finite(logits.amax(-1))
                labels = ids[0, first + at : first + at + _POSITIONS_AT_ONCE]
                total -= torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            totals.append(total)
        return totals
