"""Templates: parsing, rendering, refusals."""

from __future__ import annotations

import pyarrow as pa
import pytest

from megatron_meco.data.template import Template, frequent_values
from megatron_meco.errors import DataError, FlagError

URL = "https://user@En.Wikipedia.org:8080/wiki/Bill_Gates?x=1#y"


def render(source: str, **columns: list[str | None]) -> list[str | None]:
    table = pa.table({k: pa.array(v, pa.string()) for k, v in columns.items()})
    template = Template.parse(source)
    frequent = {
        p: frequent_values(p, _counts(template, p, table))
        for p in template.placeholders
        if p.frequency_filters
    }
    rendered: list[str | None] = template.render(table, "x.arrow", frequent).to_pylist()
    return rendered


def _counts(template: Template, placeholder: object, table: pa.Table) -> dict[str, int]:
    values = template.values(placeholder, table, "x.arrow").drop_null().to_pylist()  # type: ignore[arg-type]
    return {v: values.count(v) for v in values}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (r"URL: {url.host}\n\n", "URL: en.wikipedia.org\n\n"),
        ("{url.domain}", "wikipedia.org"),
        ("{url.suffix}", "org"),
        ("{url.raw}", URL),
        ("{{{url.suffix}}}", "{org}"),
        (r"a\\n\t{url.suffix}", "a\\n\torg"),
    ],
)
def test_the_papers_transforms(source: str, expected: str) -> None:
    assert render(source, url=[URL]) == [expected]


def test_a_url_alone_is_shown_without_its_scheme() -> None:
    url = "https://en.wikipedia.org/wiki/Bill_Gates"
    assert render("{url}", url=[url]) == ["en.wikipedia.org/wiki/Bill_Gates"]
    assert render("{url.full}", url=[url]) == ["en.wikipedia.org/wiki/Bill_Gates"]


def test_a_hashed_host_is_stable_and_hides_the_host() -> None:
    same = render("{url.hash}", url=["https://a.org/1", "http://a.org/2", "https://b.org"])
    assert same[0] == same[1] != same[2]
    assert "a.org" not in str(same[0])


def test_several_fields_and_a_missing_one() -> None:
    rows = render(
        r"Topic: {topic}\nURL: {url.host}\n\n",
        topic=["gates", None, "x", ""],
        url=["http://a.org", "http://a.org", None, "http://a.org"],
    )
    assert rows == ["Topic: gates\nURL: a.org\n\n", None, None, None]


def test_default_fills_a_gap() -> None:
    assert render("{topic|default=none}", topic=["a", None, ""]) == ["a", "none", "none"]


def test_precision_rounds_numbers() -> None:
    assert render("{q|precision=1}", q=["0.251", "3", None]) == ["0.3", "3.0", None]


def test_frequent_values_stay_and_the_rest_is_unknown() -> None:
    urls = ["http://a.org"] * 5 + ["http://b.org"] * 3 + ["http://c.org", "http://d.org", None]
    expected = ["a.org"] * 5 + ["b.org"] * 3
    assert render("{url.host|top=2}", url=urls) == [*expected, "unknown", "unknown", None]
    assert render("{url.host|top=50%}", url=urls) == [*expected, "unknown", "unknown", None]
    assert render("{url.host|min_documents=3}", url=urls)[8:] == ["unknown", "unknown", None]


def test_a_field_named_like_a_transform_is_found_first() -> None:
    table = {"meta.url": ["http://a.org/x"], "host": ["h"]}
    assert render("{meta.url.host} {meta.url} {host}", **table) == ["a.org a.org/x h"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{url.hots}", r"unknown transform 'hots'.*Did you mean 'host'"),
        ("{url|topp=3}", r"unknown filter 'topp=3'.*Did you mean 'top'"),
        ("{url|top=many}", "cannot take 'many'"),
        ("{url", "unbalanced '{'"),
        ("url}", "unbalanced '}'"),
        ("{}", "placeholder without a field"),
        ("no field", "names no field"),
        (r"\x{url}", r"unknown escape '\\x'"),
    ],
)
def test_what_cannot_be_read_is_refused(source: str, message: str) -> None:
    with pytest.raises(FlagError, match=message):
        render(source, url=[URL])


def test_a_field_that_is_not_there() -> None:
    with pytest.raises(DataError, match=r"no metadata field 'topic'.*\{topic\}.*It holds: url"):
        render("{topic}", url=[URL])


def test_precision_of_text_is_refused() -> None:
    with pytest.raises(DataError, match="needs numbers"):
        render("{q|precision=1}", q=["good"])


def test_an_empty_template_has_no_parts() -> None:
    assert Template.parse("").placeholders == ()


@pytest.mark.parametrize(
    "text",
    ["{q|precision=99999999999999999999}", "{q|precision=\u0663}", "{q|top=1e3}", "{q|top=9999%9}"],
)
def test_arguments_of_filters_are_plain_numbers_in_range(text: str) -> None:
    with pytest.raises(FlagError, match="cannot take"):
        Template.parse(text)
