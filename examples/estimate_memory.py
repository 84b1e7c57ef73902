"""Estimate what a GPU has to hold for a Megatron command line, without starting anything.

    python examples/estimate_memory.py --gpus 8 --vocab-size 128256 -- <Megatron's and MeCo's flags>

The figures are Megatron's own: `compute_weight_and_optimizer_memory` and
`compute_activation_memory` of megatron.training.theoretical_memory_usage, called on the parsed
flags (so an unknown flag is an error here already). Of its two formulas for activations the one for
sequence parallelism is taken at any layout: with one tensor-parallel rank the two cases are the
same, and the other formula knows neither the width of the MLP nor the float32 logits. Costs the
import of Megatron, a few seconds.

What was given up: the CUDA context, NCCL's buffers, fragmentation, workspaces and FP8 copies are
not in the figures (leave several GiB free), and `--recompute-*` is not accounted for.
"""

import argparse
import os
import sys
import warnings
from dataclasses import dataclass

warnings.filterwarnings("ignore")

GIB = 1024**3


@dataclass(frozen=True)
class Estimate:
    """What one GPU holds, on the fullest pipeline stage.

    Attributes:
        parameters: Of the whole model, padding of the vocabulary included.
        state_bytes: Weights, gradients and optimizer state.
        activation_bytes: Activations of the micro-batches in flight.
    """

    parameters: int
    state_bytes: float
    activation_bytes: float

    def describe(self, gpus: int) -> str:
        """The estimate in one line."""
        total = self.state_bytes + self.activation_bytes
        return (
            f"> {self.parameters / 1e6:,.0f}M parameters on {gpus} GPUs; estimated for each: "
            f"weights, gradients, optimizer {self.state_bytes / GIB:.1f} GiB + "
            f"activations {self.activation_bytes / GIB:.1f} GiB = {total / GIB:.1f} GiB "
            "(Megatron's theoretical figures, without CUDA context, NCCL, fragmentation)"
        )


def estimate(gpus: int, vocab_size: int, flags: list[str]) -> Estimate:
    """Parse the flags as a run would, and apply Megatron's formulas.

    Args:
        gpus: Number of ranks.
        vocab_size: Tokens of the tokenizer, before padding.
        flags: What would be given to the training script.
    """
    # First: it keeps PyTorch quiet about a CUDA toolkit without a GPU.
    from megatron_meco.training.arguments import add_arguments  # isort: skip

    from megatron.training.arguments import parse_args
    from megatron.training.theoretical_memory_usage import (
        compute_activation_memory,
        compute_weight_and_optimizer_memory,
    )

    sys.argv = ["pretrain_gpt.py", *flags]
    args = parse_args(lambda parser: add_arguments(parser, on_cpu=False))
    # What Megatron's validation and its tokenizer would fill in; both want the real thing.
    model_ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    # Context-parallel ranks share the optimizer's state as data-parallel ones do, and the tokens of
    # a micro-batch; Megatron's formulas know neither.
    args.world_size, args.data_parallel_size = gpus, gpus // model_ranks
    context_ranks = args.context_parallel_size
    args.seq_length //= context_ranks
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    virtual = args.num_virtual_stages_per_pipeline_rank
    if args.num_layers_per_virtual_pipeline_stage:
        per_stage = args.num_layers // args.pipeline_model_parallel_size
        virtual = per_stage // args.num_layers_per_virtual_pipeline_stage
    args.virtual_pipeline_model_parallel_size = virtual
    # Of experts there are none; Megatron's validation fills it in all the same.
    args.expert_tensor_parallel_size = args.tensor_model_parallel_size
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    args.padded_vocab_size = -(-vocab_size // multiple) * multiple
    samples = args.micro_batch_size * args.data_parallel_size // context_ranks
    num_microbatches = args.global_batch_size // samples
    whole = argparse.Namespace(**vars(args))
    whole.tensor_model_parallel_size = whole.pipeline_model_parallel_size = 1
    whole.use_distributed_optimizer = False
    return Estimate(
        # 18 bytes for each parameter where nothing is split.
        parameters=round(compute_weight_and_optimizer_memory(whole) / 18),
        state_bytes=compute_weight_and_optimizer_memory(args),
        activation_bytes=compute_activation_memory(args, num_microbatches),
    )


def main() -> None:
    """Parse, estimate, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpus", type=int, required=True, help="number of ranks")
    parser.add_argument("--vocab-size", type=int, required=True, help="tokens of the tokenizer")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="after --: the run's flags")
    options = parser.parse_args()
    flags = options.flags[1:] if options.flags[:1] == ["--"] else options.flags
    print(estimate(options.gpus, options.vocab_size, flags).describe(options.gpus))


if __name__ == "__main__":
    # Megatron reads it while it parses.
    os.environ.setdefault("WORLD_SIZE", "1")
    main()
