"""`meco show`: its numbers against slow counts, its refusals, and its page in a real browser."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import prepare_pages, write_tokenizer

from megatron_meco.cli import main
from megatron_meco.errors import FlagError
from megatron_meco.show.curves import curves_report
from megatron_meco.show.page import render_page, write_page

LENGTH = 64
TEMPLATE = r"URL: {url.host}\n\n"
LOG = """\
> MeCo: iterations 1 to 9 conditioned, 10 to 10 cooldown
 [2026-01-01 00:00:00] iteration        5/      10 | consumed samples:           20 | elapsed time per iteration (ms): 12.0 | learning rate: 1.0E-03 | global batch size:     4 | lm loss: 5.5E+00 | loss scale: 1.0 | number of skipped iterations:   0 | number of nan iterations:   0 |
 validation loss at iteration 5 | lm loss conditioned value: 5.0E+00 | lm loss conditioned PPL: 1.5E+02 | lm loss plain value: 5.2E+00 | lm loss plain PPL: 1.8E+02 | lm loss shuffled value: 5.1E+00 | lm loss shuffled PPL: 1.6E+02 | lm loss shuffled minus conditioned value: 2.0E-01 | lm loss shuffled minus conditioned PPL: 1.2E+00 |
 [2026-01-01 00:00:00] iteration       10/      10 | consumed samples:           40 | elapsed time per iteration (ms): 12.0 | learning rate: 1.0E-03 | global batch size:     4 | lm loss: 4.5E+00 | loss scale: 1.0 | number of skipped iterations:   0 | number of nan iterations:   0 |
"""  # noqa: E501


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 prepared pages of three hosts, a tokenizer and an exported model of random weights."""
    from inference.synthetic import random_tensors, run_args, write_checkpoint

    from megatron_meco.inference.export import export

    folder = tmp_path_factory.mktemp("show")
    tokenizer = write_tokenizer(folder / "tokenizer")
    prepare_pages(folder, tokenizer)
    args = run_args(tokenizer, max_position_embeddings=LENGTH, seq_length=LENGTH)
    write_checkpoint(folder / "checkpoint", args, random_tensors(args))
    export(folder / "checkpoint", folder / "model")
    (folder / "run.log").write_text(LOG)
    return folder


def flags(folder: Path) -> list[str]:
    return [
        *f"--data-path {folder}/pages --tokenizer-type HuggingFaceTokenizer".split(),
        *f"--tokenizer-model {folder}/tokenizer --seq-length {LENGTH} --split 80,20,0".split(),
        *[
            "--train-iters",
            "10",
            "--global-batch-size",
            "4",
            "--eval-iters",
            "3",
            "--eval-interval",
            "5",
        ],
        *["--meco-template", TEMPLATE],
    ]


