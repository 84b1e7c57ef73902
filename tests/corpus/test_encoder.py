"""gigatoken is used only if it gives the same ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from megatron_meco.corpus import encoder as encoder_module
from megatron_meco.corpus.encoder import (
    GigatokenEncoder,
    ListBulkEncoder,
    choose_encoder,
)
from megatron_meco.corpus.llama3 import write_llama3_tokenizer
from megatron_meco.corpus.tokenizer import HuggingFaceEncoder
from megatron_meco.corpus.work_folder import load_encoder, write_encoder
from megatron_meco.errors import DataError, FlagError


@pytest.fixture
def encoder(tokenizer_folder: Path) -> HuggingFaceEncoder:
    return HuggingFaceEncoder((tokenizer_folder / "tokenizer.json").read_text())


class _OffByOne(GigatokenEncoder):
    def encode(self, texts: list[str]) -> tuple[Any, Any]:
        ids, lengths = super().encode(texts)
        return ids + ("users own" in texts[0]), lengths


def test_equal_ids_are_used_and_said(encoder: HuggingFaceEncoder, tmp_path: Path) -> None:
    chosen = choose_encoder(encoder, ["the text of a page"] * 3)
    assert chosen["kind"] == "gigatoken" and "ids equal" in chosen["reason"]
    write_encoder(tmp_path, chosen)
    loaded, _ = load_encoder(tmp_path)
    texts = ["", "a page", "x<|end_of_text|>y \u4f60 \U0001f600", "word " * 50]
    ids, lengths = loaded.encode(texts)
    expected = encoder.encode_batch(texts)
    assert lengths.tolist() == [len(one or []) for one in expected]
    assert ids.tolist() == [i for one in expected for i in one or []]


def test_other_ids_on_the_users_text_fall_back(
    encoder: HuggingFaceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "GigatokenEncoder", _OffByOne)
    assert choose_encoder(encoder, ["fine"])["kind"] == "gigatoken"
    chosen = choose_encoder(encoder, ["fine", "users own"])
    assert chosen["kind"] == "huggingface"
    assert "other ids, first for the text 'users own'" in chosen["reason"]


def test_what_gigatoken_cannot_read_falls_back(encoder: HuggingFaceEncoder) -> None:
    settings = json.loads(encoder.serialized)
    settings["pre_tokenizer"] = {"type": "Whitespace"}
    chosen = choose_encoder(HuggingFaceEncoder(json.dumps(settings)), ["a  b"])
    assert chosen["kind"] == "huggingface" and "gigatoken" in chosen["reason"]


def test_another_machine_checks_its_first_batch(
    encoder: HuggingFaceEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_encoder(tmp_path, choose_encoder(encoder, []))
    monkeypatch.setattr(encoder_module, "GigatokenEncoder", _OffByOne)
    monkeypatch.setattr(encoder_module.platform, "node", lambda: "elsewhere")
    loaded, _ = load_encoder(tmp_path)
    with pytest.raises(DataError, match=r"elsewhere.*other ids"):
        loaded.encode(["users own"])


def test_a_panic_is_told(encoder: HuggingFaceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As in pyo3."""

    def panic(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds")

    fast = GigatokenEncoder(encoder.serialized)
    monkeypatch.setattr(fast._tokenizer, "encode_batch", panic, raising=False)
    with pytest.raises(DataError, match=r"panicked.*--encoder huggingface"):
        fast.encode(["a"])


def test_a_refused_text_is_told_from_an_empty_one() -> None:
    class Fake:
        def encode_batch(self, texts: list[str]) -> list[list[int] | None]:
            return [[1, 2], None, []]

    ids, lengths = ListBulkEncoder(Fake()).encode(["", "", ""])
    assert (ids.tolist(), lengths.tolist()) == ([1, 2], [2, -1, 0])


def test_llama3(tmp_path: Path) -> None:
    pytest.importorskip("llama_models", reason="the extra `llama3` is not installed")
    folder = tmp_path / "llama3"
    ids = write_llama3_tokenizer(folder)
    assert ids == {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001}
    with pytest.raises(FlagError, match="exists already"):
        write_llama3_tokenizer(folder)
    encoder = HuggingFaceEncoder((folder / "tokenizer.json").read_text())
    texts = [path.read_text() for path in Path(encoder_module.__file__).parent.glob("*.py")]
    chosen = choose_encoder(encoder, texts)
    assert chosen["kind"] == "gigatoken", chosen["reason"]
    fast, slow = GigatokenEncoder(encoder.serialized), ListBulkEncoder(encoder)
    for one, other in zip(fast.encode(texts), slow.encode(texts), strict=True):
        assert np.array_equal(one, other)


def test_without_llama_models_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llama_models.llama3", None)
    with pytest.raises(FlagError, match="megatron-meco\\[llama3\\]"):
        write_llama3_tokenizer(tmp_path / "llama3")
    assert list(tmp_path.iterdir()) == []


def test_arrow_strings_are_encoded_in_place(encoder: HuggingFaceEncoder) -> None:
    texts = ["", "the text", "of a", "", "p\u00e4ge <|end_of_text|>"] * 7
    fast = GigatokenEncoder(encoder.serialized)
    for part in (slice(0, 35), slice(3, 20), slice(4, 4)):
        ids, lengths = fast.encode(pa.array(texts, pa.string())[part])
        expected_ids, expected_lengths = ListBulkEncoder(encoder).encode(texts[part])
        assert ids.tolist() == expected_ids.tolist()
        assert lengths.tolist() == expected_lengths.tolist()
