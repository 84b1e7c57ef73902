"""Draw the README's picture of a pack: `python docs/draw_pack.py` writes docs/pack.png.

Nothing in the picture is made up: four short documents with URLs are written as a Megatron corpus,
and everything drawn is read from the samples that `MeCoGPTDataset` makes of them, once for the
conditioned phase and once for the cooldown. Costs the import of Megatron. Given up: a real
tokenizer; words are easier to read than pieces of words.
"""

from __future__ import annotations

import argparse
import io
import logging
import re
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from PIL import Image

from megatron_meco.config import CONDITIONED, COOLDOWN, MeCoConfig
from megatron_meco.data.dataset import MeCoGPTDataset, MeCoGPTDatasetConfig

BOS, EOD = 0, 1
SEQUENCE_LENGTH = 46
TEMPLATE = r"URL: {url.host}\n\n"
PAGES = (
    ("https://en.wikipedia.org/wiki/Llama", "The llama is a domesticated camelid ."),
    ("https://docs.python.org/3/library/heapq.html", "A heap is a binary tree ."),
    ("https://pytorch.org/docs/stable/nn.html", "Applies a linear map to its input ."),
    (
        "https://gutenberg.org/ebooks/2701",
        "Call me Ishmael . Some years ago , never mind how long precisely , having little or no "
        "money in my purse",
    ),
)
# Brings the pages into this order, the one that gets cut last.
SEED = 4

KINDS = {"BOS": "#d1d5db", "prefix": "#fdba74", "body": "#bfdbfe", "EOD": "#c4b5fd"}
CUT, TRAINED, UNTRAINED = "#fee2e2", "#16a34a", "#f3f4f6"
INK, FAINT = "#1f2937", "#6b7280"
FONT = 7.2

# Sizes of the drawing, in cells: a cell is one token wide.
LABELS, GHOSTS = 5.8, 3
TOKEN_HEIGHT, ROW, ATTENTION_HEIGHT = 5.9, 1.15, 6.6
WIDTH = LABELS + SEQUENCE_LENGTH + GHOSTS + 1.2
TOP, PANEL_HEIGHT = 3.2, 19.0


class WordTokenizer:
    """Words and line ends as tokens, with what Megatron's datasets ask of a tokenizer."""

    eod, bos = EOD, BOS

    def __init__(self, texts: list[str]) -> None:
        words = dict.fromkeys(word for text in texts for word in self._split(text))
        self._words = ["BOS", "EOD", *words]
        self._ids = {word: i for i, word in enumerate(self._words)}

    @property
    def unique_identifiers(self) -> dict[str, object]:
        """What names the tokenizer in caches."""
        return {"class": type(self).__name__, "words": self._words}

    @property
    def vocab_size(self) -> int:
        """Number of words."""
        return len(self._words)

    @property
    def pad(self) -> int:
        """There is no padding token."""
        raise NotImplementedError

    @property
    def _tokenizer(self) -> WordTokenizer:
        return self

    @staticmethod
    def _split(text: str) -> list[str]:
        return re.findall(r"\n+|\S+", text)

    def tokenize(self, text: str) -> list[int]:
        """Token ids; words that were not in the texts are passed over."""
        return [self._ids[word] for word in self._split(text) if word in self._ids]

    def detokenize(self, ids: list[int]) -> str:
        """Words with spaces between."""
        return " ".join(self._words[i] for i in ids)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A sample, and what each of its tokens is.

    Attributes:
        words: Text of each token.
        kinds: Kind of each token, a key of `KINDS`.
        position_ids: As the model gets them.
        loss_mask: As the loss gets it; entry t governs predicting token t + 1.
        bounds: Where documents begin, and the end of the last.
        discarded: Words that a cut left out.
    """

    words: list[str]
    kinds: list[str]
    position_ids: list[int]
    loss_mask: list[int]
    bounds: list[int]
    discarded: list[str]


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).with_name("pack.png")
    parser.add_argument("--output", type=Path, default=default, help="the PNG to write")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = WordTokenizer([text for _, text in PAGES] + [_prefix(url) for url, _ in PAGES])
        corpus = write_corpus(Path(folder, "pages"), tokenizer)
        packs = {phase: read_pack(corpus, tokenizer, phase) for phase in (CONDITIONED, COOLDOWN)}
    draw(packs, args.output)
    print(f"written to {args.output} ({args.output.stat().st_size / 1e3:.0f} kB)")


def write_corpus(prefix: Path, tokenizer: WordTokenizer) -> str:
    """Write the pages as Megatron files and metadata, as `meco prepare` does."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _, text in PAGES:
        body = np.array([*tokenizer.tokenize(text), EOD])
        builder.add_document(body, [len(body)])
    builder.finalize(f"{prefix}.idx")
    table = pa.table({"url": pa.array([url for url, _ in PAGES], pa.string())})
    with pa.ipc.new_file(f"{prefix}.metadata.arrow", table.schema) as writer:
        writer.write_table(table)
    return str(prefix)


