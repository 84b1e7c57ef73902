"""The mapping, tensor by tensor, against an assembly from named heads; every error."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from inference.synthetic import random_tensors, run_args

from megatron_meco.inference.checkpoint import CheckpointError
from megatron_meco.inference.llama import (
    Sizes,
    check_architecture,
    plan_weights,
    take_part,
)

ARGS = run_args(Path("tokenizer"))
HIDDEN, FFN, VOCAB, DIM = 4, 3, 5, 2


_numbers: dict[object, int] = {}


def marked(*names: object) -> torch.Tensor:
    """A distinct row for each name."""
    numbers = [_numbers.setdefault(name, 100 + len(_numbers)) for name in names]
    return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, HIDDEN).contiguous()


def sizes(groups: int, tied: bool = False) -> Sizes:
    return Sizes(
        layers=2,
        hidden=HIDDEN,
        ffn=FFN,
        heads=4,
        groups=groups,
        head_dim=DIM,
        vocab=VOCAB,
        tied=tied,
    )


def head(layer: int, kind: str, number: int) -> list[tuple[int, str, int, int]]:
    return [(layer, kind, number, i) for i in range(DIM)]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stacked", [True, False])
def test_every_tensor_goes_to_its_place(groups: int, stacked: bool) -> None:
    s = sizes(groups)
    repeats = 4 // groups
    layers = []
    for n in range(2):
        rows = []
        for g in range(groups):
            for q in range(repeats):
                rows += head(n, "q", g * repeats + q)
            rows += head(n, "k", g) + head(n, "v", g)
        ffn = [(n, kind, i) for kind in ("gate", "up") for i in range(FFN)]
        layers.append(
            {
                "self_attention.linear_qkv.layer_norm_weight": marked((n, "norm 1"))[0],
                "self_attention.linear_qkv.weight": marked(*rows),
                "self_attention.linear_proj.weight": torch.full((HIDDEN, 4 * DIM), 10.0 + n),
                "mlp.linear_fc1.layer_norm_weight": marked((n, "norm 2"))[0],
                "mlp.linear_fc1.weight": marked(*ffn),
                "mlp.linear_fc2.weight": torch.full((HIDDEN, FFN), 20.0 + n),
            }
        )
    tensors = {
        "embedding.word_embeddings.weight": marked(*(f"in {i}" for i in range(VOCAB + 3))),
        "output_layer.weight": marked(*(f"out {i}" for i in range(VOCAB + 3))),
        "decoder.final_layernorm.weight": marked("final")[0],
    }
    for name in layers[0]:
        if stacked:
            tensors[f"decoder.layers.{name}"] = torch.stack([layer[name] for layer in layers])
        else:
            for n in range(2):
                tensors[f"decoder.layers.{n}.{name}"] = layers[n][name]

    weights = plan_weights({k: tuple(v.shape) for k, v in tensors.items()}, s, "here")
    found = {}
    for weight in weights:
        source = tensors[weight.source]
        found[weight.name] = take_part(
            weight, source if weight.row is None else source[weight.row], s
        )
        assert found[weight.name].shape == weight.shape

    expected = {
        "model.embed_tokens.weight": marked(*(f"in {i}" for i in range(VOCAB))),
        "lm_head.weight": marked(*(f"out {i}" for i in range(VOCAB))),
        "model.norm.weight": marked("final")[0],
    }
    for n in range(2):
        layer = f"model.layers.{n}"
        for kind, count in (("q", 4), ("k", groups), ("v", groups)):
            rows = [row for i in range(count) for row in head(n, kind, i)]
            expected[f"{layer}.self_attn.{kind}_proj.weight"] = marked(*rows)
        for kind in ("gate", "up"):
            rows = [(n, kind, i) for i in range(FFN)]
            expected[f"{layer}.mlp.{kind}_proj.weight"] = marked(*rows)
        expected[f"{layer}.self_attn.o_proj.weight"] = torch.full((HIDDEN, 4 * DIM), 10.0 + n)
        expected[f"{layer}.mlp.down_proj.weight"] = torch.full((HIDDEN, FFN), 20.0 + n)
        expected[f"{layer}.input_layernorm.weight"] = marked((n, "norm 1"))[0]
        expected[f"{layer}.post_attention_layernorm.weight"] = marked((n, "norm 2"))[0]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_sizes_of_a_run() -> None:
    assert Sizes.from_args(ARGS, 300) == Sizes(
        layers=3, hidden=16, ffn=24, heads=4, groups=2, head_dim=6, vocab=300, tied=False
    )
    # Without grouped queries Megatron leaves some other number of groups in its flags.
    plain = run_args(Path("t"), group_query_attention=False, num_query_groups=1, kv_channels=None)
    assert (Sizes.from_args(plain, 300).groups, Sizes.from_args(plain, 300).head_dim) == (4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization": "LayerNorm"}, "normalization = 'LayerNorm'.*--normalization"),
        ({"layernorm_zero_centered_gamma": True}, "--apply-layernorm-1p"),
        ({"add_bias_linear": True}, "--disable-bias-linear"),
        ({"add_qkv_bias": True}, "--add-qkv-bias"),
        ({"swiglu": False}, "--swiglu"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"position_embedding_type": "learned_absolute"}, "learned_absolute"),
        ({"position_embedding_type": "none"}, "--position-embedding-type"),
        ({"rotary_percent": 0.5}, "--rotary-percent"),
        ({"rotary_interleaved": True}, "--rotary-interleaved"),
        ({"use_rope_scaling": True}, "--use-rope-scaling"),
        ({"qk_layernorm": True}, "--qk-layernorm"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers"),
        ({"multi_latent_attention": True}, "--multi-latent-attention"),
        ({"window_size": (128, 0)}, "--window-size"),
        ({"hybrid_layer_pattern": "M*-"}, "--hybrid-layer-pattern"),
    ],
)
def test_no_llama_is_refused_by_the_flag(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_architecture(Namespace(**{**vars(ARGS), **change}), "here")


def test_a_llama_is_accepted() -> None:
    check_architecture(ARGS, "here")
    check_architecture(Namespace(**vars(ARGS), qk_layernorm=False, add_qkv_bias=None), "here")


def shapes(**changes: object) -> dict[str, tuple[int, ...]]:
    found = {name: tuple(tensor.shape) for name, tensor in random_tensors(ARGS).items()}
    return {**found, **changes}


def test_optimizer_and_random_states_are_passed_over() -> None:
    extra = {
        "optimizer.state.exp_avg.output_layer.weight": (3,),
        "chained_0.optimizer.param": (3,),
        "rng_state": (1,),
        "decoder.layers.mlp.linear_fc1._extra_state": (3,),
    }
    weights = plan_weights(shapes(**extra), Sizes.from_args(ARGS, 300), "here")
    assert len(weights) == 3 + 3 * 9


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.self_attention.linear_qkv.bias",
        "decoder.layers.self_attention.q_layernorm.weight",
        "decoder.layers.mlp.router.weight",
        "embedding.position_embeddings.weight",
        "mtp.layers.0.eh_proj.weight",
        "optimizer_like.weight",
    ],
)
def test_unknown_tensors_are_refused_by_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"unknown tensor {name}"):
        plan_weights(shapes(**{name: (3,)}), Sizes.from_args(ARGS, 300), "here")


def test_names_of_a_hostile_file_stay_on_one_line() -> None:
    names = {"decoder.layers\nche.weight": (3,), "\x1b[2Jx": (3,), "y" * 9999: (3,)}
    with pytest.raises(CheckpointError) as refusal:
        plan_weights(shapes(**names), Sizes.from_args(ARGS, 300), "here")
    told = str(refusal.value)
    assert r"unknown tensor \x1b[2Jx, decoder.layers\nche.weight, yyy" in told
    assert told.isprintable()
    assert len(told) < 500


def test_missing_and_misshapen_tensors_are_refused_by_name() -> None:
    s = Sizes.from_args(ARGS, 300)
    lacking = shapes()
    del lacking["decoder.final_layernorm.weight"]
    with pytest.raises(CheckpointError, match=r"no tensor decoder\.final_layernorm\.weight"):
        plan_weights(lacking, s, "here")
    name = "decoder.layers.mlp.linear_fc2.weight"
    with pytest.raises(CheckpointError, match=r"linear_fc2\.weight has shape \[2, 16, 24\]"):
        plan_weights(shapes(**{name: (2, 16, 24)}), s, "here")
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight has shape \[384, 16\]"):
        plan_weights(shapes(), Sizes.from_args(ARGS, 385), "here")
    with pytest.raises(CheckpointError, match=r"unknown tensor output_layer\.weight"):
        tied = run_args(Path("t"), untie_embeddings_and_output_weights=False)
        plan_weights(shapes(), Sizes.from_args(tied, 300), "here")
