"""`meco import`: bit-exact, read by Megatron's own loader in another layout, and its errors."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from inference.launched import Trained, train_with_logits
from inference.synthetic import random_tensors, run_args, write_checkpoint
from safetensors.torch import load_file, save_file

from megatron_meco import cli
from megatron_meco.errors import MeCoError
from megatron_meco.inference.checkpoint import Checkpoint, find_iteration
from megatron_meco.inference.export import export
from megatron_meco.inference.import_hf import import_hf


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
    """One step with learning rate 0, in two pipeline stages of two virtual stages each."""
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


# ---- Folders that lie ----


def refused(model: Path, capsys: pytest.CaptureFixture[str], command: str = "import") -> str:
    """Check for one error line, nothing written, and little memory allocated."""
    out, before = model.parent / "out", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flags = ["--output", str(out)] if command == "import" else ["--prompt", "x", "--device", "cpu"]
    assert cli.main([command, "--model", str(model), *flags]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"meco: error: --model {model}: ") and err.count("\n") == 1, err
    assert [path.name for path in model.parent.iterdir() if path.name != "elsewhere"] == ["model"]
    # Kilobytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    return err


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "model")


@pytest.mark.parametrize("command", ["import", "generate"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_hidden_layers", v) for v in (10**9, 10**30, 0, -1, True, 1.5, "3", [3], None)),
        *(("hidden_size", v) for v in (10**9, 0, 17)),
        *(("vocab_size", v) for v in (10**12, -284)),
        *(("num_attention_heads", v) for v in (0, 3)),
        *(("num_key_value_heads", v) for v in (0, 3, "2")),
        *(("head_dim", v) for v in (10**9, -6)),
        *(("intermediate_size", 10**12), ("tie_word_embeddings", "false")),
        *(("rms_norm_eps", v) for v in (0, -1, "x")),
    ],
)
def test_a_size_that_cannot_be(
    model: Path, command: str, name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, name: value}))
    assert re.search(
        r"config\.json|has shape|no tensor|Validation", refused(model, capsys, command)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": [1]}, "its RoPE is"),
        ({"rope_parameters": {"rope_theta": "a"}}, "rope_theta is 'a'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"rope_parameters": {"rope_theta": 10000.5}}, "no whole number"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings is 1000"),
        ({"max_position_embeddings": 2.5}, "max_position_embeddings is 2.5"),
        ({"initializer_range": -1}, "initializer_range is -1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_a_configuration_that_cannot_be_imported(
    model: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    assert message in refused(model, capsys)


@pytest.mark.parametrize("command", ["import", "generate"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"num_hidden_layers": Infinity}', "no number of JSON"),
        (b'{"rope_theta": 1e999}', "larger than any number"),
        (b'{"model_type": "llama", "model_type": "gpt2"}', "is there twice"),
        (b"[" * 200_000, "nested too deeply"),
        (b"\xff\xfe{\0}\0", "is not UTF-8"),
        (b'{"a": "\\ud800"}', "no valid Unicode"),
        (b"null", "holds no object"),
        (b"", "is no JSON"),
    ],
)
def test_a_configuration_that_is_no_json(
    model: Path, command: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "config.json").write_bytes(content)
    assert message in refused(model, capsys, command)


def into_two_files(model: Path, change: Any) -> None:
    """Split the weights into `a` and `b`, with an index that `change` may alter."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, model / file)
    index = {name: file for file, part in parts.items() for name in part}
    content = {"metadata": {}, "weight_map": change(index)}
    (model / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("command", ["import", "generate"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: dict.fromkeys(index, "../../x"), "which is no safetensors file"),
        (lambda index: dict.fromkeys(index, "../elsewhere/model.safetensors"), "outside of the"),
        (lambda index: dict.fromkeys(index, "/elsewhere.safetensors"), "outside of the folder"),
        (lambda index: dict.fromkeys(index, "a\0.safetensors"), "outside of the folder"),
        (lambda index: dict.fromkeys(index, 5), "which is no safetensors file"),
        (list, "has no weight_map"),
        (lambda index: index | {"lm_head.weight": "c.safetensors"}, "c.safetensors is missing"),
        (lambda index: index | {"lm_head.weight": "b.safetensors"}, "do not agree about lm_head"),
        (lambda index: {n: f for n, f in index.items() if f[0] == "a"}, "no tensor"),
    ],
)
def test_an_index_that_lies(
    model: Path, command: str, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, model.parent / "elsewhere")
    into_two_files(model, change)
    assert message in refused(model, capsys, command)


