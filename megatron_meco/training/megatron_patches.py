"""Where this package changes Megatron itself; each function replaces one thing, where needed."""

from __future__ import annotations

from typing import Any


def skip_steps_without_reading_batches() -> None:
    """Let `--iterations-to-skip` pass over MeCo's batches.

    Megatron 0.19's `dummy_train_step` looks for its own batch keys and sends them to the other
    tensor-parallel ranks; MeCo's loader hands over one vector, so the ranks would wait for ever.
    Needed with `--meco` and steps to skip. Goes when Megatron skips steps by the forward step's own
    way of reading a batch.
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
