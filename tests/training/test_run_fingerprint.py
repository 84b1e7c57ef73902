"""What is told when a run goes on with other samples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from megatron_meco.config import FINGERPRINT_KEYS, add_meco_arguments
from megatron_meco.data.phases import Schedule
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
        (
            {"meco": True},
            {"meco": True, "suffix_template": "{a}", "suffix_loss": True},
            {"suffix_template": ("", "{a}")},
        ),
        (
            {"meco": True, "suffix_template": "{a}", "suffix_loss": False},
            {"meco": True},
            {"suffix_template": ("{a}", ""), "suffix_loss": (False, True)},
        ),
    ],
)
def test_differences(before: dict[str, Any], now: dict[str, Any], changed: dict[str, Any]) -> None:
    assert differences(before, now) == changed


def test_suffixes_are_in_the_fingerprint_of_runs_that_have_them(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    from megatron_meco.corpus.tokenizer import build_tokenizer

    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tokenizer_folder))
    for suffix in (".bin", ".idx", ".metadata.arrow"):
        (tmp_path / f"c{suffix}").write_bytes(suffix.encode())

    def of_run(*flags: str) -> dict[str, Any]:
        args = add_meco_arguments(argparse.ArgumentParser()).parse_args(flags)
        vars(args).update(seq_length=64, seed=1, split="1,0,0")
        schedule = Schedule(num_iterations=9, num_samples=9, switch_iteration=8, switch_sample=8)
        blend = ([str(tmp_path / "c")], None)
        return run_fingerprint.fingerprint(args, schedule, blend, None, tokenizer)

    plain, baseline = of_run(), of_run("--meco-template=")
    assert {*FINGERPRINT_KEYS, "packing_rule"} - plain.keys() == {
        *("suffix_template", "suffix_loss", "repeat_every")
    }
    repeated = of_run("--meco-repeat-every", "100")
    assert differences(plain, repeated) == {"repeat_every": (None, 100)}
    with_suffix = of_run("--meco-suffix-template", "{token:<|end_of_text|>}{url}")
    assert differences(plain, with_suffix).keys() == {"suffix_template", "tokenizer"}
    alone = of_run("--meco-template=", "--meco-suffix-template={url}")
    # A run with suffixes alone reads the metadata, too.
    assert differences(baseline, alone).keys() == {"suffix_template", "corpora"}
    out = of_run("--meco-template=", "--meco-suffix-template={url}", "--meco-suffix-loss", "0")
    assert differences(alone, out) == {"suffix_loss": (True, False)}


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
