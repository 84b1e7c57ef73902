"""Where this package changes Megatron, or relies on a private name of it: here and nowhere else.

Each function replaces or reads one thing, is called only where it is needed, and says under which
condition it goes away.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch


class SaveInterval(int):
    """An interval of Megatron's loop that is also due at one further iteration.

    Megatron has no hook at a save. Its loop asks for `iteration % save_interval`, and it keeps an
    older checkpoint where `iteration % save_retain_interval` is 0. Both are 0 at each multiple and
    at `also`. It is pickled as a plain int, so a checkpoint does not depend on this package. Goes
    when Megatron can be told to save at an iteration.
    """

    also: int

    def __new__(cls, interval: int, *, also: int) -> SaveInterval:
        """Make an interval that is due at `also` too."""
        value = super().__new__(cls, interval)
        value.also = also
        return value

    def __rmod__(self, iteration: int) -> int:
        # Python asks the right operand first, because its type derives from the left one's.
        return 0 if iteration == self.also else int(iteration) % int(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def skip_helper_compilation() -> None:
    """Keep Megatron from running `make` for its dataset helpers where they are built already.

    The wheel has the compiled `helpers_cpp` and no Makefile, so Megatron's own call ends the run.
    Imports megatron.core. Goes when Megatron looks for the module first.
    """
    # Imported here: megatron.core must not be imported before torch.cuda has been replaced.
    from megatron.core.datasets import utils

    built = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    if built and not Path(utils.__file__).with_name("Makefile").is_file():
        utils.compile_helpers = _do_nothing


def _do_nothing() -> None: ...


@functools.cache
def let_distributed_optimizer_resume() -> None:
    """Let the distributed optimizer resume exactly without Transformer Engine and Apex.

    With torch's Adam, Megatron 0.19 asserts a common step count of all parameters also where no
    step was made yet, loads one counter for all of them to share, and then copies over it what the
    checkpoint's tensors hold under "step": another count, or nothing (a KeyError). In float32 it
    cannot resume at all. Imports megatron.core. Goes when Megatron resumes torch's Adam bit for bit
    (tests/distributed/test_resume.py tells).
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # A private name: the only place that all formats of a checkpoint pass through.
    setter = "_set_main_param_and_optimizer_states"
    if not hasattr(DistributedOptimizer, setter):
        return  # a Megatron that does this in another way
    stock_set = getattr(DistributedOptimizer, setter)
    stock_state_dict = DistributedOptimizer.state_dict
    stock_load_state_dict = DistributedOptimizer.load_state_dict

    @functools.wraps(stock_state_dict)
    def state_dict(self: Any) -> Any:
        if _is_torch_adam(self.optimizer) and not self.optimizer.state:
            for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return stock_state_dict(self)

    @functools.wraps(stock_load_state_dict)
    def load_state_dict(self: Any, state: Any) -> None:
        stock_load_state_dict(self, state)
        if _is_torch_adam(self.optimizer):
            for values in self.optimizer.state.values():
                # One tensor each: Adam counts in place.
                values["step"] = values["step"].clone()

    @functools.wraps(stock_set)
    def set_all_but_step(self: Any, model_param: Any, tensors: Any) -> None:
        # The stock function skips what is not a tensor. In float32 it copies into views of the
        # model's own parameters, which autograd forbids.
        with torch.no_grad():
            stock_set(self, model_param, {**tensors, "step": None})

    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    setattr(DistributedOptimizer, setter, set_all_but_step)


def _is_torch_adam(optimizer: object) -> bool:
    """Tell torch's Adam from the fused ones, which keep one step count per parameter group."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def skip_steps_without_reading_batches() -> None:
    """Let `--iterations-to-skip` pass over MeCo's batches.

    Megatron's `dummy_train_step` looks for its own batch keys and sends them to the other
    tensor-parallel ranks; MeCo's loader hands over one vector, so the ranks would wait for ever.
    Needed with `--meco` and steps to skip. Goes when Megatron skips steps without reading keys.
    """
    from megatron.core import mpu
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import training

    def dummy_train_step(data_iterator: Any) -> None:
        machine = get_rerun_state_machine()
        while machine.should_run_forward_backward(data_iterator):
            for _ in range(get_num_microbatches()):
                if mpu.get_tensor_model_parallel_rank() == 0:
                    next(data_iterator)

    training.dummy_train_step = dummy_train_step


def rotary_scale(attention: Any) -> float:
    """What Megatron-Core's attention multiplies cosines and sines with: 1, but for YaRN."""
    return float(attention._yarn_concentration_factor)


def rotate_half(states: Any, interleaved: bool) -> Any:
    """Megatron's own `(-x2, x1)` of RoPE, for pairs that are halves or neighbours.

    Args:
        states: (..., rotary dimensions).
        interleaved: Whether pairs are neighbours.
    """
    # Imported here: megatron.core must not be imported before torch.cuda has been replaced.
    from megatron.core.models.common.embeddings.rope_utils import _rotate_half

    return _rotate_half(states, interleaved)
