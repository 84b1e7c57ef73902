"""Every patch of Megatron-LM, and every private name of it that training uses.

What, when it is needed, and when it goes:

- `SaveInterval`: with `--meco` and `--save-interval`, until Megatron can save at a given iteration.
- `skip_helper_compilation`: where Megatron is an installed wheel, until Megatron looks for the
  compiled module before it runs `make`.
- `let_distributed_optimizer_resume`: without Transformer Engine and Apex, until Megatron resumes
  torch's Adam exactly.
- `skip_steps_without_reading_batches`: with `--meco` and steps to skip, until Megatron skips a step
  without reading the keys of its batches.
- `keep_padding_out_of_experts`: with `--meco` and experts, until Megatron's router and its further
  heads take a padding mask (Megatron-LM #6114, mended on its main branch for the router).
- `let_further_heads_be_packed`: with further heads on MeCo's own attention layers, until Megatron
  takes their layers from `--spec`.
- `let_functions_be_specs`: on MeCo's own attention layers in Megatron 0.18, whose scripts pass on
  what `--spec` names without calling it. From 0.19 on Megatron calls it.
- `save_from_the_cpu_in_the_background`: with `--async-save` on a CPU, until Megatron's checkpoint
  worker does without a CUDA device.
- `rotary_scale` (read only): on MeCo's own attention layers, until it has a public name.

Nothing is patched by importing this module. Each function checks that what it replaces has the
signature of Megatron-Core 0.19.2; the run warns about other versions (`versions.check_version`).
Where no issue is named we know of none. `MeCoGPTDataset` also overrides
`_key_config_attributes`, which Megatron documents for subclasses.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_meco.errors import MeCoError


class SaveInterval(int):
    """An interval of Megatron's training loop that is also due at further iterations.

    Megatron saves where `iteration % save_interval` is 0, and keeps an older checkpoint where
    `iteration % save_retain_interval` is 0. It has no hook for other iterations. `%` with this
    interval is 0 at each multiple and at those of `also`. It is pickled as a plain int, so
    checkpoints do not depend on this package.

    Attributes:
        also: The further iterations.
    """

    also: frozenset[int]

    def __new__(cls, interval: int, *, also: Collection[int]) -> SaveInterval:
        """Make an interval that is due at those of `also` too."""
        value = super().__new__(cls, interval)
        value.also = frozenset(also)
        return value

    def __rmod__(self, iteration: int) -> int:
        # `iteration % interval`: Python asks the right operand first because its type is a subclass
        # of the left operand's type.
        return 0 if iteration in self.also else int(iteration) % int(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def let_checkpoints_hold_an_interval() -> None:
    """Let `torch.load` read the arguments of a run with a `SaveInterval`.

    It is pickled as `int(...)`, and Megatron 0.18 reads arguments by `torch.load` with
    `weights_only`, which knows integers but not their class.
    """
    torch.serialization.add_safe_globals([int])


def skip_helper_compilation() -> None:
    """Keep Megatron from running `make` for dataset helpers that are already compiled.

    The wheel has the compiled `helpers_cpp` and no Makefile, so `make` fails and ends the run.
    Imports megatron.core.
    """
    # Late: torch.cuda must be replaced before megatron.core is imported.
    from megatron.core.datasets import utils

    compiled = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    has_makefile = Path(utils.__file__).with_name("Makefile").is_file()
    if compiled and not has_makefile and _has_signature(utils.compile_helpers):
        utils.compile_helpers = _do_nothing


def _do_nothing() -> None: ...


@functools.cache
def let_distributed_optimizer_resume() -> None:
    """Let Megatron's distributed optimizer resume exactly with torch's Adam.

    Megatron 0.19.2 has three defects there:

    - `state_dict` asserts a common step count, and fails before the first step.
    - `load_state_dict` gives all parameters one shared step tensor, which Adam then increments
      once for each parameter.
    - `_set_main_param_and_optimizer_states` overwrites the step count by the "step" of each
      parameter in the checkpoint, which is another count or missing (a KeyError). In float32 it
      copies into views of the model's parameters, which autograd forbids.

    Tested by tests/distributed/test_resume.py. Does nothing to a Megatron with other signatures.
    Imports megatron.core.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # A private name: all checkpoint formats pass through this method only.
    setter = "_set_main_param_and_optimizer_states"
    stock_set = getattr(DistributedOptimizer, setter, None)
    stock_state_dict = DistributedOptimizer.state_dict
    stock_load_state_dict = DistributedOptimizer.load_state_dict
    if stock_set is None or not (
        _has_signature(stock_set, "self", "model_param", "tensors")
        and _has_signature(stock_state_dict, "self")
        and _has_signature(stock_load_state_dict, "self", "state_dict")
    ):
        return

    @functools.wraps(stock_state_dict)
    def state_dict(self: Any) -> Any:
        if _is_torch_adam(self.optimizer) and not self.optimizer.state:
            _start_adam(self.optimizer)
        return stock_state_dict(self)

    @functools.wraps(stock_load_state_dict)
    def load_state_dict(self: Any, state: Any) -> None:
        stock_load_state_dict(self, state)
        if _is_torch_adam(self.optimizer):
            for values in self.optimizer.state.values():
                # One tensor for each parameter: Adam increments it in place.
                values["step"] = values["step"].clone()

    @functools.wraps(stock_set)
    def set_all_but_step(self: Any, model_param: Any, tensors: Any) -> None:
        with torch.no_grad():
            # The stock method skips values that are not tensors.
            stock_set(self, model_param, {**tensors, "step": None})

    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    setattr(DistributedOptimizer, setter, set_all_but_step)


