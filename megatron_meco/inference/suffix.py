"""Where the text of a model ends and the suffix begins that it learned to write behind it.

In training a suffix stands between the last token of a document and EOD. A model that has learned
it writes one, and it is no part of the text. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron_meco.data.template import Group, Part, Placeholder, Template, Token
from megatron_meco.inference.conditioning import Conditioning


def cut_suffix(
    suffix: Conditioning | None, tokenizer: Any, ids: Sequence[int], *, has_ended: bool
) -> tuple[str, str]:
    """Tell the text of a continuation from the suffix behind it.

    A suffix that begins with a special token begins where the first of them is. One that begins
    with letters is looked for at the end of a text that has ended. What begins with blanks or a
    value cannot be told from text, and nothing is cut.

    Args:
        suffix: That of the model; None: it has none.
        tokenizer: The model's.
        ids: New tokens, without EOD.
        has_ended: Whether EOD came.

    Returns:
        The text, without special tokens, and the suffix; '' if there is none.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    if suffix is None:
        return text, ""
    parts = Template.parse(suffix.template).parts
    first = parts[0].parts[0] if isinstance(parts[0], Group) else parts[0]
    if isinstance(first, Token):
        token = tokenizer.convert_tokens_to_ids(first.name)
        # For a token that is not there it gives the id of its unknown token.
        if token not in ids or tokenizer.convert_ids_to_tokens(token) != first.name:
            return text, ""
        at = list(ids).index(token)
        body: str = tokenizer.decode(ids[:at], skip_special_tokens=True)
        return body, str(tokenizer.decode(ids[at:]))
    if not has_ended or not isinstance(first, str) or not first.strip():
        return text, ""
    found = re.fullmatch(f"(?s:(.*)(?=.))({_pattern(parts)})", text)
    return (found[1], found[2]) if found else (text, "")


def beginning(suffix: Conditioning | None) -> str:
    """What all suffixes begin with, unless it is blank and could be text."""
    if suffix is None:
        return ""
    found = ""
    for part in Template.parse(suffix.template).parts:
        if not isinstance(part, str | Token):
            break
        found += part if isinstance(part, str) else part.name
    return found if found.strip() else ""


def _pattern(parts: Sequence[Part]) -> str:
    """A regular expression of the suffixes as they are decoded, without special tokens."""
    pattern = ""
    for part in parts:
        if isinstance(part, str):
            pattern += re.escape(part)
        elif isinstance(part, Placeholder):
            pattern += r"[^\n]+?"
        elif isinstance(part, Group):
            pattern += f"(?:{_pattern(part.parts)})?"
    return pattern
