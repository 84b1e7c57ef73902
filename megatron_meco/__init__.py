"""Pre-training with metadata (MeCo) as an extension of Megatron-Core.

Sub-packages follow the way of a document: `corpus` (raw documents to Megatron files), `data`
(Megatron files to training samples), `training` (samples to a model) and `inference` (a model to
use). Importing this package loads none of them, so that its command line starts fast and its data
code works without torch.
"""

import logging

__version__ = "0.1.0"

# PyTorch says it wherever the CUDA toolkit is installed and there is no GPU, in each worker anew;
# nothing here compiles CUDA code.
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: "No CUDA runtime is found" not in record.getMessage()
)
