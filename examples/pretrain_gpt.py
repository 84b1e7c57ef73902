"""Pre-train a GPT or Llama model with Megatron-Core, with or without MeCo.

    torchrun --nproc-per-node 8 examples/pretrain_gpt.py <Megatron's flags> --meco

Without `--meco` this is stock Megatron GPT pre-training. On a host without a GPU it trains on the
CPU over Gloo, with the same flags apart from those that a CPU cannot have. What it does is in
`megatron_meco/training/pretrain.py`, which `meco train` starts as well.
"""

from megatron_meco.training.pretrain import main

if __name__ == "__main__":
    main()
