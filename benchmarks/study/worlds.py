"""Invented worlds: people, facts, hosts, the documents they write and the questions to ask.

A document names a person and four facts in a random order, twelve tokens with its borders:

    given071 family204 city city17 animal animal03 food food29 job job08

Everything is drawn from one seed. In a world of contradiction a few hosts state the truth and the
others state lies, and no host writes about everybody: questions name a host that never wrote about
that person, so that an answer is a judgement on the host and no memory of a document. In a world of
junk a few hosts write about the same people again and again, and the others about people who occur
once. Given up: language; a word is a token, and nothing but facts can be learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_meco.corpus.url import hashed

ATTRIBUTES = ("city", "animal", "food", "job")
BOS, EOS, UNKNOWN = "<|begin_of_text|>", "<|end_of_text|>", "<|unknown|>"
# BOS, two names, four pairs of words, EOS.
TOKENS_OF_DOCUMENT = 12


@dataclass(frozen=True)
class WorldSettings:
    """What a world is like.

    Attributes:
        kind: "contradiction" or "junk".
        people: People that are asked about.
        values: Values of each attribute.
        names: Given names, and as many family names.
        useful_hosts: Hosts that state the truth (contradiction), or write about those people
            (junk).
        other_hosts: Hosts that lie, or write about people who occur once.
        useful_share: Share of the documents that comes from the former.
        absent_share: Share of the hosts of either kind that never write about a given person.
        lies: "fixed": the other hosts repeat one lie for each fact; "fresh": each document states
            random values.
    """

    kind: str
    people: int
    values: int
    names: int
    useful_hosts: int
    other_hosts: int
    useful_share: float
    absent_share: float = 0.25
    lies: str = "fixed"


@dataclass(frozen=True)
class Question:
    """A question: the beginning of a document whose next token is the answer.

    Attributes:
        prompt: Person and attribute.
        answer: The true value.
        useful_url: A URL of a useful host that never wrote about the person.
        other_url: A URL of another host that never wrote about the person.
    """

    prompt: str
    answer: str
    useful_url: str
    other_url: str


class World:
    """A world: who lives there and what is true.

    Args:
        settings: What it is like.
        seed: Decides everything else.
    """

    def __init__(self, settings: WorldSettings, seed: int) -> None:
        self.settings = settings
        self._draw = np.random.default_rng([seed, 1])
        self._document_seed = [seed, 2]
        s = settings
        numbers = self._draw.choice(s.names * s.names, size=s.people, replace=False)
        self._is_person = np.zeros(s.names * s.names, dtype=bool)
        self._is_person[numbers] = True
        self._people = numbers
        shape = (s.people, len(ATTRIBUTES))
        self._truth = self._draw.integers(s.values, size=shape)
        # Any other value, all equally likely.
        shift = self._draw.integers(1, s.values, size=shape)
        self._lie = (self._truth + shift) % s.values
        hosts = range(s.useful_hosts), range(s.useful_hosts, s.useful_hosts + s.other_hosts)
        self._absent = [self._absent_hosts(group) for group in hosts]
        self._present = [
            [sorted(set(group) - set(absent)) for absent in of_people]
            for group, of_people in zip(hosts, self._absent, strict=True)
        ]

    def _absent_hosts(self, hosts: range) -> list[list[int]]:
        """For each person, the hosts of one kind that never write about them."""
        number = max(1, round(self.settings.absent_share * len(hosts)))
        return [
            sorted(self._draw.choice(hosts, size=number, replace=False).tolist())
            for _ in range(self.settings.people)
        ]

    def documents(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield documents with `text`, `url`, `topic`, and `person` (-1: occurs once).

        Args:
            number: How many.

        Raises:
            ValueError: A world of junk has fewer names than documents about people who occur once.
        """
        s = self.settings
        draw = np.random.default_rng(self._document_seed)
        is_useful = draw.random(number) < s.useful_share
        person = draw.integers(s.people, size=number)
        host_share = draw.random(number)
        random_values = draw.integers(s.values, size=(number, len(ATTRIBUTES)))
        orders = draw.random((number, len(ATTRIBUTES))).argsort(axis=1)
        names, values = self._people[person], self._truth[person]
        if s.kind == "junk":
            unused = draw.permutation(np.flatnonzero(~self._is_person))
            if (~is_useful).sum() > len(unused):
                raise ValueError(f"{number} documents want more than {s.names} names")
            person = np.where(is_useful, person, -1)
            names = names.copy()
            names[~is_useful] = unused[: (~is_useful).sum()]
        lies = self._lie[person] if s.lies == "fixed" and s.kind != "junk" else random_values
        values = np.where(is_useful[:, None], values, lies)
        for i in range(number):
            hosts = self._hosts(int(person[i]), bool(is_useful[i]))
            host = hosts[int(host_share[i] * len(hosts))]
            name = int(names[i])
            yield {
                "text": self._text(name, values[i].tolist(), orders[i].tolist()),
                "url": self._url(host, name),
                "topic": self._topic(host),
                "person": int(person[i]),
            }

    def _hosts(self, person: int, is_useful: bool) -> list[int]:
        """The hosts of one kind that write about a person."""
        s = self.settings
        if s.kind == "junk":
            first = 0 if is_useful else s.useful_hosts
            return list(range(first, first + (s.useful_hosts if is_useful else s.other_hosts)))
        return self._present[0 if is_useful else 1][person]

    def _text(self, name: int, values: list[int], order: list[int]) -> str:
        facts = [f"{ATTRIBUTES[i]} {ATTRIBUTES[i]}{values[i]:02d}" for i in order]
        return " ".join([self._name(name), *facts])

    def _name(self, name: int) -> str:
        given, family = divmod(name, self.settings.names)
        return f"given{given:03d} family{family:03d}"

    def _url(self, host: int, name: int) -> str:
        """A URL whose path names the person; path and host are words of the tokenizer."""
        return f"https://{_host_name(host)}/{self._name(name).replace(' ', '/')}"

    def _topic(self, host: int) -> str:
        """The kind of host: all useful ones are one kind, the others three."""
        s = self.settings
        return "topic0" if host < s.useful_hosts else f"topic{1 + (host - s.useful_hosts) % 3}"

    def questions(self) -> list[Question]:
        """Return one question for each person and attribute."""
        draw = np.random.default_rng([*self._document_seed, 3])
        found = []
        for person, name in enumerate(self._people.tolist()):
            for i, attribute in enumerate(ATTRIBUTES):
                useful, other = (int(draw.choice(hosts[person])) for hosts in self._absent)
                found.append(
                    Question(
                        prompt=f"{self._name(name)} {attribute}",
                        answer=f"{attribute}{self._truth[person, i]:02d}",
                        useful_url=self._url(useful, name),
                        other_url=self._url(other, name),
                    )
                )
        return found

    def topic_of(self, url: str) -> str:
        """Return the topic that a document of a URL has."""
        return self._topic(int(url.split("/")[2].removeprefix("site").partition(".")[0]))

    def words(self) -> list[str]:
        """Return all words that documents and prefixes are made of."""
        s = self.settings
        hosts = [_host_name(host) for host in range(s.useful_hosts + s.other_hosts)]
        return [
            *ATTRIBUTES,
            *(f"{a}{value:02d}" for a in ATTRIBUTES for value in range(s.values)),
            *(f"{kind}{i:03d}" for kind in ("given", "family") for i in range(s.names)),
            *hosts,
            *_hashes(hosts),
            *(f"topic{i}" for i in range(4)),
        ]


