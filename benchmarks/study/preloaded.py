"""What the server process of `trainer.py` imports: torch and Megatron, ready for a CPU."""
# ruff: noqa: E402, F401

import logging
import os
import warnings

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

from megatron_meco.training.cpu import enable_cpu_platform

# Before Megatron, as the script itself does; processes forked from this one inherit it.
enable_cpu_platform()

import megatron.core.models.gpt
import megatron.training.checkpointing
import transformers
from megatron.training import pretrain

import megatron_meco.inference.export
import megatron_meco.inference.model
import megatron_meco.training.provider
