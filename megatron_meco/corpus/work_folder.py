"""The folder that a preparation works in, and whether an unfinished one may go on.

`PREFIX.unfinished/` holds the encoder that all tasks use, a plan that says what is being prepared,
and the files of finished tasks. Going on is allowed when the plan is the same to the letter: inputs
with their sizes and dates, fields, tokenizer. A lock on the folder keeps two preparations of one
corpus apart; it goes with its process. Given up: keeping the tasks whose input did not change.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_meco.corpus.bulk import choose_encoder, encoder_digest, write_encoder
from megatron_meco.corpus.documents import RejectedRecords, TaskReader
from megatron_meco.corpus.sentences import sentences_digest
from megatron_meco.corpus.sources import Part, SourceFile
from megatron_meco.corpus.task_writer import write_synced
from megatron_meco.corpus.tokenizer import build_tokenizer, resolve_eod, text_encoder
from megatron_meco.errors import DataError

_PLAN = "plan.json"
_SAMPLED_TASKS = 8
_SAMPLED_DOCUMENTS = 64

ENCODERS = ("auto", "gigatoken", "huggingface")


def work_folder_of(prefix: Path) -> Path:
    """Return where the corpus at `prefix` is prepared."""
    return Path(f"{prefix}.unfinished")


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
        folder: The folder; all tasks must reach it.
        sentences: What `learn_sentences` returned, to store each document as several sequences.
        **tokenizer: The arguments of `build_encoder`.

    Returns:
        What `build_encoder` returns, and `sentences`.

    Raises:
        MeCoError: As `build_encoder`.
    """
    chosen = {**build_encoder(**tokenizer), "sentences": sentences}
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_encoder(Path(folder), chosen)
    return chosen


def sample_texts(tasks: list[list[Part]], text_field: str) -> list[str]:
    """Return texts from all over the input; what cannot be read comes up when it is prepared."""
    texts: list[str] = []
    step = max(len(tasks) // _SAMPLED_TASKS, 1)
    for rank in range(0, len(tasks), step):
        reader = TaskReader(tasks, text_field, RejectedRecords())
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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                "another process is preparing this corpus",
                where=str(self.path),
                remedy="Wait for it, or choose another --output.",
            ) from None
        except OSError as error:
            raise DataError(
                f"cannot be made ({error.strerror or error})",
                where=str(self.path),
                remedy="Choose an --output in a folder that can be written.",
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def begin(self, plan: dict[str, Any], chosen: dict[str, Any], *, restart: bool) -> None:
        """Begin a preparation, or go on with one.

        Args:
            plan: What is prepared.
            chosen: The encoder.
            restart: Whether to start afresh where the unfinished one is another.

        Raises:
            DataError: An unfinished preparation of something else is here.
        """
        try:
            earlier = json.loads((self.path / _PLAN).read_text(encoding="utf-8"))
        except FileNotFoundError:
            earlier = None
        except ValueError:
            earlier = {}
        if earlier != plan:
            if earlier is not None and not restart:
                raise DataError(
                    f"an unfinished preparation of something else: {_difference(earlier, plan)}",
                    where=str(self.path),
                    remedy="Start afresh with --overwrite, or undo the change to go on.",
                )
            self.clear()
        write_encoder(self.path, chosen)
        write_synced(self.path / _PLAN, json.dumps(plan))

    def clear(self) -> None:
        """Remove what is in the folder; the folder itself carries the lock."""
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)


def _difference(earlier: dict[str, Any], plan: dict[str, Any]) -> str:
    # An import of shards has none.
    before, now = earlier.get("inputs", []), plan.get("inputs", [])
    for one, other in zip(before, now, strict=False):
        if one != other:
            if one[0] != other[0]:
                return f"{other[0]} stands where {one[0]} stood"
            what = f"{one[1]:,} bytes then, {other[1]:,} now" if one[1] != other[1] else "its date"
            return f"{one[0]} has changed ({what})"
    if before and now and len(before) != len(now):
        return f"{len(before):,} input files then, {len(now):,} now"
    changed = [key for key in plan if earlier.get(key) != plan[key]]
    return f"other {' and '.join(key.replace('_', ' ') for key in changed)}"
