"""Forward a GPT model over a packed batch on a CUDA device that is not there.

PyTorch's fake tensors have a device, a dtype and a shape, and no values: whatever looks at a value
on the device, as a wait for the device does, fails by name. Run as a script, because Megatron must
see the same pretence from its import on; prints JSON. Kernels are not run, so numbers are not
checked here.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

torch.cuda.current_device = lambda: torch.device("cuda", 0)

import tiny_llama  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402

from megatron_meco.training import attention  # noqa: E402

LENGTH, VOCAB_SIZE = 256, 128


def count_kernels() -> list[Any]:
    """Have the shapes that reach PyTorch's varlen kernel written down."""
    calls: list[Any] = []
    kernel = attention.varlen_attn

    def recorded(q: Any, k: Any, v: Any, bounds: Any, *rest: Any, **options: Any) -> Any:
        calls.append(
            {
                "q": [*q.shape],
                "k": [*k.shape],
                "bounds": [*bounds.shape],
                "device": q.device.type,
                "dtype": str(q.dtype),
            }
        )
        return kernel(q, k, v, bounds, *rest, **options)

    attention.varlen_attn = recorded
    return calls


def main() -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    calls = count_kernels()
    report: dict[str, Any] = {}
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        model = tiny_llama.make_model(
            sys.argv[2],
            vocab_size=VOCAB_SIZE,
            length=LENGTH,
            # What the test knows of shapes.
            hidden_size=64,
            use_cpu_initialization=True,
            params_dtype=torch.bfloat16,
            bf16=True,
        )
        bounds = torch.zeros(12, dtype=torch.int32)
        params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=LENGTH,
            max_seqlen_kv=LENGTH,
        )
        tokens = torch.zeros((1, LENGTH), dtype=torch.int64)
        try:
            logits = model(tokens, tokens, None, packed_seq_params=params)
            report = {"logits": [*logits.shape], "device": logits.device.type}
        except DataDependentOutputException as error:
            report = {"looked_at": str(error.func)}
    print(json.dumps({**report, "attention": calls}))


if __name__ == "__main__":
    main()
