"""The place of the prefix, guidance, and the output and errors of the command."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_meco import cli
from megatron_meco.data.template import PrefixText, Token
from megatron_meco.errors import FlagError
from megatron_meco.inference.conditioning import parse_metadata
from megatron_meco.inference.generate import generate_text
from megatron_meco.inference.model import (
    LoadedModel,
    PromptError,
    encode_prompt,
    encode_text,
    enough_memory,
    load_model,
)

PREFIX = "URL: en.wikipedia.org\n\n"
PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def loaded(exported: Path) -> LoadedModel:
    return load_model(exported, device="cpu")


def continue_text(loaded: LoadedModel, prefix: str, **options: object) -> str:
    options = {"max_new_tokens": 12, "temperature": 0, **options}
    return generate_text(loaded.model, loaded.tokenizer, prefix, PROMPT, **options)


def test_prefix_stands_between_bos_and_prompt(loaded: LoadedModel) -> None:
    tokenizer = loaded.tokenizer

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    assert encode_prompt(loaded.model, tokenizer, PREFIX, PROMPT) == [0, *ids(PREFIX), *ids(PROMPT)]
    assert encode_prompt(loaded.model, tokenizer, "", PROMPT) == [0, *ids(PROMPT)]
    assert encode_prompt(loaded.model, tokenizer, PREFIX, "") == [0, *ids(PREFIX)]
    # Apart: one text would be merged across the border.
    assert ids("the qui" + "ck") != ids("the qui") + ids("ck")
    split = encode_prompt(loaded.model, tokenizer, "the qui", "ck")
    assert split == [0, *ids("the qui"), *ids("ck")]


def test_tokens_are_those_of_training(loaded: LoadedModel, tokenizer_folder: Path) -> None:
    from tokenizers import Tokenizer

    from megatron_meco.corpus.tokenizer import HuggingFaceEncoder

    trained = HuggingFaceEncoder(Tokenizer.from_file(f"{tokenizer_folder}/tokenizer.json").to_str())
    text = "a page that says <|end_of_text|> and goes on"
    [expected] = trained.encode_batch([text])
    assert 1 not in expected
    assert encode_prompt(loaded.model, loaded.tokenizer, "", text) == [0, *expected]


def test_special_tokens_of_a_template_are_one_id_each(loaded: LoadedModel) -> None:
    end = "<|end_of_text|>"
    prefix = PrefixText([Token(end), f"the qui{end}", Token(end), "ck"])
    between = encode_text(loaded.tokenizer, f"the qui{end}")
    ids = [1, *between, 1, *encode_text(loaded.tokenizer, "ck")]
    assert 1 not in between
    assert encode_prompt(loaded.model, loaded.tokenizer, prefix, "") == [0, *ids]
    with pytest.raises(FlagError, match="no token '<s5>'"):
        encode_text(loaded.tokenizer, PrefixText([Token("<s5>")]))


def greedy_by_hand(loaded: LoadedModel, prefix: str, guidance: float, steps: int = 12) -> str:
    conditioned = encode_prompt(loaded.model, loaded.tokenizer, prefix, PROMPT)
    plain = encode_prompt(loaded.model, loaded.tokenizer, "", PROMPT)
    new: list[int] = []
    while len(new) < steps and new[-1:] != [1]:
        with torch.no_grad():
            a, b = (
                loaded.model(torch.tensor([ids + new])).logits[0, -1]
                for ids in (plain, conditioned)
            )
        new.append(int((a + guidance * (b - a)).argmax()))
    return loaded.tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
def test_guidance_is_plain_plus_g_times_the_difference(
    loaded: LoadedModel, guidance: float
) -> None:
    text = continue_text(loaded, PREFIX, guidance=guidance)
    assert text == greedy_by_hand(loaded, PREFIX, guidance)


def test_guidance_of_0_and_1_are_the_two_models(loaded: LoadedModel) -> None:
    plain, conditioned = continue_text(loaded, ""), continue_text(loaded, PREFIX)
    assert plain != conditioned
    assert continue_text(loaded, PREFIX, guidance=0.0) == plain
    assert continue_text(loaded, PREFIX, guidance=1.0) == conditioned
    assert continue_text(loaded, PREFIX, guidance=3.0) not in (plain, conditioned)


def test_seeds_decide_and_the_callers_generator_stays(loaded: LoadedModel) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        continue_text(loaded, PREFIX, temperature=1.0, top_p=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_no_room_and_nothing_to_continue(loaded: LoadedModel) -> None:
    with pytest.raises(PromptError, match=r"do not fit in the model's 64.*Give \d+ or less"):
        continue_text(loaded, PREFIX, max_new_tokens=60)
    bos, loaded.model.config.bos_token_id = loaded.model.config.bos_token_id, None
    try:
        with pytest.raises(PromptError, match="is empty"):
            generate_text(loaded.model, loaded.tokenizer, "", "")
    finally:
        loaded.model.config.bos_token_id = bos


def test_parse_metadata() -> None:
    given = [["url=a=b", "topic=x"], ["none"], ["url=c"], ["url=c"]]
    assert parse_metadata(given) == [{}, {"url": "a=b", "topic": "x"}, {"url": "c"}]
    assert parse_metadata([]) == parse_metadata([["none"]]) == [{}]
    for words in (["url"], ["=x"], ["none", "url=x"]):
        with pytest.raises(FlagError, match="Write FIELD=VALUE"):
            parse_metadata([words])


# ---- The command ----


def run(exported: Path, *arguments: str) -> int:
    short = ["--max-new-tokens", "4", "--temperature", "0"]
    return cli.main(["generate", "--model", str(exported), *short, *arguments])


def test_special_tokens_alone(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--template", "{token:<|end_of_text|>}", "--metadata", "empty", "--prompt", PROMPT]
    assert run(exported, *flags, "--guidance", "2") == 0
    out = capsys.readouterr().out
    assert "=== no metadata\n" in out
    assert "=== empty (prefix '<|end_of_text|>', guidance 2)\n" in out


def test_side_by_side(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    urls = ["https://en.wikipedia.org/x", "www.factquizmaster.com"]
    flags = [word for url in urls for word in ("--metadata", f"url={url}")]
    assert run(exported, "--prompt", PROMPT, *flags, "--metadata", "none") == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("===")] == [
        "=== no metadata",
        "=== url=https://en.wikipedia.org/x (prefix 'URL: en.wikipedia.org\\n\\n')",
        "=== url=www.factquizmaster.com (prefix 'URL: www.factquizmaster.com\\n\\n')",
    ]
    assert out.count(PROMPT) == 3


def test_what_is_shown_is_what_is_generated(
    exported: Path, loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(exported, "--prompt", PROMPT) == 0
    expected = PROMPT + continue_text(loaded, "", max_new_tokens=4)
    assert capsys.readouterr().out == f"=== no metadata\n{expected}\n\n"


def test_prompts_from_a_file(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("the fox\n\nthe dog\n")
    flags = ["--prompt-file", str(tmp_path / "prompts.txt"), "--metadata", "url=x.org"]
    assert run(exported, *flags, "--guidance", "2") == 0
    out = capsys.readouterr().out
    assert "##### prompt 1: the fox" in out and "##### prompt 2: the dog" in out
    assert out.count("guidance 2)") == out.count("=== no metadata") == 2


def test_several_seeds_and_a_template_of_the_users(
    exported: Path, loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--template", "Topic: {topic}. ", "--metadata", "topic=llamas", "--prompt", PROMPT]
    assert run(exported, *flags, "--temperature", "1", "--seed", "3", "4") == 0
    shown = re.split(r"^=== (.*)\n", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    expected = []
    for name, prefix in (
        ("no metadata", ""),
        ("topic=llamas (prefix 'Topic: llamas. ')", "Topic: llamas. "),
    ):
        for seed in (3, 4):
            text = continue_text(loaded, prefix, max_new_tokens=4, temperature=1.0, seed=seed)
            expected += [f"{name}, seed {seed}", f"{PROMPT}{text}\n\n"]
    assert shown == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metadata", "empty"], "no value for the field 'url'"),
        (["--metadata", "topic=x"], r"unknown field 'topic'.*uses: url\."),
        (["--metadata", "url"], "cannot read 'url'"),
        (["--metadata", "url="], "leaves an empty value"),
        (["--guidance", "2"], "--guidance: has no effect without"),
        (["--max-new-tokens", "0"], "--max-new-tokens: invalid value 0"),
        (["--top-p", "0"], "--top-p: invalid value 0"),
        (["--temperature", "-1"], "--temperature: invalid value -1"),
        *(
            ([flag, value], f"{flag}: invalid value ")
            for flag, values in {
                "--temperature": ("nan", "inf", "1e-300", "1e300"),
                "--top-p": ("nan", "inf", "-0.5", "1.1"),
                "--seed": ("-1", str(2**64), "9" * 400),
                "--max-new-tokens": ("-1", "1" + "0" * 12),
            }.items()
            for value in values
        ),
        *(
            (["--metadata", "url=a", "--guidance", value], "--guidance: invalid value")
            for value in ("nan", "inf", "1e30")
        ),
        (["--metadata", "url=a", "url=b"], "has two values for the field 'url'"),
        (["--metadata", ""], "cannot read ''"),
        (["--metadata", "url=\udcff"], "--metadata: url: character 1 is no valid Unicode"),
        (["--template", "{url}\udcff"], "--template: character 6 is no valid Unicode"),
        (["--template", "{n|precision=99999999999999999999}", "--metadata", "n=5"], "cannot take"),
        (["--device", "meta"], "--device meta: cannot be used"),
        (["--device", "tpu"], "--device tpu: cannot be used"),
    ],
)
def test_refusals(
    exported: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(exported, "--prompt", PROMPT, *flags) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.search(message, err), err


def test_a_folder_that_is_no_export(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [(tmp_path / "no", "no such folder"), (tmp_path, r"it has no meco.json")]
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(exported / "meco.json", bare)
    cases.append((bare, "it has no config.json"))
    no_tokenizer = shutil.copytree(exported, tmp_path / "no-tokenizer")
    (no_tokenizer / "tokenizer.json").unlink()
    cases.append((no_tokenizer, "it has no tokenizer"))
    no_weights = shutil.copytree(exported, tmp_path / "no-weights")
    (no_weights / "model.safetensors").unlink()
    cases.append((no_weights, "not a folder that `meco export` wrote"))
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    (broken / "meco.json").write_text(json.dumps({"format": 1}))
    cases.append((broken, "cannot be read"))
    (tmp_path / "prompts.txt").write_text("\n")
    for folder, message in cases:
        assert run(folder, "--prompt", PROMPT) == 1
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err
    assert run(exported, "--prompt-file", str(tmp_path / "prompts.txt")) == 1
    assert "has no prompts" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_seed_that_a_generator_takes(exported: Path, seed: int) -> None:
    assert run(exported, "--prompt", PROMPT, "--temperature", "1", "--seed", str(seed)) == 0


def test_a_prompt_that_is_no_text(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(exported, "--prompt", "a\udcff") == 1
    assert "--prompt: character 2 is no valid Unicode" in capsys.readouterr().err
    assert run(exported, "--prompt", "the fox " * 20_000) == 1
    assert "Give a shorter prompt" in capsys.readouterr().err


def test_what_would_move_the_cursor_is_spelled_out(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text that looks like a special token stays text, in metadata as in a document."""
    value = "a\nb\x1b[2J<|end_of_text|>"
    flags = ["--template", "{topic}: ", "--metadata", f"topic={value}"]
    assert run(exported, "--prompt", PROMPT, *flags) == 0
    out = capsys.readouterr().out
    assert r"=== topic=a\nb\x1b[2J<|end_of_text|> (prefix 'a\nb\x1b[2J<|end_of_text|>: ')" in out
    assert "\x1b" not in out


