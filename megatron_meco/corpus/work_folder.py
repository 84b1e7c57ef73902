"""The folder that a preparation works in, and whether an unfinished one may resume.

`PREFIX.unfinished/` holds the encoder that all tasks use, a plan that says what is being prepared,
and the files of finished tasks. A preparation resumes only with an identical plan: inputs with
their sizes and dates, fields, tokenizer. After any change all tasks run again. A lock on the folder
keeps two preparations of one corpus apart; it goes with its process. A folder without this
package's marker is never touched, and only files under this package's names are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from megatron_meco.corpus.encoder import BulkEncoder, build_encoder, encoder_of
from megatron_meco.corpus.outputs import MARKER, is_work_folder, work_folder_of
from megatron_meco.errors import DataError
from megatron_meco.whole_file import whole_file, whole_folder
from megatron_meco.wording import counted

_FORMAT = 1
_LOGS = "logs"
_WORK_FILES = re.compile(
    r"\.?(task-\d{5,}|corpus|encoder\.json|plan\.json|executor\.pickle|publishing)(\..*)?"
)
_ENCODER = "encoder.json"
_PLAN = "plan.json"


def make_work_folder(
    folder: str | os.PathLike[str], *, sentences: dict[str, Any] | None = None, **tokenizer: Any
) -> dict[str, Any]:
    """Make a folder for a `MegatronWriter` in your own pipeline.

    Args:
        folder: A new folder, or one from an earlier call; all tasks must reach it.
        sentences: From `learn_sentences`, to store each document as several sequences.
        **tokenizer: The arguments of `build_encoder`.

    Returns:
        What `build_encoder` returns, and `sentences`.

    Raises:
        MeCoError: As `build_encoder`; or the folder exists and was not made by this function.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        check_work_folder(folder)
    chosen = {**build_encoder(**tokenizer), "sentences": sentences}
    if not folder.exists():
        make_marked_folder(folder)
    write_encoder(folder, chosen)
    return chosen


def make_marked_folder(path: Path) -> None:
    """Make a new work folder; it appears with its marker.

    Raises:
        DataError: It cannot be made.
    """

    def refuse(reason: str) -> DataError:
        return DataError(
            f"cannot be made ({reason})",
            where=str(path),
            remedy="Choose an --output in a folder that can be written.",
        )

    with whole_folder(path, refuse) as folder:
        marker = {"format": _FORMAT, "made_by": "megatron-meco"}
        (folder / MARKER).write_text(json.dumps(marker), encoding="utf-8")


def check_work_folder(path: Path) -> None:
    """Refuse an existing folder that this version of this package did not make.

    Raises:
        DataError: It is no work folder of this version.
    """
    if path.is_symlink() or not is_work_folder(path):
        raise DataError(
            "is no work folder that this package made, and stays as it is",
            where=str(path),
            remedy="Move or remove it yourself, or choose another --output.",
        )
    try:
        found: Any = orjson.loads((path / MARKER).read_bytes())
    except (OSError, ValueError):
        found = None
    told = found.get("format") if isinstance(found, dict) else None
    if told != _FORMAT:
        raise DataError(
            f"a work folder of format {told!r}, this version has {_FORMAT}",
            where=str(path / MARKER),
            remedy="Continue with the version that made it, or remove the folder.",
        )


def clear_work_folder(path: Path) -> None:
    """Remove this package's files from a work folder, apart from its marker.

    Raises:
        OSError: Something cannot be removed.
    """
    for entry in list(path.iterdir()):
        if entry.name == _LOGS and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif _WORK_FILES.fullmatch(entry.name) and not entry.is_dir():
            entry.unlink()


def remove_temporary_files(path: Path) -> None:
    """Remove the files of killed writers from a work folder in which nobody writes.

    Raises:
        OSError: Something cannot be removed.
    """
    for entry in list(path.iterdir()):
        if entry.name.startswith(".") and _WORK_FILES.fullmatch(entry.name):
            entry.unlink()


def remove_work_folder(path: Path) -> None:
    """Remove a work folder; it stays, with its marker, if it holds files of another origin.

    Raises:
        OSError: Something cannot be removed.
    """
    clear_work_folder(path)
    if [entry.name for entry in path.iterdir()] == [MARKER]:
        (path / MARKER).unlink()
        path.rmdir()


def write_encoder(folder: Path, chosen: dict[str, Any]) -> None:
    """Write an encoder to a folder, for the processes that work there.

    Args:
        folder: The folder.
        chosen: From `choose_encoder`, and anything else that belongs to it.

    Raises:
        DataError: The folder cannot be written to.
    """
    write_synced(folder / _ENCODER, json.dumps({**chosen, "compared_on": platform.node()}))


@lru_cache(maxsize=2)
def load_encoder(folder: Path) -> tuple[BulkEncoder, dict[str, Any]]:
    """Return the encoder in a folder and its settings; one process loads it once.

    Raises:
        DataError: There is none.
    """
    settings = load_settings(folder)
    try:
        return encoder_of(settings), settings
    # Damaged tokenizers raise exceptions of any type.
    except Exception as error:
        raise _no_encoder(folder, error) from error


