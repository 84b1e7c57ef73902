"""Checkpoints in Megatron's format without training: known tensors and flags, one piece each."""

from __future__ import annotations

import io
import json
import sys
import types
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from megatron_meco.inference.export import export

HIDDEN, FFN, LAYERS, HEADS, GROUPS, HEAD_DIM = 16, 24, 3, 4, 2, 6
PADDED = 384


def run_args(tokenizer: Path, **changes: Any) -> Namespace:
    """The flags of a MeCo run of a small Llama; its head is not hidden / heads wide."""
    flags = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": HEADS,
        "group_query_attention": True,
        "num_query_groups": GROUPS,
        "kv_channels": HEAD_DIM,
        "untie_embeddings_and_output_weights": True,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "layernorm_epsilon": 1e-6,
        "rotary_base": 500000,
        "max_position_embeddings": 64,
        "seq_length": 64,
        "init_method_std": 0.02,
        "params_dtype": torch.float32,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(tokenizer),
        "padded_vocab_size": PADDED,
        "make_vocab_size_divisible_by": 128,
        "tensor_model_parallel_size": 1,
        "train_iters": 20,
        "train_samples": None,
        "global_batch_size": 4,
        "seed": 7,
        "data_path": ["1.0", "somewhere/pages"],
        "meco": True,
        "meco_template": r"URL: {url.host}\n\n",
    }
    return Namespace(**{**flags, **changes})


def random_tensors(args: Namespace, seed: int = 0) -> dict[str, torch.Tensor]:
    """Megatron's tensors, stacked over layers as on disk."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    qkv = (HEADS + 2 * GROUPS) * HEAD_DIM
    tensors = {
        "embedding.word_embeddings.weight": draw(PADDED, HIDDEN),
        "decoder.final_layernorm.weight": 1 + draw(HIDDEN),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": 1 + draw(LAYERS, HIDDEN),
        "decoder.layers.self_attention.linear_qkv.weight": draw(LAYERS, qkv, HIDDEN),
        "decoder.layers.self_attention.linear_proj.weight": draw(LAYERS, HIDDEN, HEADS * HEAD_DIM),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": 1 + draw(LAYERS, HIDDEN),
        "decoder.layers.mlp.linear_fc1.weight": draw(LAYERS, 2 * FFN, HIDDEN),
        "decoder.layers.mlp.linear_fc2.weight": draw(LAYERS, HIDDEN, FFN),
    }
    if args.untie_embeddings_and_output_weights:
        tensors["output_layer.weight"] = draw(PADDED, HIDDEN)
    return tensors


def write_checkpoint(
    folder: Path, args: Namespace, tensors: dict[str, torch.Tensor], iteration: int = 20
) -> Path:
    """Write one iteration, its tracker file, and some entries that are not weights."""
    path = folder / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    state: dict[str, Any] = dict(tensors)
    state["optimizer.state.exp_avg.output_layer.weight"] = torch.zeros(4)
    state["decoder.layers.mlp.linear_fc1._extra_state/shard_0_3"] = None
    # With Transformer Engine there are more of them; some versions keep tensors.
    state["decoder.layers.self_attention.core_attention._extra_state/shard_0_3"] = io.BytesIO()
    state["decoder.final_layernorm._extra_state/shard_0_1"] = None
    state["decoder.layers.mlp.linear_fc2._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    state["rng_state/shard_0.0_1.1"] = [1, 2]
    state["common_state/shard_0_1"] = [
        {"args": args, "iteration": iteration, "rerun": _foreign_object()}
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.FileSystemWriter(path)
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
        dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    # As on a machine without the package that the object came from.
    sys.modules.pop("foreign_package", None)
    return folder


def write_run(folder: Path, tokenizer: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a checkpoint with random weights."""
    args = run_args(tokenizer, **changes)
    return write_checkpoint(folder, args, random_tensors(args, seed))


def export_random(folder: Path, tokenizer: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a checkpoint with random weights, export it, and return the export."""
    export(write_run(folder / "checkpoint", tokenizer, seed, **changes), folder / "model")
    return folder / "model"


def _foreign_object() -> Any:
    module = types.ModuleType("foreign_package")
    sys.modules["foreign_package"] = module
    exec("class State(dict):\n    pass", module.__dict__)
    state = module.State(mode="on")
    state.more = [1]
    return state
