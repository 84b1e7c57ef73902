"""Plans and samples with suffixes against the oracle: prefix x suffix x strategy x alignment."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from small_corpus import LetterTokenizer, random_bodies, write_corpus

from megatron_meco import _core
from megatron_meco.config import COOLDOWN, MeCoConfig, View
from megatron_meco.data.dataset import MeCoGPTDataset, MeCoGPTDatasetConfig
from megatron_meco.data.evaluation import FullEvaluation
from megatron_meco.data.packing import PlanRequest, build_plan, load_plan
from megatron_meco.data.phases import BatchSize, make_schedule
from megatron_meco.data.run_datasets import build_datasets
from megatron_meco.errors import DataError, FlagError
from megatron_meco.show.behaviour import held_out_sources

BOS, EOD, LENGTH = 0, 1, 24
VIEWS = ("conditioned", "plain", "shuffled")
STRATEGIES = ("truncate", "split", "best-fit")
Texts = list[list[int] | None]


def table_of(texts: Texts, kind: str) -> dict[str, Any]:
    """The arrays of `_core.Corpus` for the prefixes or suffixes of documents."""
    distinct = [list(t) for t in dict.fromkeys(tuple(t) for t in texts if t is not None)]
    return {
        f"{kind}_ids": np.array([-1 if t is None else distinct.index(t) for t in texts], np.int32),
        f"{kind}_tokens": np.array([i for text in distinct for i in text], np.int32),
        f"{kind}_offsets": np.cumsum([0, *map(len, distinct)], dtype=np.int64),
    }


class Packed:
    """A plan of a small corpus, its samples in all views, and the oracle's account of both."""

    def __init__(
        self,
        bodies: list[list[int]],
        prefixes: Texts | None,
        suffixes: Texts | None,
        *,
        strategy: str,
        bos: bool = True,
        align: int = 1,
        sentence: int | None = None,
        repeat_prefix: bool = True,
        max_documents: int = LENGTH,
        train_on_prefix: bool = False,
        train_on_suffix: bool = True,
        num_packs: int | None = None,
        every: int = 0,
    ) -> None:
        self.bodies, self.num_packs = bodies, num_packs
        self.prefixes: Texts = prefixes or [None] * len(bodies)
        self.suffixes: Texts = suffixes or [None] * len(bodies)
        self.strategy, self.bos, self.align = strategy, BOS if bos else None, align
        self.repeat_prefix, self.max_documents, self.every = repeat_prefix, max_documents, every
        self.trained = {"train_on_prefix": train_on_prefix, "train_on_suffix": train_on_suffix}
        # Sentences of `sentence` tokens, the last one shorter; EOD is in it, or alone.
        self.borders: list[list[int]] = [
            [*range(sentence, len(body), sentence), len(body)] if sentence else []
            for body in bodies
        ]
        parts = [b - a for ends in self.borders for a, b in pairwise([0, *ends])] or [
            len(body) for body in bodies
        ]
        self.corpus = _core.Corpus(
            sequence_lengths=np.array(parts, np.int32),
            document_indices=np.cumsum([0, *map(len, self.borders)], dtype=np.int64)
            if sentence
            else None,
            **(table_of(prefixes, "prefix") if prefixes is not None else {}),
            **(table_of(suffixes, "suffix") if suffixes is not None else {}),
            bos_id=BOS if bos else -1,
        )
        self.request = PlanRequest(
            strategy=strategy,
            capacity=LENGTH,
            max_documents=max_documents,
            num_packs=num_packs,
            first_document=0,
            num_documents=len(bodies),
            seed=3,
            repeat_prefix=repeat_prefix,
            repeat_every=every,
            alignment=align,
        )
        self.plan = build_plan(self.corpus, self.request, "c", num_threads=1)
        arrays = {k: v for k, v in vars(self.plan).items() if isinstance(v, np.ndarray)}
        self.assemblers = {
            view: _core.Assembler(
                corpus=self.corpus,
                **arrays,
                **{"capacity": LENGTH, "max_documents": max_documents, "alignment": align},
                **{"strategy": strategy, "repeat_prefix": repeat_prefix, "repeat_every": every},
                **{"pad_id": EOD, "view": view, **self.trained},
                bin=np.array([i for body in bodies for i in body], np.uint16).view(np.uint8),
                sequence_pointers=2 * np.cumsum([0, *parts[:-1]]),
                token_bytes=2,
            )
            for view in VIEWS
        }

    def pieces(self) -> list[list[tuple[int, int, int]]]:
        """The pieces of each pack: (document, body_begin, body_end)."""
        assembler = self.assemblers["conditioned"]
        return [
            [(p.document, p.body_begin, p.body_end) for p in assembler.pieces(pack)]
            for pack in range(len(self.plan))
        ]

    def oracle(self) -> list[reference.Pack]:
        """The packs as the oracle makes them; of best-fit those of the plan's own pieces."""
        visits = reference.document_order(
            len(self.bodies), (0, len(self.bodies)), 3, self.plan.counts.num_epochs + 1
        )
        if self.num_packs is None:
            visits = visits[: len(self.bodies)]
        more = {"align": self.align, "suffixes": self.suffixes, "every": self.every}
        if self.strategy == "truncate":
            packs, self.discarded = reference.truncate_packs(
                visits,
                self.bodies,
                self.prefixes,
                self.bos,
                LENGTH,
                self.num_packs,
                self.max_documents,
                **more,
            )
            return packs
        self.discarded = 0
        pieces = self.pieces()
        if self.strategy == "split":
            expected = reference.split_pieces(
                visits,
                self.bodies,
                self.prefixes,
                self.bos,
                LENGTH,
                self.num_packs,
                self.max_documents,
                self.repeat_prefix,
                self.borders,
                **more,
            )
            assert pieces == expected
        return [
            reference.pieces_to_pack(
                pack, self.bodies, self.prefixes, self.bos, self.repeat_prefix, **more
            )
            for pack in pieces
        ]

    def check(self) -> None:
        """The plan, its counts, and every sample in every view equal the oracle's."""
        packs = self.oracle()
        assert len(self.plan) == len(packs)
        self._check_counts([token for pack in packs for token in pack.tokens])
        if self.strategy != "truncate" and self.num_packs is None:
            self._check_whole_documents()
        if self.strategy == "best-fit" and self.num_packs is None:
            self._check_bins(packs)
        for number, pack in enumerate(packs):
            assert len(pack.tokens) <= LENGTH
            marked = []
            for view in VIEWS:
                shown = reference.in_view(
                    *(pack, self.prefixes, view, number, self.align, LENGTH, self.suffixes),
                    self.every,
                )
                sample = self.assemblers[view].sample(number)
                compared = self.assemblers[view].compared(number)
                names = ("tokens", "labels", "loss_mask", "position_ids")
                found = {name: array.tolist() for name, array in zip(names, sample, strict=False)}
                found |= {"cu_seqlens": np.unique(sample[4]).tolist(), "max_seqlen": int(sample[5])}
                assert found == shown.arrays(LENGTH, EOD, **self.trained), (number, view)
                assert compared.tolist() == shown.compared(LENGTH), (number, view)
                assert (compared <= sample[2]).all()
                metadata = ("prefix", "repeated", "suffix")
                assert int(sample[6]) == sum(t.kind in metadata for t in shown.tokens)
                marked.append(sample[1][compared == 1].tolist())
            assert marked[0] == marked[1] == marked[2]

    def _check_counts(self, tokens: list[reference.Token]) -> None:
        counts, kinds = self.plan.counts, Counter(token.kind for token in tokens)
        kinds["prefix"] += kinds["repeated"]
        for kind in ("body", "prefix", "suffix", "bos"):
            assert getattr(counts, f"{kind}_tokens") == kinds[kind], kind
        assert counts.alignment_tokens == kinds["pad"]
        assert counts.padding_tokens == LENGTH * len(self.plan) - len(tokens) + kinds["pad"]
        if self.num_packs is None:
            assert counts.discarded_tokens == self.discarded
        bare = [p is None and s is None for p, s in zip(self.prefixes, self.suffixes, strict=True)]
        shown = [d for pack in self.pieces() for d, begin, _ in pack if begin == 0]
        has_table = any(t is not None for t in [*self.prefixes, *self.suffixes])
        if has_table:
            assert counts.documents_plain == sum(bare[d] for d in shown)

    def _check_whole_documents(self) -> None:
        """Each document once, cut only where it must, the suffix whole on its last piece."""
        held = sorted(piece for pack in self.pieces() for piece in pack)
        for document, body in enumerate(self.bodies):
            spans = [(b, e) for d, b, e in held if d == document]
            assert [t for b, e in spans for t in body[b:e]] == (body if len(body) > 1 else [])
            if spans and self.suffixes[document]:
                begin, end = spans[-1]
                assert end - begin >= 2, "a token of the body, and EOD"
            around = int(self.bos is not None) + len(self.prefixes[document] or [])
            around += len(self.suffixes[document] or [])
            if self.strategy == "best-fit" and around + len(body) <= LENGTH and not self.every:
                assert len(spans) <= 1, "a document that fits was cut"

    def _check_bins(self, packs: list[reference.Pack]) -> None:
        if any(self.borders):
            return
        sizes = [
            size
            for body, p, s in zip(self.bodies, self.prefixes, self.suffixes, strict=True)
            if len(body) > 1
            for size in reference.chunk_sizes(
                len(body),
                len(p or []),
                int(self.bos is not None),
                LENGTH,
                self.repeat_prefix,
                self.align,
                len(s or []),
                self.every,
            )
        ]
        bins = sorted(
            (LENGTH - len(pack.tokens), len(pieces))
            for pack, pieces in zip(packs, self.pieces(), strict=True)
        )
        assert bins == reference.best_fit_bins(sizes, LENGTH, self.max_documents)


