"""The example's training, and afterwards Megatron's own logits of a few fixed tokens.

    torchrun ... logits_pretrain.py --logits-to FILE <flags of examples/pretrain_gpt.py>

The file is written in the validation after the last step, when the model holds exactly what the
last checkpoint will hold. With tensor parallelism the vocabulary is gathered.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_meco.training.arguments import parse_and_validate_args

NUM_TOKENS = 48


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--logits-to", required=True)
    return parser


def main() -> None:
    args = parse_and_validate_args(add_arguments)

    import torch
    from megatron.core import mpu
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_meco.training.model_builders import run_pretraining
    from megatron_meco.training.provider import forward_step, train_valid_test_datasets_provider

    @torch.no_grad()
    def write_logits(model: Any) -> None:
        tokens = torch.arange(NUM_TOKENS).mul(37).remainder(250)[None]
        bounds = torch.tensor([0, NUM_TOKENS], dtype=torch.int32)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=NUM_TOKENS,
            max_seqlen_kv=NUM_TOKENS,
        )
        positions = torch.arange(NUM_TOKENS)[None]
        logits = model(tokens, positions, None, packed_seq_params=packed)
        logits = gather_from_tensor_model_parallel_region(logits)
        if torch.distributed.get_rank() == 0:
            torch.save({"tokens": tokens, "logits": logits}, args.logits_to)

    written = []

    def step(data_iterator: Any, model: Any) -> Any:
        last = args.curr_iteration >= args.train_iters - 1 and not model.training
        if last and not written and mpu.get_pipeline_model_parallel_world_size() == 1:
            written.append(True)
            write_logits(model)
        return forward_step(data_iterator, model)

    run_pretraining(args, train_valid_test_datasets_provider, step)


if __name__ == "__main__":
    main()
