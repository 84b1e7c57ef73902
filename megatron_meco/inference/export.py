"""`meco export`: a checkpoint of any tensor- and pipeline-parallel layout to a Hugging Face folder.

The folder is a plain `LlamaForCausalLM` with its tokenizer, which transformers 4 and 5, vLLM and
others load without custom code, and a `meco.json` that says how the model was conditioned. Tensors
are read one layer at a time and written shard by shard, so memory holds at most one shard (4 GB).
Needs no GPU, launcher or Megatron. The folder gets its name when it is complete. Only Llama's
architecture and tokenizers with a `tokenizer.json` are supported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_meco.errors import FlagError
from megatron_meco.inference.checkpoint import Checkpoint, CheckpointError, find_iteration
from megatron_meco.inference.llama import (
    Sizes,
    Weight,
    check_architecture,
    plan_weights,
    take_part,
)
from megatron_meco.inference.model_card import describe_run, model_card
from megatron_meco.inference.output_file import check_new_folder, output_folder
from megatron_meco.inference.run_flags import check_flags
from megatron_meco.inference.tokenizer_files import (
    TOKENIZER_FILES,
    Words,
    read_tokenizer,
    write_tokenizer,
)
from megatron_meco.untrusted.text_file import check_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CARD = "meco.json"
_BYTES_PER_SHARD = 4_000_000_000
# Every file of an export except its weights.
_FILES = {
    CARD,
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    *TOKENIZER_FILES,
}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote.

    Attributes:
        folder: The Hugging Face folder.
        iteration: Training steps that the checkpoint had finished.
        parameters: Elements of all tensors.
        num_bytes: Bytes of the folder.
        card: What `meco.json` holds.
    """

    folder: Path
    iteration: int
    parameters: int
    num_bytes: int
    card: dict[str, Any]