def numbered(lengths: list[int], base: int = 100) -> list[list[int]]:
    """Bodies whose tokens are all different, so that none can be taken for another; then EOD."""
    bounds = np.cumsum([base, *lengths]).tolist()
    return [[*range(a, b - 1), EOD] if b > a else [] for a, b in pairwise(bounds)]


def texts_of(lengths: list[int], first: int) -> Texts:
    """Prefixes or suffixes of some lengths; of one length there are two of other tokens."""
    return [None if n < 0 else [first + i % 2] * n for i, n in enumerate(lengths)]


LENGTHS = st.one_of(st.integers(-1, 4), st.sampled_from([-1, 0, 1, 9, 10, 11, 12, 40]))


@given(
    documents=st.lists(
        st.tuples(
            st.one_of(st.integers(2, 12), st.sampled_from([0, 1, 2, 3, LENGTH, 3 * LENGTH])),
            LENGTHS,
            LENGTHS,
        ),
        min_size=1,
        max_size=30,
    ),
    tables=st.sampled_from(["both", "both", "suffix", "prefix"]),
    strategy=st.sampled_from(STRATEGIES),
    bos=st.booleans(),
    align=st.sampled_from([1, 1, 2, 4, 6, LENGTH]),
    sentence=st.sampled_from([None, None, 1, 3, 7]),
    repeat_prefix=st.booleans(),
    max_documents=st.sampled_from([1, 3, LENGTH]),
    train_on_prefix=st.booleans(),
    train_on_suffix=st.booleans(),
    num_packs=st.sampled_from([None, None, 7]),
    every=st.sampled_from([0, 0, 1, 2, 3, 5, 2**62]),
)
@settings(max_examples=400, deadline=None)
def test_plans_and_samples_equal_the_oracle(
    documents: list[tuple[int, int, int]], tables: str, **options: Any
) -> None:
    lengths, prefixes, suffixes = map(list, zip(*documents, strict=True))
    if options["strategy"] == "truncate":
        options["repeat_prefix"] = True
    if max(lengths) <= 1:
        return
    arguments = (
        numbered(lengths),
        texts_of(prefixes, 20) if tables != "suffix" else None,
        texts_of(suffixes, 30) if tables != "prefix" else None,
    )
    if options["strategy"] != "truncate":
        head = int(options["bos"])
        before = [max(n, 0) if tables != "suffix" else 0 for n in prefixes]
        behind = [max(n, 0) if tables != "prefix" else 0 for n in suffixes]
        # A token of the body and EOD have to find room beside a suffix, else one token.
        if any(head + b > LENGTH - 1 for b in before) or any(
            s > 0 and head + b + s > LENGTH - 2 for b, s in zip(before, behind, strict=True)
        ):
            with pytest.raises(FlagError, match="room"):
                Packed(*arguments, **options)
            return
    Packed(*arguments, **options).check()