def test_two_sets_of_weights_in_one_folder(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (model / "model.safetensors").read_bytes()
    into_two_files(model, dict)
    (model / "model.safetensors").write_bytes(whole)
    assert "holds both" in refused(model, capsys)
    assert "holds both" in refused(model, capsys, "generate")


def lying_header(change: Any) -> Any:
    """The bytes of a safetensors file whose header was changed."""

    def make(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return make


@pytest.mark.parametrize("command", ["import", "generate"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda content: content[:-5], "cannot be read"),
        (lambda content: b"", "cannot be read"),
        (lambda content: (2**62).to_bytes(8, "little") + content[8:], "cannot be read"),
        (
            lying_header(lambda h: h["model.norm.weight"].update(shape=[10**12])),
            "cannot be read",
        ),
        (
            lying_header(
                lambda h: h["model.norm.weight"].update(
                    data_offsets=h["model.embed_tokens.weight"]["data_offsets"]
                )
            ),
            "cannot be read",
        ),
        (lying_header(lambda h: h["model.norm.weight"].update(shape=[4, 4])), "has shape [4, 4]"),
        (lying_header(lambda h: h["model.norm.weight"].update(dtype="I32")), "holds I32"),
    ],
)
def test_weights_that_lie(
    model: Path, command: str, make: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(make(weights.read_bytes()))
    assert message in refused(model, capsys, command)


def test_weights_that_are_no_numbers(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.norm.weight"
    for value in (math.nan, math.inf):
        broken = tensors | {name: tensors[name].clone()}
        broken[name].view(-1)[3] = value
        save_file(broken, model / "model.safetensors")
        assert f"tensor {name} holds NaN or infinity" in refused(model, capsys)
        for temperature in ("0", "1"):
            flags = ["--temperature", temperature, "--device", "cpu", "--max-new-tokens", "2"]
            assert cli.main(["generate", "--model", str(model), "--prompt", "x", *flags]) == 1
            assert "computes NaN or infinity" in capsys.readouterr().err


def test_types_that_differ_inside_a_tensor_of_megatrons(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(model / "model.safetensors")
    norm = "model.norm.weight"
    save_file(tensors | {norm: tensors[norm].bfloat16()}, model / "model.safetensors")
    import_hf(model, tmp_path / "kept")
    back = Checkpoint(find_iteration(tmp_path / "kept"))
    assert back.read("decoder.final_layernorm.weight").dtype == torch.bfloat16
    shutil.rmtree(tmp_path / "kept")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].half()}, model / "model.safetensors")
    assert "is F16, and" in refused(model, capsys)


def test_links_and_pipes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The hub's cache consists of links out of the folder; loops and pipes are refused."""
    weights = model / "model.safetensors"
    (tmp_path / "elsewhere").mkdir()
    weights.rename(tmp_path / "elsewhere" / "blob")
    weights.symlink_to("../elsewhere/blob")
    import_hf(model, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    for make in (lambda: weights.symlink_to(weights.name), lambda: os.mkfifo(weights)):
        weights.unlink()
        make()
        assert "cannot be read" in refused(model, capsys)
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    assert "is a named pipe" in refused(model, capsys)


def test_a_full_disk_leaves_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        status = cli.main(["import", "--model", str(model), "--output", str(model.parent / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert status == 1 and "cannot be written" in err and err.count("\n") == 1
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_the_command(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "imported"
    assert cli.main(["import", "--model", str(exported), "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert f"--load {output} --finetune" in out and "--num-query-groups 2" in out
    # It can be pasted: every line but the last goes on.
    lines = out.partition("train from it with:\n")[2].splitlines()
    assert [line.endswith(" \\") for line in lines] == [True] * (len(lines) - 1) + [False]
    assert (output / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert cli.main(["import", "--model", str(exported), "--output", str(output)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("meco: error: --output") and err.count("\n") == 1
