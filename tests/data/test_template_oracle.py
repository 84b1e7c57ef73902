"""Templates and prefix tables against the slow oracle, on random templates and metadata."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest

from megatron_meco.data import prefix_table
from megatron_meco.data.prefix_table import load_prefix_table
from megatron_meco.data.template import Template
from tests.data import reference_template as oracle

TOKENS = {"<|begin|>": 1001, "<s>": 1002, "]": 1003}
CHAINS = {
    "topic": "; |keep=0.5; |shuffled; |default=none; |keep=0.25|default=none|shuffled; |top=2; "
    "|shuffled|top=40%|keep=0.75; |keep=0.5|shuffled|min_documents=2; "
    "|default=x|keep=0.9|shuffled|keep=0.9",
    "score": "; |bins=10; |scale=10|floor; |scale=100|floor; |scale=0.5; |bins=7|shuffled; "
    "|precision=2; |scale=-3|floor|default=none; |precision=2|bins=100|top=3",
    "date": ".year; .month; .day; .year|keep=0.5; ; .month|floor",
    "url": ".host; .host|top=2; .host|shuffled; .host|keep=0.1",
}


def random_rows(draw: random.Random, size: int) -> list[oracle.Row]:
    def date() -> str:
        text = f"{draw.randrange(1990, 2026)}-{draw.randrange(1, 13):02}-{draw.randrange(1, 29):02}"
        return draw.choice([text, text[:7], text[:4], f"{text}T12:30:00Z", f" {text} 09:00"])

    def row() -> oracle.Row:
        host = f"h{int(draw.paretovariate(1)) % 9}.org"
        found: oracle.Row = {
            "topic": draw.choice(["ab", "c<s>d", "[[e]]", "{f}", "g\xff\u20ac", ""]),
            "score": f"{draw.randrange(101) / 100}",
            "date": date(),
            "url": f"https://{host}/{draw.randrange(5)}",
        }
        return {k: None if draw.random() < 0.15 else v for k, v in found.items()}

    return [row() for _ in range(size)]


def random_template(draw: random.Random) -> str:
    def value() -> str:
        field = draw.choice(list(CHAINS))
        return f"{{{field}{draw.choice(CHAINS[field].split('; '))}}}"

    def plain() -> str:
        token = f"{{token:{draw.choice(list(TOKENS))}}}"
        return draw.choice([token, "x", r"\n", "{{", "}}", r"\[", r"\]", " [ ", " ] ", ""])

    def group() -> str:
        return f"[[{plain()}{value()}{draw.choice([plain, value])()} ]]"

    literals = [lambda: "[[[[ ", lambda: "]]]] "]
    parts = [draw.choice([value, plain, group, *literals]) for _ in range(draw.randrange(1, 5))]
    return " ".join(part() for part in [*parts, draw.choice([value, group])])


@pytest.mark.parametrize("case", range(60))
def test_tables_hold_what_the_oracle_renders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: int
) -> None:
    draw = random.Random(case)
    rows = random_rows(draw, draw.choice([1, 2, 30, 90]))
    source, seed = random_template(draw), draw.choice([0, 1, 1234, -5])
    monkeypatch.setattr(prefix_table, "_ROWS_PER_BATCH", draw.choice([7, 1000]))
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in rows[0]}
    table = pa.table(columns)
    with pa.ipc.new_file(f"{tmp_path / 'c'}.metadata.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=draw.choice([4, 1000]))
    texts: list[str] = []

    def encode(batch: list[str]) -> list[list[int] | None]:
        texts.extend(batch)
        return [[ord(c) for c in text] for text in batch]

    found = load_prefix_table(
        str(tmp_path / "c"),
        len(rows),
        Template.parse(source),
        encode,
        "letters",
        10_000,
        tmp_path / "cache",
        token_ids=TOKENS,
        seed=seed,
    )
    expected = oracle.prefixes(source, rows, seed)
    tokens = [None if i < 0 else found.tokens_of(i).tolist() for i in found.prefix_ids.tolist()]
    assert tokens == [None if e is None else ids(e) for e in expected], source
    # Texts between special tokens are tokenised apart.
    pieces = {p for e in expected for p in e or [] if isinstance(p, str)}
    assert set(texts) - {""} == pieces
    assert found.documents_without_value == expected.count(None)


def ids(segments: list[str | tuple[str, str]]) -> list[int]:
    found: list[int] = []
    for part in segments:
        found += [ord(c) for c in part] if isinstance(part, str) else [TOKENS[part[1]]]
    return found