def test_a_pack_by_hand() -> None:
    """Golden: prefix, body, suffix and EOD, and what is in the loss."""
    bodies = [[100, 101, 102, EOD]]
    packed = Packed(bodies, [[20, 21]], [[30, 31]], strategy="split")
    tokens, labels, mask = (a.tolist()[:9] for a in packed.assemblers["conditioned"].sample(0)[:3])
    assert tokens == [BOS, 20, 21, 100, 101, 102, 30, 31, EOD]
    assert labels[:8] == tokens[1:]
    assert mask == [0, 0, 1, 1, 1, 1, 1, 1, 0]
    without = Packed(bodies, [[20, 21]], [[30, 31]], strategy="split", train_on_suffix=False)
    assert without.assemblers["conditioned"].sample(0)[2].tolist()[:9] == [
        *(0, 0, 1, 1, 1),  # the labels are 100, 101 and 102
        *(0, 0),  # 30 and 31
        *(1, 0),  # EOD, and the border
    ]
    alone = Packed(bodies, None, [[30, 31]], strategy="truncate", bos=False)
    assert alone.assemblers["conditioned"].sample(0)[0].tolist()[:6] == [100, 101, 102, 30, 31, EOD]
    assert alone.assemblers["plain"].sample(0)[0].tolist()[:4] == bodies[0]