def read_pack(corpus: str, tokenizer: WordTokenizer, phase: str) -> Pack:
    """Get the first sample of a phase and name its tokens."""
    config = MeCoGPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQUENCE_LENGTH,
        blend=([corpus], None),
        split="1,0,0",
        path_to_cache=f"{corpus}-cache",
        tokenizer=tokenizer,
        meco=MeCoConfig(template=TEMPLATE),
        phase=phase,
    )
    indices = np.arange(len(PAGES), dtype=np.int32)
    dataset = MeCoGPTDataset(IndexedDataset(corpus), corpus, indices, 1, Split.train, config)
    sample = dataset[0]
    kinds: list[str] = []
    discarded: list[str] = []
    for piece in dataset.documents_of(0):
        whole = [*PAGES[piece["document"]][1].split(), "EOD"]
        discarded = whole[piece["body_end"] :]
        body = ["body"] * (piece["body_end"] - piece["body_begin"])
        kinds += ["BOS", *["prefix"] * piece["prefix_tokens"], *body]
        if not discarded:
            kinds[-1] = "EOD"
    tokens = sample["tokens"].tolist()
    assert len(kinds) == len(tokens), "the pages should fill the pack"
    return Pack(
        words=[tokenizer.detokenize([token]) for token in tokens],
        kinds=kinds,
        position_ids=sample["position_ids"].tolist(),
        loss_mask=sample["loss_mask"].int().tolist(),
        bounds=np.unique(sample["cu_seqlens"]).tolist(),
        discarded=discarded,
    )


def _prefix(url: str) -> str:
    return f"URL: {url.split('/')[2]}\n\n"


# ---- The drawing ----


def draw(packs: dict[str, Pack], output: Path) -> None:
    """Draw the packs, one panel each, with a legend on top."""
    # Comes with matplotlib, so the picture is the same everywhere.
    mpl.rcParams["font.family"] = "DejaVu Sans"
    height = TOP + 2 * PANEL_HEIGHT - 0.4
    inches = 9.375
    figure = Figure(figsize=(inches, inches * height / WIDTH))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0), aspect="equal")
    axes.axis("off")
    # A panel of its own colour, so that the picture also stands on a dark page.
    shape = "round,pad=0,rounding_size=0.8"
    panel = FancyBboxPatch((0.3, 0.3), WIDTH - 0.6, height - 0.6, boxstyle=shape)
    panel.set(facecolor="white", edgecolor="#d1d5db", linewidth=0.8)
    axes.add_patch(panel)
    draw_legend(axes, 1.3)
    titles = {
        CONDITIONED: "Conditioned phase (the first 90 % of the iterations)",
        COOLDOWN: "Cooldown (the last 10 %): no prefixes",
    }
    for number, (phase, pack) in enumerate(packs.items()):
        draw_pack(axes, pack, titles[phase], TOP + number * PANEL_HEIGHT)
    draw_notes(axes, TOP)
    save(figure, output)


def save(figure: Figure, output: Path) -> None:
    """Write the file: a small PNG, twice as fine as the README shows it."""
    full = io.BytesIO()
    figure.savefig(full, format="png", dpi=192, transparent=True)
    # A palette serves as well, and a picture in the repository is fetched with every clone.
    image = Image.open(full).quantize(256, method=Image.Quantize.FASTOCTREE)
    image.save(output, format="png", optimize=True)


def draw_legend(axes: Axes, y: float) -> None:
    """Draw what the colours mean."""
    x = LABELS
    entries = {**KINDS, "cut away": CUT, "in the loss": TRAINED}
    for name, colour in entries.items():
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour))
        _text(axes, x + 1.35, y + 0.5, name, size=FONT + 0.8)
        x += 3.3 + 0.52 * len(name)


def draw_pack(axes: Axes, pack: Pack, title: str, y: float) -> None:
    """Draw one pack: its tokens and, under each, its position, its loss and what attends to it."""
    _text(axes, LABELS, y + 0.6, title, size=FONT + 2, weight="bold")
    y += 1.7
    top = y
    draw_tokens(axes, pack, y)
    y += TOKEN_HEIGHT + 0.3
    draw_positions(axes, pack, y)
    y += ROW + 0.2
    draw_loss(axes, pack, y)
    bottom = y + ROW
    draw_attention(axes, pack, bottom + 0.35)
    for begin in pack.bounds[1:-1]:
        x = LABELS + begin
        axes.plot([x, x], [top - 0.2, bottom + 0.2], color=INK, linewidth=1.0)


