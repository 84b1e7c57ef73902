"""From a checkpoint to use: export to Hugging Face and back, generation, evaluation, steering.

`checkpoint` reads Megatron's torch_dist folders, `llama` maps their tensors to Hugging Face names,
`export` writes the folder with its `model_card`, and `import_hf` is the inverse. `conditioning`
renders a prefix for a prompt and `model` loads an exported folder; `generate` continues prompts
with it. `harness_model` puts the prefix into the requests of lm-evaluation-harness, whose tasks
(`harness_tasks`) `eval_command` compares (`eval_pairs`, `paired`) and `sweep` searches with.
`likelihood` scores texts for `sweep` and `attribute`. `steer` scores free `samples`.
Nothing here needs a GPU, a launcher or Megatron.
"""