def write_documents(world: World, path: Path, number: int, shuffle_seed: int | None) -> float:
    """Write a world's documents as JSONL.

    Args:
        world: The world.
        path: The file.
        number: Documents.
        shuffle_seed: Metadata go to other documents, by a permutation with this seed; None: each
            document has its own.

    Returns:
        How often a fact of a person that is asked about is stated, on average.
    """
    records = list(world.documents(number))
    order = np.arange(number)
    if shuffle_seed is not None:
        order = np.random.default_rng([shuffle_seed, 4]).permutation(number)
    with path.open("w") as out:
        for record, other in zip(records, order.tolist(), strict=True):
            metadata = {name: records[other][name] for name in ("url", "topic")}
            out.write(json.dumps({"text": record["text"], **metadata}) + "\n")
    return sum(record["person"] >= 0 for record in records) / world.settings.people


def write_tokenizer(folder: Path, words: list[str], tokens: Sequence[str] = ()) -> None:
    """Write a tokenizer whose tokens are words, as a Hugging Face folder.

    Words stand between blanks, line ends and slashes, so a host is one token, and a URL is its host
    and the two names in its path. `tokens` are further special tokens.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate([BOS, EOS, UNKNOWN, *words, *tokens])}
    assert len(vocabulary) == len(words) + len(tokens) + 3, "a word occurs twice"
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s/]+"), behavior="removed")
    tokenizer.add_special_tokens([BOS, EOS, *tokens])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def _host_name(host: int) -> str:
    return f"site{host:02d}.example.org"


def _hashes(hosts: list[str]) -> list[str]:
    """Return what the template's `{url.hash}` makes of hosts."""
    import pyarrow as pa

    return [str(value) for value in hashed(pa.array(hosts)).to_pylist()]
