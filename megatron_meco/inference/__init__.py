"""From a checkpoint to use: export to Hugging Face and back, generation, evaluation, steering.

`checkpoint` reads Megatron's torch_dist folders, `llama` maps their tensors to Hugging Face names,
`export` writes the folder with its `model_card`, `import_hf` goes the other way. `conditioning`
renders a prefix for one prompt and `generate` continues it; `harness` puts it into the requests of
lm-evaluation-harness, which `evaluate` (as `eval_command`) compares and `sweep` searches with;
`steer` scores free `samples`. Nothing here needs a GPU, a launch or an import of Megatron.
"""
