"""Megatron's own validation of command lines for GPU hosts, on a host without a GPU.

Run as a script: the CPU platform stands in for the devices while flags are validated, and it cannot
be undone. Reads a JSON list of [world size, flags] from stdin; prints, for each, what Megatron made
of them.
"""

from __future__ import annotations

import json
import os
import sys

from megatron_meco.training.cpu import enable_cpu_platform

enable_cpu_platform()

from megatron.core import utils  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args  # noqa: E402
from megatron.training.arguments import validate_args  # noqa: E402

from megatron_meco.training.arguments import CommandLine, check_arguments  # noqa: E402

SHOWN = (
    "data_parallel_size",
    "params_dtype",
    "gradient_accumulation_fusion",
    "sequence_parallel",
    "fp8",
    "transformer_impl",
)


def main() -> None:
    # Megatron looks for the version and for the RoPE kernel; nothing of the engine is called.
    utils._te_version = utils.PkgVersion("2.20.2")
    rope_utils.fused_apply_rotary_pos_emb = rope_utils.fused_apply_rotary_pos_emb_thd = print
    for world_size, flags in json.load(sys.stdin):
        os.environ.update(WORLD_SIZE=str(world_size), RANK="0", LOCAL_RANK="0")
        sys.argv = ["pretrain_gpt.py", *flags]
        line = CommandLine(None, on_cpu=False)
        args = line.parse()
        check_arguments(args, line.flags)
        validated = validate_args(args)
        # Megatron's configuration of the model has checks of its own; the tokenizer would say this.
        validated.padded_vocab_size = 128_256
        gpt_config_from_args(validated)
        print("validated:" + json.dumps({name: str(getattr(validated, name)) for name in SHOWN}))


if __name__ == "__main__":
    main()
