"""What a run says about its kernels, and Transformer Engine that is missing or broken."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_meco.errors import FlagError
from megatron_meco.training import arguments, attention, kernels, versions

ARGS = Namespace(
    transformer_impl="transformer_engine",
    params_dtype=torch.bfloat16,
    attention_dropout=0.0,
    spec=None,
    optimizer="adam",
    context_parallel_size=1,
    async_save=False,
)


def described(on_cpu: bool = False, **changes: object) -> kernels.Kernels:
    return arguments.kernels_of(Namespace(**{**vars(ARGS), **changes}), on_cpu)


def test_flags_decide_attention_and_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_VARLEN_PARAMETERS", {"window_size", "scale"})
    engine = described()
    assert "Transformer Engine" in engine.attention
    assert "Transformer Engine" in engine.layers
    local = {"transformer_impl": "local", "spec": attention.PACKED_LOCAL_SPEC}
    assert described(**local).attention.startswith("torch.nn.attention.varlen")
    # What the kernel cannot do goes document by document.
    for change in ({"params_dtype": torch.float32}, {"attention_dropout": 0.1}):
        assert "document by document (CUDA, slow)" in described(**local, **change).attention
    monkeypatch.setattr(attention, "_VARLEN_PARAMETERS", {"is_causal"})
    assert "document by document (CUDA, slow)" in described(**local).attention
    assert "(CPU)" in described(on_cpu=True, **local).attention
    own = described(spec=["my.module", "my_spec"])
    assert own.attention == own.layers == "as --spec my.module my_spec says"


def test_the_optimizer_is_the_one_that_megatron_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import optimizer

    for module, words in (
        ("transformer_engine.pytorch.optimizers.fused_adam", "Transformer Engine FusedAdam"),
        ("apex.optimizers.fused_adam", "apex FusedAdam"),
        ("torch.optim.adamw", "torch AdamW"),
    ):
        monkeypatch.setattr(optimizer, "Adam", type("Adam", (), {"__module__": module}))
        assert described().optimizer == words
    assert versions.optimizer_library() == "torch"
    assert described(optimizer="sgd").optimizer == "Megatron's sgd"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a transformer_engine whose import runs the given code."""

    def install(code: str) -> None:
        folder = tmp_path / "transformer_engine" / "pytorch"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("")
        (folder / "__init__.py").write_text(code)
        (folder / "optimizers.py").write_text("")

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]

    # A test before this one may have called `hide_gpu_libraries`.
    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield install
    for name in loaded():
        del sys.modules[name]


def test_transformer_engine_that_works(engine) -> None:
    engine("")
    assert kernels.try_transformer_engine() == kernels.EngineState()
    arguments._check_platform(ARGS, on_cpu=False)


def test_transformer_engine_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FlagError, match=r"--transformer-impl: .*not installed.*megatron-meco\[gpu"):
        arguments._check_platform(ARGS, on_cpu=False)
    arguments._check_platform(Namespace(transformer_impl="local", async_save=False), on_cpu=False)


def test_transformer_engine_that_cannot_be_imported(engine) -> None:
    engine("raise ImportError('libcudnn.so.9: no such file\\nmore')")
    with pytest.raises(FlagError, match=r"cannot be loaded: libcudnn.so.9: no such file\. Install"):
        arguments._check_platform(ARGS, on_cpu=False)
    arguments._check_platform(Namespace(transformer_impl="local", async_save=False), on_cpu=False)


def test_transformer_engine_that_takes_megatron_down(
    engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused whatever the flags, before Megatron is imported and dies with a trace."""
    engine("raise OSError('wrong ELF class')")
    monkeypatch.setattr(arguments, "should_use_cpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", "--transformer-impl", "local"])
    with pytest.raises(SystemExit) as end:
        arguments.parse_and_validate_args()
    assert end.value.code == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("meco: error: Transformer Engine: it cannot be loaded: wrong ELF class")
