"""A model on context-parallel ranks against the same model on one; rank 0 prints the comparison.

Run under torchrun with LAYERS: in float64, or on a GPU for each rank in bf16. Every rank also
computes the whole pack by a model without context parallelism. What is compared: logits of the
rank's tokens, gradients summed over ranks, and whether one document changed leaves all others
bit-identical.
"""

from __future__ import annotations

import json
import os
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

from megatron_meco.training.context_parallel import places_by_rank  # noqa: E402

VOCAB_SIZE, LENGTH = 100, 64
DTYPE = torch.float64 if ON_CPU else torch.bfloat16


def make_model(layers: str, size: int) -> Any:
    torch.manual_seed(1)
    model = tiny_llama.make_model(
        layers,
        vocab_size=VOCAB_SIZE,
        length=LENGTH,
        use_cpu_initialization=True,
        context_parallel_size=size,
        **({} if ON_CPU else {"bf16": True, "params_dtype": DTYPE}),
    )
    return model.cuda().to(DTYPE)


def logits_of(
    model: Any, tokens: torch.Tensor, cu_seqlens: torch.Tensor, places: torch.Tensor
) -> Any:
    size = model.config.context_parallel_size
    of_ranks = {
        "cu_seqlens_q_padded": cu_seqlens,
        "cu_seqlens_kv_padded": cu_seqlens,
        "pad_between_seqs": False,
    }
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        # More than the pack has: Megatron's own RoPE would count on through it.
        max_seqlen_q=LENGTH + 2 * size,
        max_seqlen_kv=LENGTH + 2 * size,
        **(of_ranks if size > 1 else {}),
    )
    # RoPE takes its positions from the borders.
    return model(tokens[:, places], places[None], None, packed_seq_params=packed)[0]


def gradients_of(model: Any, logits: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    (logits * weights).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def main() -> None:
    if not ON_CPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("gloo" if ON_CPU else "nccl")
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    model_parallel_cuda_manual_seed(1)
    chunk = 2 * size
    bounds = [chunk * n for n in (0, 1, 4, 5, 8, 8)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    torch.manual_seed(1)
    tokens = torch.randint(0, VOCAB_SIZE, (1, bounds[-1])).cuda()
    weights = torch.randn(bounds[-1], VOCAB_SIZE).to(DTYPE).cuda()
    everywhere = torch.arange(bounds[-1], device="cuda")
    here = places_by_rank(cu_seqlens, bounds[-1], size)[rank]
    one, many = (make_model(sys.argv[1], ranks) for ranks in (1, size))
    expected = logits_of(one, tokens, cu_seqlens, everywhere)
    found = logits_of(many, tokens, cu_seqlens, here)
    worst = [(found - expected[here]).abs().max() / expected.abs().max()]
    gradients = gradients_of(many, found, weights[here])
    for gradient, of_one in zip(gradients, gradients_of(one, expected, weights), strict=True):
        torch.distributed.all_reduce(gradient)
        worst.append((gradient - of_one).abs().max() / of_one.abs().max())
    identical = True
    for begin, end in pairwise(bounds[:-1]):
        changed = tokens.clone()
        changed[0, begin:end] = (changed[0, begin:end] + 7) % VOCAB_SIZE
        same = (logits_of(many, changed, cu_seqlens, here) == found).all(dim=-1)
        own = (here >= begin) & (here < end)
        identical &= bool(same[~own].all()) and not bool(same[own].any())
    reports: list[Any] = [None] * size
    torch.distributed.all_gather_object(
        reports, {"logits": float(worst[0]), "gradients": float(max(worst[1:])), "apart": identical}
    )
    if rank == 0:
        print(json.dumps(reports))


if __name__ == "__main__":
    main()