def _is_torch_adam(optimizer: object) -> bool:
    """Whether this is torch's Adam; the fused ones keep one step count per parameter group."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def _start_adam(optimizer: Any) -> None:
    """Set the state that torch's Adam has before its first step."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def skip_steps_without_reading_batches() -> None:
    """Let `--iterations-to-skip` skip MeCo's batches.

    Megatron's `dummy_train_step` looks up its own batch keys and sends them to the other
    tensor-parallel ranks. MeCo's loader gives one vector, so those ranks would wait forever.

    Raises:
        MeCoError: Megatron has no such function.
    """
    from megatron.core import mpu
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import training

    if not _has_signature(getattr(training, "dummy_train_step", None), "data_iterator"):
        raise _unknown_megatron("megatron.training.training.dummy_train_step")

    def dummy_train_step(data_iterator: Any) -> None:
        machine = get_rerun_state_machine()
        while machine.should_run_forward_backward(data_iterator):
            for _ in range(get_num_microbatches()):
                if mpu.get_tensor_model_parallel_rank() == 0:
                    next(data_iterator)

    training.dummy_train_step = dummy_train_step


@functools.cache
def keep_padding_out_of_experts() -> None:
    """Let the expert bias, auxiliary losses and further heads take a padding mask.

    - `TopKRouter._apply_expert_bias` of 0.18 and 0.19 combines a map of (tokens, experts) with a
      mask of (tokens,): it fails, and with as many tokens as experts counts wrong ones.
    - With `--calculate-per-token-loss` Megatron weighs a load-balancing loss by the tokens of this
      rank times the ranks. With sequence parallelism ranks hold different numbers of tokens that
      are no padding, so that a token's gradient would depend on its rank.
    - `MultiTokenPredictionLayer._get_embeddings` moves the mask with the tokens, and calls what
      comes in behind the last token of a document a token. It is padding.

    Raises:
        MeCoError: Megatron's router is another one.
    """
    from megatron.core.transformer.moe import router
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    name, counts = "_apply_expert_bias", "get_tokens_per_expert_and_token_count"
    if not _has_signature(
        getattr(router.TopKRouter, name, None), "self", "routing_map", "padding_mask"
    ):
        raise _unknown_megatron(f"TopKRouter.{name}")
    stock_counts: Any = getattr(router, counts, None)
    given = ("routing_map", "reduce_group", "topk", "with_padding_mask")
    if not _has_signature(stock_counts, *given):
        raise _unknown_megatron(f"router.{counts}")

    def count_tokens(self: Any, routing_map: torch.Tensor, padding_mask: Any = None) -> None:
        if not self.enable_expert_bias or not torch.is_grad_enabled():
            return
        with torch.no_grad():
            if padding_mask is not None:
                routing_map = routing_map & ~padding_mask.unsqueeze(-1)
            self.local_tokens_per_expert += routing_map.sum(dim=0)

    setattr(router.TopKRouter, name, count_tokens)

    @functools.wraps(stock_counts)
    def even_counts(
        routing_map: Any, reduce_group: Any, topk: Any = None, with_padding_mask: bool = False
    ) -> Any:
        experts, own, total = stock_counts(routing_map, reduce_group, topk, with_padding_mask)
        return experts, (total / reduce_group.size() if with_padding_mask else own), total

    setattr(router, counts, even_counts)
    stock = MultiTokenPredictionLayer._get_embeddings

    if "padding_mask" not in inspect.signature(stock).parameters:
        return

    @functools.wraps(stock)
    def embeddings(self: Any, *args: Any, padding_mask: Any = None, **kwargs: Any) -> Any:
        tokens = None if padding_mask is None else ~padding_mask
        found = stock(self, *args, padding_mask=tokens, **kwargs)
        ids, positions, moved, *rest = found
        return (ids, positions, None if moved is None else ~moved, *rest)

    MultiTokenPredictionLayer._get_embeddings = embeddings


