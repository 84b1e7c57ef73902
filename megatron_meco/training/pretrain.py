"""The training script that `meco train` starts: GPT or Llama pre-training with Megatron-Core.

    torchrun --nproc-per-node 8 --module megatron_meco.training.pretrain <Megatron's flags> --meco

`examples/pretrain_gpt.py` is the same as a script.
"""

import os
import warnings

# Threads of a CPU run that wait for one another sleep. By default they spin, which makes a step up
# to 60 times as long where other programs use the cores too. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Megatron's fall-backs, one line for each import and rank; `meco doctor` says what is installed.
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|apex).*")
warnings.filterwarnings("ignore", category=SyntaxWarning)

from megatron_meco.training.arguments import parse_and_validate_args  # noqa: E402


def main() -> None:
    """Parse, check, train."""
    # First of all: it makes a CPU-only host ready before Megatron is imported.
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})

    from megatron_meco.training.model_builders import run_pretraining
    from megatron_meco.training.provider import forward_step, train_valid_test_datasets_provider

    run_pretraining(args, train_valid_test_datasets_provider, forward_step)


if __name__ == "__main__":
    main()
