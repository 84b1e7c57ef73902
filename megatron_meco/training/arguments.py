"""The command line of a training run: MeCo's flags, the platform, and every refusal.

`parse_and_validate_args` stands in for Megatron's function of that name. It picks the platform,
adds the `--meco*` flags, checks everything that can be checked before the first collective call,
and lets Megatron validate the rest. Costs one more pass of argparse. What was given up: changing
what Megatron's own flags mean; where one contradicts MeCo the run stops and names it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

from megatron_meco.config import FINGERPRINT_KEYS, MeCoConfig, add_meco_arguments
from megatron_meco.data.corpora import check_corpora
from megatron_meco.data.phases import BatchSize, Schedule, make_schedule
from megatron_meco.data.template import Template
from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.training.branch import add_branch_arguments, apply_learning_rate, expand_branch
from megatron_meco.training.cpu import (
    CPU_DEFAULTS,
    enable_cpu_platform,
    impossible_flags,
    let_distributed_optimizer_resume,
    looks_like_broken_gpu_setup,
    should_use_cpu,
    skip_helper_compilation,
)
from megatron_meco.training.kernels import (
    EngineState,
    Kernels,
    choose_kernels,
    try_transformer_engine,
)
from megatron_meco.training.run_fingerprint import check_resume, fingerprint

ArgsProvider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def parse_and_validate_args(
    extra_args_provider: ArgsProvider | None = None,
    args_defaults: dict[str, Any] | None = None,
    **megatron_options: Any,
) -> argparse.Namespace:
    """Parse and check the command line of a training script, on every rank.

    A refusal is printed once, by rank 0, and ends the process with status 1.

    Args:
        extra_args_provider: The script's own flags, as Megatron's function takes it.
        args_defaults: The script's own defaults, likewise.
        **megatron_options: Passed on to Megatron's function.

    Returns:
        Megatron's validated arguments, with MeCo's beside them.
    """
    on_cpu = should_use_cpu()
    if on_cpu:
        enable_cpu_platform()
    else:
        engine = try_transformer_engine()
        if engine.breaks_megatron:
            _end(_engine_error(engine))
        skip_helper_compilation()
        if engine.reason:
            let_distributed_optimizer_resume()
    from megatron.training import arguments as megatron_arguments

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        if extra_args_provider is not None:
            parser = extra_args_provider(parser)
        return add_arguments(parser, on_cpu)

    try:
        # Parsed twice: our refusals must come before Megatron's validation stumbles on the flags.
        unknown = megatron_options.get("ignore_unknown_args")
        early = megatron_arguments.parse_args(provider, unknown)
        _check_platform(early, on_cpu)
        branch = expand_branch(early)
        if branch is not None:
            sys.argv += branch.flags
            early = megatron_arguments.parse_args(provider, unknown)
        if early.meco:
            check_arguments(early)
        args = megatron_arguments.parse_and_validate_args(
            provider, args_defaults=args_defaults or {}, **megatron_options
        )
        if branch is not None:
            apply_learning_rate(args, branch)
            if _is_rank_0():
                print(branch.describe(), flush=True)
        _check_samples(args)
    except MeCoError as error:
        _end(error)
    _apply(args)
    if args.dataloader_inter_document_masking and _is_rank_0():
        print(f"> MeCo: {kernels_of(args, on_cpu).describe()}", flush=True)
    return args


def _end(error: MeCoError) -> NoReturn:
    if _is_rank_0():
        print(f"meco: error: {error}", file=sys.stderr, flush=True)
    sys.exit(1)


def _is_rank_0() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def schedule_from_args(args: argparse.Namespace) -> Schedule:
    """The run's schedule, from Megatron's parsed flags."""
    if getattr(args, "step_batch_size_schedule", None):
        batch_size = BatchSize.parse(args.step_batch_size_schedule, args.seq_length)
    else:
        batch_size = BatchSize.constant(args.global_batch_size or args.micro_batch_size or 1)
    return make_schedule(
        MeCoConfig.from_args(args),
        batch_size,
        # Megatron fills in --train-iters from --train-samples when it validates.
        train_iterations=None if args.train_samples else args.train_iters,
        train_samples=args.train_samples,
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what does not go with MeCo, before anything is built.

    Args:
        args: Parsed flags, not yet validated by Megatron.

    Raises:
        FlagError: Names the flag, its value and the remedy.
        DataError: When a corpus or its metadata is missing or does not fit the template.
    """
    config = MeCoConfig.from_args(args)
    _refuse_contradictions(args)
    if args.train_iters is not None or args.train_samples is not None:
        schedule = schedule_from_args(args)
        if not args.meco_cooldown_data_path:
            schedule.documents_held_out(config)
    check_corpora(_corpus_prefixes(args), Template.parse(config.template))
    cooldown = cooldown_blend(args)
    check_corpora(cooldown[0] if cooldown else [], None)


