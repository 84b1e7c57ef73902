"""The way back: bit by bit, read by Megatron's own loader in another layout, refusals by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from inference.launched import Trained, train_with_logits  # noqa: E402
from inference.synthetic import random_tensors, run_args, write_checkpoint  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from megatron_meco import cli  # noqa: E402
from megatron_meco.errors import MeCoError  # noqa: E402
from megatron_meco.inference.checkpoint import Checkpoint, find_iteration  # noqa: E402
from megatron_meco.inference.export import export  # noqa: E402
from megatron_meco.inference.import_hf import import_hf  # noqa: E402


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"untie_embeddings_and_output_weights": False},
        {"params_dtype": torch.bfloat16, "rotary_base": 10000},
    ],
)
def test_there_and_back_is_bit_identical(
    tmp_path: Path, tokenizer_folder: Path, changes: dict[str, Any]
) -> None:
    args = run_args(tokenizer_folder, **changes)
    tensors = {k: v.to(args.params_dtype) for k, v in random_tensors(args).items()}
    write_checkpoint(tmp_path / "run", args, tensors)
    # Several files, so that the index is read too.
    export(tmp_path / "run", tmp_path / "model", bytes_per_shard=20_000)
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    import_hf(tmp_path / "model", tmp_path / "back")
    checkpoint = Checkpoint(find_iteration(tmp_path / "back"))
    assert checkpoint.shapes.keys() == tensors.keys()
    for name, tensor in tensors.items():
        back = checkpoint.read(name)
        # Megatron's padding of the vocabulary is not in the Hugging Face model.
        is_vocabulary = name.startswith(("embedding", "output_layer"))
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor[: len(back)] if is_vocabulary else tensor)
    for name in (
        *("num_layers", "ffn_hidden_size", "num_query_groups", "kv_channels", "rotary_base"),
        *("layernorm_epsilon", "untie_embeddings_and_output_weights", "padded_vocab_size"),
    ):
        assert getattr(checkpoint.args, name) == getattr(args, name), name
    export(tmp_path / "back", tmp_path / "again", bytes_per_shard=20_000)
    for path in (tmp_path / "model").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.distributed
def test_megatron_trains_from_it_and_exports_the_same_from_virtual_stages(
    trained: Trained, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """One step that changes nothing, in two pipeline stages of two virtual ones each."""
    imported = tmp_path / "imported"
    import_hf(trained.model, imported)
    flags = f"""
        --train-iters 1 --lr 0 --min-lr 0 --weight-decay 0 --lr-warmup-fraction 0
        --load {imported} --finetune
        --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2
    """.split()
    where = (tmp_path / "ckpt", tmp_path / "logits.pt")
    train_with_logits(trained.corpus, tokenizer_folder, *where, *flags, ranks=2)
    saved = Checkpoint(find_iteration(tmp_path / "ckpt"))
    assert saved.iteration == 1 and saved.args.virtual_pipeline_model_parallel_size == 2
    export(tmp_path / "ckpt", tmp_path / "model")
    weights = "model.safetensors"
    assert (tmp_path / "model" / weights).read_bytes() == (trained.model / weights).read_bytes()


# ---- Refusals ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3"}, "architecture = 'qwen3', and only 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_type = 'llama3'"),
        (
            {"hidden_size": 24},
            r"model.embed_tokens.weight has shape \[\d+, 16\].*gives \[\d+, 24\]",
        ),
        ({"num_hidden_layers": 4}, "no tensor model.layers.3.input_layernorm.weight and 8 more"),
        ({"num_hidden_layers": 2}, "unknown tensor model.layers.2"),
        ({"num_attention_heads": None}, "config.json lacks a size"),
    ],
)
def test_what_is_no_plain_llama(
    exported: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = shutil.copytree(exported, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(MeCoError, match=message):
        import_hf(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folders_that_cannot_be_used(exported: Path, tmp_path: Path) -> None:
    model = shutil.copytree(exported, tmp_path / "model")
    out = tmp_path / "out"
    with pytest.raises(MeCoError, match=r"--output .*exists"):
        import_hf(model, tmp_path)
    with pytest.raises(MeCoError, match=r"no readable config\.json"):
        import_hf(tmp_path, out)
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "model.layers.0.extra": torch.zeros(1)}, model / "model.safetensors")
    with pytest.raises(MeCoError, match=r"unknown tensor model\.layers\.0\.extra"):
        import_hf(model, out)
    (model / "model.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(MeCoError, match="its weights cannot be read"):
        import_hf(model, out)
    (model / "model.safetensors").unlink()
    with pytest.raises(MeCoError, match="holds no safetensors files"):
        import_hf(model, out)
    (model / "tokenizer.json").unlink()
    with pytest.raises(MeCoError, match=r"has no tokenizer\.json"):
        import_hf(model, out)
    assert not out.exists()


def test_the_command(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "imported"
    assert cli.main(["import", "--model", str(exported), "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert f"--load {output} --finetune" in out and "--num-query-groups 2" in out
    assert (output / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert cli.main(["import", "--model", str(exported), "--output", str(output)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("meco: error: --output") and err.count("\n") == 1
