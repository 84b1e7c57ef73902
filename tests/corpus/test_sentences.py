"""`--split-sentences`: from texts to Megatron sequences, and to packs cut between sentences."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_meco import cli
from megatron_meco.config import MeCoConfig
from megatron_meco.corpus import input_files
from megatron_meco.corpus import prepare as prepare_module
from megatron_meco.corpus.encoder import DocumentEncoder
from megatron_meco.corpus.prepare import PrepareConfig, PrepareReport, prepare
from megatron_meco.corpus.punkt import SentenceSplitter, learn_sentences
from megatron_meco.corpus.tokenizer import build_tokenizer
from megatron_meco.data.dataset import MeCoGPTDataset, MeCoGPTDatasetConfig
from megatron_meco.errors import DataError, FlagError

type Run = Callable[..., PrepareReport]

LENGTH = 256


def _texts(count: int) -> list[str]:
    """Pages of up to 12 sentences, with abbreviations and other false ends."""
    draw = random.Random(0)
    names = ["Dr. Smith", "the river", "Dr. Jones", "a crew of 3.5 men", "the mill"]
    ends = [". ", "! ", "?\n\n", '." ', ".) ", ".\t  "]
    return [
        "".join(
            f"Now {draw.choice(names)} saw {draw.choice(names)} and {draw.choice(names)}"
            + draw.choice(ends)
            for _ in range(draw.randint(1, 12))
        )
        for _ in range(count)
    ]


TEXTS = _texts(120)
LEARNED = learn_sentences(TEXTS, "english")
SPLITTER = SentenceSplitter(LEARNED)


@pytest.fixture
def source(write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(input_files, "_MIN_TASK_BYTES", 12_000)
    monkeypatch.setattr(input_files, "_MAX_TASK_BYTES", 12_000)
    return write_jsonl(*({"text": text, "url": f"u{i}"} for i, text in enumerate(TEXTS)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The prefix of `TEXTS` prepared in one task."""
    folder = tmp_path_factory.mktemp("sentences")
    pages = [json.dumps({"text": text, "url": f"u{i}"}) for i, text in enumerate(TEXTS)]
    (folder / "input.jsonl").write_text("\n".join([*pages, ""]))
    prepare(
        PrepareConfig(
            inputs=(folder / "input.jsonl",),
            output=folder / "corpus",
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(tokenizer_folder),
            sentence_language="english",
        )
    )
    return folder / "corpus"


@pytest.fixture
def run(source: Path, tmp_path: Path, tokenizer_folder: Path) -> Run:
    """Return `prepare` into a folder of the given name."""

    def run_to(name: str, **changes: Any) -> PrepareReport:
        config: dict[str, Any] = {
            "inputs": (source,),
            "output": tmp_path / name / "corpus",
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": str(tokenizer_folder),
            "sentence_language": "english",
        }
        return prepare(PrepareConfig(**{**config, **changes}))

    return run_to


def test_what_is_learned_tells_abbreviations_from_ends() -> None:
    assert "dr" in LEARNED["abbreviations"].split(" ")
    text = 'Now Dr. Smith saw 3.5 mills. "Now what?" \n Now (so it ended.) The'
    assert SPLITTER.split(text) == [
        "Now Dr. Smith saw 3.5 mills.",
        ' "Now what?" \n',
        " Now (so it ended.)",
        " The",
    ]
    assert SentenceSplitter(json.loads(json.dumps(LEARNED))).split(text) == SPLITTER.split(text)
    hindi = SentenceSplitter(learn_sentences([], "hindi")).split("a b\u0964 c d\u0964")
    assert hindi == ["a b\u0964", " c d\u0964"]


@given(st.text(st.sampled_from("aA.?!\"') \n\t\u00a0\u2028\u4f60;-\u201d\x1c"), max_size=60))
@settings(max_examples=400, deadline=None)
def test_sentences_joined_are_the_text(text: str) -> None:
    sentences = SPLITTER.split(text)
    assert "".join(sentences) == text
    assert all(sentences) or sentences == [""]
    # The cut falls behind the last line end of the white space between, or at its beginning.
    for before, after in pairwise(sentences):
        assert "\n" not in after[: len(after) - len(after.lstrip())]
        assert before[-1] not in " \t"


def test_stock_megatron_opens_sentences_as_sequences(
    run: Run, tmp_path: Path, tokenizer_folder: Path
) -> None:
    report = run("one")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tokenizer_folder))
    data = IndexedDataset(str(tmp_path / "one" / "corpus"))
    bounds = data.document_indices
    assert len(bounds) == len(TEXTS) + 1 == report.documents + 1
    assert report.sequences == len(data) > 3 * len(TEXTS)
    for text, begin, end in zip(TEXTS, bounds[:-1], bounds[1:], strict=True):
        sequences = [data[i].tolist() for i in range(begin, end)]
        assert sequences[-1].pop() == tokenizer.eod
        told = [tokenizer.detokenize(ids) for ids in sequences]
        assert "".join(told) == text
        assert told == SPLITTER.split(text)
    lengths = np.add.reduceat(data.sequence_lengths, bounds[:-1])
    assert report.median_tokens == np.median(lengths)


