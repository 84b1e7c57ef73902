"""Forward a pack through Megatron's Mamba mixer twice, one document changed in between.

Run as a script: `mamba_leakage.py RENDEZVOUS MODE`. Modes: `meco`, with the parameters of MeCo's
training step; `borders`, with the attention's document borders alone.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from itertools import pairwise

from megatron_meco.training.cpu import enable_cpu_platform

enable_cpu_platform()

import reference_mamba  # noqa: E402

reference_mamba.install()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_meco.training import provider  # noqa: E402

LENGTH, BOUNDS = 24, [0, 7, 8, 15, 24]


def make_mixer() -> MambaMixer:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        mamba_state_dim=8,
        mamba_head_dim=8,
        mamba_num_groups=2,
        add_bias_linear=False,
        use_cpu_initialization=True,
    )
    return MambaMixer(
        config,
        MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
        d_model=16,
        layer_number=1,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def parameters(mode: str) -> PackedSeqParams:
    cu_seqlens = torch.tensor([*BOUNDS, BOUNDS[-1]], dtype=torch.int32)
    if mode == "borders":
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=LENGTH,
            max_seqlen_kv=LENGTH,
        )
    args = Namespace(
        seq_length=LENGTH,
        micro_batch_size=1,
        transformer_impl="local",
        apply_rope_fusion=False,
        hybrid_layer_pattern="M",
    )
    return provider.packed_seq_params(args, cu_seqlens, training=True)


def main() -> None:
    rendezvous, mode = sys.argv[1:]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    provider.update_seqlen_stats_from_cu_seqlens = lambda _: None  # wants a run's arguments
    mixer = make_mixer()
    hidden = torch.randn(LENGTH, 1, 16)
    params = parameters(mode)

    def output(states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return mixer(states, packed_seq_params=params)[0]

    before = output(hidden)
    rows = []
    for begin, end in pairwise(BOUNDS):
        changed = hidden.clone()
        changed[begin:end] += 1.0
        same = (output(changed) == before).all(dim=-1).flatten()
        inside = torch.zeros(LENGTH, dtype=torch.bool)
        inside[begin:end] = True
        rows.append(
            {
                "others_identical": bool(same[~inside].all()),
                "own_changed": bool((~same[inside]).all()),
            }
        )
    # Each document by itself.
    alone = []
    for begin, end in pairwise(BOUNDS):
        bounds = torch.tensor([0, end - begin], dtype=torch.int32)
        params = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, total_tokens=end - begin
        )
        alone.append(output(hidden[begin:end]))
    difference = float((torch.cat(alone) - before).abs().max())
    print(json.dumps({"documents": rows, "difference_to_documents_alone": difference}))


if __name__ == "__main__":
    main()