def test_lines_of_a_prompt_file(exported: Path, tmp_path: Path, capsys: Any) -> None:
    """A line feed ends a prompt; other line ends of Unicode are part of it."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\u2028two\x0cthree\r\nfour\n \n".encode())
    assert run(exported, "--prompt-file", str(file)) == 0
    out = capsys.readouterr().out
    assert out.count("##### prompt") == 2 and "##### prompt 2: four\n" in out
    assert r"##### prompt 1: one\u2028two\x0cthree" in out
    for content, message in ((b"caf\xe9", "byte 3 is not UTF-8"), (b"", "has no prompts")):
        file.write_bytes(content)
        assert run(exported, "--prompt-file", str(file)) == 1
        assert message in capsys.readouterr().err
    file.unlink()
    os.mkfifo(file)
    for path, message in (
        (file, "is a named pipe"),
        (tmp_path, "is a folder"),
        (Path("/dev/zero"), "is no file"),
    ):
        assert run(exported, "--prompt-file", str(path)) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("meco.json", {"template": 5}, "its template is no text"),
        ("meco.json", {"fields": "url"}, "its fields are no list"),
        ("meco.json", {"fields": [5]}, "its fields are no texts"),
        ("meco.json", {"template": "{a"}, "unbalanced"),
        ("meco.json", {"template": "{topic}"}, "no metadata field 'topic'"),
        ("config.json", {"bos_token_id": 10**9}, "its begin or end token is 1000000000"),
        ("config.json", {"model_type": "no-such"}, "no-such"),
        ("config.json", {"tie_word_embeddings": True, "num_hidden_layers": 2}, "unknown tensor"),
        ("generation_config.json", {"eos_token_id": ["x"]}, "its begin or end token is 'x'"),
        ("tokenizer.json", {"model": {}}, "not a folder that `meco export` wrote"),
        ("tokenizer_config.json", {"bos_token": [1]}, "not a folder that `meco export` wrote"),
        ("adapter_config.json", {}, "it is an adapter"),
    ],
)
def test_a_folder_that_was_tampered_with(
    exported: Path,
    tmp_path: Path,
    name: str,
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = shutil.copytree(exported, tmp_path / "model")
    content = json.loads((model / name).read_text()) if (model / name).exists() else {}
    (model / name).write_text(json.dumps(content | changes))
    assert run(model, "--prompt", PROMPT) == 1
    err = capsys.readouterr().err
    assert message in err and err.startswith("meco: error: ") and err.count("\n") == 1, err


def test_a_tokenizer_larger_than_the_model(exported: Path, tmp_path: Path, capsys: Any) -> None:
    """Its last tokens have no embedding: an IndexError, and on a GPU a crash."""
    model = shutil.copytree(exported, tmp_path / "model")
    data = json.loads((model / "tokenizer.json").read_text())
    last = max(data["model"]["vocab"].values())
    first = data["added_tokens"][0]
    data["added_tokens"].append({**first, "id": last + 1, "content": "<extra>"})
    (model / "tokenizer.json").write_text(json.dumps(data))
    assert run(model, "--prompt", PROMPT) == 1
    assert re.search(r"its tokenizer has \d+ tokens, its model \d+", capsys.readouterr().err)


def test_weights_that_nobody_wrote_are_not_made_up(
    exported: Path, tmp_path: Path, capsys: Any
) -> None:
    """transformers warns about a missing tensor and initialises it; here it is an error."""
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(exported, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    removed = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert run(model, "--prompt", PROMPT) == 1
    assert "no tensor model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err
    # An architecture that we know nothing of: transformers says what it missed.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    assert run(model, "--prompt", PROMPT) == 1
    assert "it has no tensor model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err
    tensors |= {"model.layers.1.mlp.up_proj.weight": removed, "model.extra": torch.zeros(2)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert run(model, "--prompt", PROMPT) == 1
    assert "its model has no place for tensor model.extra" in capsys.readouterr().err


def test_the_folders_own_sampling_has_no_say(
    exported: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    model = shutil.copytree(exported, tmp_path / "model")
    own = {"eos_token_id": 1, "repetition_penalty": 50.0, "min_p": 0.9, "num_beams": 3}
    (model / "generation_config.json").write_text(json.dumps(own))
    other = load_model(model, "cpu")
    assert continue_text(other, PREFIX) == continue_text(loaded, PREFIX)


def test_too_little_memory_is_a_refusal() -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        ),
    ):
        with (
            pytest.raises(FlagError, match="--batch-size: needs more memory"),
            enough_memory("--batch-size", "Give a smaller one."),
        ):
            raise error
    with (
        pytest.raises(RuntimeError, match="other"),
        enough_memory("--batch-size", "Give a smaller one."),
    ):
        raise RuntimeError("other")
