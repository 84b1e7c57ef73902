"""`meco import`: a Hugging Face Llama to a checkpoint that Megatron's training starts from.

The other way of `meco export`, bit by bit, for going on with MeCo from a model that exists. What is
written is a `release` checkpoint in Megatron's torch_dist format: weights and the flags that they
need, no optimizer state, iteration 0. `--load` reads it in any tensor- and pipeline-parallel
layout, since the format is cut up anew when it is read. No GPU, no launch, no import of Megatron;
memory holds the model once. Tokens that Megatron adds as padding begin as zeros. What was given up:
every architecture but Llama's, scaled RoPE, quantised weights, and weights outside safetensors.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open

from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.inference.llama import (
    Sizes,
    Weight,
    join_parts,
    megatron_shapes,
    plan_weights,
)
from megatron_meco.inference.output_file import appearing_folder

_TRACKER = "latest_checkpointed_iteration.txt"
# Megatron's default of --make-vocab-size-divisible-by.
_VOCAB_STEP = 128
# What layers keep beside their weights: nothing, but Megatron asks for it. The first four are in
# every layer, the others with Transformer Engine.
_LAYER_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "self_attention.core_attention",
)
_OTHER_STATES = ("decoder.final_layernorm",)
_BUFFERS = ("rotary_emb.inv_freq",)


class LlamaImportError(MeCoError):
    """A Hugging Face folder that cannot become a Megatron checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import wrote.

    Attributes:
        folder: What `--load` takes.
        parameters: Elements of all tensors.
        flags: Megatron's flags for a model of this shape.
    """

    folder: Path
    parameters: int
    flags: list[str]


def import_hf(model: Path, output: Path, *, tokenizer: Path | None = None) -> Imported:
    """Write a Hugging Face Llama as a Megatron checkpoint.

    Args:
        model: A folder with `config.json` and safetensors files.
        output: The folder to write, for `--load`.
        tokenizer: The tokenizer's folder, noted in the checkpoint; None: the model's own.

    Raises:
        LlamaImportError: When the model is no plain Llama, or its files are damaged.
        FlagError: When the output or the tokenizer cannot be used.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FlagError("exists", where=f"--output {output}", remedy="Name a new folder.")
    config = _read_config(model)
    sizes = _sizes(config, model)
    tokenizer = tokenizer or model
    if not (tokenizer / "tokenizer.json").is_file():
        raise FlagError(
            f"{str(tokenizer)!r} has no tokenizer.json",
            where="--tokenizer",
            remedy="Give the folder of the model's tokenizer.",
        )
    shapes = megatron_shapes(sizes)
    weights = plan_weights(shapes, sizes, str(model))
    files = _weight_files(model)
    _check_weights(files, weights, model)
    tensors = dict(_tensors(files, weights, shapes, sizes, model))
    dtype = tensors[weights[0].source].dtype
    args = _run_args(config, sizes, dtype, tokenizer)
    with appearing_folder(output) as folder:
        _write(folder / "release", tensors, args)
        (folder / _TRACKER).write_text("release")
    return Imported(
        folder=output,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        flags=_flags(args),
    )


# ---- The model's folder ----


def _read_config(model: Path) -> dict[str, Any]:
    where = f"--model {model}"
    remedy = "Name a folder that transformers' save_pretrained wrote."
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LlamaImportError(
            f"no readable config.json ({error})", where=where, remedy=remedy
        ) from error
    if not isinstance(config, dict):
        raise LlamaImportError("config.json holds no object", where=where, remedy=remedy)
    return config


