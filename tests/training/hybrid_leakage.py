"""Forward a pack through a HybridModel twice, one document changed in between.

Run as a script: `hybrid_leakage.py RENDEZVOUS PATTERN MODE`. Modes: `meco`, with the parameters of
MeCo's training step; `borders`, with the attention's document borders alone. The layers are
Megatron's, the stack is MeCo's for hosts without Transformer Engine, the scan is the reference.
"""

from __future__ import annotations

import json
import sys

from megatron_meco.training.cpu import enable_cpu_platform

enable_cpu_platform()

import reference_delta_net  # noqa: E402
import reference_mamba  # noqa: E402

reference_mamba.install()
reference_delta_net.install()

import mamba_leakage  # noqa: E402
import torch  # noqa: E402
from apart import change_documents, one_by_one, other_ids, positions_of, start  # noqa: E402
from mamba_leakage import BOUNDS, LENGTH, parameters  # noqa: E402
from megatron.core.models.hybrid.hybrid_model import HybridModel  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_meco.training.hybrid_layers import packed_local_hybrid_spec  # noqa: E402

VOCAB_SIZE = 100


def make_model(pattern: str) -> HybridModel:
    config = TransformerConfig(
        num_layers=len(pattern),
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        mamba_state_dim=8,
        mamba_head_dim=8,
        mamba_num_groups=2,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        apply_rope_fusion=False,
        use_cpu_initialization=True,
        # Gated delta nets have no other activation.
        activation_func=torch.nn.functional.silu,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_moe_experts=4 if "E" in pattern else None,
        moe_router_load_balancing_type="none",
    )
    return HybridModel(
        config,
        packed_local_hybrid_spec,
        VOCAB_SIZE,
        LENGTH,
        hybrid_layer_pattern=pattern,
        position_embedding_type="rope",
    ).eval()


def main() -> None:
    rendezvous, pattern, mode = sys.argv[1:]
    start(rendezvous)
    mamba_leakage.provider.update_seqlen_stats_from_cu_seqlens = lambda _: None
    model = make_model(pattern)
    one_by_one(model)
    tokens = torch.randint(0, VOCAB_SIZE, (LENGTH,))

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids[None], positions_of(BOUNDS), None, packed_seq_params=parameters(mode))[
                0
            ]

    rows = change_documents(logits, tokens, BOUNDS, other_ids(VOCAB_SIZE))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
