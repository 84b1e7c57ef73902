"""The folder that a preparation works in, and whether an unfinished one may go on.

`PREFIX.unfinished/` holds the encoder that all tasks use, a plan that says what is being prepared,
and the files of finished tasks. Going on is allowed when the plan is the same to the letter: inputs
with their sizes and dates, fields, tokenizer. A lock on the folder keeps two preparations of one
corpus apart; it goes with its process. The folder carries a marker (see `outputs`): one without it
is never touched. Given up: keeping the tasks whose input did not change.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from megatron_meco.corpus.bulk import choose_encoder, encoder_digest, write_encoder
from megatron_meco.corpus.documents import RejectedRecords, TaskReader
from megatron_meco.corpus.outputs import (
    check_work_folder,
    clear_work_folder,
    is_work_folder,
    make_marked_folder,
    remove_temporary_files,
    remove_work_folder,
    work_folder_of,
)
from megatron_meco.corpus.sentences import sentences_digest
from megatron_meco.corpus.sources import Part, SourceFile
from megatron_meco.corpus.task_writer import write_synced
from megatron_meco.corpus.tokenizer import build_tokenizer, resolve_eod, text_encoder
from megatron_meco.errors import DataError
from megatron_meco.wording import counted

_PLAN = "plan.json"
_SAMPLED_TASKS = 8
_SAMPLED_DOCUMENTS = 64

ENCODERS = ("auto", "gigatoken", "huggingface")


def build_encoder(
    tokenizer_type: str,
    tokenizer_model: str | None,
    tokenizer_extra: dict[str, Any] | None = None,
    sample: list[str] | None = None,
    encoder: str = "auto",
) -> dict[str, Any]:
    """Build Megatron's tokenizer and decide how texts are encoded.

    Args:
        tokenizer_type: Megatron's `--tokenizer-type`.
        tokenizer_model: Megatron's `--tokenizer-model`.
        tokenizer_extra: Further tokenizer settings under Megatron's names.
        sample: Texts to compare gigatoken's ids on.
        encoder: `auto`; `gigatoken` refuses to fall back; `huggingface` never compares.

    Returns:
        What a work folder keeps of it: `kind`, `reason`, `eod`, `eod_text`, `vocab_size`, `dtype`.

    Raises:
        FlagError: The tokenizer cannot be built, or has no EOD in its vocabulary.
        DataError: gigatoken was asked for and gives other ids.
    """
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_model, **(tokenizer_extra or {}))
    from megatron.core.datasets.indexed_dataset import DType

    eod = resolve_eod(tokenizer)
    chosen = choose_encoder(
        text_encoder(tokenizer), sample or [], allow_gigatoken=encoder != "huggingface"
    )
    if encoder == "gigatoken" and chosen["kind"] != "gigatoken":
        raise DataError(
            f"gigatoken cannot be used ({chosen['reason']})",
            where="--encoder gigatoken",
            remedy="Leave --encoder out.",
        )
    return {
        **chosen,
        "eod": eod,
        "eod_text": str(tokenizer.detokenize([eod])),
        "vocab_size": tokenizer.vocab_size,
        "dtype": DType.optimal_dtype(tokenizer.vocab_size).__name__,
    }


def make_work_folder(
    folder: str | os.PathLike[str], *, sentences: dict[str, Any] | None = None, **tokenizer: Any
) -> dict[str, Any]:
    """Make a folder that a `MegatronWriter` of one's own pipeline can write to.

    Args:
        folder: The folder, which is made, or one that this function has made before; all tasks must
            reach it.
        sentences: What `learn_sentences` returned, to store each document as several sequences.
        **tokenizer: The arguments of `build_encoder`.

    Returns:
        What `build_encoder` returns, and `sentences`.

    Raises:
        MeCoError: As `build_encoder`; or the folder is there and is somebody else's.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        check_work_folder(folder)
    chosen = {**build_encoder(**tokenizer), "sentences": sentences}
    if not folder.exists():
        make_marked_folder(folder)
    write_encoder(folder, chosen)
    return chosen


def sample_texts(tasks: list[list[Part]], text_field: str) -> list[str]:
    """Return texts from all over the input; what cannot be read comes up when it is prepared."""
    texts: list[str] = []
    step = max(len(tasks) // _SAMPLED_TASKS, 1)
    for rank in range(0, len(tasks), step):
        reader = TaskReader(tasks, text_field, RejectedRecords(), ())
        try:
            found = itertools.islice(reader.run(rank=rank), _SAMPLED_DOCUMENTS)
            texts += [document.text for document in found]
        except DataError:
            continue
    return texts


def plan_of(
    files: list[SourceFile],
    text_field: str,
    metadata_fields: tuple[str, ...],
    chosen: dict[str, Any],
) -> dict[str, Any]:
    """Return what must be the same for an unfinished preparation to go on."""
    return {
        "format": 2,
        "inputs": [[file.path, file.num_bytes, file.stamp] for file in files],
        "text_field": text_field,
        "metadata_fields": list(metadata_fields),
        "tokenizer": [encoder_digest(chosen), chosen["eod"], chosen["vocab_size"], chosen["dtype"]],
        "sentences": sentences_digest(chosen["sentences"]),
    }


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
        """Return the folder opened and locked; None where its owner was done and removed it."""
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
            # Another process may have made it in between.
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
        """Begin a preparation, or go on with one.

        Args:
            plan: What is prepared.
            chosen: The encoder.
            restart: Whether to start afresh where the unfinished one is another.
            is_alone: Whether no task of an earlier call can be at work still, as on a cluster.

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
            # Another process may have made a new one since this one's was removed.
            if self._lock and os.path.samestat(os.fstat(self._lock), os.stat(self.path)):
                remove_work_folder(self.path)


def _difference(earlier: Any, plan: dict[str, Any]) -> str:
    # An import of shards has no inputs.
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
