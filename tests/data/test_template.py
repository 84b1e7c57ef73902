"""Templates: parsing, rendering, refusals."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest

from megatron_meco.data.template import Draws, PrefixText, Template, Token
from megatron_meco.errors import DataError, FlagError
from tests.data.reference_template import frequent_values

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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a{url|topp=3}", r"unknown filter 'topp=3' at character 6 of .*Did you mean 'top'"),
        ("{a|default=x| keep=2}", r"keep cannot take '2' at character 14 .*keep=0\.5"),
        ("{a|keep}", "filter keep without its argument at character 3"),
        ("{a|keep=-0.1}", r"keep cannot take '-0\.1'"),
        ("{a|keep=1.5}", "keep cannot take"),
        ("{a|floor=1}", "floor takes no argument, here '1', at character 3"),
        ("{a|shuffled=yes}", "shuffled takes no argument"),
        ("{a|shufled}", "Did you mean 'shuffled'"),
        ("{a|bins=0}", "bins cannot take '0'"),
        ("{a|scale=1e3}", "scale cannot take '1e3'"),
        ("{a|top=3|keep=.5|top=2}", "top and min_documents apart from one another"),
        ("{token:}", "special token without a name at character 1"),
        ("[[a{b}", r"unbalanced '\[\[' at character 0"),
        ("{a}]]", r"unbalanced '\]\]' at character 3"),
        ("[[{a}[[{b}]]]]", "group inside a group at character 5"),
        ("{a}[[x]]", "names no field, so it would never disappear, at character 3"),
        ("[[{token:<s>}]]", "names no field"),
        ("[[[{a}]]", r"3 brackets in a row at character 0 .*Write \\\["),
        ("\\q{a}", r"unknown escape '\\q' at character 0"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(source: str, message: str) -> None:
    with pytest.raises(FlagError, match=message) as caught:
        Template.parse(source, "--meco-suffix-template")
    assert caught.value.where == "--meco-suffix-template"
    assert "\n" not in str(caught.value)


def test_groups_disappear_and_the_rest_stays() -> None:
    rows = render(
        r"[[Topic: {topic}\n]][[{score}/{topic} ]]{{[[[[x]]]]\[{url.host}\]",
        topic=["t", None, "", "t"],
        score=["1", "1", "1", None],
        url=["http://a.org"] * 4,
    )
    rest = "{[[x]][a.org]"
    assert rows == [f"Topic: t\n1/t {rest}", rest, rest, f"Topic: t\n{rest}"]


def test_a_document_whose_groups_all_disappear_is_plain() -> None:
    assert render("[[{a}]][[{b}]]", a=["x", None], b=[None, None]) == ["x", None]


def test_special_tokens_are_no_text_and_values_are_no_tokens() -> None:
    template = Template.parse("{token:<|a|>}T {topic}{token:b}{token:<|a|>}")
    table = pa.table({"topic": ["<|a|>", None, "\u00ff"]})
    rows = template.render(table, "x").to_pylist()
    assert rows[1] is None
    a, b = Token("<|a|>"), Token("b")
    assert template.segments(rows[0]) == [a, "T <|a|>", b, a]
    assert template.segments(rows[2]) == [a, "T \u00ff", b, a]
    assert template.tokens == ("<|a|>", "b")


def test_special_tokens_alone_need_no_field() -> None:
    template = Template.parse("{token:s1}{token:s2}")
    rows = template.render(pa.table({"url": ["u", None]}), "x").to_pylist()
    assert [template.segments(row) for row in rows] == [[Token("s1"), Token("s2")]] * 2


def test_prefix_texts_survive_pickling() -> None:
    text = PrefixText([Token("<s>"), "a"])
    again = pickle.loads(pickle.dumps(text))
    assert (again, again.segments) == ("<s>a", (Token("<s>"), "a"))


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ("scale=10|floor", ["2", "-3", "10", None]),
        ("scale=100|floor", ["29", "-30", "100", None]),
        ("scale=0.5", ["0.145", "-0.15", "0.5", None]),
        ("scale=0.07", ["0.0203", "-0.021", "0.07", None]),
        ("default=0|scale=3|floor", ["0", "-1", "3", "0"]),
        ("scale=10|precision=2", ["2.90", "-3.00", "10.00", None]),
    ],
)
def test_numbers_in_a_chain(chain: str, expected: list[str | None]) -> None:
    assert render(f"{{q|{chain}}}", q=["0.29", "-0.3", "1", None]) == expected


def test_bins_divide_the_numbers_from_0_to_1() -> None:
    scores = [f"{i / 100}" for i in range(101)]
    expected = [str(min(i // 10, 9)) for i in range(101)]
    assert render("{q|bins=10}", q=scores) == expected
    for text in ("1.01", "-0.001", "nan", "inf"):
        with pytest.raises(DataError, match=r"bins=10 cannot take .*from 0 to 1"):
            render("{q|bins=10}", q=[text])
    with pytest.raises(DataError, match="floor cannot take inf"):
        render("{q|floor}", q=["inf"])


def test_filters_of_before_work_in_the_order_of_before() -> None:
    assert render("{q|default=none|precision=1}", q=["1", None]) == ["1.0", "none"]
    assert render("{q|top=1|default=z}", q=["a", "z", None]) == ["unknown", "z", "z"]


def test_parts_of_iso_dates() -> None:
    dates = ["2024-03-05T10:00:00Z", "2024-03", "2024", "2024-13-01", "5.3.2024", "20240305"]
    assert render("{d.year}", d=dates) == ["2024", "2024", "2024", None, None, None]
    assert render("{d.month}", d=dates)[:3] == ["03", "03", None]
    assert render("{d.day}", d=dates)[:3] == ["05", None, None]


def draws(num_documents: int, seed: int = 3) -> Draws:
    names = [str(i) for i in range(num_documents)]
    return Draws(seed, pa.table({"a": names, "b": names}))


def test_keep_draws_by_document_field_and_seed_alone() -> None:
    drawn = draws(20_000)

    def kept(source: str, begin: int = 0, end: int = 20_000, drawn: Draws = drawn) -> list[bool]:
        batch = drawn.metadata.slice(begin, end - begin)
        rows = Template.parse(source).render(batch, "x", draws=drawn, first_document=begin)
        return rows.is_valid().to_pylist()

    half = kept("{a|keep=0.5}")
    assert 9_500 < sum(half) < 10_500
    assert kept("{a|keep=0.5}", 777, 900) == half[777:900]
    # A document that a smaller share keeps, a larger one keeps as well; other fields are apart.
    assert all(h or not q for h, q in zip(half, kept("{a|keep=0.25}"), strict=True))
    both = sum(x and y for x, y in zip(half, kept("{b|keep=0.5}"), strict=True))
    assert 4_600 < both < 5_400
    assert half != kept("{a|keep=0.5}", drawn=draws(20_000, seed=4))
    assert all(kept("{a|keep=1}")) and not any(kept("{a|keep=0}"))
    # Without draws, as at inference, the value stays.
    assert Template.parse("{a|keep=0}").render(drawn.metadata, "x")[7].as_py() == "7"


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_shuffled_gives_each_document_the_value_of_another(size: int) -> None:
    drawn = draws(size)
    rows = Template.parse("{a|shuffled} {b|shuffled}").render(drawn.metadata, "x", draws=drawn)
    pairs = [row.split() for row in rows.to_pylist()]
    assert all(a == b for a, b in pairs)  # one permutation for all fields
    assert sorted(int(a) for a, _ in pairs) == list(range(size))
    assert size == 1 or all(int(a) != i for i, (a, _) in enumerate(pairs))
    if size == 1000:
        order = draws(size, seed=4).partners(np.arange(size))
        assert order.tolist() != [int(a) for a, _ in pairs]
