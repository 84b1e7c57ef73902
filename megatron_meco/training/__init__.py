"""MeCo inside Megatron's own trainer.

`arguments` reads and checks the flags, `provider` gives `pretrain()` its datasets and its training
step, `stock` does the same without `--meco`, `phase_switch` announces and checks the switch,
`attention` replaces Transformer Engine and `cpu` a GPU where they are missing, `kernels` names the
kernels of a run, and `megatron_patches` has everything that is changed in Megatron.
"""