def builds_further_heads() -> bool:
    """Whether Megatron has the function that `let_further_heads_be_packed` replaces."""
    return _has_signature(_heads_function(), "config", "transformer_layer_spec", "vp_stage")


def _heads_function() -> Any:
    try:
        from megatron.training.models import gpt
    except ImportError:
        return None
    return getattr(gpt, "mtp_block_spec", None)


@functools.cache
def let_further_heads_be_packed(build: Callable[..., Any]) -> None:
    """Let a function of MeCo's build further heads, for its own attention layers.

    Megatron builds them of its local layers, whose attention takes no packed documents.

    Args:
        build: Makes the heads of a pipeline stage from the model's configuration and `vp_stage`.
    """
    from megatron.training.models import gpt

    @functools.wraps(_heads_function())
    def mtp_block_spec(config: Any, transformer_layer_spec: Any, vp_stage: Any = None) -> Any:
        return None if config.transformer.mtp_num_layers is None else build(config, vp_stage)

    gpt.mtp_block_spec = mtp_block_spec


@functools.cache
def save_from_the_cpu_in_the_background(worker: Callable[..., None]) -> None:
    """Let Megatron's own asynchronous saves (`--async-strategy mcore`) work on a CPU.

    Megatron's worker process divides by the number of CUDA devices, and ends. It also gets the
    tensors themselves, in shared memory, where it would copy a GPU's to the host: training would
    change them while they are written.

    Args:
        worker: Runs Megatron's worker in a new process in which the CPU answers for CUDA.

    Raises:
        MeCoError: Megatron has no such worker.
    """
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    caller: Any = getattr(async_utils, "PersistentAsyncCaller", None)
    writer = filesystem_async.FileSystemWriterAsync
    stock: Any = getattr(writer, "get_save_function_and_args", None)
    if not callable(getattr(caller, "async_loop", None)) or not _has_signature(stock, "self"):
        raise _unknown_megatron("PersistentAsyncCaller.async_loop")

    @functools.wraps(stock)
    def with_copies(self: Any) -> tuple[Any, Any, list[Any]]:
        save, stage, arguments = stock(self)
        if save is None:
            return save, stage, arguments
        rank, buckets, results = arguments
        copies = [
            (path, name, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, name, (data, tensors) in buckets
        ]
        # Nothing is left to stage, so training goes on at once.
        return save, None, [rank, copies, results]

    writer.get_save_function_and_args = with_copies
    caller.async_loop = staticmethod(worker)


@functools.cache
def let_functions_be_specs() -> None:
    """Let `--spec` name a function that makes the layers, in Megatron 0.18.

    Does nothing where Megatron has a configuration of GPT models: it calls such a function.
    """
    # Late, as above.
    from megatron.core.transformer import transformer_block
    from megatron.training import argument_utils

    name = "_get_block_submodules"
    stock = getattr(transformer_block, name, None)
    if hasattr(argument_utils, "gpt_config_from_args") or not callable(stock):
        return
    if not _has_signature(stock, "config", "spec", "vp_stage", "pp_rank"):
        raise _unknown_megatron(f"transformer_block.{name}")

    @functools.wraps(stock)
    def submodules(config: Any, spec: Any, vp_stage: Any = None, pp_rank: Any = None) -> Any:
        if inspect.isfunction(spec):
            spec = spec(SimpleNamespace(transformer=config), vp_stage=vp_stage)
        return stock(config, spec, vp_stage, pp_rank)

    setattr(transformer_block, name, submodules)


def rotary_scale(attention: Any) -> float:
    """Factor of cosines and sines in Megatron-Core's attention: 1, except with YaRN.

    Raises:
        MeCoError: Megatron keeps it under another name.
    """
    name = "_yarn_concentration_factor"
    if hasattr(attention, name):
        return float(getattr(attention, name))
    # Megatron 0.18 works it out at each call.
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

    factor_of = getattr(yarn, "_yarn_get_concentration_factor_from_config", None)
    if factor_of is None or not hasattr(attention, "config"):
        raise _unknown_megatron(f"{type(attention).__name__}.{name}")
    return float(factor_of(attention.config))


def _has_signature(function: Callable[..., Any] | None, *parameters: str) -> bool:
    """Whether Megatron has a function, with the parameters that its replacement expects."""
    return function is not None and tuple(inspect.signature(function).parameters) == parameters


def _unknown_megatron(name: str) -> MeCoError:
    return MeCoError(
        f"has no {name} as version 0.19.2 has it",
        where="megatron-core",
        remedy="Install megatron-core 0.19.2.",
    )
