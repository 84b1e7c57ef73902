"""`meco prepare` against stock Megatron, on good lines and on bad ones."""

from __future__ import annotations

import argparse
import ast
import gzip
import itertools
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.core
import numpy as np
import pytest
import sentencepiece
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_meco.corpus import input_files, merge, task_writer
from megatron_meco.corpus.documents import Rejected, RejectedRecords, read_documents
from megatron_meco.corpus.input_bytes import Part, count_lines, read_chunks
from megatron_meco.corpus.metadata import check_row_count, open_metadata
from megatron_meco.corpus.prepare import (
    PrepareConfig,
    PrepareReport,
    add_prepare_arguments,
    prepare,
    run_prepare,
)
from megatron_meco.corpus.tokenizer import (
    TOKENIZER_DEFAULTS,
    HuggingFaceEncoder,
    MegatronEncoder,
    build_tokenizer,
    resolve_bos,
    resolve_eod,
    text_encoder,
)
from megatron_meco.errors import DataError, FlagError, MeCoError

type WriteJsonl = Callable[..., Path]
type Run = Callable[..., PrepareReport]

PAGES = [
    {"text": "the first page", "url": "https://a.org/1"},
    {"text": "zwei \u00dc \U0001f600\n\nlines", "url": "https://b.org/2", "topic": "x"},
    {"text": "a third page, longer than sixteen tokens so that truncation would show " * 3},
]


@pytest.fixture
def run(tmp_path: Path, tokenizer_folder: Path) -> Run:
    """Return `prepare` with the test tokenizer and output prefix filled in."""

    def run_with(*inputs: Path, **changes: Any) -> PrepareReport:
        settings: dict[str, Any] = {
            "output": tmp_path / "out" / "corpus",
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": str(tokenizer_folder),
        }
        return prepare(PrepareConfig(inputs=inputs, **{**settings, **changes}))

    return run_with


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_stock_megatron_reads_text_tokens_and_eod(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path, tokenizer_folder: Path
) -> None:
    report = run(write_jsonl(*PAGES))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tokenizer_folder))
    data = IndexedDataset(str(tmp_path / "out" / "corpus"))
    assert data.index.dtype == np.uint16
    assert list(data.document_indices) == [0, 1, 2, 3]
    for page, tokens in zip(PAGES, data, strict=True):
        assert tokens[-1] == tokenizer.eod
        assert not {tokenizer.bos, tokenizer.eod} & set(tokens[:-1].tolist())
        assert tokenizer.detokenize(tokens[:-1].tolist()) == page["text"]
    assert report.tokens == sum(map(len, data))
    assert report.text_bytes == sum(len(page["text"].encode()) for page in PAGES)


