"""Pre-training with metadata (MeCo) as an extension of Megatron-Core.

Sub-packages follow the way of a document: `corpus` (raw documents to Megatron files), `data`
(Megatron files to training samples), `training` (samples to a model) and `inference` (a model to
use). Importing this package loads none of them, so that its command line starts fast and its data
code works without torch.
"""

__version__ = "0.1.0"
