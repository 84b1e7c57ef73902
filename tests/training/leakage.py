"""Forward one pack twice, one document changed in between; print what became of the others.

Run as a script: the CPU platform must be there before Megatron is imported.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from types import SimpleNamespace

from megatron_meco.training.cpu import enable_cpu_platform

enable_cpu_platform()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_meco.training.attention import packed_local_layer_spec  # noqa: E402


def make_model(vocab_size: int, length: int) -> GPTModel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        use_cpu_initialization=True,
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
    return GPTModel(
        config,
        packed_local_layer_spec(SimpleNamespace(transformer=config)),
        vocab_size,
        length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def main() -> None:
    length, bounds = 48, [0, 13, 14, 30, 48]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    model = make_model(100, length).eval()
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    packed = sys.argv[2] == "packed"
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=length,
        max_seqlen_kv=length,
    )
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])
    tokens = torch.randint(0, 100, (1, length))

    def logits(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(
                batch, positions[None], None, packed_seq_params=params if packed else None
            )[0]

    before = logits(tokens)
    report = []
    for begin, end in pairwise(bounds):
        changed = tokens.clone()
        changed[0, begin:end] = (changed[0, begin:end] + 7) % 100
        same = (logits(changed) == before).all(dim=-1)
        others = torch.ones(length, dtype=torch.bool)
        others[begin:end] = False
        report.append(
            {
                "others_identical": bool(same[others].all()),
                "own_changed": bool((~same[begin:end]).all()),
            }
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
