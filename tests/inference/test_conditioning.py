"""A prefix for one prompt is the prefix that a document with these values had."""

from __future__ import annotations

import pyarrow as pa
import pytest

from megatron_meco.data.template import PrefixText, Template, Token
from megatron_meco.errors import FlagError
from megatron_meco.inference.conditioning import Conditioning

URL = "https://en.wikipedia.org/wiki/Llama"


def test_the_prefix_of_training() -> None:
    template = r"URL: {url.host}\n\n"
    document = pa.table({"url": [URL], "topic": ["animals"]})
    trained = Template.parse(template).render(document, "here")[0].as_py()
    conditioning = Conditioning.of_run(template, document.column_names)
    assert conditioning.columns == ("url",)
    assert conditioning.render({"url": URL}) == trained == "URL: en.wikipedia.org\n\n"
    assert (
        conditioning.render({"url": "www.factquizmaster.com"}) == "URL: www.factquizmaster.com\n\n"
    )


@pytest.mark.parametrize(
    ("template", "columns", "fields"),
    [
        ("{url}{url.host}{topic}", None, ("topic", "url")),
        ("{meta.url.host}", None, ("meta.url",)),
        # Only the metadata file can tell a nested field from a transform.
        ("{source.domain}", None, ("source",)),
        ("{source.domain}", ["source.domain", "url"], ("source.domain",)),
    ],
)
def test_fields_of_a_template(
    template: str, columns: list[str] | None, fields: tuple[str, ...]
) -> None:
    assert Conditioning.of_run(template, columns).columns == fields


def test_several_fields_and_stand_ins() -> None:
    conditioning = Conditioning.of_run(r"{topic|default=none} {url.suffix}\n", None)
    assert conditioning.required() == ("url",)
    assert conditioning.render({"url": URL}) == "none org\n"
    assert conditioning.render({"url": URL, "topic": "animals"}) == "animals org\n"


def test_a_given_value_counts_as_frequent() -> None:
    conditioning = Conditioning.of_run("{url.host|top=1%} ", None)
    assert conditioning.render({"url": URL}) == "en.wikipedia.org "


def test_it_comes_back_from_the_card() -> None:
    conditioning = Conditioning.of_run("{url} ", None)
    card = {"template": conditioning.template, "fields": list(conditioning.columns)}
    assert Conditioning.from_card(card) == conditioning


@pytest.mark.parametrize(
    ("template", "values", "message"),
    [
        ("{url.host} ", {"topic": "x"}, r"unknown field 'topic'.*uses: url\."),
        ("{url.host} {topic} ", {"url": URL}, r"no value for the field 'topic'.*topic, url"),
        ("{url.host} ", {"url": ""}, "leaves an empty value"),
        ("", {"url": URL}, "trained without metadata"),
    ],
)
def test_refusals(template: str, values: dict[str, str], message: str) -> None:
    with pytest.raises(FlagError, match=message):
        Conditioning.of_run(template, None).render(values)


def test_what_a_run_draws_is_left_out() -> None:
    conditioning = Conditioning.of_run("{url.host|keep=0}{topic|shuffled}", None)
    assert conditioning.render({"url": URL, "topic": "a"}) == "en.wikipedia.orga"


def test_fields_in_groups_may_be_missing() -> None:
    conditioning = Conditioning.of_run(r"[[Topic: {topic}\n]]{url.suffix}", None)
    assert conditioning.columns == ("topic", "url")
    assert conditioning.required() == ("url",)
    assert conditioning.render({"url": URL}) == "org"
    assert conditioning.render({"url": URL, "topic": "a"}) == "Topic: a\norg"


def test_special_tokens_are_told_from_text() -> None:
    conditioning = Conditioning.of_run("{token:<|a|>}{topic}{token:b}", None)
    prefix = conditioning.render({"topic": "<|a|>"})
    assert prefix == "<|a|><|a|>b"
    assert prefix.segments == (Token("<|a|>"), "<|a|>", Token("b"))
    alone = Conditioning.of_run("{token:s}", None).render({})
    assert (alone, alone.segments) == ("s", PrefixText([Token("s")]).segments)
