"""Megatron's tokenizers with unknown flags, and objects that are not Megatron tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron.core.tokenizers.utils import build_tokenizer as megatrons

from megatron_meco.corpus import tokenizer as module
from megatron_meco.corpus.tokenizer import (
    build_tokenizer,
    check_tokenizer,
    resolve_bos,
    resolve_eod,
    text_encoder,
    token_ids,
)
from megatron_meco.errors import FlagError


@pytest.fixture
def asks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Megatron that reads one more flag, as later versions do; returns the values it got."""
    told: dict[str, Any] = {}
    build = megatrons.build_tokenizer

    def install(name: str) -> dict[str, Any]:
        def newer(args: Any, **options: Any) -> Any:
            told[name] = getattr(args, name)
            return build(args, **options)

        monkeypatch.setattr(megatrons, "build_tokenizer", newer)
        return told

    return install


def test_a_flag_that_is_not_known_here_has_megatrons_default(
    asks: Any, tokenizer_folder: Path
) -> None:
    """Read from the installed Megatron without importing its training package."""
    told = asks("vocab_extra_ids")
    assert "vocab_extra_ids" not in module.TOKENIZER_DEFAULTS
    assert build_tokenizer("HuggingFaceTokenizer", str(tokenizer_folder)).vocab_size > 200
    assert told == {"vocab_extra_ids": 0}


def test_a_flag_that_nobody_knows_is_named(asks: Any, tokenizer_folder: Path) -> None:
    """The error does not blame the folder."""
    asks("use_flux_capacitor")
    with pytest.raises(FlagError, match="asks for the setting 'use_flux_capacitor'") as refused:
        build_tokenizer("HuggingFaceTokenizer", str(tokenizer_folder))
    assert refused.value.where.startswith("megatron-core 0.")
    # What Megatron asks for with a default of its own is no error.
    flags = module._Flags(a=1)
    assert getattr(flags, "use_flux_capacitor", 5) == 5 and flags.a == 1


def test_defaults_of_fields(tmp_path: Path) -> None:
    import ast

    source = "a: int = 5\nb: str = field(default='x', metadata={})\nc: list = field(factory=list)"
    fields = [node.value for node in ast.parse(source).body]  # type: ignore[attr-defined]
    assert [module._default(value) for value in fields[:2]] == [5, "x"]
    for value in (fields[2], None):
        with pytest.raises((ValueError, StopIteration)):
            module._default(value)


def test_a_folder_that_breaks_the_loader_in_its_own_way(tmp_path: Path) -> None:
    """The Rust library raises a plain `Exception`."""
    for name, content in (("tokenizer.json", "[" * 50_000), ("tokenizer_config.json", "{}")):
        (tmp_path / name).write_text(content)
    with pytest.raises(FlagError, match="does not load as HuggingFaceTokenizer"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path))


def test_a_mistyped_folder_is_told_before_the_hub_is_asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FlagError, match="There is no such folder here"):
        build_tokenizer("HuggingFaceTokenizer", "tokeniser")
    assert capsys.readouterr().err == (
        "'tokeniser' is no folder here; asking the Hugging Face hub\n"
    )
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_tokenizer_of_transformers_is_refused(tokenizer_folder: Path) -> None:
    """It has no `bos` and no `eod`: documents would silently begin without BOS."""
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tokenizer_folder)
    for function in (check_tokenizer, resolve_bos, resolve_eod, text_encoder):
        with pytest.raises(FlagError, match=r"is not a Megatron tokenizer.*build_tokenizer"):
            function(other)
    check_tokenizer(build_tokenizer("HuggingFaceTokenizer", str(tokenizer_folder)))


def test_special_tokens_by_name(tokenizer_folder: Path) -> None:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tokenizer_folder))
    found = token_ids(tokenizer, ["<|end_of_text|>"], "--meco-template")
    assert found == {"<|end_of_text|>": 1}
    null = build_tokenizer("NullTokenizer", None, vocab_size=50)
    assert token_ids(null, ["7"], "--meco-template") == {"7": 7}
    for other, name in ((tokenizer, "<|no_such_token|>"), (null, "50"), (null, "<s>")):
        with pytest.raises(FlagError, match=f"no token {name!r}".replace("|", r"\|")):
            token_ids(other, [name], "--meco-template")
