"""Formats other than plain JSONL, folders and URLs, and pipelines and executors of datatrove."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import ParquetReader
from megatron.core.datasets.indexed_dataset import IndexedDataset
from warcio.warcwriter import WARCWriter

from megatron_meco.corpus import input_files
from megatron_meco.corpus.documents import JsonLinesReader, RejectedRecords
from megatron_meco.corpus.executors import parse_options
from megatron_meco.corpus.merge import merge_tasks
from megatron_meco.corpus.metadata import open_metadata
from megatron_meco.corpus.prepare import PrepareConfig, prepare
from megatron_meco.corpus.task_writer import MegatronWriter
from megatron_meco.corpus.work_folder import make_work_folder
from megatron_meco.errors import DataError, FlagError

TABLE = pa.table(
    {
        "text": ["first", None, "third \u00e9", ""],
        "meta": [{"score": 0.5}, {"score": 1.0}, None, None],
        "url": ["a.org", "b.org", "c.org", "d.org"],
    }
)


@pytest.fixture
def settings(tmp_path: Path, tokenizer_folder: Path) -> dict[str, Any]:
    return {
        "output": tmp_path / "out" / "corpus",
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(tokenizer_folder),
    }


def _rejected(prefix: Path) -> list[tuple[str, int, str]]:
    lines = Path(f"{prefix}.rejected.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    return [(Path(r["path"]).name, r["line"], r["reason"]) for r in told]


def test_parquet_arrow_csv_and_jsonl_of_one_folder(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = tmp_path / "data" / "deeper"
    folder.mkdir(parents=True)
    pq.write_table(TABLE, folder / "a.parquet", row_group_size=2)
    with pa.ipc.new_stream(str(folder / "b.arrow"), TABLE.schema) as out:
        out.write_table(TABLE)
    with pa.ipc.new_file(str(folder / "c.arrow"), TABLE.schema) as out:
        out.write_table(TABLE)
    with (folder / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["url", "text"], ["e.org", "in two\nlines"], ["f.org", ""]])
    (folder / "e.ndjson").write_text('{"text": "last", "url": "g.org"}\n')
    for name in ("state.json", "README.md"):
        (folder / name).write_text("{}")
    fields = ("url", "meta.score", "file_path")
    report = prepare(PrepareConfig(inputs=(tmp_path / "data",), metadata_fields=fields, **settings))
    assert report.documents == 8
    prefix = settings["output"]
    table = open_metadata(prefix)
    assert table["url"].to_pylist() == [*["a.org", "c.org"] * 3, "e.org", "g.org"]
    assert table["meta.score"].to_pylist() == [*["0.5", None] * 3, None, None]
    names = [os.path.basename(path) for path in table["file_path"].to_pylist()]
    assert names == [*(["a.parquet"] * 2 + ["b.arrow"] * 2 + ["c.arrow"] * 2), "d.csv", "e.ndjson"]
    three = [(f"{name}", n, f"'text' {what}") for name, n, what in _bad_rows()]
    assert _rejected(prefix) == [*three, ("d.csv", 2, "'text' empty")]


def _bad_rows() -> list[tuple[str, int, str]]:
    names = ("a.parquet", "b.arrow", "c.arrow")
    return [(name, n, what) for name in names for n, what in ((2, "null"), (4, "empty"))]


def test_extracted_text_of_a_crawl_but_not_its_html(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    path = tmp_path / "crawl.warc.wet.gz"
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for kind, mime, content in (
            ("warcinfo", "application/warc-fields", b"software: x"),
            ("conversion", "text/plain", "a page \u00e9".encode()),
            ("conversion", "text/plain", b"<!DOCTYPE html><p>x"),
        ):
            headers = {"WARC-Identified-Payload-Type": mime}
            record = writer.create_warc_record(
                "https://a.org/x", kind, payload=io.BytesIO(content), warc_headers_dict=headers
            )
            writer.write_record(record)
    prepare(PrepareConfig(inputs=(path,), metadata_fields=("url",), **settings))
    prefix = settings["output"]
    assert open_metadata(prefix)["url"].to_pylist() == ["https://a.org/x"]
    assert _rejected(prefix) == [("crawl.warc.wet.gz", 3, "HTML, not text")]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.warc.gz"])
def test_damaged_files_of_other_formats_are_told(
    tmp_path: Path, settings: dict[str, Any], name: str
) -> None:
    path = tmp_path / name
    pq.write_table(TABLE, path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="cannot be read to its end") as told:
        prepare(PrepareConfig(inputs=(path,), **settings))
    assert told.value.where == str(path)
    assert list((tmp_path / "out").iterdir()) == []


def test_files_behind_a_url_are_cut_and_compressed_as_local_ones(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_files, "_MIN_TASK_BYTES", 300)
    memory = fsspec.filesystem("memory")
    lines = b"".join(b'{"text": "page %d", "url": "u%d"}\n' % (i, i) for i in range(100))
    memory.pipe("/bucket/a.jsonl", lines + b"{\n")
    memory.pipe("/bucket/b.jsonl.gz", gzip.compress(lines))
    sink = io.BytesIO()
    pq.write_table(TABLE, sink)
    memory.pipe("/bucket/c.parquet", sink.getvalue())
    files = input_files.find_files(["memory://bucket/*.jsonl*"])
    assert [file.path for file in files] == [
        "memory:///bucket/a.jsonl",
        "memory:///bucket/b.jsonl.gz",
    ]
    assert len(input_files.plan_tasks(files)) > 5
    report = prepare(PrepareConfig(inputs=("memory://bucket/",), **settings))
    assert report.documents == 202
    urls = [*[f"u{i}" for i in range(100)] * 2, "a.org", "c.org"]
    assert open_metadata(settings["output"])["url"].to_pylist() == urls
    assert _rejected(settings["output"]) == [
        ("a.jsonl", 101, "broken JSON"),
        ("c.parquet", 2, "'text' null"),
        ("c.parquet", 4, "'text' empty"),
    ]


def test_a_pipeline_of_ones_own(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "in").mkdir()
    lines = ['{"text": "keep 1", "url": "a"}', "{", '{"text": "drop", "url": "b"}']
    (tmp_path / "in" / "x.jsonl").write_text("\n".join(lines))
    (tmp_path / "in" / "y.jsonl").write_text('{"text": "keep 2", "url": "c"}')
    prefix = settings.pop("output")
    make_work_folder(tmp_path / "work", **settings)
    rejected = RejectedRecords()
    LocalPipelineExecutor(
        pipeline=[
            JsonLinesReader(str(tmp_path / "in"), rejected),
            LambdaFilter(lambda document: "keep" in document.text),
            MegatronWriter(tmp_path / "work", ["url"], rejected),
        ],
        tasks=2,
        workers=1,
        logging_dir=str(tmp_path / "logs"),
    ).run()
    merged = merge_tasks(tmp_path / "work", prefix, 2)
    assert (merged.documents, merged.rejected) == (2, {"broken JSON": 1})
    assert open_metadata(prefix)["url"].to_pylist() == ["a", "c"]
    assert _rejected(prefix) == [("x.jsonl", 2, "broken JSON")]


def test_datatroves_own_reader_before_our_writer(tmp_path: Path, settings: dict[str, Any]) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    prefix = settings.pop("output")
    make_work_folder(tmp_path / "work", **settings)
    reader = ParquetReader(str(tmp_path), glob_pattern="*.parquet")
    for _ in MegatronWriter(tmp_path / "work", ["url", "file_path"]).run(reader.run()):
        raise AssertionError
    merge_tasks(tmp_path / "work", prefix, 1)
    assert open_metadata(prefix)["file_path"].to_pylist() == [str(tmp_path / "a.parquet")] * 2
    assert len(IndexedDataset(str(prefix))) == 2


def test_options_of_an_executor() -> None:
    assert parse_options(["time=10:00:00", "mem_per_cpu_gb=4", "qos="]) == {
        "time": "10:00:00",
        "mem_per_cpu_gb": 4,
        "qos": "",
    }
    with pytest.raises(FlagError, match="KEY=VALUE"):
        parse_options(["time"])


# What Slurm does with an array job, without Slurm: run the script once for each task.
SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
with open("{log}", "a") as log:
    log.write(" ".join(sys.argv[1:-1]) + chr(10))
count = int(re.search(r"array=0-([0-9]+)", script).group(1)) + 1
for task in range(count if "merge_stats" not in script else 0):
    environment = {{**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "here"}}
    subprocess.run(["bash", sys.argv[-1]], check=True, env=environment, stdout=2)
print("Submitted batch job 77")
"""


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    programs, log = tmp_path / "programs", tmp_path / "sbatch.log"
    programs.mkdir()
    scripts = {
        "sbatch": SBATCH.format(python=sys.executable, log=log),
        "scontrol": "#!/bin/sh\necho here\n",
        "srun": '#!/bin/sh\nshift 3\nexec "$@"\n',
    }
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    python = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{python}{os.pathsep}{os.environ['PATH']}")
    return log


