"""Every flag of the installed Megatron is decided, and what is refused is refused by name."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest

from megatron_meco import refusals
from megatron_meco.config import alignment_from_args, layout_alignment
from megatron_meco.errors import FlagError
from megatron_meco.megatron_flags import COMPANIONS, HONOURED, OTHER_PROGRAMS, REFUSED, UNTESTED
from megatron_meco.refusals import Flag, check_flags, check_launcher, flags_of


@pytest.fixture(scope="module")
def flags() -> dict[str, Flag]:
    from megatron_meco.training.cpu import enable_cpu_platform

    enable_cpu_platform()
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return flags_of(parser)


def groups() -> list[frozenset[str]]:
    others = [*OTHER_PROGRAMS.values(), *COMPANIONS.values()]
    return [HONOURED, UNTESTED, frozenset(REFUSED), *others]


def test_every_flag_of_this_megatron_is_decided(flags: dict[str, Flag]) -> None:
    undecided = sorted(n for n in flags if not any(n in group for group in groups()))
    assert not undecided, (
        f"{len(undecided)} flags of this Megatron are in no list of megatron_flags.py; decide what "
        f"--meco does with each: {undecided}"
    )


def test_no_flag_is_decided_twice() -> None:
    # A flag may be refused for some of its values and honoured for the others.
    counts = [name for group in groups() for name in group]
    twice = {name for name in counts if counts.count(name) > 1}
    both = {n for n in REFUSED if n in HONOURED}
    assert twice == both
    assert both == {
        "ckpt_format",
        "create_attention_mask_in_dataloader",
        "dataloader_type",
        "moe_router_load_balancing_type",
        "non_persistent_ckpt_type",
        "position_embedding_type",
        "transformer_impl",
    }


def parsed(flags: dict[str, Flag], **changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{name: flag.default for name, flag in flags.items()} | changes)


def test_defaults_pass(flags: dict[str, Flag]) -> None:
    check_flags(parsed(flags), flags, local_layers=False)
    check_flags(parsed(flags, transformer_impl="local"), flags, local_layers=True)


def test_every_refused_flag_is_refused_by_name(flags: dict[str, Flag]) -> None:
    """Each flag that is not honoured, set to another value than its default."""
    values = {
        "ckpt_format": "fsdp_dtensor",
        "create_attention_mask_in_dataloader": 1,
        "dataloader_type": "cyclic",
        "moe_router_load_balancing_type": ["aux_loss", "sinkhorn"],
        "position_embedding_type": "mrope",
        "transformer_impl": "inference_optimized",
        "non_persistent_ckpt_type": "local",
    }
    for name, flag in flags.items():
        if name in HONOURED and name not in values:
            continue
        value = values.get(name, not flag.default if isinstance(flag.default, bool) else 7)
        try:
            check_flags(parsed(flags, **{name: value}), flags, local_layers=False)
        except FlagError as error:
            refused = error
        else:
            pytest.fail(f"{name} = {value!r} passes")
        assert str(refused).startswith(flag.spelling), (name, str(refused))
        assert refused.remedy


def test_a_flag_of_a_newer_megatron_is_refused_until_it_is_decided(flags: dict[str, Flag]) -> None:
    newer = {**flags, "shuffle_labels": Flag("--shuffle-labels", False)}
    check_flags(parsed(newer), newer, local_layers=False)
    args = parsed(newer, shuffle_labels=True)
    with pytest.raises(
        FlagError, match=r"--shuffle-labels: is not known to MeCo.*meco-allow-flags"
    ):
        check_flags(args, newer, local_layers=False)
    check_flags(args, newer, local_layers=False, allowed=["shuffle_labels"])


def test_what_contradicts_meco_cannot_be_let_through(flags: dict[str, Flag]) -> None:
    args = parsed(flags, reset_attention_mask=True)
    with pytest.raises(FlagError, match="Transformer Engine ignores it"):
        check_flags(args, flags, local_layers=False, allowed=["reset_attention_mask"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("softmax_type", "off-by-one"),
        ("layernorm_zero_centered_gamma", True),
        ("qk_clip", True),
        ("attention_backend", SimpleNamespace(name="flash")),
    ],
)
def test_the_layers_without_transformer_engine_have_fewer(
    flags: dict[str, Flag], name: str, value: object
) -> None:
    args = parsed(flags, **{name: value})
    check_flags(args, flags, local_layers=False)
    with pytest.raises(FlagError, match="hosts without Transformer Engine"):
        check_flags(args, flags, local_layers=True)


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("micro_batch_size", 0, "--micro-batch-size 0: must be above 0"),
        ("global_batch_size", -4, "--global-batch-size -4: must be above 0"),
        ("train_iters", 0, "--train-iters 0: must be above 0"),
        ("train_samples", 4611686018427387904, "--train-samples 4611686018427387904: too large"),
        ("seq_length", 10**12, "--seq-length 1000000000000: too large"),
        ("log_interval", 0, "--log-interval 0"),
        ("eval_interval", 0, "--eval-interval 0"),
        ("eval_iters", -1, "--eval-iters -1: must not be negative"),
        ("num_workers", -1, "--num-workers -1"),
        ("num_workers", 10**9, "--num-workers 1000000000: too large"),
        ("lr", NAN, "--lr nan: not a finite number"),
        ("clip_grad", INFINITE, "--clip-grad inf: not a finite number"),
        ("mid_level_dataset_surplus", NAN, "--mid-level-dataset-surplus nan"),
        ("hidden_dropout", 1.5, "--hidden-dropout 1.5: must not be above 1"),
        ("seed", 0, "--seed 0"),
        ("seed", 2**32, "--seed 4294967296: too large"),
        ("iterations_to_skip", [3, -1], "--iterations-to-skip -1"),
        ("tensorboard_log_interval", 0, "--tensorboard-log-interval 0"),
    ],
)
def test_numbers_that_no_run_can_mean(
    flags: dict[str, Flag], name: str, value: object, message: str
) -> None:
    with pytest.raises(FlagError) as caught:
        check_flags(parsed(flags, **{name: value}), flags, local_layers=False)
    assert message in str(caught.value)


def test_a_missing_launcher() -> None:
    there = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    check_launcher({**there, "MASTER_PORT": "29500"})
    with pytest.raises(FlagError, match=r"MASTER_PORT: not set.*torchrun"):
        check_launcher(there)
    with pytest.raises(FlagError, match="environment variable RANK"):
        check_launcher({})


def context_parallel(flags: dict[str, Flag], **changes: object) -> argparse.Namespace:
    values: dict[str, object] = {
        "context_parallel_size": 2,
        "calculate_per_token_loss": True,
        "seq_length": 64,
        "num_attention_heads": 8,
        "transformer_impl": "transformer_engine",
        "meco_pad_documents_to": None,
    }
    return parsed(flags, **{**values, **changes})


@pytest.mark.parametrize("local", [False, True])
def test_context_parallelism_passes(flags: dict[str, Flag], local: bool) -> None:
    for changes in ({}, {"meco_pad_documents_to": 8}, {"cp_comm_type": ["all_gather"]}):
        kind = "local" if local else "transformer_engine"
        args = context_parallel(flags, transformer_impl=kind, **changes)
        check_flags(args, flags, local_layers=local)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calculate_per_token_loss": False}, "divides its loss by its own trained tokens"),
        ({"context_parallel_size": 0}, "--context-parallel-size 0: must be above 0"),
        ({"hybrid_context_parallel": True}, "--hybrid-context-parallel: does not go with"),
        (
            {"hierarchical_context_parallel_sizes": [1, 2]},
            "--hierarchical-context-parallel-sizes 1 2: does not go with",
        ),
        ({"max_seqlen_per_dp_cp_rank": 64}, "--max-seqlen-per-dp-cp-rank 64: does not go with"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1"),
        ({"hybrid_layer_pattern": "M*"}, "not tested with --context-parallel-size 2: state-space"),
        ({"window_size": (16, 0)}, "--window-size 16 0: not tested with"),
        ({"seq_length": 66}, "--seq-length 66: not a multiple of 4:.*Give 68"),
        ({"meco_pad_documents_to": 6}, "--meco-pad-documents-to 6: not a multiple of 4:.*Give 12"),
        (
            {
                "meco_pad_documents_to": 4,
                "sequence_parallel": True,
                "tensor_model_parallel_size": 2,
            },
            "--meco-pad-documents-to 4: not a multiple of 8",
        ),
        ({"cp_comm_type": ["a2a+p2p"]}, r"--cp-comm-type a2a\+p2p: unknown, or not for packed"),
        ({"cp_comm_type": ["p2p", "ring"]}, "--cp-comm-type ring: unknown"),
        ({"cp_comm_type": ["a2a"], "num_query_groups": 1}, "it deals 1 key-value heads over"),
        ({"attention_backend": SimpleNamespace(name="unfused")}, "--attention-backend unfused"),
        ({"cp_comm_type": ["a2a"], "transformer_impl": "local"}, "gather keys and values"),
    ],
)
def test_what_context_parallelism_cannot_do_is_refused_by_name(
    flags: dict[str, Flag], changes: dict[str, object], message: str
) -> None:
    args = context_parallel(flags, **changes)
    with pytest.raises(FlagError, match=message):
        check_flags(args, flags, local_layers=args.transformer_impl == "local")


@pytest.mark.parametrize(
    ("version", "kind", "message"),
    [
        ("2.18.0", "all_gather", None),
        ("2.20.0.dev0+d0067d0", "all_gather", None),
        ("2.17.1", "all_gather", r"Transformer Engine 2.17.1 has it.*need 2.18. Use p2p or a2a"),
        ("2.9.0", "a2a", r"Transformer Engine 2.9.0 has it.*need 2.10. Use p2p\."),
        ("2.9.0", "p2p", None),
        (None, "all_gather", None),
    ],
)
def test_ways_of_communication_that_a_transformer_engine_lacks(
    flags: dict[str, Flag],
    version: str | None,
    kind: str,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refusals, "_engine_version", lambda: version)
    args = context_parallel(flags, cp_comm_type=[kind])
    if message is None:
        check_flags(args, flags, local_layers=False)
        return
    with pytest.raises(FlagError, match=message):
        check_flags(args, flags, local_layers=False)


@pytest.mark.parametrize(
    ("changes", "alignment"),
    [
        ({"context_parallel_size": 1, "sequence_parallel": True, "fp8": "hybrid"}, 1),
        ({}, 4),
        ({"context_parallel_size": 4}, 8),
        ({"tensor_model_parallel_size": 8}, 4),
        ({"tensor_model_parallel_size": 8, "sequence_parallel": True}, 32),
        ({"context_parallel_size": 3, "fp8": "hybrid"}, 48),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, 32),
    ],
)
def test_what_a_layout_needs_of_documents(
    flags: dict[str, Flag], changes: dict[str, object], alignment: int
) -> None:
    args = context_parallel(flags, **changes)
    assert layout_alignment(args) == alignment_from_args(args) == alignment
    args.meco_pad_documents_to = 96
    assert alignment_from_args(args) == 96


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_expert_capacity_factor": 1.0}, "an expert that is full drops tokens"),
        ({"moe_router_load_balancing_type": ["sinkhorn"]}, "documents depend on each other"),
        ({"num_experts": 8, "moe_router_fusion": True}, "fused loss takes a whole number"),
        ({"num_experts": 8, "tensor_model_parallel_size": 2}, "Add --sequence-parallel"),
        (
            {
                "num_experts": 8,
                "sequence_parallel": True,
                "micro_batch_size": 2,
                "moe_router_load_balancing_type": ["seq_aux_loss"],
            },
            "loss over all samples of a micro-batch",
        ),
        (
            {"num_experts": 8, "sequence_parallel": True, "mtp_num_layers": 1},
            "further heads with experts",
        ),
        (
            {"num_experts": 8, "moe_grouped_gemm": True, "transformer_impl": "local"},
            "--moe-grouped-gemm: the layers for hosts",
        ),
        ({"moe_router_topk": 4}, "--moe-router-topk 4: has no effect without --num-experts"),
        (
            {
                "multi_latent_attention": True,
                "qk_pos_emb_head_dim": 15,
                "num_attention_heads": 4,
                "hidden_size": 64,
                "position_embedding_type": "rope",
            },
            "--qk-pos-emb-head-dim / --rotary-percent: 15 rotary dimensions",
        ),
        ({"kv_lora_rank": 64}, "--kv-lora-rank 64: has no effect without --multi-latent"),
        ({"hybrid_layer_pattern": "M*E"}, "layer 'E': the number of its experts is missing"),
        ({"hybrid_override_pattern": "MD"}, "--hybrid-override-pattern MD: layer 'D'"),
        ({"hybrid_layer_pattern": "M+"}, r"layer '\+': latent attention"),
        ({"hybrid_layer_pattern": "M*/**"}, "layer '/': nobody has shown that further heads"),
        ({"mtp_num_layers": 1, "mtp_standalone": True}, "--mtp-standalone: does not go with"),
        (
            {"mtp_num_layers": 1, "pipeline_model_parallel_layout": "E|tm|tL"},
            r"--pipeline-model-parallel-layout E\|tm\|tL: does not go with --mtp-num-layers",
        ),
    ],
)
def test_kinds_of_models_that_are_not_right_are_refused_by_name(
    flags: dict[str, Flag], changes: dict[str, object], message: str
) -> None:
    args = argparse.Namespace(**{name: flag.default for name, flag in flags.items()} | changes)
    with pytest.raises(FlagError, match=message):
        check_flags(args, flags, local_layers=args.transformer_impl == "local")


@pytest.mark.parametrize(
    "changes",
    [
        {"hybrid_layer_pattern": "M*-|MG*-"},
        {"hybrid_layer_pattern": "M*-G", "transformer_impl": "local"},
        {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3},
        {"mtp_num_layers": 1, "transformer_impl": "local", "pipeline_model_parallel_size": 2},
        {"num_experts": 8, "moe_router_load_balancing_type": ["seq_aux_loss"]},
        {"num_experts": 8, "transformer_impl": "local", "moe_token_dispatcher_type": "alltoall"},
        {"num_experts": 8, "hybrid_layer_pattern": "M*E"},
        {"multi_latent_attention": True, "kv_lora_rank": 64, "transformer_impl": "local"},
        {"position_embedding_type": "yarn", "rotary_scaling_factor": 4.0, "mscale": 0.7},
        {"window_size": (128, 0), "window_attn_skip_freq": 4, "transformer_impl": "local"},
        {"qk_layernorm": True, "position_embedding_type": "yarn", "window_size": (128, 0)},
    ],
)
def test_kinds_of_models_that_go(flags: dict[str, Flag], changes: dict[str, object]) -> None:
    args = argparse.Namespace(**{name: flag.default for name, flag in flags.items()} | changes)
    check_flags(args, flags, local_layers=args.transformer_impl == "local")


@pytest.mark.parametrize("kind", ["tensor-model", "pipeline-model", "context"])
def test_a_layout_that_does_not_fit_is_told_by_the_flag_that_was_given(
    kind: str, flags: dict[str, Flag]
) -> None:
    name = f"{kind.replace('-', '_')}_parallel_size"
    given = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 64}
    given |= {"max_position_embeddings": 64, "micro_batch_size": 1, "train_iters": 4, "lr": 1e-3}
    given |= {"eval_interval": 2, "world_size": 3, name: 2}
    args = argparse.Namespace(**{n: flag.default for n, flag in flags.items()} | given)
    with pytest.raises(
        FlagError, match=f"--{kind}-parallel-size 2: .* which does not divide the 3"
    ):
        refusals.check_run(args)