def draw_tokens(axes: Axes, pack: Pack, y: float) -> None:
    """Draw the tokens, and how a cut document would go on."""
    _label(axes, "tokens", y + TOKEN_HEIGHT / 2)
    for t, (word, kind) in enumerate(zip(pack.words, pack.kinds, strict=True)):
        _cell(axes, t, y, TOKEN_HEIGHT, KINDS[kind])
        weight = "bold" if kind in ("BOS", "EOD") else "normal"
        _vertical(axes, t, y, word.replace("\n", "\\n"), INK, weight)
    discarded = [*pack.discarded[: GHOSTS - 1], "..."]
    for t, word in enumerate(discarded, start=len(pack.words)):
        _cell(axes, t, y, TOKEN_HEIGHT, CUT)
        _vertical(axes, t, y, word, "#b91c1c", "normal")


def draw_positions(axes: Axes, pack: Pack, y: float) -> None:
    """Draw the positions, which start again at each document."""
    _label(axes, "position_ids", y + ROW / 2)
    for t, position in enumerate(pack.position_ids):
        weight = "normal" if position else "bold"
        _centered(axes, t, y, str(position), INK, weight)


def draw_loss(axes: Axes, pack: Pack, y: float) -> None:
    """Draw the loss mask."""
    _label(axes, "loss_mask", y + ROW / 2)
    for t, trained in enumerate(pack.loss_mask):
        _cell(axes, t, y, ROW, TRAINED if trained else UNTRAINED)
        _centered(axes, t, y, str(trained), "white" if trained else FAINT)


def draw_attention(axes: Axes, pack: Pack, y: float) -> None:
    """Draw which tokens (columns) each token (row) attends to."""
    _label(axes, "attention", y + ATTENTION_HEIGHT / 2)
    row = ATTENTION_HEIGHT / len(pack.words)
    field = Rectangle((LABELS, y), len(pack.words), ATTENTION_HEIGHT, facecolor="#f9fafb")
    axes.add_patch(field)
    for begin, end in pairwise(pack.bounds):
        for t in range(begin, end):
            # Token t is seen by itself and by what follows in its document.
            height = (end - t) * row
            colour = KINDS[pack.kinds[t]]
            axes.add_patch(Rectangle((LABELS + t, y + t * row), 1, height, facecolor=colour))


def draw_notes(axes: Axes, y: float) -> None:
    """Say what cannot be seen at once, in the empty corners of the attention."""
    y += 1.7 + TOKEN_HEIGHT + 2 * ROW + 0.85
    right = LABELS + SEQUENCE_LENGTH - 0.5
    notes = (
        "loss_mask[t] governs the prediction of token t + 1:",
        "the last token of a prefix predicts the first of the body, and is trained;",
        "the last token of a document predicts nothing.",
    )
    for number, note in enumerate(notes):
        _text(axes, right, y + 0.75 + number, note, align="right", colour=FAINT)
    low = y + ATTENTION_HEIGHT - 0.7
    left = LABELS + 0.5
    _text(axes, left, low - 1, "A token (row) attends to its own document", colour=FAINT)
    _text(axes, left, low, "alone, prefix included (columns).", colour=FAINT)
    y += PANEL_HEIGHT
    note = "The same documents, to compare; in a run the two phases share none."
    _text(axes, right, y + 0.75, note, align="right", colour=FAINT)


def _text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float = FONT,
    weight: str = "normal",
    align: str = "left",
    colour: str = INK,
) -> None:
    axes.text(x, y, text, ha=align, va="center", color=colour, fontsize=size, weight=weight)


def _label(axes: Axes, text: str, y: float) -> None:
    _text(axes, LABELS - 0.4, y, text, align="right")


def _cell(axes: Axes, t: float, y: float, height: float, colour: str) -> None:
    cell = Rectangle((LABELS + t, y), 1, height)
    cell.set(facecolor=colour, edgecolor="white", linewidth=0.6)
    axes.add_patch(cell)


def _centered(axes: Axes, t: int, y: float, text: str, colour: str, weight: str = "normal") -> None:
    x = LABELS + t + 0.5
    _text(axes, x, y + ROW / 2, text, size=FONT - 0.8, weight=weight, align="center", colour=colour)


def _vertical(axes: Axes, t: int, y: float, text: str, colour: str, weight: str) -> None:
    x, bottom = LABELS + t + 0.54, y + TOKEN_HEIGHT - 0.25
    axes.text(
        x, bottom, text, rotation=90, ha="center", va="bottom", fontsize=FONT, color=colour
    ).set_weight(weight)


if __name__ == "__main__":
    main()
