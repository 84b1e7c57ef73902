"""What runs inside a probe process: imports that may print, hang or crash, and what they show.

`facts` starts one process for each entry of `PROBES` and reads the marked line of its output. This
module imports only Python's library. A probe that raises keeps what it learnt before; one that is
killed or times out does not.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_meco.training.kernels import hide_gpu_libraries

RESULT_MARK = "meco-doctor-result:"


def answer(name: str) -> None:
    """Run one probe and print its result for the parent, apart from what libraries print.

    Ends the process.

    Args:
        name: A key of `PROBES`.
    """
    result = {}
    try:
        for key, value in PROBES[name]():
            result[key] = value
    # A broken library may fail in any way, and each is a finding.
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines()
        result |= failure(lines[0] if lines else repr(error), type(error).__name__)
        if isinstance(error, ImportError):
            result["error_type"] = "ImportError"
    print(f"\n{RESULT_MARK}{json.dumps(result)}", flush=True)
    # Some GPU libraries crash during teardown.
    os._exit(0)


def failure(error: str, error_type: str) -> dict[str, Any]:
    """Return the record of a probe that has no result."""
    return {"error": error, "error_type": error_type}


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


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
            # The same rule as in a training run.
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
    version = installed_version("megatron-core")
    if version is None and importlib.util.find_spec("megatron") is None:
        return
    yield "version", version or "unknown"
    spec = importlib.util.find_spec("megatron.core")
    if spec is not None and spec.origin is not None:
        helpers = Path(spec.origin).parent / "datasets"
        yield "helpers", any(helpers.glob("helpers_cpp*.so"))
    yield "training", importlib.util.find_spec("megatron.training") is not None
    # Imported as a run here imports it.
    cpu = importlib.import_module("megatron_meco.training.cpu")
    if cpu.should_use_cpu():
        hide_gpu_libraries()
    importlib.import_module("megatron.core.parallel_state")
    yield "imported", True


def _probe_transformer_engine() -> Items:
    if importlib.util.find_spec("transformer_engine") is None:
        return
    yield "version", installed_version("transformer-engine") or "unknown"
    importlib.import_module("transformer_engine.pytorch")
    # Megatron-Core imports these names before it uses the kernels.
    optimizers = importlib.import_module("transformer_engine.pytorch.optimizers")
    yield "loads", hasattr(optimizers, "FusedAdam")


def _probe_apex() -> Items:
    if importlib.util.find_spec("apex") is None:
        return
    yield "version", installed_version("apex") or "unknown"
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
    yield "version", installed_version("flash-attn") or "unknown"
    importlib.import_module("flash_attn")
    yield "loads", True


def _probe_extension() -> Items:
    core = importlib.import_module("megatron_meco._core")
    path = Path(core.__file__ or "")
    yield "path", str(path)
    # Compilers leave their name in the file; nothing else records it.
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


PROBES: dict[str, Callable[[], Items]] = {
    "torch": _probe_torch,
    "megatron": _probe_megatron,
    "transformer_engine": _probe_transformer_engine,
    "apex": _probe_apex,
    "flash_attention": _probe_flash_attention,
    "extension": _probe_extension,
}
