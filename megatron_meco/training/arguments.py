"""The command line of a training run: MeCo's flags, the platform, and refusals.

`parse_and_validate_args` replaces Megatron's function of that name in a training script. With
`--meco` it checks what it can before the first collective call, then lets Megatron validate the
rest. Without `--meco` only Megatron checks. `parse_run` does the same for `meco plan` and `meco
inspect` on any host.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn

from megatron_meco.config import FINGERPRINT_KEYS, PLAIN, MeCoConfig, add_meco_arguments
from megatron_meco.data.corpora import check_corpora
from megatron_meco.data.evaluation import EvaluationBlocks, FullEvaluation
from megatron_meco.data.phases import BatchSize, Schedule, make_schedule
from megatron_meco.data.template import SUFFIX_FLAG, Template
from megatron_meco.errors import FlagError, MeCoError, show_refusals_in_one_line
from megatron_meco.megatron_flags import REFUSED
from megatron_meco.refusals import (
    Flag,
    check_flags,
    check_launcher,
    check_numbers,
    check_run,
    closest,
    flags_of,
    refusal,
    shown,
)
from megatron_meco.training.blends import (
    check_blends,
    cooldown_blend,
    corpus_prefixes,
    training_blend,
    validation_blend,
)
from megatron_meco.training.branch import (
    Branch,
    add_branch_arguments,
    apply_learning_rate,
    expand_branch,
)
from megatron_meco.training.cpu import (
    CPU_DEFAULTS,
    enable_cpu_platform,
    impossible_flags,
    looks_like_broken_gpu_setup,
    run_checkpoint_worker,
    should_use_cpu,
)
from megatron_meco.training.kernels import (
    EngineState,
    Kernels,
    choose_kernels,
    try_transformer_engine,
)
from megatron_meco.training.megatron_patches import (
    SaveInterval,
    builds_further_heads,
    keep_padding_out_of_experts,
    let_checkpoints_hold_an_interval,
    let_distributed_optimizer_resume,
    let_functions_be_specs,
    let_further_heads_be_packed,
    save_from_the_cpu_in_the_background,
    skip_helper_compilation,
)
from megatron_meco.training.run_fingerprint import check_resume, fingerprint

ArgsProvider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]

# What `meco plan` fills in for missing flags of the model and of evaluation.
_STAND_INS: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 1,
    "max_position_embeddings": None,  # the sequence length
    "micro_batch_size": 1,
    "eval_interval": 1000,
    "lr": 1e-4,
}
_MODEL_FLAGS = ("num_layers", "encoder_num_layers", "hybrid_layer_pattern", "hidden_size")


class CommandLine:
    """Parses `sys.argv` with Megatron's parser and MeCo's flags.

    Args:
        extra_args_provider: The script's own flags, or None.
        on_cpu: Whether to set the defaults for a CPU.
        ignore_unknown_args: Passed to Megatron's function.
        defaults: The script's own defaults, which Megatron sets when it validates.

    Attributes:
        flags: Megatron's flags with the defaults of this host; filled by parsing.
        own_flags: MeCo's flags; filled by parsing.
    """

    def __init__(
        self,
        extra_args_provider: ArgsProvider | None,
        *,
        on_cpu: bool,
        ignore_unknown_args: bool = False,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.flags: dict[str, Flag] = {}
        self.own_flags: dict[str, Flag] = {}
        self._extra = extra_args_provider
        self._on_cpu = on_cpu
        self._ignore_unknown = ignore_unknown_args
        self._defaults = dict(defaults or {})

    def provide(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add the script's flags and MeCo's to Megatron's parser."""
        names = flags_of(parser).keys()
        if "--meco" in sys.argv:
            parser.error = functools.partial(_usage_error, parser)  # type: ignore[method-assign]
        if self._extra is not None:
            parser = self._extra(parser)
        parser = add_arguments(parser, self._on_cpu)
        known = flags_of(parser)
        # Some of Megatron's flags are the script's: `add_modelopt_args`.
        self.flags = {n: flag for n, flag in known.items() if n in names or n in REFUSED}
        self.own_flags = {n: f for n, f in known.items() if n.startswith("meco_")}
        return parser

    def parse(self) -> argparse.Namespace:
        """Parse `sys.argv`, and fill in what a checkpoint and the script's defaults give."""
        from megatron.training.arguments import parse_args

        args: argparse.Namespace = parse_args(self.provide, self._ignore_unknown)
        if args.meco and args.use_checkpoint_args and (args.load or args.pretrained_checkpoint):
            from megatron.training.checkpointing import load_args_from_checkpoint

            with contextlib.redirect_stdout(io.StringIO()):
                load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
                load_args_from_checkpoint(args)
        for name, value in self._defaults.items():
            # As Megatron does it.
            if getattr(args, name, None) is None:
                setattr(args, name, value)
        return args

    def expand_branch(self, args: argparse.Namespace) -> tuple[argparse.Namespace, Branch | None]:
        """Append the flags that `--meco-branch-from` stands for to `sys.argv`, and parse again.

        Returns:
            The arguments with these flags, and the branch; `args` and None without a branch.
        """
        branch = expand_branch(args)
        if branch is None:
            return args, None
        sys.argv += branch.flags
        return self.parse(), branch


