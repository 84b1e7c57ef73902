"""What the facts mean: whether training can run here, with what, and a remedy for each problem.

A pure function of `Facts`, so that tests can describe any host. The flags of a run may choose other
kernels than those named here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_meco.doctor.facts import DISTRIBUTION, Facts
from megatron_meco.training.kernels import Kernels, choose_kernels, first_optimizer

Verdict = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: The item checked.
        found: The finding.
        verdict: Only "problem" prevents training.
        remedy: What to do about it; may be empty.
    """

    name: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The report.

    Attributes:
        can_train: True if no check is a problem.
        device: "cuda" or "cpu", where a run started here trains.
        attention: The attention over packed documents that such a run uses.
        layers: Its norms and linear layers.
        optimizer: The optimizer kernels that such a run uses.
        checks: One entry per item.
        gpus: Name, capability and memory of each visible GPU.
    """

    can_train: bool
    device: str
    attention: str
    layers: str
    optimizer: str
    checks: tuple[Check, ...]
    gpus: tuple[dict[str, Any], ...]


def diagnose(facts: Facts) -> Diagnosis:
    """Judge the facts."""
    has_gpu = bool(facts.torch.get("gpus"))
    kernels = _kernels(facts)
    checks = [
        _check_python(facts),
        *_check_requirements(facts),
        *_check_megatron(facts),
        *_check_torch(facts),
        _check_gpu(facts),
        _check_communication(facts),
        _check_extension(facts),
        _check_transformer_engine(facts),
        _check_apex(facts),
        _check_flash_attention(facts),
    ]
    return Diagnosis(
        can_train=all(check.verdict != "problem" for check in checks),
        device="cuda" if has_gpu else "cpu",
        attention=kernels.attention,
        layers=kernels.layers,
        optimizer=kernels.optimizer,
        checks=tuple(checks),
        gpus=tuple(facts.torch.get("gpus", ())),
    )


def _kernels(facts: Facts) -> Kernels:
    gpu = bool(facts.torch.get("gpus"))
    engine = bool(facts.transformer_engine.get("loads"))
    apex = bool(facts.apex.get("loads"))
    return choose_kernels(
        gpu=gpu,
        engine_layers=engine,
        varlen=bool(facts.torch.get("varlen")),
        optimizer=first_optimizer(gpu=gpu, engine_loads=engine, apex_loads=apex),
    )


def _check_python(facts: Facts) -> Check:
    if tuple(int(part) for part in facts.python.split(".")[:2]) < (3, 12):
        remedy = "Megatron-Core 0.19 needs Python 3.12 or later: `make venv` finds or asks for one"
        return Check("Python", facts.python, "problem", remedy)
    if facts.system != "Linux":
        remedy = "Megatron-Core is made for Linux; expect gaps on this system"
        return Check("Python", f"{facts.python} on {facts.system}", "warning", remedy)
    return Check("Python", facts.python)


def _check_requirements(facts: Facts) -> list[Check]:
    """Report dependencies that are missing or have an unsupported version."""
    if not facts.requirements:
        remedy = "install it: `make venv`, or `pip install .` in this repository"
        return [Check(DISTRIBUTION, "not installed, only importable", "warning", remedy)]
    # Late, because `meco doctor` must also run where this dependency is missing.
    from packaging.specifiers import SpecifierSet

    checks = []
    for name, allowed, version in facts.requirements:
        if version is None:
            remedy = f"install it: pip install '{name}{allowed}'"
            checks.append(Check(name, "not installed", "problem", remedy))
        elif not SpecifierSet(allowed).contains(version, prereleases=True):
            remedy = f"{allowed} is supported: pip install '{name}{allowed}'"
            checks.append(Check(name, version, "problem", remedy))
    return checks


def _supported(facts: Facts, name: str) -> str:
    allowed = next((allowed for found, allowed, _ in facts.requirements if found == name), "")
    return f" (supported: {allowed})" if allowed else ""


def _is_reported(facts: Facts, name: str) -> bool:
    return any(found == name and version is None for found, _, version in facts.requirements)


def _check_megatron(facts: Facts) -> list[Check]:
    found = facts.megatron
    if not found or "version" not in found:
        if _is_reported(facts, "megatron-core"):
            return []
        remedy = "install it: pip install 'megatron-core[training]'"
        return [Check("megatron-core", found.get("error", "not installed"), "problem", remedy)]
    version = found["version"] + _supported(facts, "megatron-core")
    checks = [Check("megatron-core", version)]
    if "error" in found:
        remedy = "fix what the import names, or rebuild the environment: make clean venv"
        what = f"{version}; cannot be imported: {found['error']}"
        checks = [Check("megatron-core", what, "problem", remedy)]
    if not found.get("training"):
        remedy = (
            "this installation leaves megatron.training out: install the wheel of megatron-core, "
            "or put a clone of Megatron-LM on PYTHONPATH"
        )
        checks.append(Check("megatron.training", "missing", "problem", remedy))
    else:
        checks.append(Check("megatron.training", "present"))
    if not found.get("helpers", True):
        remedy = (
            "the blended data sets need it: install the wheel of megatron-core, or run make in "
            "megatron/core/datasets"
        )
        checks.append(Check("megatron helpers_cpp", "not built", "problem", remedy))
    return checks


def _check_torch(facts: Facts) -> list[Check]:
    found = facts.torch
    if "version" not in found:
        if not found and _is_reported(facts, "torch"):
            return []
        remedy = "install it again: make clean venv"
        what = found.get("error", "not installed")
        return [Check("torch", what, "problem", remedy)]
    build = f"CUDA {found['cuda_build']}" if found.get("cuda_build") else "no CUDA"
    return [Check("torch", f"{found['version']}, built with {build}")]


def _check_gpu(facts: Facts) -> Check:
    found = facts.torch
    driver = f"driver {facts.driver}" if facts.driver else "driver unknown"
    if gpus := found.get("gpus"):
        kinds: dict[str, int] = {}
        for gpu in gpus:
            kind = f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB"
            kinds[kind] = kinds.get(kind, 0) + 1
        what = "; ".join(f"{count} x {kind}" for kind, count in kinds.items()) + f"; {driver}"
        if any(float(gpu["capability"]) < 8.0 for gpu in gpus):
            remedy = "bf16 and the packed attention kernels need capability 8.0 (Ampere) or later"
            return Check("GPU", what, "warning", remedy)
        return Check("GPU", what)
    reason = found.get("no_gpu", "torch cannot tell")
    if broken := found.get("broken_gpu"):
        remedy = (
            "mend the driver or install a torch that fits it; to train on the CPU all the same, "
            "set CUDA_VISIBLE_DEVICES to nothing"
        )
        return Check("GPU", f"{reason}: {broken}", "problem", remedy)
    remedy = "fine for the demo and the tests; real training wants GPUs"
    return Check("GPU", f"none: {reason}", "note", remedy)


def _check_communication(facts: Facts) -> Check:
    found = facts.torch
    nccl = found.get("nccl_version") or ("available" if found.get("nccl") else "missing")
    what = f"NCCL {nccl}, Gloo {'available' if found.get('gloo') else 'missing'}"
    needed = "nccl" if found.get("gpus") else "gloo"
    if "version" in found and not found.get(needed):
        remedy = f"this torch cannot train over {needed}: install the one that constraints.txt pins"
        return Check("communication", what, "problem", remedy)
    return Check("communication", what)


def _check_extension(facts: Facts) -> Check:
    found = facts.extension
    rebuild = "build it: make venv (or pip install -e . with a C++ compiler)"
    if "path" not in found:
        return Check("C++ extension", found.get("error", "missing"), "problem", rebuild)
    what = f"{found.get('compiler', 'an unknown compiler')}, {found['path']}"
    if error := found.get("error") or found.get("self_test"):
        remedy = "the sources and the built file disagree: make clean venv"
        return Check("C++ extension", f"{what}; self-test: {error}", "problem", remedy)
    return Check("C++ extension", f"self-test passed, {what}")


def _check_transformer_engine(facts: Facts) -> Check:
    name = "Transformer Engine"
    found = facts.transformer_engine
    has_gpu = bool(facts.torch.get("gpus"))
    if not found:
        if has_gpu:
            remedy = "install it for speed and FP8: pip install 'megatron-meco[gpu]'"
            return Check(name, "not installed", "warning", remedy)
        return Check(name, "not installed, not needed without a GPU", "note")
    version = found.get("version", "unknown")
    if not has_gpu:
        # Hidden from a run on the CPU, so that a broken one harms nobody here.
        return Check(name, f"{version}, not used without a GPU", "note")
    if found.get("loads"):
        return Check(name, version)
    what = f"{version}; cannot be loaded: {found.get('error', 'FusedAdam is missing')}"
    if found.get("error_type") in (None, "ImportError"):
        # Megatron-Core expects this kind of failure and goes on without.
        return Check(name, what, "warning", "install a build for this torch and CUDA, or remove it")
    return Check(name, what, "problem", "Megatron-Core fails with it: install a fitting build")


def _check_apex(facts: Facts) -> Check:
    found = facts.apex
    if not found:
        return Check(
            "apex",
            "not installed, not needed; gradient accumulation fusion is off without it",
            "note",
        )
    version = found.get("version", "unknown")
    if not found.get("real"):
        what = f"{version}, which is not NVIDIA's"
        return Check("apex", what, "warning", "remove it, it misleads: pip uninstall apex")
    if not facts.torch.get("gpus"):
        return Check("apex", f"{version}, not used without a GPU", "note")
    if found.get("loads"):
        return Check("apex", version)
    what = f"{version}; its kernels cannot be loaded: {found.get('error', 'FusedAdam is missing')}"
    remedy = "rebuild NVIDIA's apex with its C++ and CUDA extensions, or remove it"
    return Check("apex", what, "warning", remedy)


def _check_flash_attention(facts: Facts) -> Check:
    found = facts.flash_attention
    if not found:
        gpus = facts.torch.get("gpus") or []
        old = any(float(gpu["capability"]) < 9.0 for gpu in gpus)
        if old and facts.transformer_engine.get("loads"):
            remedy = (
                "install it: before Hopper, Transformer Engine's own attention takes no packed "
                "documents, and what it falls back to holds a score for every pair of tokens"
            )
            return Check("flash-attn", "not installed", "warning", remedy)
        return Check("flash-attn", "not installed, not needed", "note")
    if found.get("loads"):
        return Check("flash-attn", f"{found['version']} (used through Transformer Engine alone)")
    what = f"{found.get('version', 'unknown')}; cannot be loaded: {found.get('error')}"
    return Check("flash-attn", what, "warning", "install a build for this torch, or remove it")
