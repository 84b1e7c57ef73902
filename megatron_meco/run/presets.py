"""The models that a run file can name, and what follows from a model's flags.

The numbers are in `presets.yaml`, which examples/train_llama.sh reads as well. What depends on
other values is worked out here: `complete`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from importlib import resources

from megatron_meco.run.plain_yaml import Entries, Items, Node, Scalar, parse

_FILE = "presets.yaml"
_BASED_ON = "based-on"
# Of each of these Megatron takes one: a model's gives way to the run file's.
_ALTERNATIVES = (
    {"train-iters", "train-samples"},
    {"lr-warmup-fraction", "lr-warmup-iters", "lr-warmup-samples"},
    {"meco-cooldown-fraction", "meco-cooldown-start-iteration"},
    {"global-batch-size", "step-batch-size-schedule"},
    {"bf16", "fp16"},
    {"num-layers", "hybrid-layer-pattern"},
    {"split", "train-data-path", "per-split-data-args-path"},
)
# What a branch takes from the run that it leaves.
_OF_THE_PARENT = {"train-iters", "meco-cooldown-fraction"}


@functools.cache
def _sections() -> Mapping[str, Entries]:
    text = resources.files(__package__).joinpath(_FILE).read_text("utf-8")
    found = {}
    for key, node in parse(text, _FILE).entries:
        assert isinstance(node, Entries)
        found[key.text] = node
    return found


def model_names() -> list[str]:
    """The models in the order of the file."""
    sections = _sections().items()
    return [name for name, node in sections if any(k.text == _BASED_ON for k, _ in node.entries)]


def flags_of_model(name: str, given: Collection[str]) -> dict[str, Node]:
    """The flags of a model by key.

    Args:
        name: One of `model_names()`.
        given: The keys that the run file gives; those that exclude them are left out.
    """
    flags = _all_flags(name)
    dropped: set[str] = set()
    for group in _ALTERNATIVES:
        if group & set(given):
            dropped |= group
    if "meco-branch-from" in given:
        dropped |= _OF_THE_PARENT
    return {key: node for key, node in flags.items() if key not in dropped or key in given}


def _all_flags(name: str) -> dict[str, Node]:
    """The flags of a section and of those that it is based on; the section's own win."""
    own = {key.text: node for key, node in _sections()[name].entries}
    bases = own.pop(_BASED_ON, None)
    flags: dict[str, Node] = {}
    for part in bases.items if isinstance(bases, Items) else ():
        assert isinstance(part, Scalar)
        flags |= _all_flags(part.text)
    return flags | own


# What each flag of `complete` follows from; a refusal of it is told where that is written.
FOLLOWS_FROM = {
    "min-lr": "lr",
    "max-position-embeddings": "seq-length",
    "make-vocab-size-divisible-by": "tensor-model-parallel-size",
    "sequence-parallel": "tensor-model-parallel-size",
    "no-rope-fusion": "transformer-impl",
    "no-persist-layer-norm": "transformer-impl",
    "no-masked-softmax-fusion": "transformer-impl",
}


def complete(words: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """What follows from the flags of a run that names a model, for keys that are not given.

    Args:
        words: Values by key, of the run file and of the model; none for a switch.

    Returns:
        Further ones.
    """
    more: dict[str, tuple[str, ...]] = {}
    if "lr" in words:
        # As in the paper; not when the schedule has no end to fall to.
        more["min-lr"] = (f"{float(words['lr'][0]) / 10:.6g}",)
    if "seq-length" in words:
        more["max-position-embeddings"] = words["seq-length"]
    ranks = int(words.get("tensor-model-parallel-size", ("1",))[0])
    if ranks > 0 and 128 % ranks == 0:
        # TP times this stays 128, so that every layout has the same padded vocabulary.
        more["make-vocab-size-divisible-by"] = (str(128 // ranks),)
    if ranks > 1:
        more["sequence-parallel"] = ()
    if words.get("transformer-impl") == ("local",):
        # Kernels of Transformer Engine that Megatron would otherwise expect.
        for key in ("no-rope-fusion", "no-persist-layer-norm", "no-masked-softmax-fusion"):
            more[key] = ()
    return {key: value for key, value in more.items() if key not in words}
