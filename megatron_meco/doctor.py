"""`meco doctor`: what is installed, what a run here will really use, what is wrong, how to mend it.

Every heavy or fragile import (torch, Transformer Engine, apex, Megatron, the compiled extension) is
tried in a process of its own, all at the same time: a broken library may print, hang or crash there
and is reported here in one line. The verdicts are a pure function of the collected facts. Supported
versions are read from this package's own metadata, so they are written down once.

Costs the slowest import, a few seconds. What was given up: nothing is computed on the GPU, so a
card that answers and then fails is not found.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_meco.training.kernels import Kernels, choose_kernels, first_optimizer

Verdict = Literal["ok", "note", "warning", "problem"]

_PROBE_SECONDS = 180
_RESULT_MARK = "meco-doctor-result:"
_DISTRIBUTION = "megatron-meco"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: What was looked at.
        found: What was found.
        verdict: "problem" alone keeps training from running.
        remedy: What to do about it; empty where nothing is to be done.
    """

    name: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Facts:
    """All that the verdicts rest on.

    A probe's result holds "error" (and "error_type") where the import failed, and is empty where
    the package is not there at all.

    Attributes:
        python: Version of this Python.
        system: Name of the operating system.
        requirements: Our own dependencies as (name, allowed versions, installed version or None).
        torch: Version, CUDA build, devices, communication libraries.
        megatron: Version, and whether `megatron.training` is there and can be imported.
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


@dataclass(frozen=True)
class Diagnosis:
    """The report.

    Attributes:
        can_train: True where no check is a problem.
        device: "cuda" or "cpu": where a run started here trains.
        attention: The attention over packed documents that such a run uses.
        layers: Its norms and linear layers.
        optimizer: The optimizer kernels that such a run uses.
        checks: One entry for each thing looked at.
        gpus: Name, capability and memory of each visible GPU.
    """

    can_train: bool
    device: str
    attention: str
    layers: str
    optimizer: str
    checks: tuple[Check, ...]
    gpus: tuple[dict[str, Any], ...]


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_doctor(args: argparse.Namespace) -> int:
    """Print the report.

    Returns:
        0 where training can run, 1 where it cannot.
    """
    diagnosis = diagnose(collect_facts())
    if args.json:
        print(json.dumps(asdict(diagnosis), indent=2))
    else:
        _print(diagnosis)
    return 0 if diagnosis.can_train else 1


# ---- Facts ----


def collect_facts() -> Facts:
    """Look at this host and this environment."""
    with ThreadPoolExecutor(max_workers=len(_PROBES)) as pool:
        results = dict(zip(_PROBES, pool.map(_run_probe, _PROBES), strict=True))
    return Facts(
        python=platform.python_version(),
        system=platform.system(),
        requirements=tuple(_own_requirements()),
        driver=_driver_version(),
        **results,
    )


def _own_requirements() -> list[tuple[str, str, str | None]]:
    try:
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires(_DISTRIBUTION) or []
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return []
    requirements = [Requirement(line) for line in lines]
    return [
        (requirement.name, str(requirement.specifier), _version(requirement.name))
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


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
    code = f"from megatron_meco.doctor import _answer; _answer({name!r})"
    # The parent found this package; the child has to find the same one, from wherever it starts.
    path = os.pathsep.join(
        part
        for part in (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", ""))
        if part
    )
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
        return _failure(f"did not finish within {_PROBE_SECONDS} s", "TimeoutError")
    for line in child.stdout.splitlines():
        _, mark, result = line.partition(_RESULT_MARK)
        if mark:
            return dict(json.loads(result))
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    how = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
    return _failure(f"crashed with {how}" + (f": {lines[-1]}" if lines else ""), "Crash")


def _failure(error: str, error_type: str) -> dict[str, Any]:
    return {"error": error, "error_type": error_type}


# ---- Probes: each runs in a process of its own ----


def _answer(name: str) -> None:
    """Run one probe and print its result for the parent, apart from what libraries print."""
    result = {}
    try:
        for key, value in _PROBES[name]():
            result[key] = value
    # Anything may go wrong inside a broken library, and every way is a finding.
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines()
        result |= _failure(lines[0] if lines else repr(error), type(error).__name__)
        if isinstance(error, ImportError):
            result["error_type"] = "ImportError"
    print(f"\n{_RESULT_MARK}{json.dumps(result)}", flush=True)
    # Some GPU libraries crash while they are torn down; everything is said by now.
    os._exit(0)


# Probes yield what they learn one by one, so that a failure keeps what was learnt before it.
Items = Iterator[tuple[str, Any]]


def _probe_torch() -> Items:
    if importlib.util.find_spec("torch") is None:
        return
    torch = importlib.import_module("torch")
    yield "version", torch.__version__
    yield "cuda_build", torch.version.cuda
    with contextlib.suppress(ImportError):
        yield "varlen", hasattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn")
    distributed = importlib.import_module("torch.distributed")
    has_distributed = distributed.is_available()
    yield "gloo", has_distributed and distributed.is_gloo_available()
    yield "nccl", has_distributed and distributed.is_nccl_available()
    if not torch.cuda.is_available():
        yield "no_gpu", _why_no_gpu(torch)
        if not _gpus_are_hidden():
            # The very rule by which a training run tells a host without a GPU from a broken one.
            cpu = importlib.import_module("megatron_meco.training.cpu")
            yield "broken_gpu", cpu.looks_like_broken_gpu_setup()
        return
    if has_distributed and distributed.is_nccl_available():
        with contextlib.suppress(Exception):
            yield "nccl_version", ".".join(str(part) for part in torch.cuda.nccl.version())
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    yield "gpus", gpus


def _gpus_are_hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1")


def _why_no_gpu(torch: Any) -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if _gpus_are_hidden():
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
    return "torch finds no CUDA device"


def _probe_megatron() -> Items:
    version = _version("megatron-core")
    if version is None and importlib.util.find_spec("megatron") is None:
        return
    yield "version", version or "unknown"
    spec = importlib.util.find_spec("megatron.core")
    if spec is not None and spec.origin is not None:
        helpers = Path(spec.origin).parent / "datasets"
        yield "helpers", any(helpers.glob("helpers_cpp*.so"))
    yield "training", importlib.util.find_spec("megatron.training") is not None
    importlib.import_module("megatron.core.parallel_state")
    yield "imported", True


def _probe_transformer_engine() -> Items:
    if importlib.util.find_spec("transformer_engine") is None:
        return
    yield "version", _version("transformer-engine") or "unknown"
    importlib.import_module("transformer_engine.pytorch")
    # The names that Megatron-Core imports before it decides for these kernels.
    optimizers = importlib.import_module("transformer_engine.pytorch.optimizers")
    yield "loads", hasattr(optimizers, "FusedAdam")


def _probe_apex() -> Items:
    if importlib.util.find_spec("apex") is None:
        return
    yield "version", _version("apex") or "unknown"
    # PyPI's "apex" is a web framework's helper; NVIDIA's is known by its compiled kernels.
    package = Path(importlib.util.find_spec("apex").origin or "").parent  # type: ignore[union-attr]
    real = (package / "optimizers").is_dir()
    yield "real", real
    if real:
        importlib.import_module("torch")  # amp_C finds torch's libraries only once they are loaded
        importlib.import_module("amp_C")
        yield "loads", hasattr(importlib.import_module("apex.optimizers"), "FusedAdam")


def _probe_flash_attention() -> Items:
    if importlib.util.find_spec("flash_attn") is None:
        return
    yield "version", _version("flash-attn") or "unknown"
    importlib.import_module("flash_attn")
    yield "loads", True


def _probe_extension() -> Items:
    core = importlib.import_module("megatron_meco._core")
    path = Path(core.__file__ or "")
    yield "path", str(path)
    # Compilers leave their name in the file; nothing else knows what it was really built with.
    names = re.findall(rb"(?:GCC: \([^)\0]*\) [\d.]+|clang version [\d.]+)", path.read_bytes())
    yield "compiler", names[0].decode("ascii", "replace") if names else "an unknown compiler"
    yield "self_test", _self_test(core)


def _self_test(core: Any) -> str:
    """Pack three documents into packs of four tokens; return "" or what is wrong."""
    numpy = importlib.import_module("numpy")
    order = core.permutation(1000, 7, 0, 0, 1000)
    if sorted(order.tolist()) != list(range(1000)):
        return "the permutation of documents repeats or loses some"
    corpus = core.Corpus(
        sequence_lengths=numpy.array([4, 4, 4], numpy.int32),
        document_indices=None,
        prefix_ids=None,
        prefix_tokens=numpy.zeros(0, numpy.int32),
        prefix_offsets=numpy.zeros(1, numpy.int64),
        bos_id=-1,
        plain_seed=0,
        plain_threshold=0,
    )
    plan = core.build_plan(
        corpus,
        strategy="truncate",
        capacity=4,
        max_documents=2,
        num_packs=None,
        first_document=0,
        num_documents=3,
        range_begin=0,
        range_end=3,
        seed=1,
        repeat_prefix=True,
        num_threads=2,
    )
    if sorted(plan["piece_document"].tolist()) != [0, 1, 2]:
        return "a plan repeats or loses documents"
    return ""


_PROBES: dict[str, Callable[[], Items]] = {
    "torch": _probe_torch,
    "megatron": _probe_megatron,
    "transformer_engine": _probe_transformer_engine,
    "apex": _probe_apex,
    "flash_attention": _probe_flash_attention,
    "extension": _probe_extension,
}


# ---- Verdicts ----


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
    engine = bool(facts.transformer_engine.get("loads"))
    return choose_kernels(
        gpu=bool(facts.torch.get("gpus")),
        engine_layers=engine,
        varlen=bool(facts.torch.get("varlen")),
        optimizer=first_optimizer(engine_loads=engine, apex_loads=bool(facts.apex.get("loads"))),
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
    """Report our dependencies that are missing or outside of what is supported."""
    if not facts.requirements:
        remedy = "install it: `make venv`, or `pip install .` in this repository"
        return [Check(_DISTRIBUTION, "not installed, only importable", "warning", remedy)]
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
        remedy = "mend what the import names, or start afresh: make clean venv"
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
    if found.get("loads"):
        return Check("apex", version)
    what = f"{version}; its kernels cannot be loaded: {found.get('error', 'FusedAdam is missing')}"
    remedy = "rebuild NVIDIA's apex with its C++ and CUDA extensions, or remove it"
    return Check("apex", what, "warning", remedy)


def _check_flash_attention(facts: Facts) -> Check:
    found = facts.flash_attention
    if not found:
        return Check("flash-attn", "not installed, not needed", "note")
    if found.get("loads"):
        return Check("flash-attn", f"{found['version']} (used through Transformer Engine alone)")
    what = f"{found.get('version', 'unknown')}; cannot be loaded: {found.get('error')}"
    return Check("flash-attn", what, "warning", "install a build for this torch, or remove it")


# ---- The report ----

_COLOURS: dict[Verdict, str] = {
    "ok": "green",
    "note": "cyan",
    "warning": "yellow",
    "problem": "bold red",
}


def _print(diagnosis: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in diagnosis.checks:
        found = Text(check.found)
        if check.remedy:
            found.append(f"\n-> {check.remedy}", style="dim" if check.verdict == "note" else "")
        table.add_row(Text(check.verdict, style=_COLOURS[check.verdict]), Text(check.name), found)
    console.print(table)
    console.print()
    plain = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    plain.add_row("A run here uses", Text("CUDA" if diagnosis.device == "cuda" else "the CPU"))
    plain.add_row("attention", Text(diagnosis.attention))
    plain.add_row("layers", Text(diagnosis.layers))
    plain.add_row("optimizer", Text(diagnosis.optimizer))
    console.print(plain)
    console.print()
    problems = sum(check.verdict == "problem" for check in diagnosis.checks)
    if diagnosis.can_train:
        console.print(Text("Training can run here.", style="bold green"))
    else:
        noun = "problem keeps" if problems == 1 else "problems keep"
        console.print(Text(f"{problems} {noun} training from running here.", style="bold red"))
