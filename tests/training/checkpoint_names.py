"""Print what checkpoints of both kinds of layers hold, as JSON: tensors, and other state.

Models are built on the meta device, so this needs Transformer Engine and no GPU: its modules want
to be told of one and then compute nothing. Run as a script: `checkpoint_names.py RENDEZVOUS`.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch

torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: torch.device("meta")
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
    name="", major=9, minor=0, multi_processor_count=1, total_memory=0
)

import tiny_llama  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor  # noqa: E402


def main() -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    report = {}
    for name in ("transformer_engine", "local"):
        with torch.device("meta"):
            model = tiny_llama.make_model(
                name,
                vocab_size=128,
                length=256,
                init_model_with_meta_device=True,
                perform_initialization=False,
                params_dtype=torch.bfloat16,
                bf16=True,
            )
            held = model.sharded_state_dict().values()
        report[name] = {
            "tensors": {x.key: list(x.global_shape) for x in held if isinstance(x, ShardedTensor)},
            "state": sorted(x.unique_key for x in held if isinstance(x, ShardedObject)),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
