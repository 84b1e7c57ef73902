"""The invented worlds: who states what, and what is asked."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study.recipe import HERE, Recipe
from benchmarks.study.worlds import World, WorldSettings, write_documents

RECIPE = Recipe(HERE / "recipe.toml")
CONTRADICTION = WorldSettings(**RECIPE.content["contradiction"]["world"])
JUNK = WorldSettings(**RECIPE.content["junk"]["world"])


def facts(text: str) -> tuple[str, dict[str, str]]:
    words = text.split()
    return " ".join(words[:2]), dict(zip(words[2::2], words[3::2], strict=True))


def host_number(url: str) -> int:
    return int(url.split("/")[2][4:6])


def truths(world: World) -> dict[tuple[str, str], str]:
    return {
        (q.prompt.rpartition(" ")[0], q.prompt.rpartition(" ")[2]): q.answer
        for q in world.questions()
    }


@pytest.mark.parametrize("lies", ["fixed", "fresh"])
def test_reliable_hosts_state_the_truth_and_the_others_do_not(lies: str) -> None:
    world = World(replace(CONTRADICTION, lies=lies), seed=5)
    truth = truths(world)
    useful, other, lies_of = [], [], {}
    for record in world.documents(4000):
        name, stated = facts(record["text"])
        is_useful = host_number(record["url"]) < CONTRADICTION.useful_hosts
        right = [value == truth[name, attribute] for attribute, value in stated.items()]
        (useful if is_useful else other).extend(right)
        if not is_useful:
            for attribute, value in stated.items():
                lies_of.setdefault((name, attribute), set()).add(value)
    assert all(useful)
    share = len(useful) / (len(useful) + len(other))
    assert share == pytest.approx(CONTRADICTION.useful_share, abs=0.03)
    if lies == "fixed":
        assert not any(other)
        assert {len(values) for values in lies_of.values()} == {1}
    else:
        assert np.mean(other) == pytest.approx(1 / CONTRADICTION.values, abs=0.01)


def test_questions_name_hosts_that_never_wrote_about_the_person() -> None:
    world = World(CONTRADICTION, seed=6)
    written = {(r["url"].split("/")[2], facts(r["text"])[0]) for r in world.documents(30_000)}
    questions = world.questions()
    assert len(questions) == 4 * CONTRADICTION.people
    for question in questions:
        name = question.prompt.rpartition(" ")[0]
        for url, is_useful in ((question.useful_url, True), (question.other_url, False)):
            assert (url.split("/")[2], name) not in written
            assert (host_number(url) < CONTRADICTION.useful_hosts) == is_useful
            assert (world.topic_of(url) == "topic0") == is_useful


def test_junk_is_about_people_who_occur_once() -> None:
    world = World(JUNK, seed=7)
    asked = {q.prompt.rpartition(" ")[0] for q in world.questions()}
    useful, junk = Counter(), Counter()
    for record in world.documents(20_000):
        is_useful = host_number(record["url"]) < JUNK.useful_hosts
        (useful if is_useful else junk)[facts(record["text"])[0]] += 1
    assert set(useful) == asked
    assert asked.isdisjoint(junk)
    assert set(junk.values()) == {1}
    assert sum(useful.values()) / 20_000 == pytest.approx(JUNK.useful_share, abs=0.01)


def test_the_largest_budget_has_enough_names() -> None:
    from benchmarks.study.execute import number_of_documents

    rates = dict.fromkeys(("meco", "baseline", "shuffled"), 3e-3)
    most = max(RECIPE.junk(rates), key=number_of_documents)
    number = number_of_documents(most)
    assert sum(1 for _ in World(most.world, most.seed).documents(number)) == number


def test_a_seed_decides_the_world() -> None:
    first, again, other = (list(World(CONTRADICTION, seed).documents(50)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_shuffling_moves_metadata_and_nothing_else(tmp_path: Path) -> None:
    files = [tmp_path / "own.jsonl", tmp_path / "shuffled.jsonl"]
    stated = [
        write_documents(World(CONTRADICTION, 8), path, 3000, shuffle_seed)
        for path, shuffle_seed in zip(files, (None, 8), strict=True)
    ]
    own, shuffled = ([json.loads(line) for line in path.read_text().splitlines()] for path in files)
    assert stated[0] == stated[1]
    assert [d["text"] for d in own] == [d["text"] for d in shuffled]
    assert Counter(d["url"] for d in own) == Counter(d["url"] for d in shuffled)
    # URLs repeat, so some documents get an equal one.
    moved = sum(a["url"] != b["url"] for a, b in zip(own, shuffled, strict=True))
    assert moved > 0.95 * len(own)
    truth = truths(World(CONTRADICTION, 8))
    right = {True: [], False: []}
    for document in shuffled:
        name, of_person = facts(document["text"])
        is_useful = host_number(document["url"]) < CONTRADICTION.useful_hosts
        right[is_useful] += [value == truth[name, a] for a, value in of_person.items()]
    assert np.mean(right[True]) == pytest.approx(np.mean(right[False]), abs=0.05)
