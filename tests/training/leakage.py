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
from megatron.core import parallel_state  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402

LENGTH, BOUNDS, VOCAB_SIZE = 48, [0, 13, 14, 30, 48], 100


# What makes a model other than a plain Llama.
KINDS: dict[str, dict[str, Any]] = {
    "qk-norm": {"qk_layernorm": True},
    "qk-l2-norm": {"qk_l2_norm": True},
    "layer-norm, biases": {"normalization": "LayerNorm", "add_bias_linear": True},
    "tied embeddings": {"tied": True},
    "no positions": {"positions": "none"},
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


def logits_of(model: Any, tokens: torch.Tensor, params: PackedSeqParams | None) -> Any:
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(BOUNDS)]).cuda()
    with torch.no_grad():
        return model(tokens, positions[None], None, packed_seq_params=params)[0]


def compare_rotary(tokens: torch.Tensor) -> dict[str, bool]:
    """Our RoPE and Megatron's, which restarts where its table is longer than the pack."""
    ours = logits_of(make_model("local"), tokens, parameters())
    stock = logits_of(make_model("stock-rope"), tokens, parameters(LENGTH + 1))
    return {"equal": bool((ours == stock).all())}


def change_documents(
    model: Any, tokens: torch.Tensor, params: PackedSeqParams | None
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
    report: Any
    if mode == "rotary":
        report = compare_rotary(tokens)
    elif mode == "kinds":
        report = {
            kind: change_documents(make_model(layers, **changes), tokens, parameters())
            for kind, changes in KINDS.items()
        }
    else:
        params = parameters() if mode == "packed" else None
        report = change_documents(make_model(layers), tokens, params)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
