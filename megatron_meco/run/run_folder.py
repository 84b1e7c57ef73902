"""The folder of a run: what was started in it and when, beside Megatron's checkpoints.

    runs/NAME/logs/001/   run.yaml, command.sh, versions.txt, log.txt of the first start
    runs/NAME/tensorboard, runs/NAME/iter_...

Each start has a folder of its own, so a restart overwrites nothing. A lock keeps two starts from
training into one folder; torchrun inherits it, so it holds for as long as the run does.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_meco.errors import MeCoError

LOG = "log.txt"
_LOGS = "logs"
_LAST = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Start:
    """One start of a run.

    Attributes:
        folder: Where its files are.
        lock: A file descriptor that is locked while it is open here or in a process that inherits
            it; None where the file system has no locks.
    """

    folder: Path
    lock: int | None

    @property
    def log(self) -> Path:
        """Where the output of the run goes."""
        return self.folder / LOG


def begin(folder: Path, files: dict[str, str], node: str = "") -> Start:
    """Make the folder of a new start.

    Args:
        folder: That of the run.
        files: Texts by name.
        node: Tells nodes apart that share the folder.

    Raises:
        MeCoError: Another start is still going, or the folder cannot be written.
    """
    suffix = f"-{node}" if node else ""
    lock = None
    try:
        logs = folder / _LOGS
        logs.mkdir(parents=True, exist_ok=True)
        lock = _lock(logs / f".lock{suffix}", folder)
        own = _next(logs, suffix)
        for name, text in files.items():
            (own / name).write_text(text, encoding="utf-8")
    except OSError as error:
        if lock is not None:
            os.close(lock)
        raise MeCoError(
            f"cannot be written ({error.strerror})",
            where=str(folder),
            remedy="Give another folder with save.",
        ) from error
    return Start(own, lock)


def last_log(folder: Path) -> Path | None:
    """The log of the latest start in a run's folder, or None."""
    logs = folder / _LOGS
    found = [path for path in logs.glob(f"*/{LOG}") if path.parent.name[:3].isdigit()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def lock_of(log: Path) -> Path | None:
    """The file that is locked while the run of a log is going; None: not a log of `meco train`."""
    logs = log.absolute().parent.parent
    if log.name != LOG or logs.name != _LOGS:
        return None
    _, _, node = log.absolute().parent.name.partition("-")
    return logs / f".lock{f'-{node}' if node else ''}"


def last_checkpoint_file(folder: Path) -> Path | None:
    """The file in which Megatron names the latest checkpoint of a folder; None without one."""
    path = folder / _LAST
    return path if path.is_file() else None


def last_checkpoint(folder: Path) -> int | None:
    """The iteration of the latest checkpoint in a folder; None where there is none."""
    try:
        return int((folder / _LAST).read_text("ascii"))
    except (OSError, ValueError):
        # Megatron also writes `release`, for weights without a training state.
        return None


def versions() -> str:
    """What is installed here, one line for each package, this one's first."""
    installed = {
        dist.metadata["Name"]: dist.version
        for dist in importlib.metadata.distributions()
        if dist.metadata["Name"]
    }
    first = [name for name in ("megatron-meco", "megatron-core", "torch") if name in installed]
    others = sorted(installed.keys() - set(first), key=str.lower)
    host = f"# {platform.node()}, {platform.platform()}, Python {platform.python_version()}"
    lines = [host, f"# {sys.executable}"]
    return "\n".join([*lines, *(f"{name}=={installed[name]}" for name in [*first, *others]), ""])


def _lock(path: Path, folder: Path) -> int | None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise MeCoError(
            "a run is still going in this folder",
            where=str(folder),
            remedy=f"`meco watch {folder}` shows it; end it first, or give another folder with "
            "save.",
        ) from None
    except OSError:
        # Some network file systems have none.
        with contextlib.suppress(OSError):
            os.close(handle)
        return None
    return handle


def _next(logs: Path, suffix: str) -> Path:
    taken = [int(path.name[:3]) for path in logs.glob(f"[0-9][0-9][0-9]{suffix}")]
    number = max(taken, default=0) + 1
    while True:
        own = logs / f"{number:03d}{suffix}"
        try:
            own.mkdir()
            return own
        except FileExistsError:
            number += 1
