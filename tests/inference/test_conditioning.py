"""The prefix of a prompt is that of a training document with the same values."""

from __future__ import annotations

import pyarrow as pa
import pytest

from megatron_meco.data.template import (
    SYNTAX,
    PrefixText,
    Template,
    Token,
    in_current_syntax,
)
from megatron_meco.errors import FlagError
from megatron_meco.inference.conditioning import Conditioning, parse_metadata

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


@pytest.mark.parametrize("template", ["{token:s}", "{token:s}[[Topic: {topic}]]"])
def test_a_prefix_without_any_value_can_be_asked_for(template: str) -> None:
    conditioning = Conditioning.of_run(template, None)
    assert conditioning.prefix_of(None) == "s"
    assert conditioning.prefix_of({}) == ""
    assert parse_metadata([["empty"], ["none"], ["empty"], ["topic=a"]]) == [
        *({}, None, {"topic": "a"}),
    ]
    with pytest.raises(FlagError, match="cannot read 'empty topic=a'"):
        parse_metadata([["empty", "topic=a"]])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{topic}", "no value for the field 'topic'"),
        ("[[{topic}]]", "no value leaves an empty value"),
        ("", "no value, but this model was trained without metadata"),
    ],
)
def test_a_prefix_without_any_value_where_there_is_none(template: str, message: str) -> None:
    with pytest.raises(FlagError, match=message):
        Conditioning.of_run(template, None).prefix_of(None)


def test_a_template_without_fields_says_how_to_ask_for_it() -> None:
    with pytest.raises(FlagError, match="uses none: give `--metadata empty`"):
        Conditioning.of_run("{token:s}", None).render({"url": URL})


OLD = ["[[{topic}]] ", "{topic}]]]x[[[[", r"\\[[\n{topic}", "a[b]{{[[{{{topic|default=[[x]]}}}"]


@pytest.mark.parametrize("template", OLD)
def test_a_template_of_the_first_syntax_keeps_its_meaning(template: str) -> None:
    """In it, brackets were text."""
    written = in_current_syntax(template, 1)
    assert written is not None
    # As the first syntax was read: braces, escapes, nothing else.
    expected = template.replace("{topic|default=[[x]]}", "V").replace("{topic}", "V")
    for escape, text in (("{{", "{"), ("}}", "}"), (r"\\", "\0"), (r"\n", "\n"), ("\0", "\\")):
        expected = expected.replace(escape, text)
    assert Conditioning.of_run(written, None).render({"topic": "V"}) == expected
    assert in_current_syntax(written, SYNTAX) == written


@pytest.mark.parametrize(
    ("more", "prefix"),
    [
        ({}, "V"),
        ({"run_fingerprint": None}, "[[V]]"),
        ({"run_fingerprint": {"template": "[[{topic}]]"}}, "[[V]]"),
        ({"run_fingerprint": {"pad_documents_to": 1}}, "V"),
        ({"run_fingerprint": {"template_syntax": 2}}, "V"),
        ({"run_fingerprint": None, "template_syntax": 2}, "V"),
        ({"template_syntax": 1}, "[[V]]"),
    ],
)
def test_cards_of_models_from_before_there_were_groups(
    more: dict[str, object], prefix: str
) -> None:
    card = {"template": "[[{topic}]]", "fields": ["topic"], **more}
    assert Conditioning.from_card(card).render({"topic": "V"}) == prefix


def test_a_field_whose_name_is_that_of_a_special_token_now() -> None:
    card = {"template": "{token:a}", "fields": ["token:a"], "template_syntax": 1}
    with pytest.raises(FlagError, match=r"names a field.*Rename the field"):
        Conditioning.from_card(card)
    del card["template_syntax"]
    for broken in ({"template_syntax": "2"}, {"run_fingerprint": [1]}):
        with pytest.raises(TypeError):
            Conditioning.from_card({**card, **broken})
