"""Megatron's learning-rate schedule of a run, without an optimizer."""

from __future__ import annotations

import argparse
import types

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def learning_rate_schedule(args: argparse.Namespace) -> OptimizerParamScheduler:
    """The schedule that Megatron's `get_optimizer_param_scheduler` makes from these arguments.

    Args:
        args: Validated arguments of a run, or those saved in a checkpoint.

    Returns:
        Megatron's scheduler; it counts steps in samples.

    Raises:
        AssertionError: From Megatron, if the numbers contradict each other.
    """
    if args.train_samples:
        total = args.train_samples
        decay_steps = args.lr_decay_samples or total
        warmup_steps = args.lr_warmup_samples
        wsd_steps = args.lr_wsd_decay_samples
    else:
        batch = args.global_batch_size
        total = args.train_iters * batch
        decay_steps = (args.lr_decay_iters or args.train_iters) * batch
        warmup_steps = args.lr_warmup_iters * batch
        wsd_steps = None if args.lr_wsd_decay_iters is None else args.lr_wsd_decay_iters * batch
    if args.lr_warmup_fraction is not None:
        warmup_steps = args.lr_warmup_fraction * decay_steps
    return OptimizerParamScheduler(
        types.SimpleNamespace(param_groups=[]),
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay,
        end_wd=args.end_weight_decay,
        wd_incr_steps=total,
        wd_incr_style=args.weight_decay_incr_style,
        wsd_decay_steps=wsd_steps,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )
