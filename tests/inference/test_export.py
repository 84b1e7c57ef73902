"""The exported folder: what transformers makes of it, and that it agrees with Megatron."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from inference.launched import Trained, train_with_logits  # noqa: E402
from inference.synthetic import random_tensors, run_args, write_checkpoint  # noqa: E402
from runs import write_tokenizer  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from megatron_meco import cli  # noqa: E402
from megatron_meco.errors import FlagError  # noqa: E402
from megatron_meco.inference import export as export_module  # noqa: E402
from megatron_meco.inference.export import export  # noqa: E402


@pytest.fixture
def saved(tmp_path: Path, tokenizer_folder: Path) -> Path:
    args = run_args(tokenizer_folder)
    return write_checkpoint(tmp_path / "run", args, random_tensors(args))


def read(folder: Path, name: str) -> dict[str, object]:
    return json.loads((folder / name).read_text())


# ---- Against Megatron ----


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.distributed
def test_logits_are_megatrons(trained: Trained) -> None:
    theirs = torch.load(trained.logits)
    ours = logits_of(trained.model, theirs["tokens"])
    expected = theirs["logits"][..., : ours.shape[-1]]
    assert ours.shape[-1] < theirs["logits"].shape[-1] and expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    card = read(trained.model, "meco.json")
    assert (card["iteration"], card["bos_token_id"], card["eos_token_id"]) == (4, 0, 1)
    assert card["schedule"] == {
        "num_iterations": 4,
        "num_samples": 16,
        "switch_iteration": 2,
        "switch_sample": 8,
        "phase": "cooldown",
    }


def saved_again(trained: Trained, tokenizer: Path, folder: Path, ranks: int, *flags: str) -> Path:
    """Load a checkpoint in another layout, take a step that changes nothing, save and export."""
    still = "--train-iters 1 --lr 0 --min-lr 0 --weight-decay 0 --lr-warmup-fraction 0 --finetune"
    flags = (*still.split(), "--load", str(trained.checkpoint), *flags)
    train_with_logits(
        trained.corpus, tokenizer, folder / "ckpt", folder / "logits.pt", *flags, ranks=ranks
    )
    export(folder / "ckpt", folder / "model")
    return folder / "model" / "model.safetensors"


@pytest.mark.distributed
def test_tensor_parallel_layout_gives_the_same_bytes(
    trained: Trained, tokenizer_folder: Path, tmp_path: Path
) -> None:
    flags = ["--tensor-model-parallel-size", "2"]
    again = saved_again(trained, tokenizer_folder, tmp_path, 2, *flags)
    assert again.read_bytes() == (trained.model / "model.safetensors").read_bytes()
    theirs = torch.load(tmp_path / "logits.pt")
    ours = logits_of(again.parent, theirs["tokens"])
    torch.testing.assert_close(ours, theirs["logits"][..., : ours.shape[-1]], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
def test_tensor_and_pipeline_parallel_layout_gives_the_same_bytes(
    trained: Trained, tokenizer_folder: Path, tmp_path: Path
) -> None:
    flags = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    again = saved_again(trained, tokenizer_folder, tmp_path, 4, *flags)
    assert again.read_bytes() == (trained.model / "model.safetensors").read_bytes()


# ---- The folder ----


def test_transformers_reads_everything_as_it_was(exported: Path, tokenizer_folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(exported)
    assert (config.head_dim, config.rms_norm_eps) == (6, 1e-6)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    raw = read(exported, "config.json")
    # transformers 4 knows only the first of the two.
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 500000.0
    generation = GenerationConfig.from_pretrained(exported)
    assert (generation.bos_token_id, generation.eos_token_id) == (0, 1)

    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert config.vocab_size == len(tokenizer) < 300
    assert read(exported, "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "the quick fox, 123 \u00e9"
    plain = AutoTokenizer.from_pretrained(tokenizer_folder)(text, add_special_tokens=False)
    assert tokenizer(text).input_ids == [0, *plain.input_ids]
    assert tokenizer(text, add_special_tokens=False).input_ids == plain.input_ids
    assert tokenizer.decode(plain.input_ids) == text


def test_the_card_says_how_to_condition(exported: Path) -> None:
    card = read(exported, "meco.json")
    assert card["template"] == r"URL: {url.host}\n\n"
    assert card["fields"] == card["required_fields"] == ["url"]
    assert card["schedule"]["switch_iteration"] == 18
    assert card["data_paths"] == ["somewhere/pages"]
    assert card["run_fingerprint"] is None  # that checkpoint has none
    text = (exported / "README.md").read_text()
    assert r"'URL: en.wikipedia.org\n\n'" in text
    assert "iterations 1 to 18" in text and "before its cooldown" not in text


def test_the_card_names_what_was_trained_on_by_its_content(trained: Trained) -> None:
    """A real run: the fingerprint travels from its first step into the card."""
    card = read(trained.model, "meco.json")
    (corpus,) = card["run_fingerprint"]["corpora"]
    assert corpus[:2] == ["pages", None]
    text = (trained.model / "README.md").read_text()
    assert f"- Data: `pages`, fingerprint {corpus[2]}." in text


def test_a_checkpoint_from_before_the_cooldown_says_so(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    args = run_args(tokenizer_folder)
    write_checkpoint(tmp_path / "run", args, random_tensors(args), iteration=18)
    export(tmp_path / "run", tmp_path / "model")
    assert "before its cooldown" in (tmp_path / "model" / "README.md").read_text()


def test_a_run_without_meco(tmp_path: Path, tokenizer_folder: Path) -> None:
    args = run_args(tokenizer_folder, untie_embeddings_and_output_weights=False)
    del args.meco, args.meco_template
    write_checkpoint(tmp_path / "run", args, random_tensors(args))
    export(tmp_path / "run", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert read(tmp_path / "model", "config.json")["tie_word_embeddings"] is True
    card = read(tmp_path / "model", "meco.json")
    # Megatron's own documents have no BOS.
    assert (card["template"], card["fields"], card["bos_token_id"]) == ("", [], None)
    assert "Trained without metadata" in (tmp_path / "model" / "README.md").read_text()


def test_shards_and_dtype(saved: Path, exported: Path, tmp_path: Path) -> None:
    whole = load_file(exported / "model.safetensors")
    export(saved, tmp_path / "shards", bytes_per_shard=20_000)
    index = read(tmp_path / "shards", "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in whole.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "shards" / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), whole[name])
    tokens = torch.arange(20)[None]
    assert torch.equal(logits_of(tmp_path / "shards", tokens), logits_of(exported, tokens))

    export(saved, tmp_path / "half", dtype="bfloat16")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)
    assert read(tmp_path / "half", "config.json")["dtype"] == "bfloat16"


# ---- Refusals ----


def test_an_earlier_export_is_replaced_only_on_request(saved: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    export(saved, output)
    (output / "mark").touch()
    with pytest.raises(FlagError, match="--overwrite"):
        export(saved, output)
    assert (output / "mark").exists()
    export(saved, output, overwrite=True)
    assert not (output / "mark").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_a_folder_of_something_else_is_never_replaced(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(FlagError, match="exists and is no export"):
        export(saved, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_nothing_is_left_of_an_export_that_fails(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(saved, tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_bytes()

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "save_file", full)
    with pytest.raises(FlagError, match="No space left on device"):
        export(saved, tmp_path / "model", overwrite=True)
    assert (tmp_path / "model" / "config.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_the_tokenizer_must_be_the_runs(saved: Path, tmp_path: Path) -> None:
    other = write_tokenizer(tmp_path / "other")
    # Moved, but the same.
    export(saved, tmp_path / "model", tokenizer=other)
    data = json.loads((other / "tokenizer.json").read_text())
    extra = range(len(data["model"]["vocab"]), 400)
    first = data["added_tokens"][0]
    data["added_tokens"] += [{**first, "id": i, "content": f"<extra {i}>"} for i in extra]
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(FlagError, match="400 tokens, which does not give the run's 384"):
        export(saved, tmp_path / "second", tokenizer=other)
    with pytest.raises(FlagError, match=r"has no tokenizer\.json"):
        export(saved, tmp_path / "second", tokenizer=tmp_path)
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(FlagError, match="cannot be read"):
        export(saved, tmp_path / "second", tokenizer=other)
    assert not (tmp_path / "second").exists()


def test_other_tokenizer_types_are_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    args = run_args(tokenizer_folder, tokenizer_type="TikTokenizer")
    write_checkpoint(tmp_path / "run", args, random_tensors(args))
    with pytest.raises(FlagError, match="TikTokenizer"):
        export(tmp_path / "run", tmp_path / "model")
    export(tmp_path / "run", tmp_path / "model", tokenizer=tokenizer_folder)


def test_the_command(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "model")
    assert cli.main(["export", "--load", str(saved), "--output", output]) == 0
    assert "iteration 20: 16,112 parameters" in capsys.readouterr().out
    assert cli.main(["export", "--load", str(saved), "--output", output]) == 1
    error = capsys.readouterr().err
    assert error.startswith("meco: error: --output") and error.count("\n") == 1
    assert cli.main(["export", "--load", str(tmp_path / "no"), "--output", output + "2"]) == 1
    assert cli.main(["export", "--load", str(saved), "--output", "x", "--dtype", "int8"]) == 2