def parse_and_validate_args(
    extra_args_provider: ArgsProvider | None = None,
    args_defaults: dict[str, Any] | None = None,
    **megatron_options: Any,
) -> argparse.Namespace:
    """Parse and check the command line of a training script, on every rank.

    On a refusal rank 0 prints it, and every rank exits with status 1.

    Args:
        extra_args_provider: The script's own flags, as for Megatron's function.
        args_defaults: The script's own defaults, as for Megatron's function.
        **megatron_options: Passed to Megatron's function.

    Returns:
        Megatron's validated arguments, and MeCo's.
    """
    show_refusals_in_one_line()
    on_cpu = should_use_cpu()
    line = CommandLine(
        extra_args_provider,
        on_cpu=on_cpu,
        ignore_unknown_args=bool(megatron_options.get("ignore_unknown_args")),
        defaults=args_defaults,
    )

    def parse_with_megatron() -> argparse.Namespace:
        # Late: the platform must be chosen before Megatron is imported.
        from megatron.training.arguments import parse_and_validate_args as stock

        args: argparse.Namespace = stock(
            line.provide, args_defaults=args_defaults or {}, **megatron_options
        )
        return args

    try:
        _prepare_platform(on_cpu)
        if _takes_yaml():
            return _parse_yaml(parse_with_megatron)
        # Parsed once before Megatron does it, so that refusals come before its assertions.
        early = line.parse()
        _check_platform(early, on_cpu)
        early, branch = line.expand_branch(early)
        _check_before_megatron(early, line)
        with _megatron_errors(early.meco):
            args = parse_with_megatron()
            if args.meco:
                _check_model(args)
                _check_learning_rate(args)
        if branch is not None:
            apply_learning_rate(args, branch)
            if _is_rank_0():
                print(branch.describe(), flush=True)
        _check_samples(args)
        _check_skipped_iterations(args)
    except MeCoError as error:
        _end(error)
    apply_meco(args)
    if on_cpu and args.async_save:
        save_from_the_cpu_in_the_background(run_checkpoint_worker)
    if getattr(args, "dataloader_inter_document_masking", False) and _is_rank_0():
        print(f"> MeCo: {kernels_of(args, on_cpu).describe()}", flush=True)
    return args


def _parse_yaml(parse_with_megatron: Callable[[], argparse.Namespace]) -> argparse.Namespace:
    """Leave a run in YAML to Megatron, which reads no other flags with it."""
    if any(word.startswith("--meco") for word in sys.argv):
        raise _yaml_error()
    args = parse_with_megatron()
    args.meco = False
    return args


def _check_before_megatron(args: argparse.Namespace, line: CommandLine) -> None:
    _check_without_meco(args, line.own_flags)
    if args.meco:
        check_launcher()
        check_run(args)
        check_arguments(args, line.flags)


def _check_model(args: argparse.Namespace) -> None:
    """Make the model's configuration, whose assertions Megatron reaches later."""
    from megatron.training.arguments import core_transformer_config_from_args

    with contextlib.redirect_stdout(io.StringIO()):
        core_transformer_config_from_args(args)


