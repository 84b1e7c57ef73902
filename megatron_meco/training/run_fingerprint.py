"""What decides the samples of a run, kept with its checkpoints, compared when a run goes on.

The fingerprint is a dictionary of plain values among the arguments that Megatron saves
(`args.meco_fingerprint`), so every checkpoint carries it and none needs this package to be read. It
holds contents, not paths or times: a corpus may move between two starts. Costs a few MiB of reading
for each corpus on rank 0, and one broadcast. What was given up: hashing whole corpora; a file is
known by its size and 1,026 sampled blocks.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_meco.config import FINGERPRINT_KEYS, MeCoConfig
from megatron_meco.corpus.metadata import metadata_path
from megatron_meco.data.fingerprint import digest, file_fingerprint, tokenizer_identity
from megatron_meco.data.packing import PACKING_RULES
from megatron_meco.data.phases import Schedule
from megatron_meco.errors import MeCoError

Blend = tuple[Sequence[str], Sequence[float] | None]
_SHOWN = 120  # characters of a value in a message


def fingerprint(
    args: argparse.Namespace,
    schedule: Schedule,
    blend: Blend,
    cooldown_blend: Blend | None,
    tokenizer: Any,
) -> dict[str, Any]:
    """What decides the training samples of a run.

    Args:
        args: Parsed flags.
        schedule: Where the run switches.
        blend: Training corpora (prefixes) and their weights.
        cooldown_blend: Those of the cooldown; None: held out of the training corpora.
        tokenizer: Megatron's.

    Returns:
        Plain values, JSON-serialisable; the keys are `config.FINGERPRINT_KEYS`, and `packing_rule`
        for the version of the strategy's rule.
    """
    config = MeCoConfig.from_args(args)
    held_out = None if cooldown_blend else schedule.documents_held_out(config)
    values = {
        "meco": True,
        "template": config.template,
        "packing": config.packing,
        "prefix_once": not config.repeat_prefix,
        "plain_fraction": config.plain_fraction,
        "max_prefix_tokens": config.prefix_cap(args.seq_length),
        "max_documents_per_pack": config.documents_cap(args.seq_length),
        "pad_documents_to": config.pad_documents_to,
        "train_on_prefix": config.train_on_prefix,
        "seq_length": args.seq_length,
        "seed": args.seed,
        "split": args.split,
        "tokenizer": _tokenizer(tokenizer),
        "corpora": _corpora(blend, with_metadata=bool(config.template)),
        "cooldown_corpora": cooldown_blend and _corpora(cooldown_blend, with_metadata=False),
        "schedule": {
            "samples": schedule.num_samples,
            "switch_sample": schedule.switch_sample,
            "documents_held_out": held_out,
        },
    }
    assert tuple(values) == FINGERPRINT_KEYS
    return {**values, "packing_rule": PACKING_RULES[config.packing]}


def check_resume(args: argparse.Namespace, current: dict[str, Any] | None) -> None:
    """Compare with the checkpoint that a run goes on from, if there is one.

    Args:
        args: Parsed flags, validated; `args.load` names the checkpoint.
        current: The run's fingerprint; None without `--meco`.

    Raises:
        MeCoError: When something differs that `--meco-allow-changes` does not name.
    """
    if not args.load or args.finetune:
        return
    stored = stored_arguments(args)
    if stored is None or not getattr(stored, "consumed_train_samples", 0):
        return
    before = getattr(stored, "meco_fingerprint", None) or {"meco": False}
    changed = differences(before, current or {"meco": False})
    allowed = args.meco_allow_changes
    if allowed is not None:
        names = set(allowed) or set(FINGERPRINT_KEYS)
        changed = {key: pair for key, pair in changed.items() if key not in names}
    if changed:
        listed = "; ".join(f"{k}: {_show(a)} -> {_show(b)}" for k, (a, b) in changed.items())
        raise MeCoError(
            f"iteration {stored.iteration} was trained on other samples; what differs is {listed}",
            where=f"--load {args.load}",
            remedy="Give that run's flags; or go on all the same with "
            f"--meco-allow-changes {' '.join(changed)}; or start anew with --finetune.",
        )


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What changed between two fingerprints, by key, as (before, now).

    A run without MeCo differs by that alone.
    """
    if before["meco"] != now["meco"]:
        return {"meco": (before["meco"], now["meco"])}
    # Fingerprints of before there was the key do not tell.
    before, now = ({"pad_documents_to": 1, **values} for values in (before, now))
    changed = {
        key: (before.get(key), now.get(key))
        for key in FINGERPRINT_KEYS
        if before.get(key) != now.get(key)
    }
    # Under the same name other packs; fingerprints of before the first change do not tell.
    rules = [values.get("packing_rule", 1) for values in (before, now)]
    if "packing" not in changed and now["meco"] and rules[0] != rules[1]:
        one, other = (f"{now['packing']} (rule {rule})" for rule in rules)
        changed["packing"] = (one, other)
    return changed


def stored_arguments(args: argparse.Namespace) -> argparse.Namespace | None:
    """The arguments kept in the checkpoint at `args.load`, and its `iteration`, or None.

    Reads what all ranks have in common, in any format of Megatron's, without a process group.
    """
    from megatron.training.checkpointing import load_args_from_checkpoint

    if not has_checkpoint(args.load) and args.ckpt_step is None:
        return None
    # Megatron fills in the arguments it is given and says so at length: a copy, unheard.
    with contextlib.redirect_stdout(io.StringIO()):
        found = load_args_from_checkpoint(copy.copy(args))
    if not isinstance(found, tuple):
        return None
    filled, stored = found
    stored.iteration = filled.iteration
    return stored


def has_checkpoint(folder: str | os.PathLike[str] | None) -> bool:
    """Whether a folder holds a checkpoint that Megatron would go on from."""
    return folder is not None and Path(folder, "latest_checkpointed_iteration.txt").is_file()


def _corpora(blend: Blend, *, with_metadata: bool) -> list[list[Any]]:
    prefixes, weights = blend
    rows = []
    for i, prefix in enumerate(prefixes):
        files = [f"{prefix}.idx", f"{prefix}.bin"]
        files += [str(metadata_path(prefix))] if with_metadata else []
        content = [file_fingerprint(f) if os.path.isfile(f) else f for f in files]
        weight = None if weights is None else float(weights[i])
        rows.append([os.path.basename(prefix), weight, digest(content)])
    return rows


def _tokenizer(tokenizer: Any) -> str:
    """Kind, vocabulary size and the ids of a fixed text; the folder's name may change."""
    identifiers, vocab_size, ids = tokenizer_identity(tokenizer)
    return digest([identifiers.get("class"), vocab_size, ids])


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
