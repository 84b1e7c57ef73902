"""Truncated and damaged files: an error, never silently fewer documents."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from warcio.warcwriter import WARCWriter

from megatron_meco.corpus.input_bytes import Part
from megatron_meco.corpus.records import column_names
from megatron_meco.errors import DataError

type Read = Callable[..., tuple[list[Any], list[str]]]

PAGES = [
    {"text": f'page {i}, "quoted",\nin two lines \u00e9', "url": f"https://a.org/{i}"}
    for i in range(9)
]
TABLE = pa.Table.from_pylist(PAGES)


def _jsonl() -> bytes:
    return b"".join(json.dumps(page, ensure_ascii=False).encode() + b"\n" for page in PAGES)


def _csv(*, quoted: bool) -> bytes:
    if not quoted:
        return b"url,text\n" + b"".join(b"u%d,plain page %d\n" % (i, i) for i in range(9))
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["url", "text"])
    writer.writeheader()
    writer.writerows(PAGES)
    return out.getvalue().encode()


def _arrow(new: Any, table: pa.Table = TABLE, **options: Any) -> bytes:
    sink = io.BytesIO()
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def _parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink, row_group_size=2)
    return sink.getvalue()


def _wet(*, compressed: bool) -> bytes:
    sink = io.BytesIO()
    writer = WARCWriter(sink, gzip=compressed)
    writer.write_record(writer.create_warcinfo_record("crawl", {"software": "x"}))
    for page in PAGES:
        payload = io.BytesIO(page["text"].encode())
        record = writer.create_warc_record(
            page["url"], "conversion", payload=payload, warc_content_type="text/plain"
        )
        writer.write_record(record)
    return sink.getvalue()


def _frames(data: bytes) -> bytes:
    """Two frames, and one that decoders skip, as parallel compressors write."""
    compress = zstandard.ZstdCompressor().compress
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    return compress(data[:200]) + skipped + compress(data[200:])


# By name: the content, and whether a file that is cut between two records cannot be told.
FILES: dict[str, tuple[bytes, bool]] = {
    "a.jsonl": (_jsonl(), True),
    "a.jsonl.gz": (gzip.compress(_jsonl()), False),
    "members.jsonl.gz": (b"".join(gzip.compress(x) for x in _jsonl().splitlines(True)), True),
    "a.jsonl.zst": (_frames(_jsonl()), False),
    "quoted.csv": (_csv(quoted=True), True),
    "plain.csv": (_csv(quoted=False), True),
    "plain.csv.gz": (gzip.compress(_csv(quoted=False)), False),
    "stream.arrow": (_arrow(pa.ipc.new_stream), False),
    "legacy.arrow": (_arrow(pa.ipc.new_stream, use_legacy_format=True), False),
    "file.arrow": (_arrow(pa.ipc.new_file), False),
    "a.parquet": (_parquet(), False),
    "a.wet": (_wet(compressed=False), True),
    "a.warc.wet.gz": (_wet(compressed=True), True),
    "a.wet.zst": (_frames(_wet(compressed=False)), False),
    "whole.wet.gz": (gzip.compress(_wet(compressed=False)), False),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_ends_early_is_refused_wherever_it_ends(
    tmp_path: Path, read: Read, name: str
) -> None:
    content, has_borders = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    whole, rejected = read(path)
    assert len(whole) == len(PAGES) and rejected == []
    step = max(len(content) // 250, 1)
    cuts = {1, 2, 5, 9, *range(0, len(content), step), *range(len(content) - 12, len(content))}
    accepted = 0
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        try:
            documents, rejected = read(path)
        except DataError as error:
            assert str(path) in error.where and "\n" not in str(error)
            continue
        assert has_borders, f"cut at {cut} of {len(content)}"
        # Between two records: nothing is lost of what is there.
        assert documents == whole[: len(documents)] and rejected == []
        accepted += 1
    assert accepted < len(cuts) / 4


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("two.arrow", FILES["stream.arrow"][0] * 2),
        ("two.arrow", FILES["file.arrow"][0] * 2),
        ("no-footer.arrow", FILES["file.arrow"][0][:-300]),
        ("empty.jsonl.gz", b""),
        ("empty.jsonl.zst", b""),
        ("garbage.jsonl.gz", FILES["a.jsonl.gz"][0] + b"garbage"),
        ("nul.jsonl", FILES["a.jsonl"][0] + b"\x00" * 50),
        ("junk.wet", b"no archive of any kind, in many words\n" * 3),
        ("short.wet", FILES["a.wet"][0].replace(b"Content-Length: 3", b"Content-Length: 2", 1)),
        ("none.wet", FILES["a.wet"][0].replace(b"Content-Length", b"Content-Width", 1)),
        ("bz.jsonl", b"BZh91AY&SY" + bytes(90)),
        ("parquet.jsonl", FILES["a.parquet"][0]),
        ("utf16.jsonl", _jsonl().decode().encode("utf-16")),
        ("unpacked.jsonl.bz2", b"BZh9"),
    ],
)
def test_more_that_is_not_what_it_should_be(
    tmp_path: Path, read: Read, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as told:
        read(path)
    assert str(path) in told.value.where and "\n" not in str(told.value)


def test_one_bad_file_stops_a_folder(tmp_path: Path, read: Read) -> None:
    for name in ("a.jsonl.gz", "a.parquet", "a.wet"):
        (tmp_path / name).write_bytes(FILES[name][0])
    assert len(read(tmp_path)[0]) == 27
    (tmp_path / "a.parquet").write_bytes(FILES["a.parquet"][0][:-9])
    with pytest.raises(DataError, match=r"a\.parquet"):
        read(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bytes_never_end_in_anything_else(tmp_path: Path, read: Read, name: str) -> None:
    content, _ = FILES[name]
    path, dice = tmp_path / name, random.Random(name)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(dice.choice([1, 1, 3])):
            damaged[dice.randrange(len(damaged))] = dice.choice([0, 255, dice.randrange(256)])
        path.write_bytes(damaged)
        try:
            documents, rejected = read(path)
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        if name.endswith((".gz", ".arrow", ".parquet")):
            assert len(documents) + len(rejected) == len(PAGES)
    assert refused or name.endswith(("csv", "jsonl"))


def test_a_footer_that_names_no_batches_is_no_empty_file(tmp_path: Path, read: Read) -> None:
    whole, empty = FILES["file.arrow"][0], _arrow(pa.ipc.new_file, TABLE.slice(0, 0))
    path = tmp_path / "x.arrow"
    path.write_bytes(empty)
    assert read(path) == ([], [])
    # The footer of the empty file behind the batches of the other one.
    path.write_bytes(whole + empty[-int.from_bytes(empty[-10:-6], "little") - 10 :])
    with pytest.raises(DataError, match="that its footer does not name"):
        read(path)


def test_what_a_crawl_has_besides_text_is_counted(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "x.wet"
    content = FILES["a.wet"][0]
    path.write_bytes(content.replace(b"WARC-Type: conversion", b"WARC-Type: conversiom", 1))
    assert [len(part) for part in read(path)] == [8, 1]
    # Without this header libmagic decides, and takes this for C.
    text = b"#include <stdio.h>\nint main(void) { return 0; }\n"
    old = PAGES[0]["text"].encode()
    assert len(text) > len(old)
    lengths = (b"Content-Length: %d" % len(old), b"Content-Length: %d" % len(text))
    path.write_bytes(content.replace(*lengths).replace(old, text, 1))
    with pytest.raises(DataError):
        read(path)  # the others are shorter than their lengths now
    path.write_bytes(content.replace(lengths[0], lengths[1], 1).replace(old, text, 1))
    documents, rejected = read(path)
    assert len(documents) == 8 and rejected == ["no text by its type or encoding"]
    path.write_bytes(content.replace(b"WARC-Target-URI", b"WARC-Target-URL", 1))
    assert read(path)[1] == ["no address or no date"]


BAD = pa.array([1, 10**18, 3], pa.timestamp("us"))
NOT_UTF8 = pa.Array.from_buffers(
    pa.string(),
    3,
    [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")],
)


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_a_value_that_python_cannot_hold(tmp_path: Path, read: Read, kind: str) -> None:
    inside = pa.StructArray.from_arrays([pa.array([5, None, 7]), BAD], names=["n", "date"])
    table = pa.table(
        {"text": ["one", "two", "three"], "date": BAD, "in": inside, "url": NOT_UTF8, "in.k": BAD}
    )
    path = tmp_path / ("x.parquet" if kind == "parquet" else "x.arrow")
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        path.write_bytes(_arrow(pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file, table))
    # Nobody asked for it.
    assert read(path, fields=("in.n",)) == ([("one", "5"), ("two", None), ("three", "7")], [])
    assert read(path, fields=("in.none", "none"))[1] == []
    for field, reason in (
        ("date", "'date' cannot be read"),
        ("in.date", "'in' cannot be read"),
        ("in", "'in' cannot be read"),
        ("url", "invalid UTF-8"),
    ):
        documents, rejected = read(path, fields=(field,))
        assert [text for text, _ in documents] == ["one", "three"] and rejected == [reason]


def test_csv_as_others_write_it(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "x.csv"
    long = "x" * 200_000
    for content, documents, rejected in (
        (f"\ufefftext,url\na,u\n{long},v\n", [("a", "u"), (long, "v")], []),
        ('text,url\n"in\r\ntwo",u\n\n', [("in\ntwo", "u")], []),
        ("text,url\na\nb,c,d\ne,f\n", [("e", "f")], ["not as many fields as the header"] * 2),
        ('text,url\n"a"b,u\n"c",v\n', [("c", "v")], ["quotes in the wrong place"]),
        ("text,other\na\udcff,\nb,\udcff\n", [("b", None)], ["invalid UTF-8"]),
        ("text,url\na,\udcff\nb,u\n", [("b", "u")], ["invalid UTF-8"]),
    ):
        path.write_text(content, encoding="utf-8", errors="surrogateescape", newline="")
        assert read(path) == (documents, rejected)


class _Runs:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("code of a stranger ran",))


@pytest.mark.parametrize("name", ["arrow.py_extension_type", "arrow.pickle"])
def test_a_pickle_in_a_schema_is_not_read(tmp_path: Path, read: Read, name: str) -> None:
    told = {"ARROW:extension:name": name, "ARROW:extension:metadata": pickle.dumps(_Runs())}
    table = pa.table(
        [pa.array(["a page"])], schema=pa.schema([pa.field("text", pa.string(), metadata=told)])
    )
    pq.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "x.arrow").write_bytes(_arrow(pa.ipc.new_stream, table))
    assert read(tmp_path)[0] == [("a page", None)] * 2


def test_columns_are_named_as_the_file_has_them(tmp_path: Path) -> None:
    for name in ("quoted.csv", "stream.arrow", "file.arrow", "a.parquet"):
        path = tmp_path / name
        path.write_bytes(FILES[name][0])
        part = Part(str(path), name.rpartition(".")[2], 0, 0, True)
        assert set(column_names(part)) == {"text", "url"}
