"""What is told when a run goes on with other samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_meco.config import FINGERPRINT_KEYS
from megatron_meco.data.template import Template
from megatron_meco.errors import FlagError
from megatron_meco.training import run_fingerprint
from megatron_meco.training.run_fingerprint import differences


def values(**changes: Any) -> dict[str, Any]:
    return {**dict.fromkeys(FINGERPRINT_KEYS, 0), "meco": True, **changes}


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        (values(packing="truncate"), values(packing="truncate", packing_rule=1), {}),
        (
            values(packing="best-fit"),
            values(packing="best-fit", packing_rule=2),
            {"packing": ("best-fit (rule 1)", "best-fit (rule 2)")},
        ),
        (
            values(packing="best-fit"),
            values(packing="split", packing_rule=1, seed=3),
            {"packing": ("best-fit", "split"), "seed": (0, 3)},
        ),
        (
            values(packing="truncate", packing_rule=1),
            values(packing="best-fit", packing_rule=2),
            {"packing": ("truncate", "best-fit")},
        ),
        ({"meco": False}, values(packing="best-fit", packing_rule=2), {"meco": (False, True)}),
        ({"meco": False}, {"meco": False}, {}),
        # A checkpoint of before there was the flag, and its default.
        ({"meco": True}, {"meco": True, "pad_documents_to": 1}, {}),
        ({"meco": True}, {"meco": True, "pad_documents_to": 8}, {"pad_documents_to": (1, 8)}),
        # Templates of before brackets were groups: the same text may mean another prefix.
        *(
            (
                {"meco": True, "template": old},
                {"meco": True, "template": new, "template_syntax": 2},
                changed,
            )
            for old, new, changed in (
                (r"URL: {url.host}\n\n", r"URL: {url.host}\n\n", {}),
                ("[a] {{b}} {c|default=[[}", "[a] {{b}} {c|default=[[}", {}),
                ("{url}", "{topic}", {"template": ("{url}", "{topic}")}),
                ("[[{url}]]", "[[[[{url}]]]]", {}),
                ("[[[x{url}", r"\[\[\[x{url}", {}),
                (
                    "[[{url}]]",
                    "[[{url}]]",
                    {
                        "template": (
                            r"\[\[{url}\]\] (as that run's [[{url}]] is written today)",
                            "[[{url}]]",
                        )
                    },
                ),
                (
                    "[[[[{url}",
                    "[[[[{url}",
                    {
                        "template": (
                            r"\[\[\[\[{url} (as that run's [[[[{url} is written today)",
                            "[[[[{url}",
                        )
                    },
                ),
                (
                    "{token:a}{url}",
                    "{token:a}{url}",
                    {
                        "template": (
                            "{token:a}{url} (where {token:...} was a field)",
                            "{token:a}{url}",
                        )
                    },
                ),
            )
        ),
        # Of these two the second key says that brackets are groups already.
        (values(template="[[{url}]]"), values(template="[[{url}]]", template_syntax=2), {}),
        (
            {"meco": True, "template": "{token:a}", "template_syntax": 2},
            {"meco": True, "template": "{token:a}", "template_syntax": 2},
            {},
        ),
    ],
)
def test_differences(before: dict[str, Any], now: dict[str, Any], changed: dict[str, Any]) -> None:
    assert differences(before, now) == changed


def test_special_tokens_of_the_template_are_part_of_the_tokenizers_identity(
    tokenizer_folder: Path,
) -> None:
    from megatron_meco.corpus.tokenizer import build_tokenizer

    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tokenizer_folder))
    plain, special = (
        run_fingerprint._tokenizer(tokenizer, Template.parse(source))
        for source in ("{url}", "{token:<|end_of_text|>}{url}")
    )
    assert plain != special
    with pytest.raises(FlagError, match="no token '<s5>'"):
        run_fingerprint._tokenizer(tokenizer, Template.parse("{token:<s5>}"))
