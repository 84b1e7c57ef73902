"""`meco import`: a Hugging Face Llama to a checkpoint from which Megatron trains on.

The bit-exact inverse of `meco export`, for continuing an existing model with MeCo. Writes a
`release` checkpoint in Megatron's torch_dist format: weights and the flags that they need, no
optimizer state, iteration 0. `--load` reads it in any tensor- and pipeline-parallel layout. Needs
no GPU, launcher or Megatron; memory holds the model once. Padding tokens that Megatron adds begin
as zeros. Only Llama's architecture with plain RoPE and unquantised safetensors is supported.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.inference.llama import Sizes, Weight, join_parts, megatron_shapes
from megatron_meco.inference.model_folder import (
    Stored,
    check_layers,
    check_llama,
    finite_number,
    llama_sizes,
    read_config,
    read_weights,
)
from megatron_meco.inference.output_file import check_new_folder, output_folder
from megatron_meco.untrusted.text_file import Refuse
from megatron_meco.wording import first_line

_TRACKER = "latest_checkpointed_iteration.txt"
# Megatron's default of --make-vocab-size-divisible-by.
_VOCAB_STEP = 128
# Extra state of layers: empty, but Megatron expects the entries. The first four are in
# every layer, the others with Transformer Engine.
_LAYER_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "self_attention.core_attention",
)
_OTHER_STATES = ("decoder.final_layernorm",)
# By safetensors' names.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


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
        tokenizer: The tokenizer's folder, noted in the checkpoint; None for the model's own.

    Raises:
        LlamaImportError: If the model is not a plain Llama, or its files are damaged.
        FlagError: If the output or the tokenizer cannot be used.
    """
    check_new_folder(output)

    def refuse(reason: str) -> LlamaImportError:
        return LlamaImportError(
            reason,
            where=f"--model {model}",
            remedy="Name a plain Llama (RMSNorm, unscaled RoPE, SwiGLU, no biases), whole and as "
            "transformers' save_pretrained writes it.",
        )

    config = read_config(model, refuse)
    _check_architecture(config, refuse)
    sizes = llama_sizes(config, refuse)
    tokenizer = tokenizer or model
    if not (tokenizer / "tokenizer.json").is_file():
        raise FlagError(
            f"{str(tokenizer)!r} has no tokenizer.json",
            where="--tokenizer",
            remedy="Give the folder of the model's tokenizer.",
        )
    stored = read_weights(model, refuse)
    check_layers(config, stored, refuse)
    weights = check_llama(sizes, stored, refuse)
    dtypes = _dtypes(stored, weights, refuse)
    args = _run_args(config, sizes, dtypes[weights[0].source], tokenizer, refuse)
    tensors = dict(_tensors(stored, weights, sizes, dtypes, refuse))
    with output_folder(output) as folder:
        _write(folder / "release", tensors, args)
        (folder / _TRACKER).write_text("release")
    return Imported(
        folder=output,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        flags=_flags(args),
    )


# ---- The model's folder ----


def _check_architecture(config: dict[str, Any], refuse: Refuse) -> None:
    rope = _rope(config, refuse)
    checks = (
        ("architecture", config.get("model_type"), "llama"),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("attention_bias", bool(config.get("attention_bias")), False),
        ("mlp_bias", bool(config.get("mlp_bias")), False),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1), 1),
        ("partial_rotary_factor", config.get("partial_rotary_factor", 1), 1),
        ("quantization_config", config.get("quantization_config"), None),
    )
    for name, value, needed in checks:
        if value != needed:
            raise refuse(
                f"the model has {name} = {value!r:.80}, and only {needed!r} can be imported"
            )


def _rope(config: dict[str, Any], refuse: Refuse) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise refuse(f"config.json: its RoPE is {rope!r:.40}")
    return rope


