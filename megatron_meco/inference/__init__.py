"""From a checkpoint to use: export to Hugging Face, generation with and without a prefix.

`checkpoint` reads Megatron's torch_dist folders, `llama` maps their tensors to Hugging Face names,
`export` writes the folder with its `model_card`; `conditioning` renders a prefix for one prompt and
`generate` continues it. Nothing here needs a GPU, a launch or an import of Megatron.
"""