def show_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["show", *words, "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_a_corpus_is_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    [facts] = show_json(capsys, str(folder / "pages"))["corpora"]
    corpus = IndexedDataset(str(folder / "pages"))
    lengths = [len(corpus[i]) for i in range(len(corpus))]
    assert (facts["documents"], facts["tokens"]) == (len(lengths), sum(lengths))
    for found in facts["lengths"]:
        members = [n for n in lengths if found["from"] <= n < found["to"]]
        assert (found["documents"], found["tokens"]) == (len(members), sum(members))
    assert sum(found["documents"] for found in facts["lengths"]) == len(lengths)
    urls = [json.loads(line)["url"] for line in (folder / "pages.jsonl").read_text().splitlines()]
    documents, tokens = Counter[str](), Counter[str]()
    for url, length in zip(urls, lengths, strict=True):
        host = url.split("/")[2]
        documents[host] += 1
        tokens[host] += length
    [field] = facts["fields"]
    assert (field["by"], field["distinct"], field["documents_without"]) == ("host", 3, 0)
    assert [(v["value"], v["documents"], v["tokens"]) for v in field["values"]] == [
        (host, documents[host], tokens[host]) for host, _ in tokens.most_common()
    ]


def test_the_packs_around_the_switch_are_those_of_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = show_json(capsys, *flags(folder), "--packs", "6")["packs"]
    assert report["switch_sample"] == 36
    assert [pack["sample"] for pack in report["packs"]] == [33, 34, 35, 36, 37, 38]
    for pack in report["packs"]:
        main(["inspect", *flags(folder), "--sample", str(pack["sample"]), "--json"])
        sample = json.loads(capsys.readouterr().out)
        assert (pack["tokens"], pack["positions"]) == (sample["tokens"], sample["position_ids"])
        assert [int(bit) for bit in pack["in_loss"]] == sample["loss_mask"]
        assert pack["phase"] == sample["phase"]
        assert ("p" in pack["kinds"]) == (pack["phase"] == "conditioned")
        for document in pack["documents"]:
            kinds = pack["kinds"][document["begin"] : document["end"]]
            assert kinds.startswith("b") and kinds.lstrip("b").lstrip("p").strip("t") == ""
            text = "".join(
                report["vocabulary"][str(token)]
                for token, kind in zip(pack["tokens"][document["begin"] :], kinds, strict=False)
                if kind == "p"
            )
            assert text == (document["prefix"] or "")


def test_packs_around_both_switches_of_a_run_that_starts_plain(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*flags(folder), "--meco-start-iteration", "2", "--packs", "4"]
    facts = show_json(capsys, *words)
    report = facts["packs"]
    assert (report["start_sample"], report["switch_sample"]) == (8, 36)
    assert [(pack["sample"], pack["phase"]) for pack in report["packs"]] == [
        *((6, "plain"), (7, "plain"), (8, "conditioned"), (9, "conditioned")),
        *((34, "conditioned"), (35, "conditioned"), (36, "cooldown"), (37, "cooldown")),
    ]
    for pack in report["packs"]:
        assert ("p" in pack["kinds"]) == (pack["phase"] == "conditioned")
    assert list(facts["plan"]["phases"]) == ["plain", "conditioned", "cooldown"]
    # Switches that are closer than the samples around them: each sample once.
    close = [*flags(folder), "--meco-start-iteration", "8", "--packs", "12"]
    samples = [pack["sample"] for pack in show_json(capsys, *close)["packs"]["packs"]]
    assert samples == list(range(26, 40))


def test_suffixes_are_told_from_bodies(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*flags(folder), "--meco-suffix-template", ";{url.host}", "--meco-packing", "split"]
    report = show_json(capsys, *given, "--packs", "6")["packs"]
    found = 0
    for pack in report["packs"]:
        texts = [report["vocabulary"][str(token)] for token in pack["tokens"]]
        for document in pack["documents"]:
            span = range(document["begin"], document["end"])
            suffix = [at for at in span if pack["kinds"][at] == "s"]
            found += len(suffix)
            body = "".join(texts[at] for at in span if pack["kinds"][at] == "t")
            assert document["text"] == body
            if suffix:
                assert document["suffix"] == "".join(texts[at] for at in suffix)
                assert pack["kinds"][suffix[-1] + 1] == "t"
                assert texts[suffix[0]] == ";"
                assert pack["phase"] == "conditioned"
    assert found > 0


def test_models_are_asked_about_held_out_texts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*flags(folder), "--model", f"random={folder}/model", "--texts", "3"]
    facts = show_json(capsys, *words, "--max-new-tokens", "4", "--prompt", "the", "--prompt", "fox")
    [matrix] = facts["matrices"]
    size = len(matrix["sources"])
    assert matrix["name"] == "random" and 2 <= size <= 3
    assert all(source.startswith("URL: ") for source in matrix["sources"])
    assert [len(row) for row in matrix["loss"]] == [size + 1] * size
    # The weights are random: each token costs about the logarithm of the vocabulary's size.
    assert all(4 < loss < 8 for row in matrix["loss"] for loss in row)
    value = matrix["wrong_minus_right"]
    assert value["texts"] == sum(matrix["texts"]) and value["stderr"] > 0
    if len(set(matrix["texts"])) == 1:
        rows = [
            sum(x for c, x in enumerate(row[:-1]) if c != r) / (size - 1) - row[r]
            for r, row in enumerate(matrix["loss"])
        ]
        assert value["mean"] == pytest.approx(sum(rows) / size)
    assert [(row["model"], row["prompt"]) for row in facts["generations"]] == [
        ("random", "the"),
        ("random", "fox"),
    ]
    assert [c["prefix"] for c in facts["generations"][0]["columns"]] == ["", *matrix["sources"]]


def test_the_losses_of_a_log(folder: Path) -> None:
    report = curves_report("a", folder / "run.log")
    assert (report["switch"], report["start"]) == (9, None)
    assert report["steps"] == {"iteration": [5, 10], "loss": [5.5, 4.5]}
    [validation] = report["validations"]
    assert validation["losses"] == {
        "conditioned": 5.0,
        "plain": 5.2,
        "shuffled": 5.1,
        "shuffled minus conditioned": 0.2,
    }