def add_arguments(parser: argparse.ArgumentParser, on_cpu: bool) -> argparse.ArgumentParser:
    """Add everything that a training script of ours takes beyond Megatron's flags.

    Args:
        parser: Megatron's parser.
        on_cpu: Whether to set the defaults that a CPU needs, or those of a GPU without apex.
    """
    parser.add_argument(
        "--meco", action="store_true", help="Train with metadata conditioning, then cooldown."
    )
    parser.add_argument(
        "--meco-require-gpu",
        action="store_true",
        help="Stop when there is no usable CUDA device, where the run would go on on the CPU.",
    )
    parser.add_argument(
        "--meco-allow-changes",
        nargs="*",
        choices=FINGERPRINT_KEYS,
        metavar="NAME",
        help="Go on from a checkpoint although these differ from the run that made it (without "
        f"names: whatever differs): {', '.join(FINGERPRINT_KEYS)}.",
    )
    add_branch_arguments(parser)
    add_meco_arguments(parser)
    if on_cpu:
        parser.set_defaults(**CPU_DEFAULTS)
    elif importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        # On by default in Megatron, whose output layer then ends the run where apex's kernel is
        # missing, also with Transformer Engine.
        parser.set_defaults(gradient_accumulation_fusion=False)
    return parser


def _check_platform(args: argparse.Namespace, on_cpu: bool) -> None:
    if on_cpu:
        _check_cpu(args)
    elif args.transformer_impl == "transformer_engine":
        engine = try_transformer_engine()
        if engine.reason:
            raise _engine_error(engine)


def _engine_error(engine: EngineState) -> FlagError:
    if engine.breaks_megatron:
        return FlagError(
            f"{engine.reason}; Megatron-Core fails with it, whatever the flags",
            where="Transformer Engine",
            remedy="Install a build for this torch and CUDA, or remove it (and give "
            "--transformer-impl local).",
        )
    return FlagError(
        f"'transformer_engine' is asked for (Megatron's default), but {engine.reason}",
        where="--transformer-impl",
        remedy="Install it (pip install 'megatron-meco[gpu]'), or give --transformer-impl local.",
    )


def kernels_of(args: argparse.Namespace, on_cpu: bool) -> Kernels:
    """What the run will use, from its validated flags and from what Megatron has imported."""
    from megatron_meco.training.attention import PACKED_LOCAL_SPEC, varlen_serves
    from megatron_meco.training.compat import optimizer_library

    kernels = choose_kernels(
        gpu=not on_cpu,
        engine_layers=args.transformer_impl != "local",
        varlen=varlen_serves(args.params_dtype, args.attention_dropout),
        optimizer=optimizer_library(),
    )
    if args.spec not in (None, PACKED_LOCAL_SPEC):
        chosen = f"as --spec {' '.join(args.spec)} says"
        kernels = replace(kernels, attention=chosen, layers=chosen)
    if args.optimizer != "adam":
        kernels = replace(kernels, optimizer=f"Megatron's {args.optimizer}")
    return kernels


def _check_cpu(args: argparse.Namespace) -> None:
    broken = looks_like_broken_gpu_setup()
    if args.meco_require_gpu or broken:
        raise FlagError(
            broken or "torch sees no CUDA device",
            where="--meco-require-gpu" if args.meco_require_gpu else "GPU set-up",
            remedy="`meco doctor` says what is wrong; CUDA_VISIBLE_DEVICES=-1 (without "
            "--meco-require-gpu) trains on the CPU all the same.",
        )
    for flag, remedy in impossible_flags(args):
        raise FlagError("this host has no CUDA device", where=flag, remedy=remedy)
    if _is_rank_0():
        print("> MeCo: no CUDA device; training on the CPU over Gloo", flush=True)


