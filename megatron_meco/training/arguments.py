"""The command line of a training run: MeCo's flags, the platform, and what is refused.

`parse_and_validate_args` stands in for Megatron's function of that name. With `--meco` it checks
everything that can be checked before the first collective call and lets Megatron validate the rest;
without, the command line is Megatron's alone. `parse_run` does the same for `meco plan` and `meco
inspect`, on any host.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from megatron_meco.config import FINGERPRINT_KEYS, MeCoConfig, add_meco_arguments
from megatron_meco.data.corpora import check_corpora
from megatron_meco.data.phases import BatchSize, Schedule, make_schedule
from megatron_meco.data.template import Template
from megatron_meco.errors import FlagError, MeCoError, show_refusals_in_one_line
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
)
from megatron_meco.training.branch import add_branch_arguments, apply_learning_rate, expand_branch
from megatron_meco.training.cpu import (
    CPU_DEFAULTS,
    enable_cpu_platform,
    impossible_flags,
    looks_like_broken_gpu_setup,
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
    let_distributed_optimizer_resume,
    let_functions_be_specs,
    skip_helper_compilation,
)
from megatron_meco.training.run_fingerprint import check_resume, fingerprint

ArgsProvider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]

# What `meco plan` fills in where a command line says nothing of the model or of evaluation.
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
    """Megatron's parser with MeCo's flags, and what it was asked to parse.

    Args:
        extra_args_provider: The script's own flags, or None.
        on_cpu: Whether to set the defaults that a CPU needs.
        ignore_unknown_args: As Megatron's function takes it.

    Attributes:
        flags: Megatron's, with the defaults of this host; filled by parsing.
        own_flags: MeCo's, likewise.
    """

    def __init__(
        self,
        extra_args_provider: ArgsProvider | None,
        *,
        on_cpu: bool,
        ignore_unknown_args: bool = False,
    ) -> None:
        self.flags: dict[str, Flag] = {}
        self.own_flags: dict[str, Flag] = {}
        self._extra = extra_args_provider
        self._on_cpu = on_cpu
        self._ignore_unknown = ignore_unknown_args

    def provide(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add the script's flags and MeCo's to Megatron's parser."""
        names = flags_of(parser).keys()
        if "--meco" in sys.argv:
            parser.error = functools.partial(_usage_error, parser)  # type: ignore[method-assign]
        if self._extra is not None:
            parser = self._extra(parser)
        parser = add_arguments(parser, self._on_cpu)
        # With the defaults that hold now.
        known = flags_of(parser)
        self.flags = {name: flag for name, flag in known.items() if name in names}
        self.own_flags = {n: f for n, f in known.items() if n.startswith("meco_")}
        return parser

    def parse(self) -> argparse.Namespace:
        """Parse `sys.argv` by Megatron's own parser.

        Arguments that `--use-checkpoint-args` takes from a checkpoint are filled in.
        """
        from megatron.training.arguments import parse_args

        args: argparse.Namespace = parse_args(self.provide, self._ignore_unknown)
        if args.meco and args.use_checkpoint_args and (args.load or args.pretrained_checkpoint):
            from megatron.training.checkpointing import load_args_from_checkpoint

            with contextlib.redirect_stdout(io.StringIO()):
                load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
                load_args_from_checkpoint(args)
        return args


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
    show_refusals_in_one_line()
    on_cpu = should_use_cpu()
    try:
        _prepare_platform(on_cpu)
        line = CommandLine(
            extra_args_provider,
            on_cpu=on_cpu,
            ignore_unknown_args=bool(megatron_options.get("ignore_unknown_args")),
        )
        if _takes_yaml():
            return _parse_yaml(line, args_defaults, megatron_options)
        # Parsed once ahead of Megatron's own function: our refusals come before its assertions.
        early = line.parse()
        _check_platform(early, on_cpu)
        branch = expand_branch(early)
        if branch is not None:
            sys.argv += branch.flags
            early = line.parse()
        _check_without_meco(early, line.own_flags)
        if early.meco:
            check_launcher()
            check_run(early)
            check_arguments(early, line.flags)
        from megatron.training.arguments import parse_and_validate_args as stock

        with _megatron_errors(early.meco):
            args: argparse.Namespace = stock(
                line.provide, args_defaults=args_defaults or {}, **megatron_options
            )
            if args.meco and not args.skip_train:
                from megatron_meco.training.learning_rate import learning_rate_schedule

                learning_rate_schedule(args)
        if branch is not None:
            apply_learning_rate(args, branch)
            if _is_rank_0():
                print(branch.describe(), flush=True)
        _check_samples(args)
        _check_skipped_iterations(args)
    except MeCoError as error:
        _end(error)
    apply_meco(args)
    if getattr(args, "dataloader_inter_document_masking", False) and _is_rank_0():
        print(f"> MeCo: {kernels_of(args, on_cpu).describe()}", flush=True)
    return args