def test_both_switches_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.write_text(LOG.replace("iterations 1 to 9", "iterations 1 to 4 plain, 5 to 9"))
    report = curves_report("a", path)
    assert (report["switch"], report["start"]) == (9, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to show"),
        (["{folder}/nothing.yaml"], "nothing.yaml"),
        (["{folder}"], "no folder of a run"),
        (["--log", "{folder}/gone.log"], "gone.log: no such file"),
        (["--log", "/dev/null"], "/dev/null: is not a plain file. Name"),
        (["--log", "{folder}/pages.jsonl"], "holds no training step"),
        (["{folder}/pages", "--model", "{folder}/model"], "--model: needs a run"),
        (["{folder}/pages", "-o", "{folder}"], "is a folder"),
        (["{folder}/pages", "-o", "{folder}/no/page.html"], "does not exist"),
        (["{folder}/pages", "-o", "{folder}/run.log"], "no page of `meco show`"),
        (["{folder}/pages", "--packs", "0"], "--packs"),
        (["{folder}/pages", "--sources", "1"], "--sources"),
    ],
)
def test_refusals(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "run.log").read_text()
    assert main(["show", *(word.format(folder=folder) for word in words)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("meco: error: ") and err.count("\n") == 1
    assert message in err
    assert (folder / "run.log").read_text() == before


def test_a_page_is_replaced_by_a_page(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["show", str(folder / "pages"), "-o", str(page)]) == 0
    assert main(["show", "--log", str(folder / "run.log"), "-o", str(page)]) == 0
    with pytest.raises(FlagError, match="cannot be written"):
        write_page(tmp_path / "gone" / "page.html", {"title": "x"})


def test_texts_cannot_leave_their_place() -> None:
    hostile = "</script><script>alert(1)</script><!--"
    page = render_page({"title": hostile, "version": "0", "corpora": []})
    assert hostile not in page and "alert(1)</script>" not in page


# ---- In a browser ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, without a window."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("Chromium is not installed (Debian: chromium, chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield session
    session.quit()


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    path = folder / "page.html"
    words = [*flags(folder), "--model", f"random={folder}/model", "--texts", "2"]
    words += ["--max-new-tokens", "4", "--prompt", "the", "--log", f"run={folder}/run.log"]
    assert main(["show", *words, "-o", str(path)]) == 0
    return path


def test_the_page_of_a_run_that_starts_plain(browser: Any, folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text(LOG.replace("iterations 1 to 9", "iterations 1 to 4 plain, 5 to 9"))
    words = [*flags(folder), "--meco-start-iteration", "2", "--log", f"run={log}"]
    assert main(["show", *words, "-o", str(tmp_path / "page.html")]) == 0
    open_page(browser, tmp_path / "page.html", 1000, "light")
    assert browser.get_log("browser") == []
    text = browser.execute_script("return document.body.textContent")
    for told in ("both switches", "Metadata begin after iteration 2, with sample 8."):
        assert told in text
    for chart, number in (("strips", 2), ("training", 2)):
        script = f"return document.querySelectorAll('#{chart} .shapelayer path').length"
        assert browser.execute_script(script) == number


def open_page(browser: Any, page: Path, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(page.as_uri())
    end = time.monotonic() + 60
    while browser.execute_script("return document.body.dataset.ready") != "yes":
        assert time.monotonic() < end, browser.get_log("browser")
        time.sleep(0.1)


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(browser: Any, page: Path, width: int, scheme: str) -> None:
    browser.get_log("performance")
    open_page(browser, page, width, scheme)
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert asked and all(url.startswith(("file:", "data:", "blob:")) for url in asked)

    def ask(script: str, *arguments: object) -> Any:
        return browser.execute_script(f"return {script}", *arguments)

    # Nothing is wider than the window; text stands out from its ground.
    assert ask("document.documentElement.scrollWidth") <= width
    sections = ask("[...document.querySelectorAll('section')].map((s) => s.id)")
    assert sections == ["generations", "matrix", "losses", "packs", "plan", "corpus-0"]
    ground = ask("getComputedStyle(document.body).backgroundColor")
    ink = ask("getComputedStyle(document.body).color")
    light = [sum(map(int, c[c.index("(") + 1 : -1].split(",")[:3])) for c in (ground, ink)]
    assert (light[0] > light[1] + 400) if scheme == "light" else (light[1] > light[0] + 400)
    # The slider chooses the sample.
    first = ask("document.getElementById('caption').textContent")
    assert "sample 28, conditioned" in first
    browser.execute_script(
        "const s = document.getElementById('sample'); s.value = s.max;"
        "s.dispatchEvent(new Event('input'))"
    )
    last = ask("document.getElementById('caption').textContent")
    assert "cooldown" in last and last != first
    # A token says what it is when it is pointed at.
    box = ask(
        "(() => { const e = document.querySelector('#strips .nsewdrag');"
        "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
        "return [b.left + 0.1 * b.width, b.top + 0.1 * b.height] })()"
    )
    for offset in (0, 3):
        where = {"type": "mouseMoved", "x": box[0] + offset, "y": box[1]}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", where)
        time.sleep(0.3)
    told = ask("[...document.querySelectorAll('#strips .hovertext')].map((e) => e.textContent)")
    assert told and "in the loss" in told[0] and "position" in told[0]
    png = base64.b64decode(
        browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    )
    assert len(png) > 10_000