def _refuse_contradictions(args: argparse.Namespace) -> None:
    refusals: list[tuple[bool, str, str, str]] = [
        (
            args.dataloader_type not in (None, "single"),
            f"--dataloader-type {args.dataloader_type}",
            "phases follow the order of the samples, which only the `single` loader keeps",
            "Drop the flag; packs are shuffled when they are planned.",
        ),
        (
            bool(args.full_validation),
            "--full-validation",
            "Megatron ends the run at the first evaluation, unless there are several validation "
            "sets",
            "Drop the flag and give --eval-iters.",
        ),
        (
            bool(args.reset_attention_mask),
            "--reset-attention-mask",
            "Transformer Engine ignores it silently; MeCo separates documents by cu_seqlens",
            "Drop the flag.",
        ),
        (
            bool(args.reset_position_ids),
            "--reset-position-ids",
            "it finds documents by the EOD token; MeCo restarts positions at each document",
            "Drop the flag.",
        ),
        (
            bool(args.eod_mask_loss),
            "--eod-mask-loss",
            "it masks by token id; MeCo trains EOD and masks borders by position",
            "Drop the flag.",
        ),
        (
            (args.context_parallel_size or 1) > 1 or bool(args.hybrid_context_parallel),
            f"--context-parallel-size {args.context_parallel_size}",
            "packed documents are not padded to 2 * CP, so attention would leak across documents",
            "Use 1; tensor and pipeline parallelism work.",
        ),
        (
            bool(args.phase_transition_iterations),
            "--phase-transition-iterations",
            "it saves and ends the run; MeCo switches inside the run",
            "Use --meco-cooldown-start-iteration.",
        ),
        (
            getattr(args, "rampup_batch_size", None) is not None,
            "--rampup-batch-size",
            "this Megatron reads the flag and ignores it",
            "Use --step-batch-size-schedule.",
        ),
        (
            bool(args.multiple_validation_sets),
            "--multiple-validation-sets",
            "MeCo reports its two validation losses from one set",
            "Drop the flag.",
        ),
        (bool(args.sft), "--sft", "it brings packed data of its own", "Drop --sft or --meco."),
        (
            bool(args.fim_data),
            "--fim-data",
            "it rearranges the tokens that MeCo masks by position",
            "Drop --fim-data or --meco.",
        ),
        (
            bool(args.mock_data),
            "--mock-data",
            "mock documents have no metadata",
            "Give --data-path, or drop --meco.",
        ),
        (
            bool(args.dataloader_fast_cache_load) or bool(args.dataloader_defer_npy_index_mmap),
            "--dataloader-fast-cache-load / --dataloader-defer-npy-index-mmap",
            "MeCo has no .npy index; its plan is mapped without a scan anyhow",
            "Drop the flag.",
        ),
    ]
    for applies, flag, reason, remedy in refusals:
        if applies:
            raise FlagError(f"does not go with --meco: {reason}", where=flag, remedy=remedy)


def _check_samples(args: argparse.Namespace) -> None:
    """Work out the run's fingerprint and compare it with the checkpoint's, on rank 0.

    The others wait for rank 0 at the first collective call, and end with it.
    """
    if not _is_rank_0():
        return
    if args.meco:
        from megatron.training.global_vars import get_tokenizer

        args.meco_fingerprint = fingerprint(
            args,
            schedule_from_args(args),
            _training_blend(args),
            cooldown_blend(args),
            get_tokenizer(),
        )
    check_resume(args, getattr(args, "meco_fingerprint", None))


def _training_blend(args: argparse.Namespace) -> tuple[list[str], list[float] | None]:
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, per_split = get_blend_and_blend_per_split(args)
    training = blend if blend is not None else per_split[0]
    return training or ([], None)


def _corpus_prefixes(args: argparse.Namespace) -> list[str]:
    """Every corpus that the data flags name, once."""
    from megatron.training.utils import get_blend_and_blend_per_split

    sources = ("data_path", "data_args_path", "train_data_path", "per_split_data_args_path")
    if not any(getattr(args, name) for name in sources):
        raise FlagError(
            "no corpus is given",
            where="--data-path",
            remedy="Give the path of a prepared corpus, without .bin or .idx.",
        )
    blend, per_split = get_blend_and_blend_per_split(args)
    blends = [blend, *(per_split or [])]
    prefixes = [prefix for b in blends if b is not None for prefix in b[0]]
    return list(dict.fromkeys(prefixes))


def cooldown_blend(args: argparse.Namespace) -> tuple[list[str], list[float] | None] | None:
    """`--meco-cooldown-data-path` as a blend: paths, or weights and paths in turn."""
    from megatron.core.datasets.utils import get_blend_from_list

    if not args.meco_cooldown_data_path:
        return None
    blend: tuple[list[str], list[float] | None] = get_blend_from_list(args.meco_cooldown_data_path)
    return blend


def _apply(args: argparse.Namespace) -> None:
    """Set what follows from --meco, once Megatron has validated the rest."""
    if args.meco:
        from megatron_meco.training.phase_switch import SaveInterval

        args.dataloader_inter_document_masking = True
        args.create_attention_mask_in_dataloader = False
        if args.save_interval:
            switch = schedule_from_args(args).switch_iteration
            args.save_interval = SaveInterval(args.save_interval, also=switch)
    packed = args.dataloader_inter_document_masking
    largest = max(args.micro_batch_size, args.eval_micro_batch_size or 0)
    if packed and args.pipeline_model_parallel_size > 1 and largest > 1:
        # A packed micro-batch travels as [mbs * s, 1, h], where the next stage expects [s, mbs, h];
        # this makes stages tell each other the shape. Megatron wants the second setting with it,
        # also without experts.
        args.variable_seq_lengths = True
        args.moe_token_dispatcher_type = "alltoall"
    if packed and args.transformer_impl == "local":
        from megatron_meco.training.attention import PACKED_LOCAL_SPEC

        # Megatron's own local attention refuses packed documents.
        args.spec = args.spec or PACKED_LOCAL_SPEC
