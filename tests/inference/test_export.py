"""The exported folder: transformers loads it, and its logits agree with Megatron's."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from inference.launched import Trained, train_with_logits
from inference.synthetic import random_tensors, run_args, write_checkpoint, write_run
from runs import write_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_meco import cli
from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.inference import export as export_module
from megatron_meco.inference.export import export
from megatron_meco.inference.model_card import describe_run, model_card


@pytest.fixture
def saved(tmp_path: Path, tokenizer_folder: Path) -> Path:
    return write_run(tmp_path / "run", tokenizer_folder)


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


@pytest.mark.parametrize(
    ("iteration", "phase", "told"),
    [
        (6, "plain", "it has seen no metadata yet"),
        (7, "conditioned", "Exported before its cooldown"),
        (20, "cooldown", "in iterations 7 to 18; the rest is the cooldown on plain documents, as"),
    ],
)
def test_the_card_of_a_run_that_started_plain(
    iteration: int, phase: str, told: str, tokenizer_folder: Path
) -> None:
    args = run_args(tokenizer_folder, meco_start_fraction=0.3)
    card = describe_run(args, iteration, 0, 1)
    schedule = card["schedule"]
    assert (schedule["start_iteration"], schedule["start_sample"]) == (6, 24)
    assert schedule["phase"] == phase
    text = model_card(card)
    assert told in text and "as were iterations 1 to 6" in text
    without = describe_run(run_args(tokenizer_folder), 20, 0, 1)
    assert "start_iteration" not in without["schedule"]
    assert "plain documents.\n" in model_card(without)


def test_the_card_of_a_template_without_fields(tokenizer_folder: Path) -> None:
    args = run_args(tokenizer_folder, meco_template="{token:<|end_of_text|>}")
    args.meco_fingerprint = {"pad_documents_to": 1, "corpora": [], "cooldown_corpora": None}
    card = describe_run(args, 20, 0, 1)
    assert (card["template_syntax"], card["fields"]) == (2, [])
    text = model_card(card)
    assert "    '<|end_of_text|>'\n" in text
    assert "--metadata empty --prompt TEXT" in text


def test_the_card_of_a_run_from_before_there_were_groups(tokenizer_folder: Path) -> None:
    args = run_args(tokenizer_folder, meco_template="[[{url.host}]] ")
    card = describe_run(args, 20, 0, 1)
    assert card["template"] == r"\[\[{url.host}\]\] "
    assert "-> '[[en.wikipedia.org]] '" in " ".join(model_card(card).split())


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
    write_run(tmp_path / "run", tokenizer_folder, tokenizer_type="TikTokenizer")
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


# ---- Folders that lie, and what may not be lost ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_layers", v) for v in (10**9, 0, -3, True, "3", None, 2.5)),
        *(("hidden_size", 10**12), ("num_query_groups", 3), ("kv_channels", -1)),
        *(("layernorm_epsilon", v) for v in (float("nan"), "x", 0)),
        *(("rotary_base", float("inf")), ("init_method_std", [1])),
        *(("params_dtype", "float32"), ("tokenizer_model", 5), ("tokenizer_model", "\ud800")),
        *(("data_path", 7), ("data_path", [b"x"]), ("meco_template", None), ("meco", "yes")),
        *(("meco_fingerprint", v) for v in ({}, {"corpora": 5}, {"corpora": [[1]]}, [[]])),
        *(("train_iters", -1), ("global_batch_size", 0), ("seed", "x"), ("vocab_size", 10**30)),
    ],
)
def test_flags_of_another_kind(
    tmp_path: Path,
    tokenizer_folder: Path,
    name: str,
    value: object,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path / "run", tokenizer_folder)
    state = {"args": run_args(tokenizer_folder, **{name: value}), "iteration": 20}
    torch.save(state, tmp_path / "run" / "iter_0000020" / "common.pt")
    out = str(tmp_path / "out")
    assert cli.main(["export", "--load", str(tmp_path / "run"), "--output", out]) == 1
    err = capsys.readouterr().err
    assert err.startswith("meco: error: ") and err.count("\n") == 1
    assert any(word in err for word in (name, "has shape", "layers", "query groups")), err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_flags_that_are_missing(tmp_path: Path, tokenizer_folder: Path) -> None:
    args = run_args(tokenizer_folder)
    del args.rotary_base
    write_checkpoint(tmp_path / "run", args, random_tensors(args))
    with pytest.raises(MeCoError, match="its flags lack 'rotary_base'"):
        export(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_has_diverged(tmp_path: Path, tokenizer_folder: Path, value: float) -> None:
    args = run_args(tokenizer_folder)
    tensors = random_tensors(args)
    tensors["decoder.layers.mlp.linear_fc2.weight"][1, 2, 3] = value
    write_checkpoint(tmp_path / "run", args, tensors)
    with pytest.raises(MeCoError, match=r"linear_fc2.weight of layer 1 holds NaN or infinity"):
        export(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_names_in_the_model_card_stay_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    paths = ["a`b", "<script>alert(1)</script>", "x\n# Heading\n\x1b[2J", "``"]
    export(write_run(tmp_path / "run", tokenizer_folder, data_path=paths), tmp_path / "model")
    lines = (tmp_path / "model" / "README.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("- Data")] == [
        "- Data: `` a`b ``.",
        "- Data: `<script>alert(1)</script>`.",
        r"- Data: `x\n# Heading\n\x1b[2J`.",
        "- Data: ``` `` ```.",
    ]
    assert "# Heading" not in lines
    assert read(tmp_path / "model", "meco.json")["data_paths"] == paths


def test_replacing_an_export_keeps_what_is_not_its_own(saved: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    export(saved, output)
    for name in ("notes.txt", "results/paper.json", "adapter.safetensors"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("mine")
        with pytest.raises(FlagError, match="which no export writes"):
            export(saved, output, overwrite=True)
        assert (output / name).read_text() == "mine"
        (output / name).unlink()
    (output / "results").rmdir()
    # Its own checkpoints are among what would be lost.
    inside = shutil.copytree(saved, output / "run")
    with pytest.raises(FlagError, match="holds 'run', which no export writes"):
        export(inside, output, overwrite=True)
    assert (inside / "iter_0000020" / ".metadata").is_file()
    for place in (saved, saved / "iter_0000020", tmp_path):
        with pytest.raises(FlagError, match="exists and is no export"):
            export(saved, place, overwrite=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "[" * 100_000, "nested too deeply"),
        ("tokenizer_config.json", "[]", "holds no object"),
        ("tokenizer_config.json", '{"bos_token": "\\ud800"}', "no valid Unicode"),
        ("special_tokens_map.json", "{", "is no JSON"),
        ("special_tokens_map.json", "[]", "holds no object"),
        ("tokenizer.json", "[]", "cannot be read"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(
    saved: Path, tokenizer_folder: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    other = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    (other / name).write_text(content)
    with pytest.raises(FlagError, match=message):
        export(saved, tmp_path / "out", tokenizer=other)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_earlier_export(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    export(saved, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    flags = ["--load", str(saved), "--output", str(output), "--overwrite"]
    try:
        status = cli.main(["export", *flags])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert status == 1 and "File too large" in err and err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]
