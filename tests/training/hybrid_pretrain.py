"""The hybrid example on a CPU: reference kernels in place of the packages that need a GPU."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import reference_delta_net
import reference_mamba

reference_mamba.install()
reference_delta_net.install()

if __name__ == "__main__":
    folder = Path(os.environ.get("MECO_TEST_SCRIPTS", Path(__file__).parents[2] / "examples"))
    runpy.run_path(str(folder / "pretrain_hybrid.py"), run_name="__main__")
