"""MeCo inside Megatron's own trainer.

`arguments` reads and checks the flags, `provider` gives `pretrain()` its datasets and its training
step, `stock` does the same without `--meco`, `phase_switch` announces and checks the switch,
`attention` and `cpu` stand in for what a host without Transformer Engine or without a GPU lacks,
`kernels` says which kernels a run uses, `megatron_patches` holds all that is changed in Megatron.
"""
