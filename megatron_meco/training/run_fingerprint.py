"""What determines the samples of a run: saved in its checkpoints, compared when it resumes.

The fingerprint is a dictionary of plain values among the arguments that Megatron saves
(`args.meco_fingerprint`), so reading a checkpoint does not need this package. It describes contents
and not paths or times, so a corpus may be moved. A corpus is identified by its size and 1,026
sampled blocks, a few MiB that rank 0 reads.
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

from megatron_meco.config import FINGERPRINT_DEFAULTS, FINGERPRINT_KEYS, MeCoConfig
from megatron_meco.corpus.metadata import metadata_path
from megatron_meco.corpus.tokenizer import token_ids
from megatron_meco.data.fingerprint import digest, file_fingerprint, tokenizer_identity
from megatron_meco.data.packing import PACKING_RULES
from megatron_meco.data.phases import Schedule
from megatron_meco.data.template import (
    SUFFIX_FLAG,
    SYNTAX,
    Template,
    in_current_syntax,
    syntax_of,
)
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
    """The fingerprint of a run: what determines its training samples.

    Args:
        args: Parsed flags.
        schedule: The run's schedule.
        blend: Training corpora (paths without suffix) and their weights.
        cooldown_blend: Corpora of the cooldown; None: held out of the training corpora.
        tokenizer: Megatron's tokenizer.

    Returns:
        JSON-serializable values with the keys `config.FINGERPRINT_KEYS` (without those of suffixes
        and of repeated prefixes in a run that has none), and `packing_rule` and `template_syntax`,
        the versions of the packing strategy and of what a template means.
    """
    config = MeCoConfig.from_args(args)
    templates = (
        Template.parse(config.template),
        Template.parse(config.suffix_template, SUFFIX_FLAG),
    )
    held_out = None if cooldown_blend else schedule.documents_held_out(config)
    start: dict[str, Any] = {}
    if schedule.start_sample:
        share = schedule.documents_of_start(config, held_out or 0.0)
        start = {"start_sample": schedule.start_sample, "documents_of_start": share}
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
        "suffix_template": config.suffix_template,
        "suffix_loss": config.suffix_loss,
        "repeat_every": config.repeat_every,
        "seq_length": args.seq_length,
        "seed": args.seed,
        "split": args.split,
        "tokenizer": _tokenizer(tokenizer, *templates),
        "corpora": _corpora(blend, with_metadata=any(t.placeholders for t in templates)),
        "cooldown_corpora": cooldown_blend and _corpora(cooldown_blend, with_metadata=False),
        "schedule": {
            "samples": schedule.num_samples,
            "switch_sample": schedule.switch_sample,
            "documents_held_out": held_out,
            # Runs that start with the conditioned phase keep their fingerprints.
            **start,
        },
    }
    assert tuple(values) == FINGERPRINT_KEYS
    if not config.suffix_template:
        del values["suffix_template"], values["suffix_loss"]
    if config.repeat_every is None:
        del values["repeat_every"]
    return {
        **values,
        "packing_rule": PACKING_RULES[config.packing],
        "template_syntax": SYNTAX,
    }


def check_resume(args: argparse.Namespace, current: dict[str, Any] | None) -> None:
    """Compare the run with the checkpoint that it resumes from, if there is one.

    Args:
        args: Parsed flags, validated; `args.load` names the checkpoint.
        current: The run's fingerprint; None without `--meco`.

    Raises:
        MeCoError: Something differs that `--meco-allow-changes` does not name.
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
    """Differences of two fingerprints: key -> (before, now).

    Between a run with and one without MeCo, only "meco" is reported.
    """
    if before["meco"] != now["meco"]:
        return {"meco": (before["meco"], now["meco"])}
    template = _template_difference(before, now)
    before, now = ({**FINGERPRINT_DEFAULTS, **values} for values in (before, now))
    changed = {
        key: (before.get(key), now.get(key))
        for key in FINGERPRINT_KEYS
        if before.get(key) != now.get(key)
    }
    # The same strategy may have made other packs. The first fingerprints have no version.
    rules = [values.get("packing_rule", 1) for values in (before, now)]
    if "packing" not in changed and now["meco"] and rules[0] != rules[1]:
        one, other = (f"{now['packing']} (rule {rule})" for rule in rules)
        changed["packing"] = (one, other)
    if template is None:
        changed.pop("template", None)
    else:
        changed["template"] = template
    return changed


def _template_difference(before: dict[str, Any], now: dict[str, Any]) -> tuple[Any, Any] | None:
    """The templates, if they differ in meaning: the same text may have meant something else."""
    old, new = before.get("template"), now.get("template")
    if not isinstance(old, str) or not isinstance(new, str):
        return None if old == new else (old, new)
    meant = in_current_syntax(old, syntax_of(before))
    if meant == old:
        return None if old == new else (old, new)
    if meant is None:
        return f"{old} (where {{token:...}} was a field)", new
    if Template.parse(meant).parts == Template.parse(new).parts:
        return None
    return f"{meant} (as that run's {old} is written today)", new


def stored_arguments(args: argparse.Namespace) -> argparse.Namespace | None:
    """Arguments saved in the checkpoint at `args.load`, with its `iteration`; None without one.

    Reads the common part of any Megatron checkpoint format, without a process group.
    """
    from megatron.training.checkpointing import load_args_from_checkpoint

    if not has_checkpoint(args.load) and args.ckpt_step is None:
        return None
    # Megatron modifies the arguments and prints each: pass a copy and drop the output.
    with contextlib.redirect_stdout(io.StringIO()):
        found = load_args_from_checkpoint(copy.copy(args))
    if not isinstance(found, tuple):
        return None
    filled: argparse.Namespace
    stored: argparse.Namespace
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


def _tokenizer(tokenizer: Any, *templates: Template) -> str:
    """Kind, vocabulary size, ids of a fixed text and of the templates' special tokens.

    The folder's name may change.
    """
    identifiers, vocab_size, ids = tokenizer_identity(tokenizer)
    special: dict[str, int] = {}
    for template in templates:
        special |= token_ids(tokenizer, template.tokens, template.flag)
    return digest([identifiers.get("class"), vocab_size, ids, *([special] if special else [])])


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