def _sizes(config: dict[str, Any], model: Path) -> Sizes:
    kind = config.get("model_type")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    checks = (
        ("architecture", kind, "llama"),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("attention_bias", bool(config.get("attention_bias")), False),
        ("mlp_bias", bool(config.get("mlp_bias")), False),
        ("rope_type", rope_type, "default"),
        ("quantization_config", config.get("quantization_config"), None),
    )
    for name, value, needed in checks:
        if value != needed:
            raise LlamaImportError(
                f"the model has {name} = {value!r}, and only {needed!r} can be imported",
                where=f"--model {model}",
                remedy="Import a plain Llama: RMSNorm, unscaled RoPE, SwiGLU, no biases.",
            )
    try:
        heads = int(config["num_attention_heads"])
        return Sizes(
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            ffn=int(config["intermediate_size"]),
            heads=heads,
            groups=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LlamaImportError(
            f"config.json lacks a size ({error})",
            where=f"--model {model}",
            remedy="Name a folder that transformers' save_pretrained wrote.",
        ) from error


def _weight_files(model: Path) -> dict[str, Path]:
    """The file of each tensor."""
    paths = sorted(model.glob("*.safetensors"))
    index = model / "model.safetensors.index.json"
    try:
        if index.is_file():
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            paths = sorted({model / file for file in listed.values()})
        if not paths:
            raise LlamaImportError(
                "holds no safetensors files",
                where=f"--model {model}",
                remedy="Load it with transformers and save it again: save_pretrained writes them.",
            )
        found: dict[str, Path] = {}
        for path in paths:
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, MeCoError):
            raise
        raise _damaged(model, error) from error
    return {name: path for name, path in found.items() if not name.endswith(_BUFFERS)}


def _check_weights(files: dict[str, Path], weights: list[Weight], model: Path) -> None:
    needed = {weight.name for weight in weights}
    # A tied output layer is written by some tools, and is the embedding.
    unknown = sorted(files.keys() - needed - {"lm_head.weight"})
    missing = sorted(needed - files.keys())
    for what, names in (("unknown tensor", unknown), ("no tensor", missing)):
        if names:
            raise LlamaImportError(
                f"{what} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""),
                where=f"--model {model}",
                remedy="Only a plain Llama, with all of its weights, can be imported.",
            )


