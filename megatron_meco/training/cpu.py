"""Let `megatron.training.pretrain` run on a host without a CUDA device.

Megatron-Core has no CPU path, but nearly all of it is plain PyTorch that names the device "cuda".
`enable_cpu_platform` therefore makes `torch.cuda` answer for one device, and that device is the
CPU: streams and events do nothing, the CUDA generator is the default generator, memory statistics
are zero, and every `device="cuda"` becomes the CPU. Collectives go over Gloo. Transformer Engine
and apex count as not installed, `CPU_DEFAULTS` turns off the other fused kernels that exist for
GPUs only, and `impossible_flags` names what cannot be had.

torch is changed for the whole process, for good. Not to be had on a CPU: Transformer Engine, FP8,
CUDA graphs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
import types
import warnings
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_meco.training.kernels import hide_gpu_libraries
from megatron_meco.training.megatron_patches import (
    let_distributed_optimizer_resume,
    skip_helper_compilation,
)

CPU_DEFAULTS: dict[str, object] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
    "attention_backend": "unfused",
}
"""Defaults of Megatron's argument parser (dest -> value) for a CPU run.

To be applied with `parser.set_defaults(**CPU_DEFAULTS)` after Megatron has added its arguments, for
example in the `extra_args_provider`. argparse converts the one string that stands for an enum.
"""

_CPU = torch.device("cpu")
# Bound before anything is replaced.
_torch_sees_cuda = torch.cuda.is_available


def should_use_cpu() -> bool:
    """Return True where torch sees no CUDA device, also after `enable_cpu_platform`."""
    return not _torch_sees_cuda()


def looks_like_broken_gpu_setup() -> str | None:
    """Return one line on why this host seems to have a GPU that torch cannot see, or None.

    Training on the CPU by mistake costs days, so a script should print this line, or stop.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # An empty value or -1 hides the GPUs on purpose.
    if not should_use_cpu() or visible in ("", "-1"):
        return None
    for path in ("/dev/nvidia0", "/proc/driver/nvidia/version"):
        if Path(path).exists():
            return f"{path} exists, but torch {torch.__version__} sees no CUDA device"
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible}, but torch {torch.__version__} sees no CUDA device"
    return None


def impossible_flags(args: Namespace) -> list[tuple[str, str]]:
    """List what `args` asks for that a CPU cannot do.

    Args:
        args: Megatron's parsed arguments, before or after its own validation.

    Returns:
        Pairs of (flag with its value, what to do instead); empty where the run can start.
    """
    found = []
    for dest, is_impossible, flag, remedy in _GPU_ONLY:
        value = getattr(args, dest, None)
        if dest == "context_parallel_size" and getattr(args, "meco", False):
            # MeCo's own attention has it; Megatron's local attention has not.
            continue
        if is_impossible(value):
            found.append((flag.format(_spelling(value)), remedy))
    return found


@functools.cache
def enable_cpu_platform() -> None:
    """Make `torch.cuda` answer for a single device that is the CPU.

    Call it once, before `megatron` is imported, in the main thread, and only where
    `should_use_cpu()` holds. A second call does nothing.
    """
    hide_gpu_libraries()
    # Megatron decorates functions with torch.compile at import: without a GPU that only means
    # minutes in a C++ compiler. The variable is read at each decoration, not when torch starts.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Dynamo tells functions of torch.cuda apart by identity when it is imported, and torch's
    # optimizers import it in any case: it has to see the originals.
    import torch._dynamo

    # For functions that were decorated before this call.
    torch._dynamo.config.disable = True
    # Megatron insists on it for tensor parallelism on anything older than Blackwell.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    _replace_members(torch.cuda, _torch_cuda_names())
    _replace_tensor_methods()
    _hide_accelerator()
    _replace_device_arguments()
    _skip_reductions_of_one_rank()
    _take_split_sizes_as_tensors()
    skip_helper_compilation()
    let_distributed_optimizer_resume()


def _is_true(value: object) -> bool:
    return bool(value)


def _is_none_of(*allowed: object) -> Callable[[object], bool]:
    return lambda value: value is not None and _spelling(value) not in allowed


