"""Pre-train a GPT or Llama model with Megatron-Core, with or without MeCo.

    torchrun --nproc-per-node 8 examples/pretrain_gpt.py <Megatron's flags> --meco

Without `--meco` this is stock Megatron GPT pre-training. On a host without a GPU it trains on the
CPU over Gloo, with the same flags apart from those that a CPU cannot have.
"""

import warnings

# Megatron's fall-backs, one line for each import and rank; `meco doctor` says what is installed.
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|apex).*")
warnings.filterwarnings("ignore", category=SyntaxWarning)

from megatron_meco.training.arguments import parse_and_validate_args  # noqa: E402


def main() -> None:
    """Parse, check, train."""
    # First of all: it makes a CPU-only host ready before Megatron is imported.
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})

    from megatron_meco.training.pretraining import run_pretraining
    from megatron_meco.training.provider import forward_step, train_valid_test_datasets_provider

    run_pretraining(args, train_valid_test_datasets_provider, forward_step)


if __name__ == "__main__":
    main()