def test_a_repeated_prefix_by_hand() -> None:
    """Golden: after every two tokens of the body, never in the loss, and what follows it is."""
    body = [100, 101, 102, 103, 104, EOD]
    options: dict[str, Any] = {"strategy": "split", "every": 2, "train_on_prefix": True}
    packed = Packed([body], [[20, 21]], None, **options)
    tokens, labels, mask = (a.tolist() for a in packed.assemblers["conditioned"].sample(0)[:3])
    expected = [BOS, 20, 21, 100, 101, 20, 21, 102, 103, 20, 21, 104, EOD]
    assert tokens[:13] == expected
    assert labels[:12] == expected[1:]
    #                    20 21 100 101 20 21 102 103 20 21 104 EOD
    assert mask[:13] == [1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0]
    assert packed.plan.counts.prefix_tokens == 6
    [piece] = packed.assemblers["conditioned"].pieces(0)
    kinds = ["bos", "prefix", "body", "prefix", "body", "prefix", "body"]
    assert piece.runs == list(zip(kinds, [1, 2, 2, 2, 2, 2, 2], strict=True))
    # No repetition before EOD behind a suffix, and one before EOD alone.
    packed = Packed([[*body[:4], EOD]], [[20]], [[30]], strategy="split", every=4)
    assert packed.assemblers["conditioned"].sample(0)[0].tolist()[:8] == [
        *(BOS, 20, 100, 101, 102, 103, 30, EOD)
    ]
    packed = Packed([[*body[:4], EOD]], [[20]], None, strategy="split", every=4)
    assert packed.assemblers["conditioned"].sample(0)[0].tolist()[:8] == [
        *(BOS, 20, 100, 101, 102, 103, 20, EOD)
    ]
    # `truncate` may end a pack within a repetition.
    packed = Packed(numbered([30]), [[20] * 4], None, strategy="truncate", every=8)
    packed.check()
    [piece] = packed.assemblers["conditioned"].pieces(0)
    assert piece.runs == [("bos", 1), ("prefix", 4), ("body", 8), ("prefix", 4), ("body", 7)]
    packed = Packed(numbered([30]), [[20] * 3], None, strategy="truncate", every=9)
    packed.check()
    [piece] = packed.assemblers["conditioned"].pieces(0)
    assert piece.runs[3:] == [("prefix", 3), ("body", 8)]
    packed = Packed(numbered([30]), [[20] * 6], None, strategy="truncate", every=4)
    packed.check()
    [piece] = packed.assemblers["conditioned"].pieces(0)
    assert piece.runs[3:] == [("prefix", 6), ("body", 4), ("prefix", 3)]


