"""What is installed on this host and in this environment, without a verdict.

Every heavy or fragile import (torch, Transformer Engine, Apex, Megatron, the compiled extension)
runs in its own process, all at the same time. A broken library may print, hang or crash there, and
is one line of the facts here. Supported versions come from this package's own metadata. Only this
host is examined: run it on each node of a cluster.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_meco.doctor.probes import PROBES, RESULT_MARK, failure, installed_version

_PROBE_SECONDS = 180
DISTRIBUTION = "megatron-meco"


@dataclass(frozen=True)
class Facts:
    """Input of the verdicts.

    A probe's result has "error" and "error_type" if the import failed, and is empty if the package
    is not installed.

    Attributes:
        python: Version of this Python.
        system: Name of the operating system.
        requirements: Our dependencies as (name, allowed versions, installed version or None).
        torch: Version, CUDA build, devices, communication libraries.
        megatron: Version, and whether `megatron.training` exists and can be imported.
        transformer_engine: Version, and whether its kernels load.
        apex: Version, and whether it is NVIDIA's.
        flash_attention: Version, and whether it loads.
        extension: Path, compiler and self-test of `megatron_meco._core`.
        driver: Version of the NVIDIA driver, or None.
    """

    python: str
    system: str
    requirements: tuple[tuple[str, str, str | None], ...]
    torch: dict[str, Any] = field(default_factory=dict)
    megatron: dict[str, Any] = field(default_factory=dict)
    transformer_engine: dict[str, Any] = field(default_factory=dict)
    apex: dict[str, Any] = field(default_factory=dict)
    flash_attention: dict[str, Any] = field(default_factory=dict)
    extension: dict[str, Any] = field(default_factory=dict)
    driver: str | None = None


def collect_facts() -> Facts:
    """Collect the facts of this host and environment."""
    with ThreadPoolExecutor(max_workers=len(PROBES)) as pool:
        results = dict(zip(PROBES, pool.map(_run_probe, PROBES), strict=True))
    return Facts(
        python=platform.python_version(),
        system=platform.system(),
        requirements=tuple(_own_requirements()),
        driver=_driver_version(),
        **results,
    )


def _own_requirements() -> list[tuple[str, str, str | None]]:
    try:
        # Late, because `meco doctor` must also run where this dependency is missing.
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return []
    requirements = [Requirement(line) for line in lines]
    return [
        (requirement.name, str(requirement.specifier), installed_version(requirement.name))
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]


def _driver_version() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        if answer.stdout.strip():
            return answer.stdout.split()[0]
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
        return found.group(1) if found else None
    return None


def _run_probe(name: str) -> dict[str, Any]:
    code = f"from megatron_meco.doctor.probes import answer; answer({name!r})"
    # The child must find the same package as the parent, whatever its working directory.
    own = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (own, os.environ.get("PYTHONPATH", "")) if part)
    try:
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return failure(f"did not finish within {_PROBE_SECONDS} s", "TimeoutError")
    for line in child.stdout.splitlines():
        _, mark, result = line.partition(RESULT_MARK)
        if mark:
            return dict(json.loads(result))
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    how = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
    return failure(f"crashed with {how}" + (f": {lines[-1]}" if lines else ""), "Crash")
