"""The flags in a checkpoint that an export reads: checks that they exist and have the right type.

A checkpoint may come from anyone and from any version of Megatron. A size that is a string or a
rate that is NaN is one clear error here, not a failure later. Flags that nothing reads are ignored.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from megatron_meco.inference.checkpoint import CheckpointError
from megatron_meco.refusals import is_finite

Check = Callable[[Any], bool]


def _whole(low: int) -> Check:
    return lambda value: type(value) is int and low <= value < 2**62


def _number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and is_finite(value)


def _above_zero(value: Any) -> bool:
    return _number(value) and value > 0


def _switch(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    # Lone surrogates cannot be written to a file.
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_text, value))


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype)


def _fingerprint(value: Any) -> bool:
    """As `megatron_meco.training.run_fingerprint` makes it: JSON, with corpora by name."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        corpora = [*value["corpora"], *(value["cooldown_corpora"] or ())]
        return all(
            _text(name) and (weight is None or _number(weight)) and re.fullmatch(r"[\w-]+", content)
            for name, weight, content in corpora
        )
    except (TypeError, ValueError, LookupError, RecursionError):
        return False


# Every run has them.
_NEEDED: dict[str, Check] = {
    "num_layers": _whole(1),
    "hidden_size": _whole(1),
    "ffn_hidden_size": _whole(1),
    "num_attention_heads": _whole(1),
    "group_query_attention": _switch,
    "kv_channels": _or_none(_whole(0)),
    "untie_embeddings_and_output_weights": _switch,
    "max_position_embeddings": _whole(1),
    "seq_length": _whole(1),
    "layernorm_epsilon": _above_zero,
    "rotary_base": _above_zero,
    "init_method_std": _number,
    "tokenizer_type": _text,
    "tokenizer_model": _or_none(_text),
    "padded_vocab_size": _whole(1),
    "make_vocab_size_divisible_by": _whole(1),
    "seed": _whole(0),
    "train_iters": _or_none(_whole(0)),
    "train_samples": _or_none(_whole(0)),
    "data_path": _or_none(_texts),
}
# Optional.
_OPTIONAL: dict[str, Check] = {
    "num_query_groups": _or_none(_whole(1)),
    "params_dtype": _dtype,
    "vocab_size": _or_none(_whole(1)),
    "pad_vocab_size": _switch,
    "train_data_path": _or_none(_texts),
    "global_batch_size": _or_none(_whole(1)),
    "micro_batch_size": _or_none(_whole(1)),
    "step_batch_size_schedule": _or_none(_text),
    "meco": _switch,
    "meco_template": _text,
    "meco_packing": _text,
    "meco_cooldown_fraction": _number,
    "meco_cooldown_start_iteration": _or_none(_whole(0)),
    "meco_cooldown_data_path": _or_none(_texts),
    "meco_cooldown_documents": _or_none(_number),
    "meco_start_fraction": _number,
    "meco_start_iteration": _or_none(_whole(0)),
    "meco_start_documents": _or_none(_number),
    "meco_plain_fraction": _number,
    "meco_prefix_once": _switch,
    "meco_max_documents_per_pack": _or_none(_whole(0)),
    "meco_pad_documents_to": _or_none(_whole(1)),
    "meco_max_prefix_tokens": _or_none(_whole(1)),
    "meco_train_on_prefix": _switch,
    "meco_repeat_every": _or_none(_whole(1)),
    "meco_suffix_template": _text,
    "meco_suffix_loss": lambda value: type(value) is int and value in (0, 1),
    "meco_fingerprint": _or_none(_fingerprint),
}


def check_flags(args: Namespace, where: str) -> None:
    """Refuse flags of a run that are missing or have the wrong type.

    Raises:
        CheckpointError: Names the flag and its value.
    """
    if lacking := sorted(_NEEDED.keys() - vars(args).keys()):
        raise _refusal(f"its flags lack {lacking[0]!r}", where)
    for name, check in (_NEEDED | _OPTIONAL).items():
        if hasattr(args, name) and not check(getattr(args, name)):
            raise _refusal(f"its flag {name!r} is {getattr(args, name)!r:.80}", where)
    if getattr(args, "meco", False) and not getattr(args, "global_batch_size", None):
        raise _refusal("its flags lack 'global_batch_size'", where)
    heads = args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else heads
    if groups is None or heads % groups:
        raise _refusal(f"{heads} attention heads are no multiple of {groups} query groups", where)


def _refusal(what: str, where: str) -> CheckpointError:
    return CheckpointError(
        what, where=where, remedy="Use a checkpoint that Megatron's own training loop saved."
    )
