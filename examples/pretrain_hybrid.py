"""Pre-train a hybrid of attention and Mamba layers with Megatron-Core, with or without MeCo.

    torchrun --nproc-per-node 8 examples/pretrain_hybrid.py \
        --hybrid-layer-pattern 'M-M*-M-M*-' <Megatron's flags> --meco

Mamba layers need the packages mamba_ssm and causal_conv1d, and those need a GPU. Everything else is
as in `examples/pretrain_gpt.py`, which takes the same flag.
"""

from megatron_meco.training.pretrain import main

if __name__ == "__main__":
    main()