def _parse_yaml(
    line: CommandLine, args_defaults: dict[str, Any] | None, megatron_options: dict[str, Any]
) -> argparse.Namespace:
    """Leave a run that is described by YAML to Megatron, which reads no flags beside it."""
    if any(word.startswith("--meco") for word in sys.argv):
        raise _yaml_error()
    from megatron.training.arguments import parse_and_validate_args as stock

    args: argparse.Namespace = stock(
        line.provide, args_defaults=args_defaults or {}, **megatron_options
    )
    args.meco = False
    return args


def _takes_yaml() -> bool:
    return any(word.partition("=")[0] == "--yaml-cfg" for word in sys.argv)


def _yaml_error() -> FlagError:
    reason, remedy = refusal("yaml_cfg")
    return FlagError(f"does not go with --meco: {reason}", where="--yaml-cfg", remedy=remedy)


def _check_without_meco(args: argparse.Namespace, own_flags: Mapping[str, Flag]) -> None:
    """Refuse flags of MeCo's that have no effect because `--meco` is missing."""
    # A run that goes on without MeCo names that change, and may insist on a GPU.
    without = ("meco_allow_changes", "meco_require_gpu")
    for name, flag in own_flags.items():
        value = getattr(args, name)
        if not args.meco and name not in without and value != flag.default:
            raise FlagError(
                "has no effect without --meco",
                where=shown(flag.spelling, value),
                remedy="Add --meco, or drop the flag.",
            )


def parse_run(
    argv: Sequence[str], add_own: Callable[[argparse.ArgumentParser], None] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Parse and validate the flags of a training run without starting one.

    The parser, the checks and the validation are those of `parse_and_validate_args`. The number of
    ranks is the launcher's, or else the smallest that holds the layout. Flags of the model may be
    left out altogether; stand-ins then take their place.

    Args:
        argv: The flags.
        add_own: Adds further flags.

    Returns:
        Megatron's validated arguments, and notes on what was not checked.

    Raises:
        MeCoError: When the run would not start.
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
        args = line.parse()
        branch = expand_branch(args)
        if branch is not None:
            sys.argv += branch.flags
            args = line.parse()
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
    """Fill in what a command line says nothing of; returns the flags, as a user types them."""
    missing = [name for name in _STAND_INS if getattr(args, name) is None]
    for name in missing:
        value = _STAND_INS[name]
        setattr(args, name, args.seq_length if value is None else value)
    if args.global_batch_size is None and args.step_batch_size_schedule is None:
        args.global_batch_size = args.micro_batch_size
    return [flags[name].spelling for name in missing]


def _validate(args: argparse.Namespace) -> None:
    """Megatron's own validation of flags and of the model's configuration, unheard."""
    from megatron.training.arguments import core_transformer_config_from_args, validate_args

    from megatron_meco.training.learning_rate import learning_rate_schedule

    with _megatron_errors(True), contextlib.redirect_stdout(io.StringIO()):
        validate_args(args)
        core_transformer_config_from_args(args)
        if not args.skip_train:
            learning_rate_schedule(args)


@contextlib.contextmanager
def _command_line(argv: Sequence[str]) -> Iterator[None]:
    """Let Megatron's parser, which reads `sys.argv`, read these flags."""
    stock = sys.argv
    sys.argv = [stock[0], *argv]
    try:
        yield
    finally:
        sys.argv = stock


@contextlib.contextmanager
def _megatron_errors(meco: bool) -> Iterator[None]:
    """Turn what Megatron's validation raises into a refusal, where `--meco` is given."""
    try:
        yield
    except MeCoError:
        raise
    except Exception as error:
        if not meco:
            raise
        # Many of Megatron's assertions have no text; the line says which flag is meant.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split()) or (frame.line or type(error).__name__)
        raise FlagError(
            f"Megatron refuses these flags: {text}",
            where=f"{os.path.basename(frame.filename)}, line {frame.lineno}",
            remedy="Change the flag that it names.",
        ) from error


def _usage_error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Print one line for a mistyped flag, where argparse prints all of Megatron's flags first."""
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
    if on_cpu:
        enable_cpu_platform()
        return
    engine = try_transformer_engine()
    if engine.breaks_megatron:
        raise _engine_error(engine)
    skip_helper_compilation()


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


def check_arguments(args: argparse.Namespace, flags: Mapping[str, Flag]) -> None:
    """Refuse what does not go with MeCo, before anything is built.

    Args:
        args: Parsed flags, not yet validated by Megatron.
        flags: Those of Megatron's parser.

    Raises:
        FlagError: Names the flag, its value and the remedy.
        DataError: When a corpus or its metadata is missing or does not fit the template.
    """
    config = MeCoConfig.from_args(args)
    local_layers = args.transformer_impl == "local" and args.spec is None
    check_flags(args, flags, local_layers=local_layers, allowed=args.meco_allow_flags or ())
    if args.train_iters is not None or args.train_samples is not None:
        schedule = schedule_from_args(args)
        if not args.meco_cooldown_data_path:
            schedule.documents_held_out(config)
    check_blends(args)
    check_corpora(corpus_prefixes(args), Template.parse(config.template))
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
    from megatron_meco.training.versions import optimizer_library

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
            training_blend(args),
            cooldown_blend(args),
            get_tokenizer(),
        )
    check_resume(args, getattr(args, "meco_fingerprint", None))