def test_metadata_rows_belong_to_the_documents(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    bad = {"url": "https://no.text"}
    report = run(
        write_jsonl(PAGES[0], bad, *PAGES[1:]), metadata_fields=("url", "topic"), strict=False
    )
    prefix = tmp_path / "out" / "corpus"
    check_row_count(prefix, 3)
    table = open_metadata(prefix)
    assert table["url"].to_pylist() == ["https://a.org/1", "https://b.org/2", None]
    assert table["topic"].to_pylist() == [None, "x", None]
    assert report.missing_metadata == {"url": 1, "topic": 2}


def test_metadata_values_of_all_kinds(run: Run, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    values = [3, 0.5, True, None, ["a", "\u00fc"], {"k": 1}, "\ud800x", ""]
    lines = [{"text": "a page", "meta": {"v": value}} for value in values]
    lines.append({"text": "a page", "meta": "flat", "meta.v": "own key"})
    lines.append({"text": "a page", "meta": "flat"})
    run(write_jsonl(*lines), metadata_fields=("meta.v",))
    column = open_metadata(tmp_path / "out" / "corpus")["meta.v"].to_pylist()
    assert column[:8] == ["3", "0.5", "True", None, '["a", "\u00fc"]', '{"k": 1}', "?x", ""]
    assert column[8:] == ["own key", None]


def test_without_metadata_fields_there_is_no_metadata_file(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    run(write_jsonl(*PAGES), metadata_fields=())
    assert _left(tmp_path / "out") == ["corpus.bin", "corpus.idx", "corpus.prepare.json"]


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the input into tasks of two kilobytes."""
    monkeypatch.setattr(input_files, "_MIN_TASK_BYTES", 2000)
    monkeypatch.setattr(input_files, "_MAX_TASK_BYTES", 2000)


def _many_pages(write_jsonl: WriteJsonl) -> Path:
    lines: list[Any] = [{"text": f"page {i} of the text", "url": f"u{i}"} for i in range(400)]
    lines[7::50] = [b"broken"] * len(lines[7::50])
    return write_jsonl(*lines)


@pytest.mark.usefixtures("small_tasks")
def test_one_and_three_workers_write_the_same_bytes(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _many_pages(write_jsonl)
    assert len(input_files.plan_tasks(input_files.find_files([source]))) == 9
    run(source, workers=1, output=tmp_path / "one" / "corpus")
    run(source, workers=3, output=tmp_path / "three" / "corpus")
    assert "corpus.rejected.jsonl" in _left(tmp_path / "one")
    assert _left(tmp_path / "one") == _left(tmp_path / "three")
    for name in _left(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    rejected = (tmp_path / "one" / "corpus.rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in rejected] == list(range(8, 401, 50))
    # The same as in one task, but for where the metadata is cut into batches.
    monkeypatch.undo()
    run(source, output=tmp_path / "whole" / "corpus")
    for suffix in ("bin", "idx", "rejected.jsonl"):
        name = f"corpus.{suffix}"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    urls = [open_metadata(tmp_path / run / "corpus")["url"].to_pylist() for run in ("one", "whole")]
    assert urls[0] == urls[1]


@pytest.mark.usefixtures("small_tasks")
def test_the_index_is_what_megatron_writes(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    run(_many_pages(write_jsonl))
    prefix = str(tmp_path / "out" / "corpus")
    data = IndexedDataset(prefix)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=data.index.dtype)
    for tokens in data:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert (tmp_path / "theirs.idx").read_bytes() == Path(f"{prefix}.idx").read_bytes()
    assert (tmp_path / "theirs.bin").read_bytes() == Path(f"{prefix}.bin").read_bytes()


def test_several_files_plain_and_compressed_in_the_order_given(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    plain = write_jsonl({"text": "plain", "url": "1"})
    line = json.dumps({"text": "gzip", "url": "2"}).encode()
    gz = tmp_path / "b.jsonl.gz"
    # Two members, and no line end before the border of two files.
    gz.write_bytes(gzip.compress(line + b"\n") + gzip.compress(line))
    zst = tmp_path / "a.jsonl.zst"
    frame = zstandard.ZstdCompressor().compress(json.dumps({"text": "zst", "url": "3"}).encode())
    zst.write_bytes(frame)
    run(plain, gz, zst)
    urls = open_metadata(tmp_path / "out" / "corpus")["url"].to_pylist()
    assert urls == ["1", "2", "2", "3"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut off', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'["a list"]', "not a JSON object"),
        (b'{"url": "u"}', "'text' missing"),
        (b'{"text": null}', "'text' null"),
        (b'{"text": 7}', "'text' not a string"),
        (b'{"text": ""}', "'text' empty"),
        (b'{"text": " \\n"}', "'text' empty"),
        (b'{"text": "caf\xe9"}', "invalid UTF-8"),
        (b'{"text": "half a pair \\ud800"}', "invalid UTF-8"),
    ],
)
def test_a_bad_line_is_rejected_with_its_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    documents, rejected = _read(tmp_path, b'{"text": "good"}\r\n\n' + line + b"\n")
    assert [(r.line, r.reason) for r in rejected] == [(3, reason)]
    assert rejected[0].excerpt == line[:200].decode("utf-8", "replace")
    assert documents == ["good"]


def _read(tmp_path: Path, content: bytes) -> tuple[list[str], list[Rejected]]:
    path = tmp_path / "lines"
    path.write_bytes(content)
    rejected = RejectedRecords()
    part = Part(str(path), "jsonl", 0, len(content), True)
    documents = [document.text for document in read_documents(part, "text", rejected)]
    return documents, [record for record, _ in rejected.drain()]


@pytest.fixture
def use_encoder(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes every task use a fake encoder."""

    def use(ids_of: Callable[[str], list[int]]) -> None:
        def encode(texts: list[str]) -> tuple[Any, Any]:
            ids = [ids_of(text) for text in texts]
            return np.array([i for one in ids for i in one]), np.array([len(one) for one in ids])

        settings = {"eod": 1, "vocab_size": 300, "dtype": "uint16"}
        fake = argparse.Namespace(encode=encode)
        monkeypatch.setattr(task_writer, "load_encoder", lambda folder: (fake, settings))

    return use


def test_documents_without_tokens_are_rejected_in_line_order(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path, use_encoder: Callable[..., None]
) -> None:
    use_encoder(lambda text: [5] if text == "good" else [])
    run(write_jsonl({"text": "gone"}, b"broken", {"text": "good"}, {"text": "gone"}))
    lines = (tmp_path / "out" / "corpus.rejected.jsonl").read_text().splitlines()
    assert [(json.loads(x)["line"], json.loads(x)["reason"]) for x in lines] == [
        (1, "no tokens"),
        (2, "broken JSON"),
        (4, "no tokens"),
    ]
    data = IndexedDataset(str(tmp_path / "out" / "corpus"))
    assert [tokens.tolist() for tokens in data] == [[5, 1]]


def test_an_id_outside_the_vocabulary_is_never_written(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path, use_encoder: Callable[..., None]
) -> None:
    use_encoder(lambda text: [300])
    with pytest.raises(DataError, match="id 300"):
        run(write_jsonl({"text": "a"}))
    assert _left(tmp_path / "out") == []


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    assert _read(tmp_path, b'\xef\xbb\xbf{"text": "a"}\n') == (["a"], [])


def test_bad_lines_are_set_aside_and_counted(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    source = write_jsonl(PAGES[0], b"{", b"{", {"text": None}, PAGES[1])
    report = run(source)
    assert report.documents == 2
    assert report.rejected == {"broken JSON": 2, "'text' null": 1}
    lines = (tmp_path / "out" / "corpus.rejected.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert [(r["path"], r["line"]) for r in told] == [(str(source), n) for n in (2, 3, 4)]
    manifest = json.loads((tmp_path / "out" / "corpus.prepare.json").read_text())
    assert manifest["documents"] == 2
    assert manifest["rejected"] == {"'text' null": 1, "broken JSON": 2}
    assert manifest["tokenizer"]["eod"] == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_strict_stops_at_the_first_bad_line_and_leaves_nothing(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path, workers: int
) -> None:
    source = write_jsonl(PAGES[0], b"{", {"text": None})
    with pytest.raises(DataError) as refusal:
        run(source, strict=True, workers=workers)
    assert refusal.value.where == f"{source}, line 2"
    assert _left(tmp_path / "out") == []


def test_no_documents_at_all(run: Run, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all 2 lines rejected.*'text' missing"):
        run(write_jsonl({"body": "x"}, {"body": "y"}))
    with pytest.raises(DataError, match="blank"):
        run(write_jsonl(b"", b"  "))
    assert _left(tmp_path / "out") == []


@pytest.mark.parametrize("kind", ["gz", "zst", "not gz", "not zst"])
def test_damaged_archives_are_told_and_leave_nothing(run: Run, tmp_path: Path, kind: str) -> None:
    lines = b"".join(b'{"text": "page %d", "url": "u"}\n' % i for i in range(20_000))
    content = {
        "gz": gzip.compress(lines)[:-2000],
        "zst": zstandard.ZstdCompressor().compress(lines)[:-2000],
    }.get(kind, lines)
    path = tmp_path / f"pages.jsonl.{kind.rsplit(maxsplit=1)[-1]}"
    path.write_bytes(content)
    with pytest.raises(DataError, match="truncated" if "not" not in kind else "damaged") as told:
        run(path)
    assert told.value.where == str(path)
    assert _left(tmp_path / "out") == []


def test_a_full_disk_is_told_and_the_work_is_kept(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    source = write_jsonl(*PAGES)
    monkeypatch.setattr(merge, "_sync", full)
    with pytest.raises(DataError, match=r"No space left.*1 of 1 tasks are finished and kept"):
        run(source)
    assert _left(tmp_path / "out") == ["corpus.unfinished"]
    monkeypatch.undo()
    assert run(source).documents == 3
    assert "corpus.unfinished" not in _left(tmp_path / "out")


@pytest.mark.usefixtures("small_tasks")
def test_a_disk_that_fills_up_inside_a_task(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, calls = _many_pages(write_jsonl), []

    def full_at_the_third(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", lambda _: full_at_the_third())
    with pytest.raises(DataError, match="No space left"):
        run(source)
    monkeypatch.undo()
    assert _left(tmp_path / "out") == []


@pytest.mark.usefixtures("small_tasks")
def test_going_on_after_a_change_is_refused(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _many_pages(write_jsonl)
    with monkeypatch.context() as patch:
        patch.setattr("megatron_meco.corpus.prepare.merge_tasks", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(source)
    with pytest.raises(DataError, match="other metadata fields"):
        run(source, metadata_fields=("topic",))
    content = source.read_bytes()
    source.write_bytes(content.replace(b"page 3 ", b"PAGE 3 "))
    os.utime(source, (1, 1))
    with pytest.raises(DataError, match=r"input.jsonl has changed \(its date\).*--overwrite"):
        run(source)
    source.write_bytes(content + b"\n")
    with pytest.raises(DataError, match="bytes then"):
        run(source)
    assert run(source, overwrite=True).documents == 392


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_existing_output_is_kept_unless_told(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    run(write_jsonl(b"{", *PAGES))
    with pytest.raises(DataError, match="--overwrite"):
        run(write_jsonl(PAGES[0]))
    assert run(write_jsonl(PAGES[0]), overwrite=True).documents == 1
    # The older run's rejected lines would belong to nothing.
    assert "corpus.rejected.jsonl" not in _left(tmp_path / "out")
    assert len(IndexedDataset(str(tmp_path / "out" / "corpus"))) == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokenizer_type": "NoSuchTokenizer"}, "unknown tokenizer type"),
        ({"tokenizer_model": None}, "needs a model"),
        ({"tokenizer_model": "/no/such/folder"}, "no such folder"),
        ({"workers": 0}, "--workers"),
        ({"metadata_fields": ("url", "url")}, "--metadata-fields"),
        ({"inputs": (Path("/no/such/file"),)}, "no such file"),
        ({"inputs": ("/no/such/*.jsonl",)}, "no such file"),
        ({"inputs": ("nosuch://bucket/x",)}, "Protocol not known"),
        ({"output": Path("/")}, "--output"),
        ({"encoder": "fast"}, "--encoder"),
        ({"executor": "cloud"}, "--executor"),
        ({"executor_options": {"time": 1}}, "--executor-option"),
    ],
)
def test_flags_are_refused_before_anything_is_loaded(
    write_jsonl: WriteJsonl, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    settings: dict[str, Any] = {
        "inputs": (write_jsonl(*PAGES),),
        "output": tmp_path / "out" / "corpus",
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(tmp_path),
    }
    with pytest.raises(MeCoError, match=match):
        prepare(PrepareConfig(**{**settings, **changes}))
    assert _left(tmp_path / "out") == []


def test_a_tokenizer_without_eod_is_refused(
    run: Run, write_jsonl: WriteJsonl, tokenizer_without_eos: Path
) -> None:
    with pytest.raises(FlagError, match="no end-of-document"):
        run(write_jsonl(*PAGES), tokenizer_model=str(tokenizer_without_eos))


def test_an_eod_outside_the_vocabulary_is_refused() -> None:
    tokenizer = build_tokenizer("NullTokenizer", None, vocab_size=10, null_tokenizer_eod_id=10)
    with pytest.raises(FlagError, match="10 outside the vocabulary of 10"):
        resolve_eod(tokenizer)


def test_a_folder_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="does not load as HuggingFaceTokenizer"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path))


def test_encoding_adds_and_drops_nothing(tokenizer_folder: Path) -> None:
    """Megatron's own tokenizer would add BOS and EOS."""
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tokenizer_folder))
    assert (resolve_bos(tokenizer), resolve_eod(tokenizer)) == (0, 1)
    assert tokenizer.tokenize("a")[0] == 0
    encoder = text_encoder(tokenizer)
    assert isinstance(encoder, HuggingFaceEncoder)
    ids = encoder.encode_batch(["a", "x<|end_of_text|>y"])
    assert ids[0] == tokenizer.tokenize("a")[1:-1]
    assert 1 not in (ids[1] or [1])
    assert tokenizer.detokenize(ids[1] or []) == "x<|end_of_text|>y"


def test_truncation_saved_with_a_tokenizer_is_not_obeyed(tokenizer_folder: Path) -> None:
    serialized = (tokenizer_folder / "tokenizer.json").read_text()
    assert json.loads(serialized)["truncation"]["max_length"] == 16
    (ids,) = HuggingFaceEncoder(serialized).encode_batch(["word " * 50])
    assert len(ids or []) > 50


def test_sentencepiece_goes_through_megatron(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the text of a page", "and the next page"] * 20),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = str(tmp_path / "sp.model")
    encoder = text_encoder(build_tokenizer("Llama2Tokenizer", model))
    copy = pickle.loads(pickle.dumps(encoder))
    assert isinstance(copy, MegatronEncoder)
    assert copy.encode_batch(["the page"]) == encoder.encode_batch(["the page"])
    run(write_jsonl({"text": "the page"}), tokenizer_type="Llama2Tokenizer", tokenizer_model=model)
    # Kept in a name: its arrays are views of a file that it unmaps when it goes.
    data = IndexedDataset(str(tmp_path / "out" / "corpus"))
    oracle = sentencepiece.SentencePieceProcessor(model)
    assert data[0].tolist() == [*oracle.encode("the page"), oracle.eos_id()]


def test_a_text_that_the_tokenizer_refuses_is_rejected(run: Run, write_jsonl: WriteJsonl) -> None:
    source = write_jsonl({"text": "1 2 3"}, {"text": "no numbers"})
    report = run(source, tokenizer_type="NullTokenizer", tokenizer_extra={"vocab_size": 10})
    assert (report.documents, report.tokens, report.eod) == (1, 4, 9)
    assert report.rejected == {"refused by the tokenizer": 1}


def test_defaults_are_megatrons() -> None:
    source = Path(megatron.core.__file__).parents[1] / "training/config/training_config.py"
    found = {}
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "TokenizerConfig":
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    found[line.target.id] = _default(line.value)
    assert {name: found[name] for name in TOKENIZER_DEFAULTS} == TOKENIZER_DEFAULTS


def _default(value: ast.expr | None) -> Any:
    if isinstance(value, ast.Call):
        value = next(k.value for k in value.keywords if k.arg == "default")
    assert value is not None
    return ast.literal_eval(value)


def test_command_line(
    write_jsonl: WriteJsonl,
    tmp_path: Path,
    tokenizer_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    add_prepare_arguments(parser)
    source, prefix = write_jsonl(*PAGES, b"{"), tmp_path / "out" / "corpus"
    flags = [str(source), "--output", str(prefix), "--tokenizer-type", "HuggingFaceTokenizer"]
    flags += ["--tokenizer-model", str(tokenizer_folder), "--metadata-fields", "url,topic"]
    args = parser.parse_args([*flags, "--workers", "1"])
    assert run_prepare(args) == 0
    out = capsys.readouterr().out
    assert "3" in out and "1 line: broken JSON" in out and "'<|end_of_text|>'" in out
    assert run_prepare(args) == 1
    told = capsys.readouterr()
    assert told.out == "" and "already there" in told.err and "Traceback" not in told.err
    assert run_prepare(parser.parse_args([*flags, "--workers", "1", "--overwrite", "--json"])) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["documents"] == 3 and report["rejected"] == {"broken JSON": 1}
    assert f"{prefix}.bin" in report["files"]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 10_000_000])
def test_chunks_are_whole_lines_with_right_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr("megatron_meco.corpus.input_bytes._BLOCK_BYTES", 5)
    path = tmp_path / "lines"
    content = b"a\n\nlonger than a block\nb\r\n" + b"\xe2\x80\xa8x\n" + b"last, without its end"
    path.write_bytes(content)
    chunks = list(read_chunks(str(path), chunk_bytes=chunk_bytes))
    assert b"".join(chunk.data for chunk in chunks) == content
    seen = 0
    for chunk in chunks:
        assert chunk.first_line == seen + 1
        assert chunk.data.endswith(b"\n") or chunk is chunks[-1]
        seen += chunk.data.count(b"\n")
    # Ranges that cover a file give every line once, wherever they are cut.
    for cuts in itertools.combinations(range(1, len(content)), 2):
        borders = [0, *cuts, len(content)]
        ranges = [
            b"".join(c.data for c in read_chunks(str(path), begin, end, chunk_bytes))
            for begin, end in itertools.pairwise(borders)
        ]
        assert b"".join(ranges) == content
        for begin, before in zip(borders, itertools.accumulate(ranges, initial=b""), strict=False):
            assert content.find(before) == 0
            assert not before or before.endswith(b"\n") or before == content
            assert len(before) >= begin or b"\n" not in content[len(before) : begin - 1]
            assert count_lines(str(path), begin) == before.count(b"\n")
