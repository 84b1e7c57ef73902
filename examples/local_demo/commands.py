"""Run the demo's commands: print each one, show, hide or follow what it writes, keep a log of it.

Every command can be typed as it is printed, in the repository root; all are kept in `commands.sh`.
One that fails raises `CommandFailed`, which knows its log. Children run in sessions of their own,
so an interrupt reaches this process alone; it then ends them, and Megatron's launcher passes the
signal on to its ranks. Costs nothing worth a number. Given up: Windows, which has no
pseudo-terminals.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

Command = Sequence[str]
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_SECONDS_TO_END = 15


class CommandFailed(Exception):
    """A command that ended with another status than 0.

    Attributes:
        command: The command line.
        status: Its exit status.
        log: Where its output is.
    """

    def __init__(self, command: Command, status: int, log: Path) -> None:
        super().__init__(shlex.join(command), status, log)
        self.command, self.status, self.log = command, status, log

    def last_lines(self, number: int) -> list[str]:
        """Return the end of the log, as a terminal would show it."""
        text = _ESCAPES.sub("", self.log.read_text(encoding="utf-8", errors="replace"))
        # A progress bar writes over its own line.
        lines = [line.rstrip().rpartition("\r")[2] for line in text.splitlines()]
        return [line for line in lines if line][-number:]


class Commands:
    """Runs commands in one folder and logs them.

    Args:
        root: Where commands run.
        output: Where `commands.sh` and the folder `logs` are written.
        console: The terminal.
        environment: What commands find in their environment.
    """

    def __init__(
        self, root: Path, output: Path, console: Console, environment: dict[str, str]
    ) -> None:
        self._root = root
        self._script = output / "commands.sh"
        self._logs = output / "logs"
        self._console = console
        self._environment = environment
        self._logs.mkdir(parents=True, exist_ok=True)
        threads = f"export OMP_NUM_THREADS={environment['OMP_NUM_THREADS']}\n"
        self._script.write_text(f"# The commands of the last `make demo`.\ncd {root}\n{threads}")

    def print(self, command: Command) -> None:
        """Print a command as one can type it, dimmed, and keep it."""
        text = Text(broken(command, self._console.width), style="dim")
        self._console.print(text, soft_wrap=True)
        self.keep(command)

    def keep(self, command: Command) -> None:
        """Add a command to `commands.sh`."""
        with self._script.open("a") as script:
            script.write(f"\n{broken(command, 100)}\n")

    def log_path(self, name: str) -> Path:
        """Return where a log is."""
        return self._logs / f"{name}.log"

    def show(self, command: Command, name: str, max_lines: int | None = None) -> None:
        """Run a command and show what it writes, or the first lines of it."""
        log = self.log_path(name)
        with (
            self._terminal() as (near, far),
            self._started(command, stdout=far, stderr=far) as process,
        ):
            os.close(far)
            _copy(near, log, max_lines)
            status = process.wait()
        if status:
            raise CommandFailed(command, status, log)

    @contextlib.contextmanager
    def background(self, command: Command, name: str, output: Path) -> Iterator[None]:
        """Run a command beside others, into a file; leaving the block waits for it."""
        log = self.log_path(name)
        with (
            log.open("w") as errors,
            output.open("w") as out,
            self._started(command, stdout=out, stderr=errors) as process,
        ):
            yield
            status = process.wait()
        if status:
            raise CommandFailed(command, status, log)

    def follow(self, command: Command, name: str, on_line: Callable[[str], None]) -> Path:
        """Run a command, hand every line that it writes to a function, and show nothing.

        Returns:
            The log.
        """
        log = self.log_path(name)
        with (
            log.open("w", encoding="utf-8") as out,
            self._started(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
        ):
            for line in io.TextIOWrapper(process.stdout, errors="replace"):
                out.write(line)
                out.flush()
                on_line(line)
            status = process.wait()
        if status:
            raise CommandFailed(command, status, log)
        return log

    @contextlib.contextmanager
    def _started(self, command: Command, **streams: Any) -> Iterator[subprocess.Popen[Any]]:
        """Start a process, and end it when the block is left early."""
        process: subprocess.Popen[Any] = subprocess.Popen(
            command,
            cwd=self._root,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **streams,
        )
        try:
            yield process
        finally:
            _end(process)

    @contextlib.contextmanager
    def _terminal(self) -> Iterator[tuple[int, int]]:
        """Give a pair (to read from, for the command to write to)."""
        if sys.stdout.isatty():
            # A command that finds a terminal shows its progress bar and its colours.
            near, far = pty.openpty()
            size = struct.pack("HHHH", self._console.height, self._console.width, 0, 0)
            fcntl.ioctl(far, termios.TIOCSWINSZ, size)
        else:
            near, far = os.pipe()
        try:
            yield near, far
        finally:
            os.close(near)


def broken(command: Command, width: int) -> str:
    """Return a command line, broken before its flags where it is longer than the width."""
    lines, line = [], shlex.quote(command[0])
    for group in _groups(command[1:]):
        if len(line) + len(group) + 3 > width:
            lines.append(f"{line} \\")
            line = f"   {group}"
        else:
            line += f" {group}"
    return "\n".join([*lines, line])


def changed(command: Command, other: Command) -> list[str]:
    """Return the flags, with their values, that one command has and another one has not."""
    others = set(_groups(other))
    groups = [group for group in _groups(command) if group not in others]
    # Another free port is no difference.
    return [word for group in groups if "--master-port" not in group for word in shlex.split(group)]


def _groups(words: Command) -> list[str]:
    """Return words as one types them, a flag together with its values."""
    groups: list[str] = []
    takes_values = False
    for word in words:
        if takes_values and not word.startswith("--") and not word.endswith(".py"):
            groups[-1] += f" {shlex.quote(word)}"
        else:
            groups.append(shlex.quote(word))
            takes_values = word.startswith("--")
    return groups


def _copy(near: int, log: Path, max_lines: int | None) -> None:
    """Copy what comes to the log and, up to a number of lines, to the terminal."""
    sys.stdout.flush()
    shown = 0
    with log.open("wb") as out:
        while data := _read(near):
            out.write(data)
            out.flush()
            if max_lines is not None:
                lines = data.splitlines(keepends=True)[: max(0, max_lines - shown)]
                data = b"".join(lines)
                shown += data.count(b"\n")
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        # How a pseudo-terminal says that the other end is closed.
        return b""


def _end(process: subprocess.Popen[Any]) -> None:
    if process.poll() is not None:
        return
    # A second interrupt must not leave anything running.
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_END)
                return
    finally:
        signal.signal(signal.SIGINT, earlier)