def _is_above(limit: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and value > limit


def _spelling(value: object) -> str:
    """Return a value as the user typed it (argparse turns some choices into enums)."""
    return str(getattr(value, "name", value))


# (dest in Megatron's arguments, whether its value is impossible, flag, remedy)
_GPU_ONLY: list[tuple[str, Callable[[Any], bool], str, str]] = [
    (
        "transformer_impl",
        _is_none_of("local"),
        "--transformer-impl {}",
        "Transformer Engine needs a GPU: use --transformer-impl local.",
    ),
    (
        "distributed_backend",
        _is_none_of("gloo"),
        "--distributed-backend {}",
        "Use --distributed-backend gloo.",
    ),
    (
        "attention_backend",
        _is_none_of("unfused", "auto", "local"),
        "--attention-backend {}",
        "Flash and fused attention need a GPU: use --attention-backend unfused.",
    ),
    ("use_flash_attn", _is_true, "--use-flash-attn", "Remove it: the kernels need a GPU."),
    (
        "gradient_accumulation_fusion",
        _is_true,
        "gradient accumulation fusion",
        "Its kernel needs a GPU: add --no-gradient-accumulation-fusion.",
    ),
    (
        "masked_softmax_fusion",
        _is_true,
        "masked softmax fusion",
        "Its kernel needs a GPU: add --no-masked-softmax-fusion.",
    ),
    (
        "apply_rope_fusion",
        _is_true,
        "RoPE fusion",
        "Its kernel needs Transformer Engine: add --no-rope-fusion.",
    ),
    ("fp8", _is_true, "--fp8-format {}", "Remove it: use --bf16 or fp32 on a CPU."),
    ("fp4", _is_true, "--fp4-format {}", "Remove it: use --bf16 or fp32 on a CPU."),
    ("fp16", _is_true, "--fp16", "Use --bf16 or fp32: loss scaling is untried on a CPU."),
    (
        "context_parallel_size",
        _is_above(1),
        "--context-parallel-size {}",
        "Without --meco it needs Transformer Engine: use --context-parallel-size 1.",
    ),
    ("tp_comm_overlap", _is_true, "--tp-comm-overlap", "Remove it: it needs Transformer Engine."),
    (
        "cross_entropy_fusion_impl",
        _is_none_of("native"),
        "--cross-entropy-fusion-impl {}",
        "Use --cross-entropy-fusion-impl native.",
    ),
    ("te_rng_tracker", _is_true, "--te-rng-tracker", "Remove it: it needs Transformer Engine."),
    (
        "use_precision_aware_optimizer",
        _is_true,
        "--use-precision-aware-optimizer",
        "Remove it: it needs Transformer Engine's optimizer.",
    ),
    (
        "cuda_graph_impl",
        _is_none_of("none"),
        "--cuda-graph-impl {}",
        "Remove it: there are no CUDA graphs on a CPU.",
    ),
    ("enable_cuda_graph", _is_true, "--enable-cuda-graph", "Remove it."),
    ("external_cuda_graph", _is_true, "--external-cuda-graph", "Remove it."),
    ("optimizer_cuda_graph", _is_true, "--optimizer-cuda-graph", "Remove it."),
    ("use_megatron_fsdp", _is_true, "--use-megatron-fsdp", "Use --use-distributed-optimizer."),
    ("use_torch_fsdp2", _is_true, "--use-torch-fsdp2", "Use --use-distributed-optimizer."),
    ("nccl_ub", _is_true, "--use-nccl-ub", "Remove it: there is no NCCL on a CPU."),
    ("use_sharp", _is_true, "--use-sharp", "Remove it: there is no NCCL on a CPU."),
    (
        "moe_token_dispatcher_type",
        _is_none_of("allgather", "alltoall"),
        "--moe-token-dispatcher-type {}",
        "Its kernels need a GPU: use alltoall.",
    ),
    ("moe_enable_deepep", _is_true, "--moe-enable-deepep", "Remove it: its kernels need a GPU."),
    (
        "moe_permute_fusion",
        _is_true,
        "--moe-permute-fusion",
        "Remove it: it needs Transformer Engine.",
    ),
    ("moe_grouped_gemm", _is_true, "--moe-grouped-gemm", "Remove it: its kernel needs a GPU."),
    ("batch_invariant_mode", _is_true, "--batch-invariant-mode", "Remove it: it needs Triton."),
    ("optimizer_cpu_offload", _is_true, "--optimizer-cpu-offload", "Remove it: all is on the CPU."),
    (
        "cpu_offloading_num_layers",
        _is_above(0),
        "--cpu-offloading-num-layers {}",
        "Remove it: all is on the CPU.",
    ),
    (
        "fine_grained_activation_offloading",
        _is_true,
        "--fine-grained-activation-offloading",
        "Remove it: all is on the CPU.",
    ),
    ("profile", _is_true, "--profile", "Remove it: it starts the CUDA profiler."),
    (
        "record_memory_history",
        _is_true,
        "--record-memory-history",
        "Remove it: it records CUDA memory.",
    ),
]


def _replace_device_arguments() -> None:
    """Let every torch function that takes a device take "cuda" for the CPU.

    Functions are replaced, rather than intercepted by a TorchFunctionMode: a mode costs
    microseconds in each of the thousands of calls of a step, and is bound to one thread.
    """
    likes = [name for name in dir(torch) if name.endswith("_like")]
    makers = [function.__name__ for function in _device_constructors()]
    names = {name for name in [*likes, *makers, "normal"] if hasattr(torch, name)}
    _replace_members(torch, {name: _on_cpu(getattr(torch, name)) for name in sorted(names)})
    for name in ("new_tensor", "new_empty", "new_full", "new_ones", "new_zeros"):
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    move = torch.Tensor.to

    @functools.wraps(move)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # The only function that takes a device by position.
        if args and _names_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return move(self, *args, **kwargs)

    torch.Tensor.to = to  # type: ignore[method-assign, assignment]  # overloaded


def _skip_reductions_of_one_rank() -> None:
    """Let an all-reduce within a group of one rank, which changes nothing, cost nothing.

    Megatron reduces about twenty times a step whatever the size of its groups; Gloo takes 50
    microseconds for each.
    """
    stock = torch.distributed.all_reduce

    @functools.wraps(stock)
    def all_reduce(
        tensor: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False
    ) -> Any:
        if torch.distributed.get_world_size(group) == 1:
            return _Done() if async_op else None
        op = torch.distributed.ReduceOp.SUM if op is None else op
        return stock(tensor, op, group, async_op)

    torch.distributed.all_reduce = all_reduce


def _take_split_sizes_as_tensors() -> None:
    """Let an all-to-all take the tensors in which Megatron counts the tokens of each expert.

    On a GPU Megatron copies them to the host as arrays; those of a CPU it leaves as they are.
    """
    stock = torch.distributed.all_to_all_single

    @functools.wraps(stock)
    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        to, of = (
            sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
            for sizes in (output_split_sizes, input_split_sizes)
        )
        return stock(output, input, to, of, group, async_op)

    torch.distributed.all_to_all_single = all_to_all_single


class _Done:
    """The handle of a collective call that is over."""

    def wait(self, timeout: object = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if "device" in kwargs and _names_cuda(kwargs["device"]):
                kwargs["device"] = _CPU
            if "pin_memory" in kwargs:
                kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return call


def _names_cuda(device: object) -> bool:
    """Tell whether a device argument means a CUDA device; a bare index does."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class _Stream:
    """A stream of a device that does one thing at a time."""

    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class _Event:
    """An event that has happened as soon as it is recorded, with its time."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._recorded_at = 0.0

    def record(self, stream: object = None) -> None:
        self._recorded_at = time.perf_counter()

    def elapsed_time(self, end_event: _Event) -> float:
        """Return milliseconds, as torch does."""
        return 1000.0 * (end_event._recorded_at - self._recorded_at)

    def synchronize(self) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True


def _do_nothing(*args: object, **kwargs: object) -> None: ...


def _always(value: object) -> Callable[..., Any]:
    # A new function for each name: dynamo tells the members of torch.cuda apart by identity.
    return lambda *args, **kwargs: value


def _torch_cuda_names() -> dict[str, object]:
    """Return name -> replacement for the members of `torch.cuda` that Megatron can reach."""
    stream = _Stream()
    properties = types.SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=os.cpu_count()
    )
    names: dict[str, object] = {
        "is_available": _always(True),
        "device_count": _always(1),
        # An index, not a torch.device: Megatron also writes f"cuda:{current_device()}".
        "current_device": _always(0),
        "get_device_name": _always("cpu"),
        # The lowest, so that no path for a particular GPU generation is chosen.
        "get_device_capability": _always((0, 0)),
        "get_device_properties": _always(properties),
        "is_bf16_supported": _always(True),
        "is_current_stream_capturing": _always(False),
        # Context managers that yield and change nothing.
        "device": contextlib.nullcontext,
        "stream": contextlib.nullcontext,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": _always(stream),
        "default_stream": _always(stream),
        # Called counters in Megatron's logs; an unknown counter is zero.
        "memory_stats": lambda *args, **kwargs: defaultdict(int),
        "mem_get_info": _always((0, 0)),
        # torch.cuda's own random functions reach the generator through these three, so all of
        # them (and Megatron's tracker of random states) then work on the CPU's generator.
        "_lazy_init": _always(None),
        "_lazy_call": lambda function, **kwargs: function(),
        "default_generators": (torch.default_generator,),
    }
    for name in ("set_device", "set_stream", "synchronize", "empty_cache", "ipc_collect"):
        names[name] = _always(None)
    for name in (
        "reset_peak_memory_stats",
        "reset_accumulated_memory_stats",
        "reset_max_memory_allocated",
        "reset_max_memory_cached",
    ):
        names[name] = _always(None)
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "device_memory_used",
        "utilization",
        "temperature",
        "power_draw",
        "clock_rate",
    ):
        names[name] = _always(0)
    return names