def _tensors(
    files: dict[str, Path],
    weights: list[Weight],
    shapes: dict[str, tuple[int, ...]],
    sizes: Sizes,
    model: Path,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Megatron's tensors, layers stacked."""
    for source, shape in shapes.items():
        here = [weight for weight in weights if weight.source == source]
        out: torch.Tensor | None = None
        for row in sorted({weight.row for weight in here}, key=lambda row: row or 0):
            parts = {w.part: _read(files[w.name], w, model) for w in here if w.row == row}
            joined = join_parts(parts, sizes)
            if out is None:
                out = torch.empty(shape, dtype=joined.dtype)
            (out if row is None else out[row]).copy_(joined)
        assert out is not None
        yield source, out


def _read(path: Path, weight: Weight, model: Path) -> torch.Tensor:
    try:
        with safe_open(path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(weight.name)
    except (OSError, SafetensorError) as error:
        raise _damaged(model, error) from error
    if tuple(tensor.shape) != weight.shape:
        raise LlamaImportError(
            f"tensor {weight.name} has shape {list(tensor.shape)}, config.json gives "
            f"{list(weight.shape)}",
            where=f"--model {model}",
            remedy="Copy the model again, or name another one.",
        )
    return tensor


def _damaged(model: Path, error: Exception) -> LlamaImportError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return LlamaImportError(
        f"its weights cannot be read ({reason})",
        where=f"--model {model}",
        remedy="Copy the model again, or name another one.",
    )


# ---- The checkpoint ----


def _run_args(
    config: dict[str, Any], sizes: Sizes, dtype: torch.dtype, tokenizer: Path
) -> Namespace:
    """What `--use-checkpoint-args` and `meco export` read."""
    rope = config.get("rope_parameters") or {}
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    positions = int(config.get("max_position_embeddings", 2048))
    return Namespace(
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.ffn,
        num_attention_heads=sizes.heads,
        group_query_attention=sizes.groups != sizes.heads,
        num_query_groups=sizes.groups,
        kv_channels=sizes.head_dim,
        max_position_embeddings=positions,
        seq_length=positions,
        position_embedding_type="rope",
        add_position_embedding=True,
        rotary_base=int(base) if float(base).is_integer() else base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        normalization="RMSNorm",
        layernorm_epsilon=config.get("rms_norm_eps", 1e-6),
        swiglu=True,
        squared_relu=False,
        add_bias_linear=False,
        add_qkv_bias=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        apply_query_key_layer_scaling=False,
        untie_embeddings_and_output_weights=not sizes.tied,
        init_method_std=config.get("initializer_range", 0.02),
        params_dtype=dtype,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tokenizer.resolve()),
        vocab_size=sizes.vocab,
        padded_vocab_size=math.ceil(sizes.vocab / _VOCAB_STEP) * _VOCAB_STEP,
        make_vocab_size_divisible_by=_VOCAB_STEP,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        world_size=1,
        data_parallel_size=1,
        iteration=0,
        train_iters=0,
        train_samples=None,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        seed=0,
        data_path=None,
        train_data_path=None,
    )


def state_names(num_layers: int) -> list[str]:
    """Names of what modules may keep beside their weights: FP8 scales, say. Here it is empty."""
    layers = [
        f"decoder.layers.{name}._extra_state/shard_{layer}_{num_layers}"
        for name in _LAYER_STATES
        for layer in range(num_layers)
    ]
    return layers + [f"{name}._extra_state/shard_0_1" for name in _OTHER_STATES]


def _write(folder: Path, tensors: dict[str, torch.Tensor], args: Namespace) -> None:
    state: dict[str, Any] = dict(tensors)
    state |= {name: [None] for name in state_names(args.num_layers)}
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
    state["common_state/shard_0_1"] = [common]
    with warnings.catch_warnings():
        # It says that no process group is there, which is the point.
        warnings.simplefilter("ignore")
        dcp.save(
            state,
            storage_writer=dcp.FileSystemWriter(folder),
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
            no_dist=True,
        )
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backend))


def _flags(args: Namespace) -> list[str]:
    flags = [
        f"--num-layers {args.num_layers}",
        f"--hidden-size {args.hidden_size}",
        f"--ffn-hidden-size {args.ffn_hidden_size}",
        f"--num-attention-heads {args.num_attention_heads}",
        f"--kv-channels {args.kv_channels}",
        f"--max-position-embeddings {args.max_position_embeddings}",
        f"--position-embedding-type rope --rotary-base {args.rotary_base}",
        f"--normalization RMSNorm --norm-epsilon {args.layernorm_epsilon}",
        "--swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0",
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {args.tokenizer_model}",
    ]
    if args.group_query_attention:
        flags.insert(4, f"--group-query-attention --num-query-groups {args.num_query_groups}")
    if args.untie_embeddings_and_output_weights:
        flags.append("--untie-embeddings-and-output-weights")
    if args.params_dtype == torch.bfloat16:
        flags.append("--bf16")
    return flags


# ---- The command ----


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `meco import` to its parser."""
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="a Hugging Face Llama")
    add("--output", required=True, type=Path, metavar="DIR", help="the folder to write")
    add("--tokenizer", type=Path, metavar="DIR", help="default: the model's folder")


def run_import(args: argparse.Namespace) -> int:
    """Run `meco import`.

    Args:
        args: The parsed flags of `add_import_arguments`.

    Returns:
        The exit status, 0.
    """
    begin = time.monotonic()
    done = import_hf(args.model, args.output, tokenizer=args.tokenizer)
    seconds = time.monotonic() - begin
    print(f"{done.parameters:,} parameters written to {done.folder} in {seconds:.0f} s")
    print("train from it with:")
    for line in (f"--load {done.folder} --finetune", *done.flags):
        print(f"    {line} \\")
    return 0
