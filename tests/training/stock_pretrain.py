"""A pre-training script on stock Megatron alone: GPTDataset, its batch functions, its loss.

Only the CPU platform and the packed attention come from the package. The example script without
`--meco` must give the same losses as this one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_meco.training.attention import PACKED_LOCAL_SPEC
from megatron_meco.training.cpu import CPU_DEFAULTS, enable_cpu_platform

enable_cpu_platform()

import torch  # noqa: E402
from megatron.core import mpu  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: E402
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer  # noqa: E402
from megatron.core.utils import flatten_batch_for_packed_sequences  # noqa: E402
from megatron.training import get_args, pretrain  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402


def datasets_provider(sizes: Any, vp_stage: int | None = None) -> Any:
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=(args.data_path, None),
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        inter_document_masking=args.dataloader_inter_document_masking,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor) -> Any:
    mask = loss_mask.view(-1).float()
    loss = (output.view(-1).float() * mask).sum()
    tokens = mask.sum().to(torch.int)
    report = torch.cat([loss.detach().view(1), tokens.view(1)])
    return loss, tokens, {"lm loss": report}


def forward_step(data_iterator: Any, model: Any) -> Any:
    assert mpu.get_tensor_model_parallel_world_size() == 1
    batch = next(data_iterator)
    params = None
    if "cu_seqlens" in batch:
        batch = flatten_batch_for_packed_sequences(batch)
        bounds = batch["cu_seqlens"].squeeze(0)
        longest = int(batch["max_seqlen"].max())
        params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        packed_seq_params=params,
    )
    return output, partial(loss_func, batch["loss_mask"])


def main() -> None:
    datasets_provider.is_distributed = True  # type: ignore[attr-defined]

    def provider(parser: Any) -> Any:
        parser.set_defaults(**CPU_DEFAULTS, create_attention_mask_in_dataloader=False)
        return parser

    args = parse_and_validate_args(provider)
    args.spec = PACKED_LOCAL_SPEC if args.dataloader_inter_document_masking else None
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
