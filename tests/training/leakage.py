"""Forward one pack twice, one document changed in between; print what became of the others.

Run as a script, on a GPU in bf16 where there is one: `leakage.py RENDEZVOUS MODE LAYERS`. The CPU
platform must be there before Megatron is imported. Modes: `packed`; `causal`, the same without
documents; `rotary`, which compares our RoPE with Megatron's; `kinds`, `packed` for each of KINDS.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from typing import Any

from megatron_meco.training.cpu import enable_cpu_platform, should_use_cpu

ON_CPU = should_use_cpu()
if ON_CPU:
    enable_cpu_platform()

import tiny_llama  # noqa: E402
import torch  # noqa: E402
from apart import (  # noqa: E402
    change_documents,
    documents,
    one_by_one,
    other_ids,
    positions_of,
    start,
)
from megatron.core.activations import squared_relu  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402

LENGTH, BOUNDS, VOCAB_SIZE = 48, [0, 13, 14, 30, 48], 100


# What makes a model other than a plain Llama.
KINDS: dict[str, dict[str, Any]] = {
    "qk-norm": {"qk_layernorm": True},
    "qk-l2-norm": {"qk_l2_norm": True},
    "layer-norm, biases": {"normalization": "LayerNorm", "add_bias_linear": True},
    "tied embeddings": {"tied": True},
    "no positions": {"positions": "none"},
    "no positions in every second layer": {"no_rope_freq": [0, 1]},
    "sliding window": {"window_size": (5, 0)},
    "sliding window in every second layer": {"window_size": (5, 0), "window_attn_skip_freq": 2},
    "latent attention": {"multi_latent_attention": True},
    "latent attention, yarn, compressed queries": {
        "multi_latent_attention": True,
        "q_lora_rank": 32,
        "qk_layernorm": True,
        "rope_type": "yarn",
        "rotary_scaling_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    # As Gemma, Nemotron and DeepSeek have it.
    "gelu, gated, large heads": {
        "activation_func": torch.nn.functional.gelu,
        "num_query_groups": 1,
        "kv_channels": 128,
        "tied": True,
        "window_size": (8, 0),
        "window_attn_skip_freq": [1, 0],
    },
    "squared relu, partial rotation": {
        "gated_linear_unit": False,
        "activation_func": squared_relu,
        "normalization": "LayerNorm",
        "rotary_percent": 0.5,
    },
    "experts, latent attention": {
        "multi_latent_attention": True,
        "num_moe_experts": 4,
        "moe_layer_freq": [0, 1],
        "moe_router_load_balancing_type": "none",
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 64,
    },
    "yarn": {
        "positions": "yarn",
        "yarn_rotary_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 16,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_mscale": 1.0,
        "yarn_mscale_all_dim": 0.5,
        "yarn_correction_range_round_to_int": True,
    },
}


def make_model(layers: str, **changes: Any) -> Any:
    precision = {} if ON_CPU else {"bf16": True, "params_dtype": torch.bfloat16}
    torch.manual_seed(1)
    model = tiny_llama.make_model(
        layers,
        vocab_size=VOCAB_SIZE,
        length=LENGTH,
        use_cpu_initialization=True,
        **precision,
        **changes,
    )
    model = model.cuda().eval()
    one_by_one(model)
    # As Megatron's Float16Module does to a model that it trains.
    return model if ON_CPU else model.bfloat16()


def parameters(longest: int = LENGTH) -> PackedSeqParams:
    """The documents; `longest` decides how many positions Megatron's table of angles has."""
    return documents(BOUNDS, longest, "cuda")


def logits_of(model: Any, tokens: torch.Tensor, params: PackedSeqParams | None) -> Any:
    with torch.no_grad():
        return model(tokens[None], positions_of(BOUNDS).cuda(), None, packed_seq_params=params)[0]


def compare_rotary(tokens: torch.Tensor) -> dict[str, bool]:
    """Our RoPE and Megatron's, which restarts where its table is longer than the pack."""
    ours = logits_of(make_model("local"), tokens, parameters())
    stock = logits_of(make_model("stock-rope"), tokens, parameters(LENGTH + 1))
    return {"equal": bool((ours == stock).all())}


def change_each(
    model: Any, tokens: torch.Tensor, params: PackedSeqParams | None
) -> list[dict[str, bool]]:
    def logits(ids: torch.Tensor) -> torch.Tensor:
        return logits_of(model, ids, params)

    return change_documents(logits, tokens, BOUNDS, other_ids(VOCAB_SIZE))


def from_alone(model: Any, tokens: torch.Tensor) -> float:
    """Largest difference of a logit from that of its document as a batch that is not packed."""
    # One more than the pack: what the training step says where Megatron's own RoPE is used.
    packed = logits_of(model, tokens, parameters(LENGTH + 1))
    alone = []
    for begin, end in pairwise(BOUNDS):
        positions = torch.arange(end - begin)[None].cuda()
        with torch.no_grad():
            alone.append(model(tokens[None, begin:end], positions, None)[0])
    return float((packed - torch.cat(alone)).abs().max())


def main() -> None:
    rendezvous, mode, layers = sys.argv[1:]
    start(rendezvous)
    tokens = torch.randint(0, VOCAB_SIZE, (LENGTH,)).cuda()
    report: Any
    if mode == "rotary":
        report = compare_rotary(tokens)
    elif mode == "kinds":
        report = {}
        for kind, changes in KINDS.items():
            model = make_model(layers, **changes)
            rows = change_each(model, tokens, parameters())
            report[kind] = {"documents": rows, "difference": from_alone(model, tokens)}
    else:
        params = parameters() if mode == "packed" else None
        report = change_each(make_model(layers), tokens, params)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
