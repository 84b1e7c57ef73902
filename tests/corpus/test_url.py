"""URL transforms, example by example."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from megatron_meco.corpus import url
from megatron_meco.data.template import Template


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("https://en.wikipedia.org/wiki/Bill_Gates", "en.wikipedia.org"),
        ("HTTPS://bob:p@ss@Example.COM.:8080/x", "example.com"),
        ("//cdn.example.org/a", "cdn.example.org"),
        ("example.org/a?b=c", "example.org"),
        ("www.BBC.co.uk", "www.bbc.co.uk"),
        ("localhost:80", "localhost"),
        ("  http://example.org\n", "example.org"),
        ("http://exam\nple.org/", "example.org"),
        ("http://[2001:DB8::1]:80/x", "[2001:db8::1]"),
        ("http://example.org?user@evil.com", "example.org"),
        ("http://example.org#user@evil.com", "example.org"),
        ("http://example.org\\@evil.com", "example.org"),
        ("http://m\u00fcnchen.DE/", "m\u00fcnchen.de"),
        ("http://example.org:/x", "example.org"),
        ("http://example.org:?q", "example.org"),
        ("\ufeffhttp://bom.com", "bom.com"),
        ("\u200b \ufeff http://b\u2060om.com\u200b", "bom.com"),
        ("\x00http://example.org\x1f", "example.org"),
        ("http://u:p@[::1]:80/@x", "[::1]"),
        ("(http://example.org", None),
        ("1http://example.org", None),
        ("http://exam\x01ple.org/", None),
        ("", None),
        ("   ", None),
        ("http://", None),
        ("http:///path", None),
        ("http://?query", None),
        ("http://user@/x", None),
        ("http://...", None),
        ("http://two words/x", None),
        ("file:///etc/hosts", None),
        ("mailto:a@example.org", None),
        ("about:blank", None),
        ("javascript:alert(1)", None),
        (None, None),
    ],
)
def test_host(given: str | None, expected: str | None) -> None:
    assert url.host(pa.array([given], pa.string())).to_pylist() == [expected]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("https://en.wikipedia.org/wiki/Bill_Gates", "en.wikipedia.org/wiki/Bill_Gates"),
        ("//Example.org/A?b#c", "Example.org/A?b#c"),
        ("example.org/?u=http://other.org", "example.org/?u=http://other.org"),
        (" http://example.org/a ", "example.org/a"),
        ("\ufeffhttp://bom.com/x", "bom.com/x"),
        ("https://user:password@example.org/a@b?c@d", "example.org/a@b?c@d"),
        ("https://user:p@ss@example.org:80/", "example.org:80/"),
        ("//user@example.org", "example.org"),
        ("user:password@example.org/x", "example.org/x"),
        ("https:user:password@example.org/x", "example.org/x"),
        ("\ufeffhttps://user:password@example.org", "example.org"),
        ("ht\ntps://user:pass\nword@example.org", "example.org"),
        # A password cannot be told from the path.
        ("https://user:pass/word@example.org/", None),
        ("https://user:pass#word@example.org/", None),
        ("https://user:pass\\@example.org/", None),
        # What looks a little like one and is none.
        ("https://medium.com/@user", "medium.com/@user"),
        ("https://example.org:8080/@user", "example.org:8080/@user"),
        ("https://[::1]:80/@user", "[::1]:80/@user"),
        ("mailto:user@example.org", "mailto:user@example.org"),
        ("doi:10.1000/a@b", "doi:10.1000/a@b"),
        ("http://", None),
        ("", None),
        (None, None),
    ],
)
def test_without_scheme(given: str | None, expected: str | None) -> None:
    assert url.without_scheme(pa.array([given], pa.string())).to_pylist() == [expected]


def test_domain_and_suffix() -> None:
    hosts = pa.array(["www.bbc.co.uk", "a.github.io", "127.0.0.1", "[::1]", "localhost", None])
    assert url.registered_domain(hosts).to_pylist() == [
        "bbc.co.uk",
        "github.io",
        None,
        None,
        None,
        None,
    ]
    assert url.suffix(hosts).to_pylist() == ["co.uk", "io", None, None, None, None]


def test_hashed_ids_are_pinned() -> None:
    """Trained models depend on them: a release must not change them."""
    ids = url.hashed(pa.array(["en.wikipedia.org", "www.bbc.co.uk", None])).to_pylist()
    assert ids == ["pq8ibe9t-xjzp", "eifmd0vx-kpe2", None]


@pytest.mark.parametrize(
    "transform",
    [url.host, url.without_scheme, url.registered_domain, url.suffix, url.hashed],
)
def test_chunks_dictionaries_and_nothing(transform) -> None:  # type: ignore[no-untyped-def]
    values = pa.array(["www.example.org", None, "b.net", "www.example.org"])
    expected = transform(values).to_pylist()
    chunked = transform(pa.chunked_array([values.slice(0, 1), values.slice(1)]))
    assert isinstance(chunked, pa.ChunkedArray)
    assert chunked.to_pylist() == expected
    assert expected[1] is None
    assert transform(values.cast(pa.large_string())).to_pylist() == expected
    assert transform(values.dictionary_encode()).to_pylist() == expected
    assert transform(pa.array([], pa.string())).to_pylist() == []
    assert transform(pa.nulls(2)).to_pylist() == [None, None]


def test_domains_are_asked_once_per_distinct_host(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(url, "_hash", lambda name: asked.append(name) or "id")
    url.hashed(pa.chunked_array([["a", "b", "a"], ["b", "a"]]))
    assert sorted(asked) == ["a", "b"]


def test_no_password_gets_into_a_prefix() -> None:
    template = Template.parse("{url} {url.host} {url.domain} {url.suffix} {url.hash}")
    urls = pa.array(
        ["https://user:hunter2@www.example.org:8080/x", "https://www.example.org:8080/x"]
    )
    one, other = template.render(pa.record_batch({"url": urls}), "here").to_pylist()
    assert one == other and "hunter2" not in one and "user" not in one


@pytest.mark.parametrize("hosts_only", [False, True])
def test_the_short_cut_for_plain_urls_gives_what_the_expressions_give(hosts_only: bool) -> None:
    draw = random.Random(3)
    schemes = [
        "http://",
        "https://",
        "https://",
        "HTTP://",
        "http:/",
        "//",
        "",
        "ftp://",
        " http://",
    ]
    pieces = [
        "a",
        "B.c",
        "-",
        ".",
        "..",
        "@",
        ":80",
        "/",
        "//",
        "?q=@",
        "#",
        " ",
        "\n",
        "\x7f",
        "\u00e4",
    ]
    pieces += ["mailto:", "[::1]", "\\", "~!", "x.org/y", "\ufeff"]
    urls = [
        draw.choice(schemes) + "".join(draw.choices(pieces, k=draw.randrange(5)))
        for _ in range(20_000)
    ]
    given = pa.array([None if draw.random() < 0.05 else u for u in urls]).slice(7)
    fast, slow = (url.host, url._host) if hosts_only else (url.without_scheme, url._without_scheme)
    assert fast(given).to_pylist() == slow(given).to_pylist()
    assert sum(u is not None and u.startswith("http") for u in given.to_pylist()) > 5000
    # A null may hide bytes that look like a URL.
    hidden = pa.Array.from_buffers(
        pa.string(), 1, [pa.py_buffer(b"\0"), *pa.array(["http://a.org"]).buffers()[1:]]
    )
    assert fast(hidden).to_pylist() == [None]
