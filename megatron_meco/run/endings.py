"""What the end of a failed run's log means, in a few lines instead of torchrun's tracebacks."""

from __future__ import annotations

import re
from pathlib import Path

_TAIL_BYTES = 1 << 18
_MOST_LINES = 6
_REFUSAL = "meco: error: "
_TRACEBACK = "Traceback (most recent call last):"
_EXCEPTION = re.compile(
    r"^(?:\[rank\d+\]: *)?((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b.*)"
)
# torchrun puts these before lines of ranks, or Slurm does.
_RANK = re.compile(r"^(?:\[(?:rank|default)?\d+\]: ?|\d+: )+")

# What is found in the log's end, what it means, and the remedy.
_MEANINGS = (
    (
        r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
        "a GPU's memory is too small for this run. Lower micro-batch-size, raise "
        "tensor-model-parallel-size, or recompute activations (recompute-granularity: full, "
        "recompute-method: uniform, recompute-num-layers: 1).",
    ),
    (
        r"No space left on device|Errno 28",
        "a disk is full. Make room (old checkpoints?) and give the same command again.",
    ),
    (
        r"Disk quota exceeded",
        "the quota of this user is used up. Make room and give the same command again.",
    ),
    (
        r"EADDRINUSE|[Aa]ddress already in use",
        "another program listens on the port. Give another master-port in launch.",
    ),
    (
        r"Watchdog caught collective operation timeout|collective operation timeout|"
        r"Timed out waiting \d+ms for",
        "a rank waited in vain for the others. The rank that stopped first is the one to look at; "
        "where ranks wait for a large corpus to be planned, `meco plan RUN.yaml --build` does that "
        "ahead, and distributed-timeout-minutes gives more time.",
    ),
    (
        r"found NaN|Unexpected result nan|found Inf|NaN in (?:local )?(?:forward|grad)",
        "the loss or a gradient is no longer a number. Look at the losses before it; lower lr, or "
        "go on from an earlier checkpoint (ckpt-step).",
    ),
    (
        r"value from checkpoint .* is not equal to the (?:input argument|currently set argument)",
        "the checkpoint was saved with another model. Give the value that it has, or another "
        "folder with save.",
    ),
    (
        r"ModuleNotFoundError|ImportError",
        "something is not installed. `meco doctor` says what is missing and how to mend it.",
    ),
    (
        r"NCCL error|ncclSystemError|ncclInternalError|ncclRemoteError|CUDA error|CUDA driver",
        "the GPUs or their network failed. `meco doctor` checks this host; with "
        "`launch: {env: {NCCL_DEBUG: INFO}}` NCCL says more.",
    ),
    (
        r"Bus error|Signal 7 \(SIGBUS\)|exitcode: -7\b|unable to allocate shared memory|/dev/shm",
        "shared memory is full. Give the container more of it (--shm-size), or write "
        "num-workers: 0.",
    ),
    (
        r"Signal 9 \(SIGKILL\)|exitcode *: -9\b|DataLoader worker .* killed by signal: Killed",
        "a process was killed from outside, most often because the host's memory was full. Lower "
        "num-workers or micro-batch-size, or give the job more memory.",
    ),
    (
        r"Signal 11 \(SIGSEGV\)|exitcode *: -11\b|Segmentation fault",
        "a process crashed inside of a library. `meco doctor` checks what is installed.",
    ),
    (
        r"Signal 15 \(SIGTERM\)|got signal: 15|exitcode *: -15\b|DUE TO TIME LIMIT|CANCELLED AT",
        "the run was ended from outside, as by a time limit. The same command goes on from the "
        "last checkpoint.",
    ),
    (
        r"RendezvousTimeoutError|RendezvousConnectionError|failed to connect to|"
        r"client socket has (?:timed out|failed)",
        "the nodes did not find each other. Check master-addr and master-port in launch, and that "
        "every node was started.",
    ),
)


def tail_of(log: Path) -> str:
    """The end of a log, at most 256 KiB."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")


def refusal_in(text: str) -> str | None:
    """MeCo's own refusal, without `meco: error: `; None where there is none."""
    found = [line.partition(_REFUSAL)[2] for line in text.splitlines() if _REFUSAL in line]
    return found[0].strip() if found else None


def has_failed(text: str) -> bool:
    """Whether torchrun or a rank says that the run has failed."""
    return "ChildFailedError" in text or "SignalException" in text or refusal_in(text) is not None


def meaning_of(text: str) -> str | None:
    """What the first cause in the end of a log means; None where it is not known."""
    # The rank's own words come first: torchrun then ends the others with SIGTERM.
    before, _, _ = text.partition("ChildFailedError")
    for part in (_first_traceback(before), before, text):
        for pattern, meaning in _MEANINGS:
            if re.search(pattern, part):
                return meaning
    return None


def last_lines(text: str) -> list[str]:
    """The lines that say what happened: the end of the first rank's traceback, or of the log."""
    found = _first_traceback(text.partition("ChildFailedError")[0])
    lines = [line.rstrip() for line in (found or text).splitlines() if line.strip()]
    if not found:
        lines = [line for line in lines if not _of_torchrun(line)]
    return lines[-_MOST_LINES:]


def _of_torchrun(line: str) -> bool:
    return "torch/distributed/" in line or "torch.distributed.elastic" in line or line[:1] in "=-"


def _first_traceback(text: str) -> str:
    """The first traceback of a rank up to its exception, or nothing."""
    lines = [_RANK.sub("", line) for line in text.splitlines()]
    starts = [number for number, line in enumerate(lines) if line.startswith(_TRACEBACK)]
    for start in starts:
        body: list[str] = []
        for line in lines[start + 1 :]:
            body.append(line)
            if _EXCEPTION.match(line):
                break
        else:
            continue
        if "torch/distributed/run.py" not in "".join(body):
            return "\n".join(body)
    return ""
