"""`PackedDotProductAttention` against a dense softmax with a block-diagonal mask."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_meco.errors import DataError, FlagError  # noqa: E402
from megatron_meco.training import attention as attention_module  # noqa: E402
from megatron_meco.training.attention import (  # noqa: E402
    PackedDotProductAttention,
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    packed_local_layer_spec,
)

# A TransformerConfig of nothing but defaults warns about one of them.
pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")

HEADS, GROUPS, HEAD_DIM = 4, 2, 16


def make_config(**changes: object) -> TransformerConfig:
    values: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": HEADS * HEAD_DIM,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "normalization": "RMSNorm",
        "use_cpu_initialization": True,
    }
    return TransformerConfig(**{**values, **changes})


def make_attention(
    softmax_scale: float | None = None, pg_collection: object = None, **changes: object
) -> PackedDotProductAttention:
    return PackedDotProductAttention(
        config=make_config(**changes),
        layer_number=3,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        softmax_scale=softmax_scale,
        pg_collection=pg_collection,
    )


def make_qkv(
    tokens: int, groups: int = GROUPS, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return tuple(
        torch.randn(tokens, heads, HEAD_DIM, generator=generator).to(dtype)
        for heads in (HEADS, groups, groups)
    )


def packed(*bounds: int) -> PackedSeqParams:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def dense_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: list[int],
    scale: float | None = None,
    window: float = math.inf,
) -> Tensor:
    """Softmax over a full [t, t] matrix; a query sees earlier keys of its own document only."""
    tokens = q.size(0)
    position = torch.arange(tokens)
    document = torch.bucketize(position, torch.tensor(bounds[1:]), right=True)
    visible = (document[:, None] == document[None, :]) & (position[:, None] >= position[None, :])
    visible &= position[:, None] - position[None, :] <= window
    outputs = []
    for head in range(q.size(1)):
        group = head // (q.size(1) // k.size(1))
        scores = q[:, head].double() @ k[:, group].double().T * (scale or 1 / math.sqrt(HEAD_DIM))
        outputs.append(scores.masked_fill(~visible, -math.inf).softmax(-1) @ v[:, group].double())
    return torch.stack(outputs, dim=1).flatten(1)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "bounds", [[0, 40], [0, 1, 2, 40], [0, 13, 14, 39, 40], [0, 0, 17, 17, 40, 40, 40]]
)
def test_packed_equals_dense_oracle(bounds: list[int], groups: int) -> None:
    q, k, v = make_qkv(40, groups)
    out = make_attention(num_query_groups=groups)(q, k, v, None, packed_seq_params=packed(*bounds))
    assert out.shape == (40, HEADS * HEAD_DIM)
    torch.testing.assert_close(out.double(), dense_oracle(q, k, v, bounds), rtol=0, atol=1e-5)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(("window", "skip", "seen"), [(0, None, 0), (5, None, 5), (5, 3, 40)])
def test_a_window_counts_tokens_of_a_document(
    window: int, skip: int | None, seen: int, packs: bool
) -> None:
    """The layer is the third, which a frequency of 3 exempts."""
    bounds = [0, 1, 18, 40] if packs else [0, 40]
    q, k, v = make_qkv(40)
    attention = make_attention(window_size=(window, 0), window_attn_skip_freq=skip)
    if packs:
        out = attention(q, k, v, None, packed_seq_params=packed(*bounds))
    else:
        out = attention(*(x[:, None] for x in (q, k, v)), None)[:, 0]
    expected = dense_oracle(q, k, v, bounds, window=seen)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(expected, dense_oracle(q, k, v, bounds)) == (seen == 40)


def test_values_may_have_another_size_than_queries() -> None:
    """As in latent attention."""
    bounds = [0, 13, 40]
    q, k, v = make_qkv(40, HEADS)
    out = make_attention()(q, k, v[..., :8], None, packed_seq_params=packed(*bounds))
    expected = dense_oracle(q, k, v, bounds).view(40, HEADS, -1)[..., :8].flatten(1)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_gradients_equal_dense_oracle() -> None:
    bounds = [0, 9, 30]
    ours = [x.requires_grad_() for x in make_qkv(30)]
    oracle = [x.detach().clone().requires_grad_() for x in ours]
    weight = torch.linspace(-1, 1, 30 * HEADS * HEAD_DIM).view(30, -1)
    (make_attention()(*ours, None, packed_seq_params=packed(*bounds)) * weight).sum().backward()
    (dense_oracle(*oracle, bounds) * weight).sum().backward()
    for x, y in zip(ours, oracle, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_one_document_leaves_the_others_bit_identical(dtype: torch.dtype) -> None:
    params = packed(0, 11, 12, 50, 64)
    attention = make_attention()

    def run(changed: bool) -> tuple[Tensor, list[Tensor]]:
        qkv = make_qkv(64, dtype=dtype)
        if changed:
            for x in qkv:
                x[12:50] = 100 * torch.randn(38, x.size(1), HEAD_DIM)
        leaves = [x.requires_grad_() for x in qkv]
        out = attention(*leaves, None, packed_seq_params=params)
        out.float().sum().backward()
        return out, [x.grad for x in leaves]

    (before, grads_before), (after, grads_after) = run(False), run(True)
    others = torch.ones(64, dtype=torch.bool)
    others[12:50] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])
    for x, y in zip(grads_before, grads_after, strict=True):
        assert torch.equal(x[others], y[others])


def test_softmax_scale_is_used() -> None:
    q, k, v = make_qkv(20)
    out = make_attention(softmax_scale=0.7)(q, k, v, None, packed_seq_params=packed(0, 8, 20))
    expected = dense_oracle(q, k, v, [0, 8, 20], scale=0.7)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_unpacked_equals_oracle_of_each_sample() -> None:
    q, k, v = (x.view(2, 15, -1, HEAD_DIM).transpose(0, 1) for x in make_qkv(30))  # [s, b, h, d]
    out = make_attention()(q, k, v, None)
    assert out.shape == (15, 2, HEADS * HEAD_DIM)
    for sample in range(2):
        expected = dense_oracle(q[:, sample], k[:, sample], v[:, sample], [0, 15])
        torch.testing.assert_close(out[:, sample].double(), expected, rtol=0, atol=1e-5)


def test_dropout_only_while_training() -> None:
    q, k, v = make_qkv(30)
    # With sequence parallelism dropout draws from the default generator, as in Megatron.
    attention = make_attention(attention_dropout=0.5, tensor_model_parallel_size=2)
    attention.config.sequence_parallel = True
    params = packed(0, 10, 30)
    plain = make_attention()(q, k, v, None, packed_seq_params=params)
    dropped = attention(q, k, v, None, packed_seq_params=params)
    assert not torch.allclose(dropped, plain)
    attention.eval()
    assert torch.equal(attention(q, k, v, None, packed_seq_params=params), plain)


@pytest.mark.parametrize("bounds", [(0, 10, 29), (1, 30), (0, 31)])
def test_boundaries_that_do_not_cover_the_pack_are_refused(bounds: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="of a pack of 30"):
        make_attention()(*make_qkv(30), None, packed_seq_params=packed(*bounds))


@pytest.mark.parametrize("window", [-1, 7])
def test_varlen_gets_causal_window_scale_and_groups(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA branch, with the kernel replaced by the dense oracle."""
    calls = []

    def fake_varlen(q: Tensor, k: Tensor, v: Tensor, *sizes: object, **options: object) -> Tensor:
        cu_q, cu_k, max_q, max_k = sizes
        assert cu_q is cu_k
        assert (max_q, max_k) == (20, 20)
        assert options.pop("window_size") == (window, 0)
        assert options.pop("enable_gqa", False) == (q.size(1) != k.size(1))
        calls.append(options.pop("scale"))
        assert not options
        return dense_oracle(q, k, v, cu_q.tolist()).view_as(q).to(q.dtype)

    monkeypatch.setattr(attention_module, "varlen_attn", fake_varlen)
    monkeypatch.setattr(attention_module, "_can_use_varlen", lambda q, dropout: True)
    q, k, v = make_qkv(30)
    for parameters in ({"window_size", "scale"}, {"window_size", "scale", "enable_gqa"}):
        monkeypatch.setattr(attention_module, "_VARLEN_PARAMETERS", parameters)
        config = {} if window < 0 else {"window_size": (window, 0)}
        out = make_attention(**config)(q, k, v, None, packed_seq_params=packed(0, 10, 30))
        expected = dense_oracle(q, k, v, [0, 10, 30])
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    assert calls == [1 / math.sqrt(HEAD_DIM)] * 2


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"window_size": (128, 1)}, "--window-size"),
        ({"softmax_type": "off-by-one"}, "--softmax-type"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(changes: dict[str, object], where: str) -> None:
    with pytest.raises(FlagError, match=where):
        make_attention(**changes)


def test_context_parallelism_is_refused_for_batches_that_are_not_packed() -> None:
    attention = make_attention(pg_collection=SimpleNamespace(cp="group"), context_parallel_size=2)
    with pytest.raises(FlagError, match="--context-parallel-size"):
        attention(*(x[:, None] for x in make_qkv(4)), None)


def test_other_masks_are_refused() -> None:
    with pytest.raises(FlagError, match="no_mask"):
        make_attention()(*make_qkv(4), None, attn_mask_type=AttnMaskType.no_mask)


def one_stage(monkeypatch: pytest.MonkeyPatch, num_layers: int) -> None:
    monkeypatch.setattr(gpt_layer_specs, "get_num_layers_to_build", lambda *_, **__: num_layers)
    monkeypatch.setattr(gpt_layer_specs, "get_transformer_layer_offset", lambda *_, **__: 0)


@pytest.mark.parametrize(
    ("normalization", "norm"),
    [("RMSNorm", SequenceParallelRMSNorm), ("LayerNorm", SequenceParallelLayerNorm)],
)
def test_spec_replaces_attention_and_every_norm(
    normalization: str, norm: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_stage(monkeypatch, 3)
    config = SimpleNamespace(transformer=make_config(normalization=normalization, num_layers=3))
    config.transformer.qk_layernorm = True
    block = packed_local_layer_spec(config, vp_stage=None)
    assert len(block.layer_specs) == 3
    assert block.layer_norm is norm
    layer = block.layer_specs[0].submodules
    attention = layer.self_attention.submodules
    assert attention.core_attention is PackedDotProductAttention
    assert {
        layer.input_layernorm,
        layer.pre_mlp_layernorm,
        attention.q_layernorm,
        attention.k_layernorm,
    } == {norm}
    # The stock spec maps norms to the names of Transformer Engine's fused layers on disk.
    assert layer.sharded_state_dict_keys_map["input_layernorm."] == (
        "self_attention.linear_qkv.layer_norm_"
    )


def test_every_layer_of_a_model_with_experts_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    one_stage(monkeypatch, 4)
    changes = {"num_moe_experts": 4, "moe_layer_freq": [0, 1, 1, 0], "moe_ffn_hidden_size": 8}
    config = SimpleNamespace(transformer=make_config(num_layers=4, **changes))
    layers = [layer.submodules for layer in packed_local_layer_spec(config).layer_specs]
    assert [layers.index(layer) for layer in layers] == [0, 1, 1, 0]
    for layer in layers:
        attention = layer.self_attention.submodules.core_attention
        assert attention is PackedDotProductAttention
        assert layer.pre_mlp_layernorm is SequenceParallelRMSNorm


def test_spec_refuses_a_norm_around_zero() -> None:
    config = SimpleNamespace(transformer=make_config())
    config.transformer.layernorm_zero_centered_gamma = True
    with pytest.raises(FlagError, match="--apply-layernorm-1p"):
        packed_local_layer_spec(config)


def test_norm_marks_its_weight_for_sequence_parallel_gradients() -> None:
    config = make_config()
    assert SequenceParallelRMSNorm(config, 8).weight.sequence_parallel is False
    config.sequence_parallel = True
    norm = SequenceParallelRMSNorm(config, 8, eps=1e-3)
    assert norm.weight.sequence_parallel is True
    assert list(norm.state_dict()) == ["weight"]
    x = torch.randn(5, 8)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), expected)


def test_constructor_takes_what_the_stock_attention_takes() -> None:
    ours, stock = (
        list(inspect.signature(c.__init__).parameters)
        for c in (PackedDotProductAttention, DotProductAttention)
    )
    # The last two are those of latent attention, which the stock attention does not serve.
    assert ours == [*stock, "k_channels", "v_channels"]
