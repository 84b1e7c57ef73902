"""What the server process of `trainer.py` imports: torch and Megatron, ready for a CPU."""

import logging
import os
import warnings

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

from megatron_meco.training.cpu import enable_cpu_platform  # noqa: E402

# Before Megatron, as the script itself does; processes forked from this one inherit it.
enable_cpu_platform()

import megatron.core.models.gpt  # noqa: E402
import megatron.training.checkpointing  # noqa: E402, F401
import transformers  # noqa: E402, F401
from megatron.training import pretrain  # noqa: E402, F401

import megatron_meco.training.provider  # noqa: E402, F401