def load_settings(folder: Path) -> dict[str, Any]:
    """Return what `write_encoder` was given.

    Raises:
        DataError: It cannot be read.
    """
    try:
        settings = orjson.loads((folder / _ENCODER).read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise _no_encoder(folder, error) from None
    return settings


def _no_encoder(folder: Path, error: Exception) -> DataError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(
        f"no readable encoder ({reason})",
        where=str(folder / _ENCODER),
        remedy="Remove the work folder, and prepare again.",
    )


class WorkFolder:
    """An unfinished preparation, locked while this object is entered.

    Args:
        prefix: The corpus.
    """

    def __init__(self, prefix: Path) -> None:
        self.path = work_folder_of(prefix)
        self._lock: int | None = None

    def __enter__(self) -> Self:
        while self._lock is None:
            if not os.path.lexists(self.path):
                self._make()
            check_work_folder(self.path)
            self._lock = self._locked()
        return self

    def _locked(self) -> int | None:
        """Return the opened and locked folder; None if its owner finished and removed it."""
        descriptor = None
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            if descriptor is not None:
                os.close(descriptor)
            is_busy = isinstance(error, BlockingIOError)
            raise DataError(
                "another process is preparing this corpus"
                if is_busy
                else f"cannot be used ({error.strerror or error})",
                where=str(self.path),
                remedy="Wait for it, or choose another --output."
                if is_busy
                else "Choose an --output in a folder that can be written.",
            ) from None
        if descriptor is not None:
            os.close(descriptor)
        return None

    def _make(self) -> None:
        try:
            make_marked_folder(self.path)
        except DataError:
            # Another process may have made it meanwhile.
            if not is_work_folder(self.path):
                raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def begin(
        self,
        plan: dict[str, Any],
        chosen: dict[str, Any],
        *,
        restart: bool,
        is_alone: bool = True,
    ) -> None:
        """Begin a preparation, or resume one.

        Args:
            plan: What is prepared.
            chosen: The encoder.
            restart: Whether to start afresh if the unfinished work is of another plan.
            is_alone: Whether no task of an earlier call can still be running, as on a cluster.

        Raises:
            DataError: An unfinished preparation of something else is here.
        """
        try:
            earlier = orjson.loads((self.path / _PLAN).read_bytes()) or "damaged"
        except FileNotFoundError:
            earlier = None
        except (OSError, ValueError):
            earlier = "damaged"
        if earlier != plan:
            if earlier is not None and not restart:
                raise DataError(
                    f"an unfinished preparation of something else: {_difference(earlier, plan)}",
                    where=str(self.path),
                    remedy="Start afresh with --overwrite, or undo the change to go on.",
                )
            self.clear()
        if is_alone:
            with contextlib.suppress(OSError):
                remove_temporary_files(self.path)
        write_encoder(self.path, chosen)
        write_synced(self.path / _PLAN, json.dumps(plan))

    def clear(self) -> None:
        """Remove the work in the folder; the folder itself carries the lock."""
        try:
            clear_work_folder(self.path)
        except OSError as error:
            raise DataError(
                f"cannot be emptied ({error.strerror or error})",
                where=str(error.filename or self.path),
                remedy="Remove it yourself, or choose another --output.",
            ) from None

    def remove(self) -> None:
        """Remove the folder, as far as it is this package's."""
        with contextlib.suppress(OSError):
            # Another process may have removed this one and made a new one.
            if self._lock and os.path.samestat(os.fstat(self._lock), os.stat(self.path)):
                remove_work_folder(self.path)


def _difference(earlier: Any, plan: dict[str, Any]) -> str:
    # An import of shards has no `inputs`.
    if not isinstance(earlier, dict) or not _are_inputs(earlier.get("inputs", [])):
        return f"{_PLAN} is damaged"
    before, now = earlier.get("inputs", []), plan.get("inputs", [])
    for one, other in zip(before, now, strict=False):
        if one != other:
            if one[0] != other[0]:
                return f"{other[0]} stands where {one[0]} stood"
            what = f"{one[1]:,} bytes then, {other[1]:,} now" if one[1] != other[1] else "its date"
            return f"{one[0]} has changed ({what})"
    if before and now and len(before) != len(now):
        return f"{counted(len(before), 'input file')} then, {len(now):,} now"
    changed = [key for key in plan if earlier.get(key) != plan[key]]
    return f"other {' and '.join(key.replace('_', ' ') for key in changed)}"


def _are_inputs(told: Any) -> bool:
    return isinstance(told, list) and all(
        isinstance(one, list) and list(map(type, one)) == [str, int, str] for one in told
    )


def write_synced(path: Path, text: str) -> None:
    """Write a small file atomically.

    Raises:
        DataError: It cannot be written.
    """
    with whole_file(path, lambda reason: cannot_write_for(reason, path)) as file:
        file.write(text.encode())


def cannot_write(error: OSError, path: Path) -> DataError:
    """Return the error for a disk that is full or read-only."""
    return cannot_write_for(error.strerror or str(error), error.filename or path)


def cannot_write_for(reason: str, path: str | Path) -> DataError:
    """Return the error for a file that cannot be written, with the reason in a few words."""
    return DataError(
        f"cannot be written ({reason})",
        where=str(path),
        remedy="Free space, or choose another --output; finished work is kept.",
    )