def _replace_members(owner: types.ModuleType, replacements: Mapping[str, object]) -> None:
    """Set members of a torch module, also where a module has imported them by name."""
    importers = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(("torch.cuda.", "megatron.")) and isinstance(module, types.ModuleType)
    ]
    for name, new in replacements.items():
        old = getattr(owner, name, None)
        setattr(owner, name, new)
        for module in importers:
            if old is not None and vars(module).get(name) is old:
                setattr(module, name, new)


def _replace_tensor_methods() -> None:
    """Make moving to the GPU a no-op and let a tensor's type name say "cuda"."""
    tensor_type = torch.Tensor.type

    def type_with_cuda_name(
        self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> Any:
        if dtype is None:
            # Megatron's optimizers and gradient clipping sort parameters by
            # "torch.cuda.FloatTensor" and refuse any other name. Under a TorchFunctionMode the
            # original method comes back here, so the name may have been changed already.
            name = tensor_type(self)
            return name if "cuda" in name else name.replace("torch.", "torch.cuda.")
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return tensor_type(self, dtype, non_blocking, **kwargs)

    def return_self(self: Any, *args: object, **kwargs: object) -> Any:
        return self

    for owner, name, method in (
        (torch.Tensor, "type", type_with_cuda_name),
        (torch.Tensor, "cuda", return_self),
        (torch.Tensor, "pin_memory", return_self),
        (torch.Tensor, "record_stream", _do_nothing),
        (torch.nn.Module, "cuda", return_self),
    ):
        setattr(owner, name, method)


def _hide_accelerator() -> None:
    """Let `torch.accelerator` report none, so that a DataLoader does not try to pin memory."""
    torch.accelerator.is_available = _always(False)
    torch.accelerator.current_accelerator = _always(None)
    torch.accelerator.device_count = _always(0)
    # Megatron always asks for pinned memory; that it has no effect here is no news.
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")


def run_checkpoint_worker(*arguments: Any, **options: Any) -> None:
    """Run the process in which Megatron saves checkpoints while training goes on.

    Args:
        arguments: As of `PersistentAsyncCaller.async_loop`.
        options: Likewise.
    """
    enable_cpu_platform()
    # Only now: it asks for the number of devices.
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*arguments, **options)