def _dtypes(
    stored: dict[str, Stored], weights: list[Weight], refuse: Refuse
) -> dict[str, torch.dtype]:
    """The type of each of Megatron's tensors, whose parts must agree: a cast is no import."""
    first: dict[str, Weight] = {}
    for weight in weights:
        one = first.setdefault(weight.source, weight)
        if stored[weight.name].dtype != stored[one.name].dtype:
            raise refuse(
                f"tensor {weight.name} is {stored[weight.name].dtype}, and {one.name} is "
                f"{stored[one.name].dtype}"
            )
    return {source: _DTYPES[stored[one.name].dtype] for source, one in first.items()}


def _tensors(
    stored: dict[str, Stored],
    weights: list[Weight],
    sizes: Sizes,
    dtypes: dict[str, torch.dtype],
    refuse: Refuse,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Megatron's tensors, layers stacked."""
    for source, shape in megatron_shapes(sizes).items():
        here = [weight for weight in weights if weight.source == source]
        out = torch.empty(shape, dtype=dtypes[source])
        for row in sorted({weight.row for weight in here}, key=lambda row: row or 0):
            parts = {w.part: _read(stored[w.name], w, refuse) for w in here if w.row == row}
            (out if row is None else out[row]).copy_(join_parts(parts, sizes))
        yield source, out


def _read(stored: Stored, weight: Weight, refuse: Refuse) -> torch.Tensor:
    try:
        with safe_open(stored.path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(weight.name)
    except (OSError, SafetensorError) as error:
        raise refuse(f"its weights cannot be read ({first_line(error)})") from error
    if not tensor.isfinite().all():
        raise refuse(f"tensor {weight.name} holds NaN or infinity")
    return tensor


# ---- The checkpoint ----


def _run_args(
    config: dict[str, Any], sizes: Sizes, dtype: torch.dtype, tokenizer: Path, refuse: Refuse
) -> Namespace:
    """What `--use-checkpoint-args` and `meco export` read."""
    outside = finite_number(config, "rope_theta", 10000.0, refuse)
    base = finite_number(config.get("rope_parameters") or {}, "rope_theta", outside, refuse)
    if not float(base).is_integer():
        # Megatron's flag takes whole numbers only.
        raise refuse(f"config.json: rope_theta is {base!r:.40}, no whole number")
    positions = finite_number(config, "max_position_embeddings", 2048, refuse)
    if not isinstance(positions, int) or positions >= 2**31:
        raise refuse(f"config.json: max_position_embeddings is {positions!r:.40}")
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
        rotary_base=int(base),
        rotary_percent=1.0,
        rotary_interleaved=False,
        normalization="RMSNorm",
        layernorm_epsilon=finite_number(config, "rms_norm_eps", 1e-6, refuse),
        swiglu=True,
        squared_relu=False,
        add_bias_linear=False,
        add_qkv_bias=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        apply_query_key_layer_scaling=False,
        untie_embeddings_and_output_weights=not sizes.tied,
        init_method_std=finite_number(config, "initializer_range", 0.02, refuse, zero=True),
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
    """Return the names of extra state that modules may have, such as FP8 scales; here empty."""
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
        # It warns that there is no process group, which is intended.
        warnings.simplefilter("ignore")
        try:
            save(
                state,
                storage_writer=FileSystemWriter(folder),
                planner=DefaultSavePlanner(flatten_state_dict=False),
                no_dist=True,
            )
        except CheckpointException as error:
            # PyTorch wraps an error such as a full disk, one per rank; there is one rank.
            [(cause, _)] = error.failures.values()
            raise OSError(first_line(cause)) from error
    # Where Megatron looks for the same before 0.19.
    torch.save(common, folder / "common.pt")
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
        "--tokenizer-type HuggingFaceTokenizer "
        f"--tokenizer-model {shlex.quote(args.tokenizer_model)}",
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
    """Run `meco import`; returns the exit status, 0."""
    begin = time.monotonic()
    done = import_hf(args.model, args.output, tokenizer=args.tokenizer)
    seconds = time.monotonic() - begin
    print(f"{done.parameters:,} parameters written to {done.folder} in {seconds:.0f} s")
    print("train from it with:")
    lines = [f"--load {shlex.quote(str(done.folder))} --finetune", *done.flags]
    print(" \\\n".join(f"    {line}" for line in lines))
    return 0
