"""The installed Megatron-Core, and the library of its optimizer."""

from __future__ import annotations

import importlib.util
import re

from megatron_meco.errors import MeCoError
from megatron_meco.training.kernels import OptimizerLibrary

# Those that `make test-versions` trains under, the last one as Megatron-LM's main branch.
OLDEST = (0, 18, 2)
BELOW = (0, 21)


def check_version() -> str | None:
    """Check the installed Megatron-Core.

    Returns:
        A warning if its version is untested, else None.

    Raises:
        MeCoError: Megatron-Core or its trainer is not installed.
    """
    try:
        # Not the wheel's metadata: another Megatron may come first on PYTHONPATH.
        from megatron.core import __version__ as version
    except ModuleNotFoundError as error:
        raise MeCoError(
            "not installed", where="megatron-core", remedy="pip install 'megatron-core[training]'."
        ) from error
    if importlib.util.find_spec("megatron.training") is None:
        raise MeCoError(
            f"version {version} comes without megatron.training",
            where="megatron-core",
            remedy="pip install 'megatron-core[training]>=0.18.2'.",
        )
    # Such as 0.19.2+8206698 or 0.20.0rc0.
    numbers = tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))
    if OLDEST <= numbers < BELOW:
        return None
    oldest, below = (".".join(map(str, v)) for v in (OLDEST, BELOW))
    return f"> MeCo: Megatron-Core {version} was never tried; known to work: >= {oldest}, < {below}"


def optimizer_library() -> OptimizerLibrary:
    """Library of the Adam that Megatron-Core imported for its optimizer."""
    from megatron.core import optimizer

    # The first of three libraries that Megatron-Core could import.
    library = optimizer.Adam.__module__.partition(".")[0]
    return library if library in ("transformer_engine", "apex") else "torch"
