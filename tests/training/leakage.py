"""Forward one pack twice, one document changed in between; print what became of the others.

Run as a script, on a GPU in bf16 where there is one: `leakage.py RENDEZVOUS MODE LAYERS`. The CPU
platform must be there before Megatron is imported. Modes: `packed`; `causal`, the same without
documents; `rotary`, which compares our RoPE with Megatron's.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from megatron_meco.training.cpu import enable_cpu_platform, should_use_cpu

ON_CPU = should_use_cpu()
if ON_CPU:
    enable_cpu_platform()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.attention import SelfAttention  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_meco.training.attention import packed_local_layer_spec  # noqa: E402

LENGTH, BOUNDS, VOCAB_SIZE = 48, [0, 13, 14, 30, 48], 100


def make_model(layers: str) -> GPTModel:
    """`layers`: local, transformer_engine, or local with Megatron's own RoPE: stock-rope."""
    # Heads of 64: flash kernels have no smaller ones in every version.
    config = TransformerConfig(
        num_layers=2,
        hidden_size=256,
        ffn_hidden_size=512,
        num_attention_heads=4,
        num_query_groups=2,
        use_cpu_initialization=True,
        bf16=not ON_CPU,
        params_dtype=torch.float32 if ON_CPU else torch.bfloat16,
        gradient_accumulation_fusion=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
    if layers == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = packed_local_layer_spec(SimpleNamespace(transformer=config))
    if layers == "stock-rope":
        spec.layer_specs[0].submodules.self_attention.module = SelfAttention
    torch.manual_seed(1)
    model = GPTModel(
        config,
        spec,
        VOCAB_SIZE,
        LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    model = model.cuda().eval()
    # As Megatron's Float16Module does to a model that it trains.
    return model if ON_CPU else model.bfloat16()


def parameters(longest: int = LENGTH) -> PackedSeqParams:
    """The documents; `longest` decides how many positions Megatron's table of angles has."""
    # An empty document at the end, as the fixed length of cu_seqlens brings.
    cu_seqlens = torch.tensor([*BOUNDS, BOUNDS[-1]], dtype=torch.int32, device="cuda")
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def logits_of(model: GPTModel, tokens: torch.Tensor, params: PackedSeqParams | None) -> Any:
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(BOUNDS)]).cuda()
    with torch.no_grad():
        return model(tokens, positions[None], None, packed_seq_params=params)[0]


def compare_rotary(tokens: torch.Tensor) -> dict[str, bool]:
    """Our RoPE and Megatron's, which restarts where its table is longer than the pack."""
    ours = logits_of(make_model("local"), tokens, parameters())
    stock = logits_of(make_model("stock-rope"), tokens, parameters(LENGTH + 1))
    return {"equal": bool((ours == stock).all())}


def change_documents(
    model: GPTModel, tokens: torch.Tensor, params: PackedSeqParams | None
) -> list[dict[str, bool]]:
    before = logits_of(model, tokens, params)
    report = []
    for begin, end in pairwise(BOUNDS):
        changed = tokens.clone()
        changed[0, begin:end] = (changed[0, begin:end] + 7) % VOCAB_SIZE
        same = (logits_of(model, changed, params) == before).all(dim=-1)
        others = torch.ones(LENGTH, dtype=torch.bool, device=same.device)
        others[begin:end] = False
        report.append(
            {
                "others_identical": bool(same[others].all()),
                "own_changed": bool((~same[begin:end]).all()),
            }
        )
    return report


def main() -> None:
    rendezvous, mode, layers = sys.argv[1:]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    tokens = torch.randint(0, VOCAB_SIZE, (1, LENGTH)).cuda()
    if mode == "rotary":
        report: Any = compare_rotary(tokens)
    else:
        params = parameters() if mode == "packed" else None
        report = change_documents(make_model(layers), tokens, params)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