@pytest.mark.parametrize(
    ("body", "prefix", "suffix", "strategy", "pieces"),
    [
        # BOS, 7 of prefix, a token of the body, 14 of suffix and EOD are 24: it just fits.
        *((2, 7, 14, strategy, [(0, 2)]) for strategy in STRATEGIES),
        *((3, 7, 14, strategy, [(0, 1), (1, 3)]) for strategy in ("split", "best-fit")),
        *((4, 7, 14, strategy, [(0, 2), (2, 4)]) for strategy in ("split", "best-fit")),
        (3, 7, 14, "truncate", [(0, 2)]),
        # The body alone would fill the pack.
        *((24, 0, 1, strategy, [(0, 22), (22, 24)]) for strategy in ("split", "best-fit")),
        *((23, 0, 1, strategy, [(0, 21), (21, 23)]) for strategy in ("split", "best-fit")),
        *((22, 0, 1, strategy, [(0, 22)]) for strategy in STRATEGIES),
        (23, 0, 1, "truncate", [(0, 22)]),
        (24, 0, 1, "truncate", [(0, 23)]),
        (25, 0, 1, "truncate", [(0, 23)]),
        # The suffix is longer than the pack.
        (2, 0, 60, "truncate", [(0, 1)]),
        (2, 23, 60, "truncate", [(0, 0)]),
    ],
)
def test_where_a_document_with_a_suffix_is_cut(
    body: int, prefix: int, suffix: int, strategy: str, pieces: list[tuple[int, int]]
) -> None:
    packed = Packed(numbered([body]), [[20] * prefix], [[30] * suffix], strategy=strategy)
    packed.check()
    assert sorted((b, e) for pack in packed.pieces() for _, b, e in pack) == pieces


@pytest.mark.parametrize("strategy", ["split", "best-fit"])
def test_a_suffix_without_room_for_a_body_is_refused(strategy: str) -> None:
    with pytest.raises(
        FlagError, match=r"--meco-max-prefix-tokens: .* 23 tokens \(with BOS\).*Give 10 or less"
    ):
        Packed(numbered([2]), [[20] * 8], [[30] * 14], strategy=strategy)
    # The longest prefix and the longest suffix are of different documents.
    Packed(numbered([2, 2]), [[20] * 22, None], [None, [30] * 21], strategy=strategy).check()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("suffix", [None, []])
def test_suffixes_that_hold_nothing_change_nothing(strategy: str, suffix: list[int] | None) -> None:
    bodies = numbered([5, 9, 30, 2, 23, 24, 25, 12] * 3)
    prefixes = texts_of([3, -1, 2, 0] * 6, 20)
    plans = [
        Packed(bodies, prefixes, suffixes, strategy=strategy) for suffixes in (None, [suffix] * 24)
    ]
    for view in VIEWS:
        for pack in range(len(plans[0].plan)):
            one, other = (p.assemblers[view].sample(pack) for p in plans)
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert plans[0].plan.counts.suffix_tokens == plans[1].plan.counts.suffix_tokens == 0


def test_plans_without_suffixes_are_stored_as_before(tmp_path: Path) -> None:
    for suffixes in (None, [[30]] * 3):
        packed = Packed(numbered([5, 9, 30]), [[20]] * 3, suffixes, strategy="split")
        for path in tmp_path.iterdir():
            path.unlink()
        load_plan(lambda made=packed: made.corpus, packed.request, "c", tmp_path, "c")
        [path] = tmp_path.iterdir()
        assert (b"suffix_tokens" in path.read_bytes()) == (suffixes is not None)
        # Of the caller's key, request and versions alone: as before there were suffixes.
        assert path.name == "2b6b230f1346536b95c0b8d3bcb57fc0-plan.meco"
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        assert (digest == "cbe80070c715b1d1d182eef7519ca677") == (suffixes is None)


def test_damaged_suffixes_are_told() -> None:
    """A number of a suffix, or a border, that points outside."""
    arguments: dict[str, Any] = {"sequence_lengths": np.array([5, 5], np.int32)}
    arguments |= table_of([[30, 31], [32]], "suffix")
    for name, array in (("ids", [0, 0, 0]), ("offsets", [0, 2, 1]), ("offsets", [0, 2, 9])):
        wrong = {f"suffix_{name}": np.array(array, arguments[f"suffix_{name}"].dtype)}
        with pytest.raises(ValueError, match=r"offsets|ids"):
            _core.Corpus(**{**arguments, **wrong})
    corpus = _core.Corpus(**{**arguments, "suffix_ids": np.array([0, 7], np.int32)})
    request = Packed(numbered([5, 5]), None, None, strategy="truncate").request
    with pytest.raises(DataError, match="damaged"):
        build_plan(corpus, request, "c")


SEED, SUFFIX = 7, r"\n{topic}"
URLS = [None if i % 7 == 3 else f"https://{'abc'[i % 3] * (i % 3 + 1)}.org/{i}" for i in range(150)]
TOPICS = [None if i % 5 == 2 else ["x", "yy", "zzz", ""][i % 4] for i in range(150)]


