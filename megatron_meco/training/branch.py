"""A cooldown branched off an earlier checkpoint: `--meco-branch-from`, `--meco-branch-iters`.

The paper cools down at many points of one conditioned run. A branch is a set of ordinary flags: the
schedule switches at the checkpoint's iteration and ends N iterations later, on the documents that
the conditioned run holds out for its cooldown. `expand_branch` computes these flags from the
checkpoint. They are appended to the command line, so Megatron, the log and the fingerprint see
them. Once the branch has checkpoints, the same command resumes it. Every rank reads the arguments
of the checkpoint once. Branches with a batch-size schedule are not supported.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_meco.errors import FlagError
from megatron_meco.training.run_fingerprint import has_checkpoint, stored_arguments

LR_CHOICES = ("continue", "decay")
_FLAG = "--meco-branch-from"
# The learning-rate schedule. Megatron keeps the first two in its parameter groups, and would use
# the checkpoint's silently.
_LR_ARGUMENTS = ("lr", "min_lr", "lr_decay_style", "lr_warmup_fraction", "lr_warmup_iters")


@dataclass(frozen=True)
class Branch:
    """A cooldown that starts from a checkpoint of a conditioned run.

    Attributes:
        flags: Flags that it adds to the command line.
        iteration: Iteration of the checkpoint.
        num_iterations: Iterations of the branch.
        learning_rate: Learning rate of the last step before the branch.
        decays: Whether it decays linearly to --min-lr over the branch; otherwise it follows the
            schedule of the conditioned run.
    """

    flags: list[str]
    iteration: int
    num_iterations: int
    learning_rate: float
    decays: bool

    def describe(self) -> str:
        """One line for the first log lines."""
        rate = "falls to --min-lr in a straight line" if self.decays else "goes on along its curve"
        return (
            f"> MeCo: branch of {self.num_iterations} cooldown iterations after iteration "
            f"{self.iteration}; the learning rate ({self.learning_rate:.4g} there) {rate}; "
            f"flags added: {' '.join(self.flags)}"
        )


def add_branch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a branch."""
    group = parser.add_argument_group("MeCo: a cooldown branched off an earlier checkpoint")
    group.add_argument(
        _FLAG,
        metavar="DIR",
        help="Checkpoints of a conditioned run (its --save), or one of them (DIR/iter_0010000). "
        "Starts a cooldown there; --load and --save name the branch's own folder.",
    )
    group.add_argument(
        "--meco-branch-iters", type=int, metavar="N", help="Iterations of the branch."
    )
    group.add_argument(
        "--meco-branch-lr",
        choices=LR_CHOICES,
        default=LR_CHOICES[0],
        help="`continue`: along the conditioned run's schedule; `decay`: in a straight line to "
        "--min-lr at the end of the branch. Default: %(default)s.",
    )


def expand_branch(args: argparse.Namespace) -> Branch | None:
    """The branch that the flags ask for, or None.

    Args:
        args: Parsed flags, not yet validated by Megatron.

    Raises:
        FlagError: The checkpoint or another flag does not allow a branch.
    """
    if args.meco_branch_from is None:
        if args.meco_branch_iters is not None:
            raise FlagError(
                "no checkpoint to branch from",
                where=f"--meco-branch-iters {args.meco_branch_iters}",
                remedy=f"Give {_FLAG}, or use --meco-cooldown-start-iteration.",
            )
        return None
    folder, step = _split_step(Path(args.meco_branch_from))
    _check_flags(args, folder)
    parent = _stored(args, folder, step)
    branch_iterations = int(args.meco_branch_iters)
    iteration = int(parent.iteration)
    _check_parent(args, parent, iteration)
    schedule = parent.meco_fingerprint["schedule"]
    held_out = schedule["documents_held_out"]
    flags = ["--train-iters", str(iteration + branch_iterations)]
    flags += ["--meco-cooldown-start-iteration", str(iteration)]
    flags += _start_flags(args, schedule)
    flags += ["--lr-decay-iters", str(parent.lr_decay_iters or parent.train_iters)]
    # The checkpoint's schedule of weight decay has another length.
    flags += ["--override-opt-param-scheduler"]
    if not args.meco_cooldown_data_path:
        if not held_out:
            raise FlagError(
                "that run kept no documents for a cooldown",
                where=f"{_FLAG} {args.meco_branch_from}",
                remedy="Give --meco-cooldown-data-path.",
            )
        flags += ["--meco-cooldown-documents", repr(held_out)]
    if not has_checkpoint(args.load):
        flags += ["--load", str(folder), "--ckpt-step", str(iteration)]
        # A branch changes the schedule on purpose; everything else is still compared.
        allowed = args.meco_allow_changes
        names = ["schedule", *["cooldown_corpora"] * bool(args.meco_cooldown_data_path)]
        flags += ["--meco-allow-changes", *([] if allowed == [] else [*(allowed or []), *names])]
    rate = _learning_rate(parent, iteration)
    decays = args.meco_branch_lr == "decay" and rate > parent.min_lr
    return Branch(flags, iteration, branch_iterations, rate, decays)


