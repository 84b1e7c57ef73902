"""What a value of a run file means, by the type of its key.

YAML's own guesses are not asked: the key says what its value is, and a value that some version of
YAML reads as another one (`010`, `1:30`, `on`, `1_000`) is refused with the way to write it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from megatron_meco.refusals import closest
from megatron_meco.run.flag_table import KnownFlag
from megatron_meco.run.plain_yaml import Entries, Items, Node, RunFileError, Scalar

_TRUE = ("true", "True", "TRUE")
_FALSE = ("false", "False", "FALSE")
# Booleans in some versions of YAML or in other tools, text in others.
_ALSO_BOOLEAN = ("yes", "no", "on", "off", "y", "n")
_NOTHING = ("", "~", "null", "Null", "NULL")
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_LONGEST_NUMBER = 40
_SHOWN = 60


def switch_of(key: str, node: Node, where: str) -> bool:
    """Whether a switch is on.

    Args:
        key: Its key, for messages.
        node: Its value.
        where: File and line, for messages.

    Raises:
        RunFileError: It is neither `true` nor `false`.
    """
    if isinstance(node, Scalar) and node.plain and node.text in (*_TRUE, *_FALSE):
        return node.text in _TRUE
    if isinstance(node, Scalar):
        _check_given(key, node, where)
        told = f"is {_quoted(node)}, and takes true or false"
    else:
        told = f"takes true or false, and this is {_kind(node)}"
    raise RunFileError(f"{key} {told}", where=where, remedy="Write true or false, without quotes.")


def words_of(flag: KnownFlag, node: Node, where: str) -> tuple[str, ...]:
    """The values of a flag as they stand on a command line; none for a switch.

    Args:
        flag: The flag, not a switch.
        node: Its value in the run file.
        where: File and line, for messages.

    Raises:
        RunFileError: The value is of another type, not among the choices, or they are too many.
    """
    key = flag.key
    if isinstance(node, Entries):
        raise RunFileError(
            f"{key} takes {'values' if flag.is_list else 'one value'}, and this is keys in braces "
            "or on lines of their own",
            where=where,
            remedy="Quote a value that begins with a brace.",
        )
    if isinstance(node, Scalar):
        return (_word(flag, node, where),)
    if not flag.is_list:
        raise RunFileError(
            f"{key} takes one value, and this is a list",
            where=where,
            remedy="Write the value alone; quote one that begins with a bracket.",
        )
    words = []
    for item in node.items:
        if not isinstance(item, Scalar):
            raise RunFileError(
                f"{key} takes a list of values, and one of these is {_kind(item)}",
                where=where,
                remedy="Write it flat: [a, b].",
            )
        words.append(_word(flag, item, where))
    if flag.count not in ("*", "+") and len(words) != int(flag.count):
        raise RunFileError(
            f"{key} takes {flag.count} values, and these are {len(words)}",
            where=where,
            remedy=f"Give {flag.count}.",
        )
    if flag.count == "+" and not words:
        raise RunFileError(
            f"{key} is an empty list", where=where, remedy="Give a value, or take the key out."
        )
    return tuple(words)


def nearest(key: str, known: Collection[str]) -> str:
    """` Did you mean X?` for an unknown key, or nothing."""
    word = key.lower().replace("_", "-").strip("-")
    if word in _OTHER_NAMES:
        return f" Did you mean {_OTHER_NAMES[word]}?"
    found = closest(word, known)
    if found:
        return found
    parts = set(word.split("-"))
    # `template` for meco-template, `batch-size` for global-batch-size and micro-batch-size.
    longer = sorted((k for k in known if parts <= set(k.split("-"))), key=lambda k: (len(k), k))
    return f" Did you mean {' or '.join(longer[:2])}?" if word and longer else ""


# What other trainers call it.
_OTHER_NAMES = {
    "batch-size": "global-batch-size",
    "data": "data-path",
    "learning-rate": "lr",
    "max-steps": "train-iters",
    "num-steps": "train-iters",
    "output": "save",
    "output-dir": "save",
    "steps": "train-iters",
    "tokenizer": "tokenizer-model",
    "warmup": "lr-warmup-fraction",
}


def _word(flag: KnownFlag, value: Scalar, where: str) -> str:
    key, text = flag.key, value.text
    _check_given(key, value, where)
    if flag.kind == "int":
        _check_number(key, value, where, whole=True)
    elif flag.kind == "float":
        _check_number(key, value, where, whole=False)
    elif value.plain and text in (*_TRUE, *_FALSE):
        raise RunFileError(
            f"{key} takes text, and {text} is a boolean",
            where=where,
            remedy=f"Quote it if the text is meant: '{text}'.",
        )
    elif value.plain and text.lower() in _ALSO_BOOLEAN:
        raise RunFileError(
            f"{key} takes text, and some readers of YAML take {text} for a boolean",
            where=where,
            remedy=f"Quote it: '{text}'.",
        )
    if flag.choices and text not in flag.choices:
        raise RunFileError(
            f"{key} is {_quoted(value)}, which is none of {', '.join(flag.choices)}",
            where=where,
            remedy=f"Give one of them.{closest(text, flag.choices)}",
        )
    return text


def _check_given(key: str, value: Scalar, where: str) -> None:
    if value.plain and value.text in _NOTHING:
        raise RunFileError(
            f"{key} has no value",
            where=where,
            remedy="Give one ('' is the empty text), or take the key out.",
        )
    # What no command line can hold.
    if "\0" in value.text or (not value.text.isascii() and not _encodes(value.text)):
        raise RunFileError(
            f"{key} holds a character that no command line can pass on",
            where=where,
            remedy="Take it out.",
        )


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_number(key: str, value: Scalar, where: str, *, whole: bool) -> None:
    text = value.text
    kind = "a whole number" if whole else "a number"
    if not value.plain:
        raise RunFileError(
            f"{key} takes {kind}, and {_quoted(value)} is text",
            where=where,
            remedy="Write it without quotes.",
        )
    if text in (*_TRUE, *_FALSE) or text.lower() in _ALSO_BOOLEAN:
        raise RunFileError(
            f"{key} takes {kind}, and {text} is a boolean", where=where, remedy="Write a number."
        )
    if len(text) > _LONGEST_NUMBER:
        raise RunFileError(
            f"{key} is a number of {len(text):,} characters",
            where=where,
            remedy="Write it shorter.",
        )
    if (_WHOLE if whole else _NUMBER).fullmatch(text):
        if not math.isfinite(float(text)):
            raise RunFileError(
                f"{key} is {text}, beyond what a number holds",
                where=where,
                remedy="Write a smaller one.",
            )
        return
    raise RunFileError(
        f"{key} is {_quoted(value)}, which is not {kind}", where=where, remedy=_remedy(text, whole)
    )


def _remedy(text: str, whole: bool) -> str:
    """How to write what somebody most likely meant."""
    plain = text.replace("_", "").replace(",", "")
    if plain != text and plain.replace(".", "").lstrip("+-").isdigit():
        if re.fullmatch(r"[-+]?[0-9]+,[0-9]+", text) and not re.fullmatch(
            r"[1-9]\d{0,2},\d{3}", text
        ):
            return f"Write {text.replace(',', '.')}, with a point."
        return f"Write {plain}."
    if re.fullmatch(r"[-+]?0[0-9]+(\.[0-9]*)?", text):
        return "Some readers of YAML take it for octal: write it without the leading zero."
    if re.fullmatch(r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?", text):
        return "Some readers of YAML take it for base 60: write one number."
    if re.fullmatch(r"[-+]?0[xob][0-9a-fA-F]+", text):
        return f"Write {int(text, 0)}."
    if text.endswith("%") and _NUMBER.fullmatch(text[:-1].strip()):
        return f"Write {float(text[:-1]) / 100:g}."
    if text[-1:].lower() in ("k", "m", "b", "g") and _NUMBER.fullmatch(text[:-1].strip()):
        factor = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}[text[-1].lower()]
        return f"Write {float(text[:-1]) * factor:.0f}."
    if whole and _NUMBER.fullmatch(text):
        number = float(text)
        if number.is_integer() and abs(number) < 1e18:
            return f"Write {number:.0f}."
        return "Write a number without a fraction."
    return "Write it as 8192." if whole else "Write it as 0.0005 or 5e-4."


def _quoted(value: Scalar) -> str:
    text = value.text if len(value.text) <= _SHOWN else f"{value.text[:_SHOWN]}..."
    return text if value.plain else f"'{text}'"


def _kind(node: Items | Entries) -> str:
    return "a list" if isinstance(node, Items) else "keys with values"