def _pages(tmp_path: Path) -> Path:
    path = tmp_path / "pages.jsonl"
    lines = [json.dumps({"text": f"page {i}", "url": f"u{i}"}) for i in range(200)]
    path.write_text("\n".join([*lines, "{", ""]))
    return path


def _same(one: Path, other: Path) -> bool:
    suffixes = (".bin", ".idx", ".metadata.arrow", ".prepare.json", ".rejected.jsonl")
    return all(Path(f"{one}{s}").read_bytes() == Path(f"{other}{s}").read_bytes() for s in suffixes)


def test_slurm_writes_the_same_bytes(
    tmp_path: Path,
    settings: dict[str, Any],
    fake_slurm: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(input_files, "_MIN_TASK_BYTES", 3000)
    source = _pages(tmp_path)
    assert len(input_files.plan_tasks(input_files.find_files([source]))) == 2
    with pytest.raises(FlagError, match="time and partition"):
        prepare(PrepareConfig(inputs=(source,), executor="slurm", **settings))
    options = {"time": "1:00:00", "partition": "cpu", "env_command": "true"}
    report = prepare(
        PrepareConfig(inputs=(source,), executor="slurm", executor_options=options, **settings)
    )
    assert report.job == "77"
    assert "--dependency=afterok:77" in fake_slurm.read_text()
    local = tmp_path / "local" / "corpus"
    prepare(PrepareConfig(inputs=(source,), **{**settings, "output": local}))
    assert _same(settings["output"], local)
    (fake_slurm.parent / "programs" / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    again = {**settings, "output": tmp_path / "again", "executor_options": options}
    with pytest.raises(FlagError, match="sbatch does not work"):
        prepare(PrepareConfig(inputs=(source,), executor="slurm", **again))


def test_ray_writes_the_same_bytes(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    monkeypatch.setattr(input_files, "_MIN_TASK_BYTES", 3000)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        options = {"mem_per_cpu_gb": 0.1}
        source = _pages(tmp_path)
        prepare(
            PrepareConfig(
                inputs=(source,), executor="ray", executor_options=options, workers=2, **settings
            )
        )
    finally:
        ray.shutdown()
    local = tmp_path / "local" / "corpus"
    prepare(PrepareConfig(inputs=(source,), **{**settings, "output": local}))
    assert _same(settings["output"], local)


def test_without_ray_it_is_said(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FlagError, match=r"megatron-meco\[ray\]"):
        prepare(PrepareConfig(inputs=(_pages(tmp_path),), executor="ray", **settings))