def apply_learning_rate(args: argparse.Namespace, branch: Branch) -> None:
    """Set up the linear decay of a branch: from its first learning rate to --min-lr at its end.

    Megatron's linear schedule goes from --lr at the end of the warm-up to --min-lr at
    `lr_decay_iters`. A checkpoint fixes --lr and --min-lr, so the line through the branch's first
    and last learning rate is set by the end of the warm-up: where the line, extended backwards,
    reaches --lr. No step is taken there, and the iteration may be negative. With
    `share = (learning_rate - min_lr) / (lr - min_lr)` it is `train_iters - num_iterations / share`.

    Args:
        args: Megatron's validated arguments; modified.
        branch: The branch; nothing is done unless it decays.
    """
    if not branch.decays:
        return
    share = (branch.learning_rate - args.min_lr) / (args.lr - args.min_lr)
    args.lr_decay_style = "linear"
    args.lr_decay_iters = args.train_iters
    args.lr_warmup_fraction = None
    args.lr_warmup_iters = args.train_iters - branch.num_iterations / share


def _start_flags(args: argparse.Namespace, parent: dict[str, Any]) -> list[str]:
    """The plain phase of the parent, whose length does not follow from that of the branch."""
    given = (args.meco_start_fraction, args.meco_start_iteration, args.meco_start_documents)
    start = parent.get("start_sample", 0)
    if not start and not any(given):
        return []
    flags = ["--meco-start-fraction", "0"]
    flags += ["--meco-start-iteration", str(start // args.global_batch_size)]
    if start:
        flags += ["--meco-start-documents", repr(parent["documents_of_start"])]
    return flags


def _split_step(path: Path) -> tuple[Path, int | None]:
    match = re.fullmatch(r"iter_(\d+)", path.name)
    return (path.parent, int(match[1])) if match else (path, None)


def _check_flags(args: argparse.Namespace, folder: Path) -> None:
    where = f"{_FLAG} {args.meco_branch_from}"
    if not args.meco:
        raise FlagError("a branch is a cooldown of MeCo", where=where, remedy="Give --meco.")
    if args.meco_branch_iters is None or args.meco_branch_iters < 1:
        raise FlagError(
            "the branch has no length", where=where, remedy="Give --meco-branch-iters, 1 or more."
        )
    for other in ("train_samples", "step_batch_size_schedule"):
        if getattr(args, other, None):
            raise FlagError(
                f"does not go with --{other.replace('_', '-')}",
                where=where,
                remedy="Branch with a constant --global-batch-size, counted in iterations.",
            )
    if not has_checkpoint(folder):
        raise FlagError(
            "there is no checkpoint of Megatron's",
            where=where,
            remedy="Give the --save folder of the conditioned run.",
        )
    for own in (args.save, args.load):
        if own and Path(own).resolve() == folder.resolve():
            raise FlagError(
                "the branch would overwrite the run it leaves",
                where=f"--save / --load {own}",
                remedy="Give the branch a folder of its own.",
            )


def _stored(args: argparse.Namespace, folder: Path, step: int | None) -> argparse.Namespace:
    if step is not None and not (folder / f"iter_{step:07d}").is_dir():
        kept = ", ".join(sorted(p.name for p in folder.glob("iter_*"))) or "none"
        raise FlagError(
            "no such checkpoint",
            where=f"{_FLAG} {args.meco_branch_from}",
            remedy=f"That run kept: {kept}.",
        )
    there = argparse.Namespace(**{**vars(args), "load": str(folder), "ckpt_step": step})
    stored = stored_arguments(there)
    if stored is None or getattr(stored, "meco_fingerprint", None) is None:
        raise FlagError(
            "the checkpoint was not made with --meco",
            where=f"{_FLAG} {args.meco_branch_from}",
            remedy="Give the --save folder of a conditioned run, or DIR/iter_NNNNNNN in it.",
        )
    return stored


def _check_parent(args: argparse.Namespace, parent: argparse.Namespace, iteration: int) -> None:
    where = f"{_FLAG} {args.meco_branch_from}"
    switch = parent.meco_fingerprint["schedule"]["switch_sample"]
    if parent.consumed_train_samples > switch:
        raise FlagError(
            f"iteration {iteration} lies in that run's own cooldown",
            where=where,
            remedy="Give an earlier checkpoint (DIR/iter_NNNNNNN), or go on with that run.",
        )
    if parent.consumed_train_samples <= parent.meco_fingerprint["schedule"].get("start_sample", 0):
        raise FlagError(
            f"iteration {iteration} lies before that run's conditioned phase",
            where=where,
            remedy="Give a later checkpoint (DIR/iter_NNNNNNN): a branch is a cooldown.",
        )
    if parent.consumed_train_samples != iteration * args.global_batch_size:
        raise FlagError(
            f"{iteration} iterations consumed {parent.consumed_train_samples} samples there, which "
            f"is not {args.global_batch_size} for each",
            where=f"--global-batch-size {args.global_batch_size}",
            remedy="Give that run's batch size.",
        )
    for name in _LR_ARGUMENTS:
        before, now = getattr(parent, name), getattr(args, name)
        if (before or 0) != (now or 0):
            raise FlagError(
                f"that run has {before}",
                where=f"--{name.replace('_', '-')} {now}",
                remedy="Give the same: the optimizer's state is bound to it.",
            )


def _learning_rate(parent: argparse.Namespace, iteration: int) -> float:
    """Learning rate of the last step before the branch, from Megatron's own schedule."""
    # Late: the platform must be chosen before Megatron is imported.
    from megatron_meco.training.learning_rate import learning_rate_schedule

    scheduler = learning_rate_schedule(parent)
    scheduler.num_steps = iteration * parent.global_batch_size
    return float(scheduler.get_lr({}))
