"""Run the training script and `meco` commands in processes that have torch and Megatron loaded.

Loading torch and Megatron costs about 20 s, more than a small run. A server process
(`multiprocessing`'s forkserver) imports them once. Each command is a process forked from it, with
the environment that `torchrun --nproc-per-node 1` would set, and executes the script or the command
as it is. The losses equal those of a run under torchrun (`tests/study/test_study.py`). CPU only.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.util
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "examples/pretrain_gpt.py"
# One thread for each run: runs go side by side, and such small steps gain nothing from two.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_LOGS": "-torch.utils.cpp_extension",
}
# Imported by the server: all that costs a run seconds.
_PRELOADED = "benchmarks.study.preloaded"
_SECONDS_TO_END = 5.0
_running: set[Any] = set()
_interrupted = threading.Event()


class RunFailed(Exception):
    """A process that ended with another status than 0; the message ends its log."""


def train(flags: Sequence[str], log: Path) -> None:
    """Run the training script with these flags and wait for it.

    Args:
        flags: All flags of the run.
        log: Where its output goes.

    Raises:
        RunFailed: When it ended with an error.
    """
    call(_train, (list(flags),), log)


def meco(arguments: Sequence[str], log: Path) -> None:
    """Run a `meco` command and wait for it.

    Args:
        arguments: What stands after `meco`.
        log: Where its output goes.

    Raises:
        RunFailed: When it ended with an error.
    """
    call(_meco, (list(arguments),), log)


def call(function: Callable[..., int], arguments: tuple[Any, ...], log: Path) -> None:
    """Call a function that returns an exit status, in a process of its own.

    Args:
        function: A function of a module.
        arguments: Its arguments.
        log: Where the output of the process goes.

    Raises:
        RunFailed: When it returned another status than 0, or raised.
    """
    if _interrupted.is_set():
        raise RunFailed("interrupted")
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED])
    process = context.Process(target=_logged, args=(function, arguments, str(log)))
    process.start()
    _running.add(process)
    try:
        process.join()
    finally:
        _running.discard(process)
    if process.exitcode != 0:
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        end = "\n".join(lines[-15:])
        raise RunFailed(f"exit status {process.exitcode}, see {log}, which ends:\n{end}")


def interrupt() -> None:
    """End all processes that `call` waits for, from another thread, and start no more.

    By an interrupt, so that they end processes of their own, such as Megatron's writer. An
    interrupt may be lost in a destructor, so it is repeated; the last resort is a kill.
    """
    _interrupted.set()
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGINT, signal.SIGKILL):
        alive = [process for process in _running if process.is_alive()]
        for process in alive:
            os.kill(process.pid, number)
        end = time.monotonic() + _SECONDS_TO_END
        while any(process.is_alive() for process in alive) and time.monotonic() < end:
            time.sleep(0.1)


def _train(flags: list[str]) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    sys.argv = [SCRIPT, *flags]
    runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")
    return 0


def _meco(arguments: list[str]) -> int:
    from megatron_meco.cli import main

    return main(arguments)


def _logged(function: Callable[..., int], arguments: tuple[Any, ...], log: str) -> None:
    """Be the process."""
    os.chdir(ROOT)
    with open(log, "w", encoding="utf-8", errors="replace", buffering=1) as out:
        # Libraries write to the descriptors themselves.
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        stream = os.fdopen(1, "wb", closefd=False)
        sys.stdout = sys.stderr = io.TextIOWrapper(
            stream, encoding="utf-8", errors="replace", line_buffering=True
        )
        status: int | str | None = 0
        try:
            status = function(*arguments)
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
            status = 1
        with contextlib.suppress(ValueError):
            sys.stdout.flush()
        # Megatron's writer of checkpoints keeps a process of its own, which ends here.
        multiprocessing.util._exit_function()
        # Threads of the process group must not keep a finished run alive.
        os._exit(0 if status in (0, None) else 1)
