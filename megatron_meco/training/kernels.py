"""Which kernels a run uses for attention, for layers and for the optimizer.

One rule with two callers: `meco doctor`, which knows what is installed, and a run, which knows its
flags as well and says the result in its first lines. Needs neither torch nor Megatron. What was
given up: which of its own attention kernels Transformer Engine takes (it decides at each call;
NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=1 shows it).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from typing import Literal

OptimizerLibrary = Literal["transformer_engine", "apex", "torch"]

_OPTIMIZERS: dict[OptimizerLibrary, str] = {
    "transformer_engine": "Transformer Engine FusedAdam",
    "apex": "apex FusedAdam",
    "torch": "torch AdamW",
}


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What does the work of a run, in words.

    Attributes:
        attention: Attention over packed documents.
        layers: Norms and linear layers.
        optimizer: The optimizer's step.
    """

    attention: str
    layers: str
    optimizer: str

    def describe(self) -> str:
        """All three in one line."""
        return f"attention: {self.attention}; layers: {self.layers}; optimizer: {self.optimizer}"


def choose_kernels(
    *, gpu: bool, engine_layers: bool, varlen: bool, optimizer: OptimizerLibrary
) -> Kernels:
    """Say what a run uses.

    Args:
        gpu: Whether it runs on CUDA.
        engine_layers: Whether its layers are Transformer Engine's.
        varlen: Whether PyTorch's varlen attention can serve it (its version, precision, dropout).
        optimizer: Where Megatron's Adam comes from.
    """
    if gpu and engine_layers:
        attention = "Transformer Engine over packed sequences (THD)"
        layers = "Transformer Engine, norm fused with the linear layer behind it"
    elif gpu and varlen:
        attention = "torch.nn.attention.varlen (CUDA, bf16 and fp16)"
        layers = "Megatron's linear layers, torch norm (CUDA, not fused)"
    elif gpu:
        attention = "torch scaled_dot_product_attention, document by document (CUDA, slow)"
        layers = "Megatron's linear layers, torch norm (CUDA, not fused)"
    else:
        attention = "torch scaled_dot_product_attention, document by document (CPU)"
        layers = "Megatron's linear layers, torch norm (CPU)"
    return Kernels(attention=attention, layers=layers, optimizer=_OPTIMIZERS[optimizer])


def first_optimizer(*, gpu: bool, engine_loads: bool, apex_loads: bool) -> OptimizerLibrary:
    """Say where Megatron-Core takes its Adam from: the first that can be imported.

    Args:
        gpu: Whether the run is on CUDA; the CPU platform hides both libraries.
        engine_loads: Whether Transformer Engine can be imported.
        apex_loads: Whether NVIDIA's apex can.
    """
    if gpu and engine_loads:
        return "transformer_engine"
    return "apex" if gpu and apex_loads else "torch"


@dataclass(frozen=True)
class EngineState:
    """Whether Transformer Engine can be used.

    Attributes:
        reason: Why not, in one line; empty where it can.
        breaks_megatron: Whether Megatron-Core fails with it, too: it expects an ImportError alone.
    """

    reason: str = ""
    breaks_megatron: bool = False


def try_transformer_engine() -> EngineState:
    """Import Transformer Engine as Megatron-Core does; for hosts with a GPU."""
    if importlib.util.find_spec("transformer_engine") is None:
        return EngineState("it is not installed")
    try:
        importlib.import_module("transformer_engine.pytorch.optimizers")
    except Exception as error:  # A broken build fails in any way it likes.
        line = (str(error).splitlines() or [type(error).__name__])[0]
        return EngineState(f"it cannot be loaded: {line}", not isinstance(error, ImportError))
    return EngineState()


def hide_gpu_libraries() -> None:
    """Let Transformer Engine and apex count as not installed in this process.

    For runs without a GPU and for commands that train nothing. Where the libraries are installed,
    as in an environment that GPU nodes share with a login node, Megatron-Core imports them without
    asking for a GPU, takes their optimizer and norms, and fails where their import does. Call it
    before `megatron` is imported; a library that is in use already stays.
    """
    for name in ("transformer_engine", "apex"):
        # Python's own way to say that a module cannot be imported: an ImportError, which Megatron
        # answers with PyTorch's kernels.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
