"""The kernels of a run: attention, layers, optimizer.

`meco doctor` and the first lines of a run show them. Imports neither torch nor Megatron. It is not
known here which of its attention kernels Transformer Engine uses: it chooses at each call
(NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=1 shows it).
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
    """Descriptions of the kernels of a run.

    Attributes:
        attention: Attention over packed documents.
        layers: Norms and linear layers.
        optimizer: Optimizer step.
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
    """The kernels of a run.

    Args:
        gpu: Whether it runs on CUDA.
        engine_layers: Whether its layers are Transformer Engine's.
        varlen: Whether PyTorch's varlen attention supports it (version, precision, dropout).
        optimizer: Library of Megatron's Adam.
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
    """Library of Megatron-Core's Adam: the first that can be imported.

    Args:
        gpu: Whether the run is on CUDA; on a CPU both libraries are hidden.
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
        reason: Why not, in one line; empty if it can.
        breaks_megatron: Whether Megatron-Core fails, too: it handles an ImportError only.
    """

    reason: str = ""
    breaks_megatron: bool = False


def try_transformer_engine() -> EngineState:
    """Import Transformer Engine as Megatron-Core does; for hosts with a GPU."""
    if importlib.util.find_spec("transformer_engine") is None:
        return EngineState("it is not installed")
    try:
        importlib.import_module("transformer_engine.pytorch.optimizers")
    except Exception as error:  # a broken build may raise anything
        line = (str(error).splitlines() or [type(error).__name__])[0]
        return EngineState(f"it cannot be loaded: {line}", not isinstance(error, ImportError))
    return EngineState()


def hide_gpu_libraries() -> None:
    """Make Transformer Engine and apex appear not installed in this process.

    For runs without a GPU and for commands that do not train. Megatron-Core imports installed
    libraries even without a GPU, uses their optimizer and norms, and fails if their import fails.
    Call it before `megatron` is imported. A library that is already imported stays.
    """
    for name in ("transformer_engine", "apex"):
        # None makes `import` raise an ImportError. Megatron then uses PyTorch's kernels.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
