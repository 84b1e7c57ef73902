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

from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_meco.training.attention import packed_local_layer_spec  # noqa: E402


def main() -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=2,
        hidden_size=256,
        ffn_hidden_size=512,
        num_attention_heads=4,
        num_query_groups=2,
        init_model_with_meta_device=True,
        perform_initialization=False,
        params_dtype=torch.bfloat16,
        bf16=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )
    specs = {
        "transformer_engine": get_gpt_layer_with_transformer_engine_spec(),
        "local": packed_local_layer_spec(SimpleNamespace(transformer=config)),
    }
    report = {}
    for name, spec in specs.items():
        with torch.device("meta"):
            model = GPTModel(
                config,
                spec,
                128,
                256,
                position_embedding_type="rope",
                share_embeddings_and_output_weights=False,
            )
            held = model.sharded_state_dict().values()
        report[name] = {
            "tensors": {x.key: list(x.global_shape) for x in held if isinstance(x, ShardedTensor)},
            "state": sorted(x.unique_key for x in held if isinstance(x, ShardedObject)),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
