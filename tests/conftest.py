"""What every test relies on; heavy imports belong into the tests that need them."""

import os

# One process must not take the cores of the others (torchrun ranks, parallel test workers).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may depend on a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
