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
from apart import change_documents, documents, start  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402
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
    borders = documents(BOUNDS)
    if mode == "borders":
        return borders
    args = Namespace(
        seq_length=LENGTH,
        micro_batch_size=1,
        transformer_impl="local",
        apply_rope_fusion=False,
        hybrid_layer_pattern="M",
        sequence_parallel=False,
    )
    return provider.packed_seq_params(args, borders.cu_seqlens_q, training=True)


def main() -> None:
    rendezvous, mode = sys.argv[1:]
    start(rendezvous)
    provider.update_seqlen_stats_from_cu_seqlens = lambda _: None  # wants a run's arguments
    mixer = make_mixer()
    hidden = torch.randn(LENGTH, 1, 16)
    params = parameters(mode)

    def output(states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return mixer(states, packed_seq_params=params)[0].squeeze(1)

    rows = change_documents(output, hidden, BOUNDS, lambda states: states + 1.0)
    together = output(hidden)
    # Each document by itself.
    alone = []
    for begin, end in pairwise(BOUNDS):
        bounds = torch.tensor([0, end - begin], dtype=torch.int32)
        params = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, total_tokens=end - begin
        )
        alone.append(output(hidden[begin:end]))
    difference = float((torch.cat(alone) - together).abs().max())
    print(json.dumps({"documents": rows, "difference_to_documents_alone": difference}))


if __name__ == "__main__":
    main()