def _check_skipped_iterations(args: argparse.Namespace) -> None:
    """Refuse to skip the step after which the switch's checkpoint is written."""
    if not args.meco or not args.save:
        return
    switch = schedule_from_args(args).switch_iteration
    # Also those that --result-rejected-tracker-filename lists.
    if switch in args.iterations_to_skip:
        raise FlagError(
            f"Megatron writes no checkpoint after a step that it skips, and iteration {switch} is "
            "the last one of the conditioned phase",
            where="--iterations-to-skip",
            remedy="Leave it out, or move the switch with --meco-cooldown-start-iteration.",
        )


def apply_meco(args: argparse.Namespace) -> None:
    """Set what follows from `--meco`, and the layers that packed documents need.

    Args:
        args: Megatron's validated arguments; changed.
    """
    if args.meco:
        from megatron_meco.training.versions import optimizer_library

        args.dataloader_inter_document_masking = True
        args.create_attention_mask_in_dataloader = False
        switch = schedule_from_args(args).switch_iteration
        for name in ("save_interval", "save_retain_interval"):
            if getattr(args, name):
                setattr(args, name, SaveInterval(getattr(args, name), also=switch))
        largest = max(args.micro_batch_size, args.eval_micro_batch_size or 0)
        if args.pipeline_model_parallel_size > 1 and largest > 1:
            # A packed micro-batch travels as [mbs * s, 1, h], where the next stage expects
            # [s, mbs, h]; this makes stages tell each other the shape. Megatron wants the second
            # setting with it, also without experts.
            args.variable_seq_lengths = True
            args.moe_token_dispatcher_type = "alltoall"
        if args.use_distributed_optimizer and optimizer_library() == "torch":
            let_distributed_optimizer_resume()
    # Megatron 0.18 has no such flag.
    packed = getattr(args, "dataloader_inter_document_masking", False)
    if packed and _uses_local_layers(args):
        from megatron_meco.training.attention import PACKED_LOCAL_SPEC

        # Megatron's own local attention refuses packed documents.
        args.spec = PACKED_LOCAL_SPEC
        let_functions_be_specs()


def _uses_local_layers(args: argparse.Namespace) -> bool:
    """Whether MeCo's layers take the place of Megatron's: nothing else chooses the layers."""
    others = (
        "spec",
        "experimental_attention_variant",
        "heterogeneous_layers_config_path",
        "heterogeneous_layers_config_encoded_json",
        "hybrid_layer_pattern",
        "num_experts",
        "multi_latent_attention",
        "mtp_num_layers",
    )
    chosen = any(getattr(args, name, None) for name in others)
    return args.transformer_impl == "local" and not chosen