def _check_learning_rate(args: argparse.Namespace) -> None:
    """Make the learning-rate schedule, whose assertions Megatron reaches after the model only."""
    from megatron_meco.training.learning_rate import learning_rate_schedule

    if not args.skip_train:
        learning_rate_schedule(args)


def _takes_yaml() -> bool:
    return any(word.partition("=")[0] == "--yaml-cfg" for word in sys.argv)


def _yaml_error() -> FlagError:
    reason, remedy = refusal("yaml_cfg")
    return FlagError(f"does not go with --meco: {reason}", where="--yaml-cfg", remedy=remedy)


def _check_without_meco(args: argparse.Namespace, own_flags: Mapping[str, Flag]) -> None:
    """Refuse flags of MeCo's that have no effect because `--meco` is missing."""
    # These two also work without --meco.
    without = ("meco_allow_changes", "meco_require_gpu")
    for name, flag in own_flags.items():
        value = getattr(args, name)
        if not args.meco and name not in without and value != flag.default:
            raise FlagError(
                "has no effect without --meco",
                where=shown(flag.spelling, value),
                remedy="Add --meco, or drop the flag.",
            )
    ranks = args.context_parallel_size
    if not args.meco and args.dataloader_inter_document_masking and not args.sft and ranks > 1:
        raise FlagError(
            "Megatron cuts each sequence as a whole for these ranks, and attention counts in "
            "chunks of documents: documents would reach each other",
            where=f"--dataloader-inter-document-masking --context-parallel-size {ranks}",
            remedy="Drop one of the two, or add --meco (with --meco-template '' for a baseline).",
        )