def test_the_same_bytes_with_several_workers(run: Run, tmp_path: Path, source: Path) -> None:
    assert len(input_files.plan_tasks(input_files.find_files([source]))) > 2
    run("one")
    run("two", workers=2)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_unfinished_work_with_other_sentences_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise DataError("stopped", where="here", remedy="Go on.")

    with monkeypatch.context() as patch, pytest.raises(DataError, match="stopped"):
        patch.setattr(prepare_module, "merge_tasks", stop)
        run("one")
    for language in ("german", None):
        with pytest.raises(DataError, match="other sentences"):
            run("one", sentence_language=language)
    run("one")
    assert (tmp_path / "one" / "corpus.idx").exists()


def test_verify_compares_sentences(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole.parent, tmp_path / "one")
    prefix = tmp_path / "one" / "corpus"
    against = ["verify", str(prefix), "--against", str(tmp_path / "one" / "input.jsonl")]
    assert cli.main(against) == 0
    assert f"{len(TEXTS)} documents are equal" in capsys.readouterr().out

    # The same tokens and documents, another border; then one border less.
    data = IndexedDataset(str(prefix))
    documents = [
        [data[i].tolist() for i in range(begin, end)]
        for begin, end in zip(data.document_indices[:-1], data.document_indices[1:], strict=True)
    ]
    number = next(i for i, one in enumerate(documents) if i > 50 and len(one) > 2)
    moved = documents[number]
    moved[1].insert(0, moved[0].pop())
    assert f"document {number} differs" in _verify_rebuilt(prefix, documents, against, capsys)
    moved[0] += moved.pop(1)
    told = _verify_rebuilt(prefix, documents, against, capsys)
    assert f"document {number} differs" in told and "another number of sequences" in told


def _verify_rebuilt(
    prefix: Path,
    documents: list[list[list[int]]],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for one in documents:
        builder.add_document([i for ids in one for i in ids], [len(ids) for ids in one])
    builder.finalize(f"{prefix}.idx")
    assert cli.main(words) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["split", "best-fit"])
def test_packs_are_cut_between_sentences(
    whole: Path, tmp_path: Path, tokenizer_folder: Path, strategy: str
) -> None:
    prefix = str(whole)
    config = MeCoGPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        blend=([prefix], None),
        split="100,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=build_tokenizer("HuggingFaceTokenizer", str(tokenizer_folder)),
        meco=MeCoConfig(template="", packing=strategy),
    )
    dataset = BlendedMegatronDatasetBuilder(
        MeCoGPTDataset, [None, None, None], lambda: True, config
    ).build()[Split.train.value]
    data = IndexedDataset(prefix)
    lengths, bounds = data.sequence_lengths, data.document_indices
    assert lengths.max() < LENGTH - 1, "a sentence longer than a pack has to be cut somewhere"
    num_cuts = 0
    for pack in range(len(dataset)):
        for piece in dataset.documents_of(pack):
            document = piece["document"]
            ends = np.cumsum(lengths[bounds[document] : bounds[document + 1]]).tolist()
            assert piece["body_end"] in ends and piece["body_begin"] in [0, *ends]
            num_cuts += piece["body_end"] != ends[-1]
    assert num_cuts > 10


def test_a_document_is_refused_whole_and_sentences_without_ids_are_no_sequences() -> None:
    class Fake:
        def encode(self, texts: list[str]) -> tuple[Any, Any]:
            ids: list[list[int]] = [[] if "Empty" in t else [len(t)] * 2 for t in texts]
            lengths = [-1 if "Bad" in t else len(i) for t, i in zip(texts, ids, strict=True)]
            kept = [i for n, i in zip(lengths, ids, strict=True) if n > 0]
            return np.array([i for one in kept for i in one]), np.array(lengths)

    encoder = DocumentEncoder(Fake(), learn_sentences([], "english"))
    encoded = encoder.encode(
        ["One here. Two.", "Fine. Bad one. Fine.", "Empty one.", "Empty here. Four. Six now!"]
    )
    assert encoded.ids.tolist() == [9, 9, 5, 5, 6, 6, 9, 9]
    assert encoded.lengths.tolist() == [4, -1, 0, 4]
    assert encoded.sequence_lengths.tolist() == [2, 2, 2, 2]
    assert encoded.num_sequences.tolist() == [2, 0, 0, 2]
    assert encoded.sequence_lengths_with_eod().tolist() == [2, 3, 2, 3]


def test_languages_and_flags_are_refused_by_name(
    run: Run, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FlagError, match=r"'klingon'.*english.*turkish"):
        run("one", sentence_language="klingon")
    words = ["prepare", str(source), "--output", str(tmp_path / "out" / "c")]
    words += ["--tokenizer-type", "NullTokenizer", "--sentence-language", "german"]
    assert cli.main(words) == 1
    assert "no effect without --split-sentences" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