def dataset_of(folder: Path, split: str = "100,0,0", **changes: Any) -> Any:
    """A function that makes the dataset of a phase or view, and the configuration."""
    bodies = random_bodies(150)
    prefix = write_corpus(folder / "c", bodies, {"url": URLS, "topic": TOPICS})
    options: dict[str, Any] = {"template": "", "suffix_template": SUFFIX}
    config = MeCoGPTDatasetConfig(
        random_seed=SEED,
        sequence_length=48,
        blend=([prefix], None),
        split=split,
        path_to_cache=str(folder / "cache"),
        tokenizer=LetterTokenizer(),
        meco=MeCoConfig(**{**options, **changes}),
    )

    def build(num_samples: int | None = None, **more: Any) -> Any:
        changed = dataclasses.replace(config, **more)
        builder = BlendedMegatronDatasetBuilder(
            MeCoGPTDataset, [num_samples, 0, 0], lambda: True, changed
        )
        return builder.build()[0]

    return build, config, bodies


def tokenized(texts: list[str | None], template: str) -> Texts:
    """By hand: what a template with one value renders to; an empty value is none."""
    tokenize = LetterTokenizer().tokenize
    return [tokenize(template % text) if text else None for text in texts]


@pytest.mark.parametrize("with_prefix", [True, False])
@pytest.mark.parametrize("suffix_loss", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_samples_of_a_corpus_equal_the_oracle(
    tmp_path: Path, with_prefix: bool, suffix_loss: bool, mmap: bool
) -> None:
    template = "U:{url.host} " if with_prefix else ""
    build, _, bodies = dataset_of(tmp_path, template=template, suffix_loss=suffix_loss)
    dataset = build(90, mmap_bin_files=mmap)
    hosts = [url and url.split("/")[2] for url in URLS]
    prefixes = tokenized(hosts, "U:%s ") if with_prefix else [None] * 150
    suffixes = tokenized(TOPICS, "\n%s")
    order = reference.document_order(150, (0, 150), SEED, epochs=6)
    packs, _ = reference.truncate_packs(order, bodies, prefixes, BOS, 48, 90, suffixes=suffixes)
    tokens = [token for pack in packs for token in pack.tokens]
    assert dataset.plan.counts.suffix_tokens == sum(t.kind == "suffix" for t in tokens) > 90
    assert dataset.suffixes.documents_without_value == suffixes.count(None)
    kinds = {"bos", "prefix", "body", "suffix", "padding"}
    for number, pack in enumerate(packs):
        sample = dataset[number]
        expected = pack.arrays(48, EOD, train_on_suffix=suffix_loss)
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert sample[name].tolist() == expected[name], (number, name)
        assert np.unique(sample["cu_seqlens"]).tolist() == expected["cu_seqlens"]
        found = []
        for document in dataset.documents_of(number):
            found += [kind for kind, begin, end in document["parts"] for _ in range(begin, end)]
            has_suffix = document["suffix_tokens"] > 0
            assert (document["suffix"] is None) == (not has_suffix)
            assert (document["no_suffix_because"] is None) == has_suffix
        assert set(found) <= kinds
        assert found == [token.kind for token in pack.tokens]


def test_the_prefix_of_a_long_document_is_repeated_in_samples(tmp_path: Path) -> None:
    options = {"template": "U:{url.host} ", "packing": "split", "repeat_every": 6}
    build, _, bodies = dataset_of(tmp_path, **options)
    dataset = build()
    prefixes = tokenized([url and url.split("/")[2] for url in URLS], "U:%s ")
    suffixes = tokenized(TOPICS, "\n%s")
    repeated = 0
    for number in range(len(dataset)):
        documents = dataset.documents_of(number)
        pieces = [(d["document"], d["body_begin"], d["body_end"]) for d in documents]
        pack = reference.pieces_to_pack(pieces, bodies, prefixes, BOS, suffixes=suffixes, every=6)
        expected = pack.arrays(48, EOD)
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert dataset[number][name].tolist() == expected[name], (number, name)
        repeated += sum(token.kind == "repeated" for token in pack.tokens)
    assert repeated > 50
    cooldown = build(phase=COOLDOWN)
    assert int(cooldown[0]["meco_prefix_tokens"]) == 0
    names = [path.name for path in (tmp_path / "cache").glob("*-plan.meco")]
    # The cooldown of a run without repetitions has the same plan.
    build(phase=COOLDOWN, meco=MeCoConfig(packing="split"))
    assert [path.name for path in (tmp_path / "cache").glob("*-plan.meco")] == names


def test_padding_is_marked_behind_suffixes_and_repeated_prefixes(tmp_path: Path) -> None:
    """Experts count what is not padding, and the loss leaves padding out."""
    options = {"template": "U:{url.host} ", "packing": "split", "repeat_every": 6}
    build, _, bodies = dataset_of(tmp_path, **options, pad_documents_to=8)
    dataset = build(mark_padding=True)
    prefixes = tokenized([url and url.split("/")[2] for url in URLS], "U:%s ")
    suffixes = tokenized(TOPICS, "\n%s")
    kinds: Counter[str] = Counter()
    for number in range(len(dataset)):
        documents = dataset.documents_of(number)
        pieces = [(d["document"], d["body_begin"], d["body_end"]) for d in documents]
        pack = reference.pieces_to_pack(
            pieces, bodies, prefixes, BOS, align=8, suffixes=suffixes, every=6
        )
        kinds.update(token.kind for token in pack.tokens)
        expected = [token.kind == "pad" for token in pack.tokens]
        expected += [True] * (48 - len(expected))
        assert dataset[number]["meco_padding"].tolist() == expected, f"pack {number}"
    assert min(kinds[kind] for kind in ("pad", "suffix", "repeated")) > 50


def test_the_cooldown_has_no_suffixes_and_is_the_baseline(tmp_path: Path) -> None:
    build, _, _ = dataset_of(tmp_path)
    plain, baseline = build(60, phase=COOLDOWN), build(60, meco=MeCoConfig(template=""))
    for number in range(60):
        assert int(plain[number]["meco_prefix_tokens"]) == 0
        for name in ("tokens", "loss_mask", "position_ids", "cu_seqlens"):
            assert torch.equal(plain[number][name], baseline[number][name])
    document = plain.documents_of(0)[0]
    assert document["no_suffix_because"] == "the cooldown has no suffixes"


@pytest.mark.parametrize("template", ["", "U:{url.host} "])
def test_validation_counts_the_same_tokens_in_all_views(tmp_path: Path, template: str) -> None:
    """Suffixes are shown and left out of the loss; body tokens and EOD are in it, in each view."""
    _, config, _ = dataset_of(tmp_path, split="60,40,0", template=template, packing="best-fit")
    schedule = make_schedule(config.meco, BatchSize.constant(4), train_iterations=10)
    train, valid, _ = build_datasets([40, 30, 0], lambda: True, config, schedule)
    assert "meco_compared" not in train[0]
    trained = [train[i]["labels"][train[i]["loss_mask"] == 1].tolist() for i in range(36)]
    assert any(token < 200 for labels in trained for token in labels if token != EOD)
    num_compared = 0
    for number in range(10):
        shown = [valid[3 * number + view] for view in range(3)]
        assert [int(s["meco_view"]) for s in shown] == [1, 0, 2]
        metadata = [int(s["meco_prefix_tokens"]) for s in shown]
        assert metadata[1] == 0
        assert metadata[0] == metadata[2]
        for mask in ("loss_mask", "meco_compared"):
            labels = [s["labels"][s[mask] == 1].tolist() for s in shown]
            assert labels[0] == labels[1] == labels[2]
            assert all(token == EOD or token >= 270 for token in labels[0]), "bodies alone"
        has_changed = not torch.equal(shown[0]["tokens"], shown[2]["tokens"])
        assert has_changed == bool(labels[0])
        num_compared += len(labels[0])
    assert num_compared > 50


def test_a_full_validation_of_suffixes_alone_has_each_view(tmp_path: Path) -> None:
    _, config, _ = dataset_of(tmp_path, split="60,40,0", packing="best-fit")
    schedule = make_schedule(config.meco, BatchSize.constant(4), train_iterations=10)
    full = FullEvaluation(batch=4, begin=0, number=1)
    _, valid, _ = build_datasets([40, 4, 0], lambda: True, config, schedule, full=full)
    views = [int(valid[i]["meco_view"]) for i in range(len(valid))]
    assert views[:6] == [View.CONDITIONED, View.PLAIN, View.SHUFFLED] * 2
    num_packs = len(valid.parts[0])
    assert num_packs > 10
    num_suffix_tokens = num_compared = 0
    for number in range(num_packs):
        shown = [valid[3 * number + turn] for turn in range(3)]
        metadata = [int(sample["meco_prefix_tokens"]) for sample in shown]
        assert metadata == [metadata[0], 0, metadata[0]]
        labels = [sample["labels"][sample["meco_compared"] == 1].tolist() for sample in shown]
        assert labels[0] == labels[1] == labels[2]
        num_suffix_tokens += metadata[0]
        num_compared += len(labels[0])
    assert num_suffix_tokens > 50
    assert num_compared > 10


def test_held_out_texts_are_without_suffixes_and_repeated_prefixes(tmp_path: Path) -> None:
    """`meco show` takes them for the loss of each source's texts."""
    options = {"template": "U:{url.host} ", "repeat_every": 6, "packing": "best-fit"}
    _, config, bodies = dataset_of(tmp_path, split="50,50,0", **options)
    schedule = make_schedule(config.meco, BatchSize.constant(4), train_iterations=10)
    _, valid, _ = build_datasets([40, 90, 0], lambda: True, config, schedule)
    detokenize = config.tokenizer.detokenize
    of_documents = [detokenize(body[:-1]) for body in bodies]
    sources = held_out_sources(valid, 3, 10)
    texts = [text for source in sources for text in source.texts]
    assert len(texts) > 10
    for text in texts:
        assert any(whole.startswith(text) for whole in of_documents), text


def test_plain_documents_have_no_suffix_either(tmp_path: Path) -> None:
    build, _, _ = dataset_of(tmp_path, template="U:{url.host} ", plain_fraction=0.5)
    dataset = build()
    for number in range(len(dataset)):
        for document in dataset.documents_of(number):
            if reference.hash_pair(SEED, document["document"]) < 2**63:
                assert document["prefix_tokens"] == document["suffix_tokens"] == 0
    reasons = {
        document["no_suffix_because"]
        for number in range(len(dataset))
        for document in dataset.documents_of(number)
    }
    assert {
        *(None, "it has no topic", "its end is not in this piece"),
        "meco-plain-fraction 0.5 drew it",
    } == reasons


def test_a_long_suffix_is_left_out_and_counted(tmp_path: Path) -> None:
    build, _, _ = dataset_of(tmp_path, template="{url.host}", max_prefix_tokens=3)
    dataset = build()
    assert dataset.suffixes.documents_with_long_prefix == TOPICS.count("zzz") > 0
    shown = [d for n in range(len(dataset)) for d in dataset.documents_of(n)]
    long = [d for d in shown if TOPICS[d["document"]] == "zzz"]
    assert {d["no_suffix_because"] for d in long} == {
        "its suffix is longer than 3 tokens (meco-max-prefix-tokens)"
    }
    assert max(d["suffix_tokens"] for d in shown) == 3


def test_shuffled_values_are_those_of_other_documents(tmp_path: Path) -> None:
    """In prefix and suffix of one document they are those of the same other one."""
    shuffled = {"template": "{topic|shuffled};", "suffix_template": ";{topic|shuffled}"}
    build, _, _ = dataset_of(tmp_path, packing="best-fit", **shuffled)
    dataset = build()
    shown = [d for n in range(len(dataset)) for d in dataset.documents_of(n)]
    pairs = [(d["prefix"], d["suffix"], d["document"]) for d in shown if d["suffix"]]
    assert all(prefix[:-1] == suffix[1:] for prefix, suffix, _ in pairs)
    assert sum(suffix[1:] != TOPICS[document] for _, suffix, document in pairs) > len(pairs) / 3


def test_identities_without_suffixes_are_as_before() -> None:
    known = MeCoConfig().unique_identifiers
    assert not any("suffix" in name or name == "repeat_every" for name in known)
    repeated = MeCoConfig(repeat_every=9).unique_identifiers
    assert repeated == {**known, "repeat_every": 9}
    with_suffix = MeCoConfig(suffix_template="{a}").unique_identifiers
    assert {name for name in with_suffix if name not in known} == {
        *("suffix_template", "suffix_loss")
    }
    others = [
        MeCoConfig(suffix_template="{b}"),
        MeCoConfig(suffix_template="{a}", suffix_loss=False),
    ]
    assert all(other.unique_identifiers != with_suffix for other in others)
