"""Checks a Hugging Face folder before anything loads it: configuration and headers of weights.

Sizes in `config.json` are compared with the tensors in the files, so no number in a text file
decides how much memory is allocated. Only safetensors are read: the other formats are pickles.
Symbolic links are followed, because the hub's cache consists of them; a file name inside a file
never leads out of the folder. Shapes are checked for Llama only; transformers checks the others
when it loads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_meco.errors import MeCoError
from megatron_meco.inference.conditioning import not_an_export
from megatron_meco.inference.llama import Sizes, Weight, megatron_shapes, plan_weights
from megatron_meco.refusals import is_finite
from megatron_meco.untrusted.text_file import Refuse, read_json
from megatron_meco.wording import first_line, shown

CONFIG = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_CODE = "custom_generate"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Computed by transformers.
_BUFFERS = ("rotary_emb.inv_freq",)
# By safetensors' names.
_FLOATS = ("F64", "F32", "F16", "BF16")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_MOST_EXPERTS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor in a safetensors file, by its header.

    Attributes:
        path: The file.
        shape: Its shape.
        dtype: Its type, as safetensors spells it.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str


def read_config(folder: Path, refuse: Refuse) -> dict[str, Any]:
    """Read `config.json`.

    Raises:
        MeCoError: From `refuse`.
    """
    path = folder / CONFIG
    config = read_json(path, lambda reason: refuse(f"no readable {CONFIG} ({reason})"))
    if not isinstance(config, dict):
        raise refuse(f"{CONFIG} holds no object")
    return config


def read_weights(folder: Path, refuse: Refuse) -> dict[str, Stored]:
    """Read the headers of the weights, without buffers that transformers computes.

    Raises:
        MeCoError: From `refuse`.
    """
    listed = _listed(folder, refuse)
    if listed is None:
        one = folder / _WEIGHTS
        paths = [one] if one.exists() else sorted(folder.glob("*.safetensors"))
    elif (folder / _WEIGHTS).exists():
        # Programs differ in which of the two they read.
        raise refuse(f"holds both {_WEIGHTS} and {_INDEX}")
    else:
        paths = sorted({folder / name for name in listed.values()})
    if not paths:
        raise refuse("holds no safetensors files")
    found: dict[str, Stored] = {}
    for path in paths:
        for name, stored in _header(path, refuse).items():
            if name in found:
                raise refuse(f"{shown(name, 120)} is in two files")
            found[name] = stored
    found = {name: stored for name, stored in found.items() if not name.endswith(_BUFFERS)}
    if listed is not None:
        where = {name: stored.path.name for name, stored in found.items()}
        named = {name: file for name, file in listed.items() if not name.endswith(_BUFFERS)}
        if wrong := sorted(named.items() ^ where.items()):
            raise _damaged(
                refuse, f"{_INDEX} and the files do not agree about {shown(wrong[0][0], 120)}"
            )
    return found


def _listed(folder: Path, refuse: Refuse) -> dict[str, str] | None:
    """Return the index, the file of each tensor, or None if there is none."""
    path = folder / _INDEX
    if not path.is_file():
        return None
    content = read_json(path, lambda reason: _damaged(refuse, f"{_INDEX} {reason}"))
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise _damaged(refuse, f"{_INDEX} has no weight_map")
    for name in names.values():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise _damaged(refuse, f"{_INDEX} names {name!r:.80}, which is no safetensors file")
        if "/" in name or "\\" in name or "\0" in name:
            raise _damaged(refuse, f"{_INDEX} names {name!r:.80}, outside of the folder")
    return names


def _header(path: Path, refuse: Refuse) -> dict[str, Stored]:
    found = {}
    try:
        if not path.is_file():
            raise _damaged(refuse, f"{shown(path.name, 120)} is missing, or no file")
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                part = file.get_slice(name)
                shape = tuple(part.get_shape())
                found[name] = Stored(path=path, shape=shape, dtype=str(part.get_dtype()))
    except (OSError, SafetensorError) as error:
        raise _damaged(refuse, f"{path.name}: {first_line(error)}") from error
    return found


def _damaged(refuse: Refuse, reason: str) -> MeCoError:
    return refuse(f"its weights cannot be read ({reason})")


def check_layers(config: Mapping[str, Any], weights: Mapping[str, Stored], refuse: Refuse) -> None:
    """Refuse more layers than tensors: transformers builds each layer before it loads tensors.

    Raises:
        MeCoError: From `refuse`.
    """
    limits = dict.fromkeys(_LAYERS, len(weights)) | dict.fromkeys(_EXPERTS, _MOST_EXPERTS)
    for name, most in limits.items():
        value = config.get(name)
        if isinstance(value, (int, float)) and not value <= most:
            raise refuse(
                f"{CONFIG} says {name} = {value!r:.40}, and there are {len(weights):,} tensors"
            )


def llama_sizes(config: Mapping[str, Any], refuse: Refuse) -> Sizes:
    """Return the checked sizes of a Llama from its `config.json`.

    Raises:
        MeCoError: From `refuse`.
    """
    heads = _size(config, "num_attention_heads", refuse)
    hidden = _size(config, "hidden_size", refuse)
    groups = _size(config, "num_key_value_heads", refuse, heads)
    if config.get("head_dim") is None and hidden % heads:
        raise refuse(f"{CONFIG}: hidden_size {hidden} is no multiple of {heads} heads")
    if heads % groups:
        raise refuse(f"{CONFIG}: {heads} heads are no multiple of {groups} key and value heads")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise refuse(f"{CONFIG}: tie_word_embeddings is {tied!r:.40}, neither true nor false")
    return Sizes(
        layers=_size(config, "num_hidden_layers", refuse),
        hidden=hidden,
        ffn=_size(config, "intermediate_size", refuse),
        heads=heads,
        groups=groups,
        head_dim=_size(config, "head_dim", refuse, hidden // heads),
        vocab=_size(config, "vocab_size", refuse),
        tied=tied,
    )


def _size(config: Mapping[str, Any], name: str, refuse: Refuse, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise refuse(f"{CONFIG} lacks a size ({name!r})")
    if type(value) is not int or not 0 < value < 2**40:
        raise refuse(f"{CONFIG}: {name} is {value!r:.40}, which is no size")
    return value


def check_llama(sizes: Sizes, weights: Mapping[str, Stored], refuse: Refuse) -> list[Weight]:
    """Check that the weights are those of a Llama of these sizes; return them in layer order.

    Args:
        sizes: From `llama_sizes`, with layers that `check_layers` has checked.
        weights: From `read_weights`.
        refuse: Makes the error to raise from the reason.

    Raises:
        MeCoError: From `refuse`, for an unknown, a missing or a misshapen tensor.
    """
    planned = plan_weights(megatron_shapes(sizes), sizes, "")
    needed = {weight.name for weight in planned}
    # Some tools write a tied output layer, which equals the embedding.
    unknown = sorted(weights.keys() - needed - {"lm_head.weight"})
    missing = sorted(needed - weights.keys())
    for what, names in (("unknown tensor", unknown), ("no tensor", missing)):
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise refuse(f"{what} {shown(names[0], 120)}{more}")
    for weight in planned:
        stored = weights[weight.name]
        if stored.shape != weight.shape:
            raise refuse(
                f"tensor {weight.name} has shape {list(stored.shape)}, {CONFIG} gives "
                f"{list(weight.shape)}"
            )
        if stored.dtype not in _FLOATS:
            raise refuse(f"tensor {weight.name} holds {stored.dtype}, no floating-point weights")
    return planned


def check_model(folder: Path) -> None:
    """Refuse a folder that transformers would load wrongly, at great cost, or with foreign code.

    Raises:
        FlagError: With the reason.
    """

    def refuse(reason: str) -> MeCoError:
        return not_an_export(folder, reason)

    if not folder.is_dir():
        raise refuse("no such folder")
    if not (folder / CONFIG).is_file():
        raise refuse(f"it has no {CONFIG}")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise refuse("it has no tokenizer")
    if (folder / _ADAPTER).exists():
        # Its weights belong to another folder, which it names.
        raise refuse(f"it is an adapter ({_ADAPTER}); merge it into its model first")
    if (folder / _CODE).exists():
        # Some versions of transformers run it even with trust_remote_code=False.
        raise refuse(f"it contains code ({_CODE})")
    config = read_config(folder, refuse)
    _check_kernels(config, refuse)
    weights = read_weights(folder, refuse)
    check_layers(config, weights, refuse)
    is_plain = not any(config.get(n) for n in ("attention_bias", "mlp_bias", "quantization_config"))
    if config.get("model_type") == "llama" and is_plain:
        check_llama(llama_sizes(config, refuse), weights, refuse)
        finite_number(config, "rms_norm_eps", 1e-6, refuse)


def _check_kernels(config: Any, refuse: Refuse) -> None:
    """Refuse kernels of the hub, which are code that transformers downloads and runs."""
    if isinstance(config, dict):
        for name, value in config.items():
            if "implementation" in name and isinstance(value, str) and "/" in value:
                raise refuse(f"its {CONFIG} asks for code from the hub ({name} = {value!r:.80})")
            _check_kernels(value, refuse)


def finite_number(
    config: Mapping[str, Any], name: str, default: float, refuse: Refuse, *, zero: bool = False
) -> Any:
    """Return a number of the configuration that must be above 0, or 0 if `zero` allows it."""
    value = config.get(name, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not is_finite(value) or value < 0 or (value == 0 and not zero):
        raise refuse(f"{CONFIG}: {name} is {value!r:.40}")
    return value