def export(
    load: Path,
    output: Path,
    *,
    iteration: int | None = None,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    bytes_per_shard: int = _BYTES_PER_SHARD,
) -> Exported:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        load: What the run's `--save` named.
        output: The folder to write.
        iteration: Iteration, or None for the latest.
        dtype: One of `DTYPES`, or None for that of the training.
        tokenizer: The tokenizer's folder, or None for the one in the run's flags.
        overwrite: Whether an earlier export may be replaced.
        bytes_per_shard: Largest safetensors file, unless one tensor alone is larger.

    Raises:
        CheckpointError: If the checkpoint cannot be read, or is not a Llama.
        FlagError: If the output or the tokenizer cannot be used.
    """
    _check_output(output, overwrite)
    checkpoint = Checkpoint(find_iteration(load, iteration))
    args, where = checkpoint.args, str(checkpoint.folder)
    check_flags(args, where)
    check_architecture(args, where)
    words = read_tokenizer(args, tokenizer)
    sizes = Sizes.from_args(args, words.size)
    weights = plan_weights(checkpoint.shapes, sizes, where)
    dtype_name = dtype or _trained_dtype(args)
    card = describe_run(args, checkpoint.iteration, words.bos, words.eos)
    with output_folder(output) as folder:
        _write_json(folder / "config.json", _config(args, sizes, words, dtype_name))
        ids = {"bos_token_id": words.bos, "eos_token_id": words.eos}
        _write_json(folder / "generation_config.json", ids)
        write_tokenizer(folder, words)
        _write_json(folder / CARD, card)
        (folder / "README.md").write_text(model_card(card), encoding="utf-8")
        _write_weights(folder, checkpoint, weights, sizes, DTYPES[dtype_name], bytes_per_shard)
    return Exported(
        folder=output,
        iteration=checkpoint.iteration,
        parameters=sum(weight.num_elements for weight in weights),
        num_bytes=sum(path.stat().st_size for path in output.iterdir()),
        card=card,
    )


# ---- The model ----


def _config(args: Namespace, sizes: Sizes, words: Words, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.groups,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_position_embeddings,
        "rms_norm_eps": args.layernorm_epsilon,
        # transformers 5 reads the first; 4 reads the second, and without it takes 10000 silently.
        "rope_parameters": {"rope_type": "default", "rope_theta": float(args.rotary_base)},
        "rope_theta": float(args.rotary_base),
        "tie_word_embeddings": sizes.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": args.init_method_std,
        "bos_token_id": words.bos,
        "eos_token_id": words.eos,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _trained_dtype(args: Namespace) -> str:
    trained = str(getattr(args, "params_dtype", torch.float32)).removeprefix("torch.")
    # float16 does not fit bfloat16.
    return trained if trained in DTYPES else "float32"


def _write_weights(
    folder: Path,
    checkpoint: Checkpoint,
    weights: list[Weight],
    sizes: Sizes,
    dtype: torch.dtype,
    bytes_per_shard: int,
) -> None:
    shards = _shards(weights, bytes_per_shard // dtype.itemsize)
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        tensors = dict(_tensors(checkpoint, shard, sizes, dtype))
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            # The Rust library's error for a full disk.
            raise OSError(str(error)) from error
        # safetensors makes files that only their owner can read.
        (folder / file).chmod((folder / "config.json").stat().st_mode)
        names.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        total = sum(weight.num_elements for weight in weights) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": names}
        _write_json(folder / "model.safetensors.index.json", index)


def _shards(weights: list[Weight], most_elements: int) -> list[list[Weight]]:
    shards: list[list[Weight]] = [[]]
    filled = 0
    for weight in weights:
        if shards[-1] and filled + weight.num_elements > most_elements:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += weight.num_elements
    return shards


def _tensors(
    checkpoint: Checkpoint, weights: list[Weight], sizes: Sizes, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    last: tuple[str, int | None] | None = None
    tensor = torch.empty(0)
    for weight in weights:
        # Queries, keys and values come from one tensor, one after the other.
        if (weight.source, weight.row) != last:
            tensor = checkpoint.read(weight.source, weight.row)
            _check_finite(tensor, weight, checkpoint.folder)
            last = (weight.source, weight.row)
        part = take_part(weight, tensor, sizes)
        # A copy: safetensors refuses tensors that share memory.
        yield weight.name, part.to(dtype, copy=True).contiguous()


def _check_finite(tensor: torch.Tensor, weight: Weight, folder: Path) -> None:
    if not tensor.isfinite().all():
        layer = "" if weight.row is None else f" of layer {weight.row}"
        raise CheckpointError(
            f"tensor {weight.source}{layer} holds NaN or infinity",
            where=str(folder),
            remedy="Name an earlier --iteration: that model computes nothing.",
        )


# ---- The folder ----


def _check_output(output: Path, overwrite: bool) -> None:
    where = f"--output {output}"
    # The libraries that write files need UTF-8 names.
    check_text(os.path.realpath(output), "--output")
    try:
        check_new_folder(output)
    except FlagError:
        if not (output / CARD).is_file():
            # --overwrite removes the folder: never one that holds something else.
            remedy = "Name a new folder."
            raise FlagError("exists and is no export", where=where, remedy=remedy) from None
        if not overwrite:
            remedy = "Add --overwrite, or name a new folder."
            raise FlagError("exists", where=where, remedy=remedy) from None
    else:
        return
    for path in sorted(output.iterdir()):
        ours = path.name in _FILES or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", path.name)
        if not ours and (path.is_dir() or path.stat().st_size):
            raise FlagError(
                f"holds {path.name!r}, which no export writes",
                where=where,
                remedy="Move it elsewhere: --overwrite removes the whole folder.",
            )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- The command ----


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `meco export` to its parser."""
    add = parser.add_argument
    add("--load", required=True, type=Path, metavar="DIR", help="what the run's --save named")
    add("--iteration", type=int, metavar="N", help="which checkpoint; default: the latest")
    add("--output", required=True, type=Path, metavar="DIR", help="the folder to write")
    add("--dtype", choices=list(DTYPES), help="default: as it was trained")
    add(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="the tokenizer's folder; default: the one that the run's flags name",
    )
    add("--overwrite", action="store_true", help="replace an earlier export")


def run_export(args: argparse.Namespace) -> int:
    """Run `meco export`; returns the exit status, 0."""
    begin = time.monotonic()
    done = export(
        args.load,
        args.output,
        iteration=args.iteration,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        overwrite=args.overwrite,
    )
    seconds = time.monotonic() - begin
    print(
        f"iteration {done.iteration:,}: {done.parameters:,} parameters, "
        f"{done.num_bytes / 1e6:,.1f} MB written to {done.folder} in {seconds:.0f} s"
    )
    if done.card["template"]:
        print(f"template {done.card['template']}, fields: {', '.join(done.card['fields'])}")
    return 0