def parse_run(
    argv: Sequence[str], add_own: Callable[[argparse.ArgumentParser], None] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Parse and validate the flags of a training run without starting one.

    The parser, the checks and the validation are those of `parse_and_validate_args`. The number of
    ranks is the launcher's, or else the smallest for the layout. Without any flag of the model,
    placeholders are filled in.

    Args:
        argv: The flags.
        add_own: Adds further flags.

    Returns:
        Megatron's validated arguments, and notes on what was not checked.

    Raises:
        MeCoError: The run would not start.
    """
    on_cpu = should_use_cpu()
    _prepare_platform(on_cpu)

    def provide(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        if add_own is not None:
            add_own(parser)
        return parser

    notes: list[str] = []
    with _command_line(["--meco", *argv]):
        if _takes_yaml():
            raise _yaml_error()
        line = CommandLine(provide, on_cpu=on_cpu)
        args, _ = line.expand_branch(line.parse())
        check_numbers(args, line.flags)
        if args.tokenizer_type is None:
            raise FlagError(
                "missing", where="--tokenizer-type", remedy="Give the tokenizer of the corpus."
            )
        if all(getattr(args, name, None) is None for name in _MODEL_FLAGS):
            missing = _fill_stand_ins(args, line.flags)
            if missing:
                notes.append(f"checked the data alone; a run also needs {', '.join(missing)}")
        if on_cpu:
            notes += [
                f"this host has no CUDA device: the run would be refused here for {flag}"
                for flag, _ in impossible_flags(args)
            ]
        if "WORLD_SIZE" not in os.environ:
            args.world_size = (
                args.tensor_model_parallel_size
                * args.pipeline_model_parallel_size
                * args.context_parallel_size
            )
        check_run(args)
        check_arguments(args, line.flags)
        _validate(args)
        _check_skipped_iterations(args)
    apply_meco(args)
    return args, notes


def _fill_stand_ins(args: argparse.Namespace, flags: dict[str, Flag]) -> list[str]:
    """Fill in missing flags; returns their spellings."""
    missing = [name for name in _STAND_INS if getattr(args, name) is None]
    for name in missing:
        value = _STAND_INS[name]
        setattr(args, name, args.seq_length if value is None else value)
    if args.global_batch_size is None and args.step_batch_size_schedule is None:
        args.global_batch_size = args.micro_batch_size
    return [flags[name].spelling for name in missing]


def _validate(args: argparse.Namespace) -> None:
    """Validate flags and the model's configuration with Megatron, without its output."""
    from megatron.training.arguments import validate_args

    with _megatron_errors(True), contextlib.redirect_stdout(io.StringIO()):
        validate_args(args)
        _check_model(args)
        _check_learning_rate(args)


@contextlib.contextmanager
def _command_line(argv: Sequence[str]) -> Iterator[None]:
    """Set `sys.argv`, which Megatron's parser reads."""
    stock = sys.argv
    sys.argv = [stock[0], *argv]
    try:
        yield
    finally:
        sys.argv = stock


@contextlib.contextmanager
def _megatron_errors(meco: bool) -> Iterator[None]:
    """With `--meco`, turn errors of Megatron's validation into a refusal."""
    try:
        yield
    except MeCoError:
        raise
    except Exception as error:
        if not meco:
            raise
        # Many of Megatron's assertions have no text; the source line names the flag.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split()) or (frame.line or type(error).__name__)
        raise FlagError(
            f"Megatron refuses these flags: {text}",
            where=f"{os.path.basename(frame.filename)}, line {frame.lineno}",
            remedy="Change the flag that it names.",
        ) from error


def _usage_error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Print one line for an unknown flag; argparse would print all of Megatron's flags first."""
    _, _, words = message.partition("unrecognized arguments: ")
    known = [option for action in parser._actions for option in action.option_strings]
    hints = [closest(w.partition("=")[0], known) for w in words.split() if w.startswith("--")]
    if _is_rank_0():
        print(f"meco: error: {message}.{''.join(hints[:1])}", file=sys.stderr, flush=True)
    sys.exit(2)


def _end(error: MeCoError) -> NoReturn:
    if _is_rank_0():
        print(f"meco: error: {error.original()}", file=sys.stderr, flush=True)
    sys.exit(1)


def _is_rank_0() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _prepare_platform(on_cpu: bool) -> None:
    let_checkpoints_hold_an_interval()
    if on_cpu:
        enable_cpu_platform()
        return
    engine = try_transformer_engine()
    if engine.breaks_megatron:
        raise _engine_error(engine)
    skip_helper_compilation()


def schedule_from_args(args: argparse.Namespace) -> Schedule:
    """The schedule of a run, from Megatron's parsed flags."""
    if getattr(args, "step_batch_size_schedule", None):
        batch_size = BatchSize.parse(args.step_batch_size_schedule, args.seq_length)
    else:
        batch_size = BatchSize.constant(args.global_batch_size or args.micro_batch_size or 1)
    return make_schedule(
        MeCoConfig.from_args(args),
        batch_size,
        # Megatron's validation sets train_iters from --train-samples.
        train_iterations=None if args.train_samples else args.train_iters,
        train_samples=args.train_samples,
    )


def evaluation_from_args(args: argparse.Namespace) -> EvaluationBlocks:
    """Which validation samples one evaluation reads, from Megatron's validated flags.

    Args:
        args: Validated flags, with what a loaded checkpoint says of the samples already read.
    """
    begin = 0 if args.skip_train else args.consumed_valid_samples
    return EvaluationBlocks(args.eval_iters * args.eval_global_batch_size, begin)


def full_evaluation_from_args(
    args: argparse.Namespace, num_samples: int | None
) -> FullEvaluation | None:
    """How evaluations read the whole validation split; None without `--full-validation`.

    Args:
        args: As for `evaluation_from_args`, after `apply_meco`.
        num_samples: Validation samples of the run, as Megatron counts them by `args.eval_iters`.
    """
    if not args.meco_full_validation:
        return None
    blocks = evaluation_from_args(args)
    assert num_samples is not None, "Megatron counts, as apply_meco took its flag away"
    number = num_samples // blocks.size
    sets = tuple(validation_blend(args)[0]) if args.meco_validation_sets else ()
    return FullEvaluation(args.eval_global_batch_size, blocks.begin, number, sets)


def check_arguments(args: argparse.Namespace, flags: Mapping[str, Flag]) -> None:
    """Refuse flags and corpora that do not work with MeCo, before anything is built.

    Args:
        args: Parsed flags, not yet validated by Megatron.
        flags: Flags of Megatron's parser.

    Raises:
        FlagError: Names the flag, its value and the remedy.
        DataError: A corpus or its metadata is missing or does not match the template.
    """
    config = MeCoConfig.from_args(args)
    local_layers = args.transformer_impl == "local" and args.spec is None
    check_flags(args, flags, local_layers=local_layers, allowed=args.meco_allow_flags or ())
    _check_balance_in_samples(args)
    if args.mtp_num_layers and local_layers and not builds_further_heads():
        raise FlagError(
            "this Megatron builds further heads of layers that take no packed documents",
            where=f"--mtp-num-layers {args.mtp_num_layers}",
            remedy="Use Megatron-Core 0.19, or --transformer-impl transformer_engine.",
        )
    if args.seq_length:
        config.check_sequence_length(args.seq_length)
    if args.train_iters is not None or args.train_samples is not None:
        schedule = schedule_from_args(args)
        schedule.document_shares(config, own_cooldown=bool(args.meco_cooldown_data_path))
    check_blends(args)
    _check_validation(args, flags)
    check_corpora(
        corpus_prefixes(args),
        Template.parse(config.template),
        Template.parse(config.suffix_template, SUFFIX_FLAG),
    )
    cooldown = cooldown_blend(args)
    check_corpora(cooldown[0] if cooldown else [])


def _check_balance_in_samples(args: argparse.Namespace) -> None:
    """Refuse to balance experts within samples where Megatron cannot tell samples apart."""
    from megatron.core.packed_seq_params import PackedSeqParams

    if (
        args.num_experts
        and "seq_aux_loss" in args.moe_router_load_balancing_type
        and (args.micro_batch_size or 1) > 1
        and "tokens_per_sample" not in {field.name for field in fields(PackedSeqParams)}
    ):
        raise FlagError(
            "this Megatron would take the loss over all samples of a packed micro-batch",
            where="--moe-router-load-balancing-type seq_aux_loss",
            remedy="Use --micro-batch-size 1, aux_loss or Megatron-Core 0.19.",
        )


# What stands between two words of Megatron's log, or between a loss and its set.
_SET_NAME = re.compile(r"[\w.][\w.-]*")


def _check_validation(args: argparse.Namespace, flags: Mapping[str, Flag]) -> None:
    """Refuse contradictory flags of `--full-validation` and `--multiple-validation-sets`."""
    names = getattr(args, "validation_set_names", None)
    if names is not None and not args.multiple_validation_sets:
        raise FlagError(
            "has no effect without --multiple-validation-sets",
            where=shown("--validation-set-names", names),
            remedy="Add that flag, or drop this one.",
        )
    if args.multiple_validation_sets and not args.full_validation:
        raise FlagError(
            "needs --full-validation, also in Megatron",
            where="--multiple-validation-sets",
            remedy="Add --full-validation.",
        )
    if not args.full_validation:
        return
    if args.eval_iters != flags["eval_iters"].default:
        raise FlagError(
            "has no effect with --full-validation, which reads the whole validation split",
            where=f"--eval-iters {args.eval_iters}",
            remedy="Drop one of the two.",
        )
    corpora, weights = validation_blend(args)
    if weights is not None:
        raise FlagError(
            "reads every validation pack once, so the weights of the validation corpora would "
            "have no effect",
            where="--full-validation",
            remedy="Give the validation corpora by --valid-data-path without weights (and the "
            "training corpora by --train-data-path).",
        )
    if not args.multiple_validation_sets:
        return
    if args.data_path or args.data_args_path or not corpora:
        raise FlagError(
            "the sets are the corpora of --valid-data-path",
            where="--multiple-validation-sets",
            remedy="Give the training corpora by --train-data-path, and a corpus for each set by "
            "--valid-data-path.",
        )
    if names is None:
        return
    if len(names) != len(corpora):
        raise FlagError(
            f"{len(names)} names for the {len(corpora)} corpora of --valid-data-path",
            where=shown("--validation-set-names", names),
            remedy="Give one name for each corpus, in their order.",
        )
    for name in names:
        if not _SET_NAME.fullmatch(name) or names.count(name) > 1:
            raise FlagError(
                f"{name!r} is given twice"
                if names.count(name) > 1
                else f"{name!r} would make the log ambiguous",
                where=shown("--validation-set-names", names),
                remedy="Give different names of letters, digits, _, - and .",
            )


def add_arguments(parser: argparse.ArgumentParser, on_cpu: bool) -> argparse.ArgumentParser:
    """Add MeCo's flags and the defaults of this host.

    Args:
        parser: Megatron's parser.
        on_cpu: Whether to set the defaults for a CPU.
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
    parser.add_argument(
        "--meco-allow-flags",
        nargs="*",
        metavar="NAME",
        help="Let these flags of Megatron through although nobody has tried them with --meco "
        "(names as in Python: num_layers).",
    )
    add_branch_arguments(parser)
    add_meco_arguments(parser)
    if on_cpu:
        parser.set_defaults(**CPU_DEFAULTS)
    elif (
        "--meco" in sys.argv and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None
    ):
        # On by default in Megatron. Without apex's kernel its output layer then fails, also with
        # Transformer Engine.
        parser.set_defaults(gradient_accumulation_fusion=False)
    return parser


def _check_platform(args: argparse.Namespace, on_cpu: bool) -> None:
    if on_cpu:
        _check_cpu(args)
    elif args.transformer_impl == "transformer_engine":
        engine = try_transformer_engine()
        if engine.reason:
            raise _engine_error(engine)
    _check_hybrid_kernels(args)
    _check_checkpoint_worker(args, on_cpu)


def _check_checkpoint_worker(args: argparse.Namespace, on_cpu: bool) -> None:
    """Refuse `--async-save` where the worker process of its strategy could not start."""
    strategy = getattr(args, "async_strategy", "mcore")
    if not args.async_save or strategy == "mcore":
        return
    where = f"--async-save --async-strategy {strategy}"
    remedy = "Use --async-strategy mcore, which is Megatron's own."
    if on_cpu:
        raise FlagError("its worker process needs a CUDA device", where=where, remedy=remedy)
    if importlib.util.find_spec("nvidia_resiliency_ext") is None:
        raise FlagError("nvidia-resiliency-ext is not installed", where=where, remedy=remedy)


# Letters of a pattern: the layers, their packages in Python, and what to install.
_HYBRID_KERNELS = {
    "M": ("Mamba layers", ("mamba_ssm", "causal_conv1d"), "mamba-ssm and causal-conv1d"),
    "G": ("gated delta nets", ("fla",), "flash-linear-attention"),
}


def _check_hybrid_kernels(args: argparse.Namespace) -> None:
    """Refuse layers without their kernels, where Megatron fails in the layer."""
    patterns = (getattr(args, f"hybrid_{name}_pattern", None) for name in ("layer", "override"))
    letters = "".join(pattern or "" for pattern in patterns)
    for letter, (layers, packages, install) in _HYBRID_KERNELS.items():
        for package in packages if letter in letters else ():
            if importlib.util.find_spec(package) is None:
                raise FlagError(
                    f"{layers} need the Python package {package}, which is not installed",
                    where="--hybrid-layer-pattern",
                    remedy=f"Install {install} (on a host with a GPU), or leave the {letter} out "
                    "of the pattern.",
                )


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
    """Kernels of a run, from its validated flags and the libraries that Megatron imported."""
    from megatron_meco.training.attention import varlen_serves
    from megatron_meco.training.versions import optimizer_library

    kernels = choose_kernels(
        gpu=not on_cpu,
        engine_layers=args.transformer_impl != "local",
        varlen=varlen_serves(args.params_dtype, args.attention_dropout),
        optimizer=optimizer_library(),
    )
    if args.spec is not None and not args.spec[0].startswith("megatron_meco."):
        chosen = f"as --spec {' '.join(args.spec)} says"
        kernels = replace(kernels, attention=chosen, layers=chosen)
    if args.context_parallel_size > 1 and args.meco:
        shared = "keys and values of all ranks gathered"
        if args.transformer_impl != "local":
            shared = " ".join(args.cp_comm_type)
        shared = f"{kernels.attention}, over {args.context_parallel_size} ranks ({shared})"
        kernels = replace(kernels, attention=shared)
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


def _check_samples(args: argparse.Namespace) -> None:
    """Compute the run's fingerprint and compare it with the checkpoint's, on rank 0.

    The other ranks wait for rank 0 at the first collective call and end with it.
    """
    if not _is_rank_0():
        return
    if args.meco:
        from megatron.training.global_vars import get_tokenizer

        args.meco_fingerprint = fingerprint(
            args,
            schedule_from_args(args),
            training_blend(args),
            cooldown_blend(args),
            get_tokenizer(),
        )
    check_resume(args, getattr(args, "meco_fingerprint", None))


def _check_skipped_iterations(args: argparse.Namespace) -> None:
    """Refuse to skip a step whose checkpoint is the one at a switch."""
    if not args.meco or not args.save:
        return
    for switch, _, before, _ in schedule_from_args(args).switches:
        # Includes those of --result-rejected-tracker-filename.
        if switch in args.iterations_to_skip:
            flag = (
                "--meco-start-iteration" if before == PLAIN else "--meco-cooldown-start-iteration"
            )
            raise FlagError(
                f"Megatron writes no checkpoint after a step that it skips, and iteration {switch} "
                f"is the last one of the {before} phase",
                where="--iterations-to-skip",
                remedy=f"Leave it out, or move the switch with {flag}.",
            )


def apply_meco(args: argparse.Namespace) -> None:
    """Set the arguments that `--meco` implies, and the layers for packed documents.

    Args:
        args: Megatron's validated arguments; modified.
    """
    args.meco_full_validation, args.meco_validation_sets = False, None
    if args.meco:
        from megatron_meco.training.versions import optimizer_library

        _take_over_validation(args)
        args.dataloader_inter_document_masking = True
        args.create_attention_mask_in_dataloader = False
        switches = [at for at, *_ in schedule_from_args(args).switches]
        for name in ("save_interval", "save_retain_interval"):
            if getattr(args, name):
                setattr(args, name, SaveInterval(getattr(args, name), also=switches))
        largest = max(args.micro_batch_size, args.eval_micro_batch_size or 0)
        if args.pipeline_model_parallel_size > 1 and largest > 1:
            # A packed micro-batch is sent as [mbs * s, 1, h]; the next stage expects [s, mbs, h].
            # With this, stages also send the shape. Megatron requires the second setting with it,
            # even without experts.
            args.variable_seq_lengths = True
            if args.moe_token_dispatcher_type == "allgather":
                args.moe_token_dispatcher_type = "alltoall"
        if args.num_experts:
            keep_padding_out_of_experts()
        if args.use_distributed_optimizer and optimizer_library() == "torch":
            let_distributed_optimizer_resume()
    # Megatron 0.18 has no such flag.
    packed = getattr(args, "dataloader_inter_document_masking", False)
    if packed and _uses_local_layers(args):
        # Megatron's local attention does not support packed documents.
        if getattr(args, "hybrid_layer_pattern", None):
            from megatron_meco.training.hybrid_layers import PACKED_LOCAL_HYBRID_SPEC

            args.spec = PACKED_LOCAL_HYBRID_SPEC
            return
        from megatron_meco.training.attention import PACKED_LOCAL_SPEC, packed_local_heads_spec

        args.spec = PACKED_LOCAL_SPEC
        let_functions_be_specs()
        if args.mtp_num_layers:
            let_further_heads_be_packed(packed_local_heads_spec)


def _take_over_validation(args: argparse.Namespace) -> None:
    """Let MeCo's datasets do what `--full-validation` and `--multiple-validation-sets` ask for.

    Megatron's own way cannot be taken: with one set, `evaluate_and_print_results` takes an element
    of an integer; with several, it takes the test set for a list of sets; and its sampler reads the
    first samples twice where their number is not a multiple of the data-parallel ranks.
    """
    args.meco_full_validation = args.full_validation
    if args.multiple_validation_sets:
        numbers = range(len(validation_blend(args)[0]))
        given = getattr(args, "validation_set_names", None)
        args.meco_validation_sets = list(given or map(str, numbers))
        args.validation_set_names = None
    if args.full_validation:
        # Until the samples are counted.
        args.eval_iters = 1
    args.full_validation = args.multiple_validation_sets = False


def _uses_local_layers(args: argparse.Namespace) -> bool:
    """Whether MeCo's layers replace Megatron's: local layers, and no flag that selects others."""
    others = (
        "spec",
        "experimental_attention_variant",
        "heterogeneous_layers_config_path",
        "heterogeneous_layers_config_encoded_json",
    )
    chosen = any(getattr(args, name, None) for name in others)
    return args.transformer_impl == "local" and not chosen
