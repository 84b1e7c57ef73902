"""The frozen recipe and the list of runs that it means.

A run is one training and the questions that its checkpoints are asked. All that decides it is in
`Run`, so its digest names its result file, and a result of another recipe is never taken for it.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.study.worlds import WorldSettings

HERE = Path(__file__).resolve().parent
MECO, BASELINE, SHUFFLED = "meco", "baseline", "shuffled"


@dataclass(frozen=True)
class Model:
    """The model's size."""

    layers: int
    hidden_size: int
    ffn_hidden_size: int
    attention_heads: int


@dataclass(frozen=True)
class Training:
    """What all runs have in common.

    Attributes:
        tokens_per_step: One sequence of so many tokens.
        learning_rate: Peak; cosine to a tenth of it.
        weight_decay: Of AdamW.
        warmup_share: Share of the iterations.
        template: What precedes a document.
    """

    tokens_per_step: int
    learning_rate: float
    weight_decay: float
    warmup_share: float
    template: str


@dataclass(frozen=True)
class Choice:
    """What a run of `choices` does otherwise, beside its template.

    Attributes:
        start: Share of the iterations on plain documents before metadata come in.
        suffix: What follows a document, in the loss; with it nothing precedes one.
        tokens: Special tokens that the tokenizer has for it.
        head_tokens: Tokens of metadata that a document has, on average over the conditioned phase.
    """

    start: float = 0.0
    suffix: str = ""
    tokens: tuple[str, ...] = ()
    head_tokens: float = 1.0


@dataclass(frozen=True)
class Run:
    """One training in an invented world.

    Attributes:
        setting: "contradiction", "junk" or "clean".
        variant: What distinguishes it in the setting, as in "fixed".
        arm: `MECO`, `BASELINE` or `SHUFFLED`.
        seed: Of the world, the order of documents and the initial weights.
        iterations: Training steps.
        cooldown: Share of them without metadata.
        template: What precedes a document; empty for the baseline.
        question_template: What precedes a question that is asked under a URL.
        shuffles: Each document has another one's metadata.
        world: The world.
        model: The model.
        training: All else; its learning rate and template are this run's.
        choice: What a run of `choices` does otherwise; None: nothing.
    """

    setting: str
    variant: str
    arm: str
    seed: int
    iterations: int
    cooldown: float
    template: str
    question_template: str
    shuffles: bool
    world: WorldSettings
    model: Model
    training: Training
    choice: Choice | None = None

    @property
    def name(self) -> str:
        """A name for people; `digest` tells runs apart."""
        return f"{self.setting}-{self.variant}-{self.iterations}-{self.arm}-seed-{self.seed}"

    @property
    def digest(self) -> str:
        """A digest of everything that decides the run."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return all that decides the run; runs without a choice are as they were before it."""
        values = asdict(self)
        if self.choice is None:
            del values["choice"]
        return values

    @property
    def head_tokens(self) -> float:
        """Tokens of metadata in a document, on average over the whole run."""
        if not self.template and self.choice is None:
            return 0.0
        choice = self.choice or Choice()
        return choice.head_tokens * (1 - choice.start - self.cooldown)

    @property
    def switch(self) -> int:
        """Iterations before the cooldown."""
        return self.iterations - round(self.cooldown * self.iterations)


class Recipe:
    """The recipe.

    Args:
        path: The TOML file.
        seeds: Instead of the recipe's, for all settings; None: those.
        shuffle_labels: Every document of every arm gets another one's metadata: a control, in which
            no effect of metadata can exist.
    """

    def __init__(
        self, path: Path, seeds: Sequence[int] | None = None, *, shuffle_labels: bool = False
    ) -> None:
        self.content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.model = Model(**self.content["model"])
        self.training = Training(**self.content["training"])
        self._given_seeds = seeds
        self.shuffle_labels = shuffle_labels

    def seeds(self, setting: str) -> list[int]:
        """Return the seeds of a setting."""
        return list(self._given_seeds or self.content[setting]["seeds"])

    def variant_seeds(self, setting: str) -> list[int]:
        """Return the seeds of a setting's variants."""
        return self.seeds(setting)[: self.content[setting]["variant_seeds"]]

    def contradiction(self) -> list[Run]:
        """Return the runs of the default study."""
        settings = self.content["contradiction"]
        return [
            self._run("contradiction", lies, arm, seed, settings["iterations"], lies=lies)
            for seed in self.seeds("contradiction")
            for lies in settings["lies"]
            for arm in (MECO, BASELINE)
        ]

    def cooldowns(self, setting: str, rate: float | None = None) -> list[Run]:
        """Return the runs with other cooldown shares.

        Args:
            setting: "contradiction" or "junk".
            rate: The learning rate; None: the recipe's.
        """
        settings = self.content[setting]
        iterations = settings.get("cooldown_budget", settings.get("iterations"))
        return [
            self._run(
                setting, f"cooldown-{share:g}", MECO, seed, iterations, cooldown=share, rate=rate
            )
            for seed in self.variant_seeds(setting)
            for share in settings["cooldowns"]
        ]

    def kinds(self) -> list[Run]:
        """Return the runs with other kinds of metadata."""
        settings = self.content["contradiction"]
        return [
            self._run(
                "contradiction",
                f"kind-{kind}",
                SHUFFLED if kind == SHUFFLED else MECO,
                seed,
                settings["iterations"],
                template=template or None,
            )
            for seed in self.variant_seeds("contradiction")
            for kind, template in settings["kinds"].items()
        ]

    def choices(self) -> list[Run]:
        """Return the runs in which one choice about metadata is another."""
        settings = self.content["contradiction"]
        return [
            self._run(
                "contradiction",
                choice_variant(name),
                MECO,
                seed,
                settings["iterations"],
                template=changes.get("template"),
                question_template=changes.get("question_template"),
                choice=_choice(changes),
            )
            for seed in self.seeds("contradiction")
            for name, changes in settings["choices"].items()
        ]

    def tuning(self) -> list[Run]:
        """Return the runs that choose the learning rates of setting 2."""
        settings = self.content["junk"]
        return [
            self._run("junk", f"rate-{rate:g}", arm, seed, settings["tuning_budget"], rate=rate)
            for seed in settings["tuning_seeds"]
            for rate in settings["learning_rates"]
            for arm in (MECO, BASELINE)
        ]

    def junk(self, rates: dict[str, float]) -> list[Run]:
        """Return the runs of setting 2 and of the same without junk.

        Args:
            rates: The learning rate of each arm.
        """
        return [
            self._run(setting, "host", arm, seed, budget, rate=rates[arm])
            for setting in ("junk", "clean")
            for budget in self.content[setting]["budgets"]
            for seed in self.seeds(setting)
            for arm in (MECO, BASELINE, SHUFFLED)
            if setting == "junk" or arm != SHUFFLED
        ]

    def _run(
        self,
        setting: str,
        variant: str,
        arm: str,
        seed: int,
        iterations: int,
        *,
        lies: str = "fixed",
        cooldown: float | None = None,
        template: str | None = None,
        rate: float | None = None,
        question_template: str | None = None,
        choice: Choice | None = None,
    ) -> Run:
        template = template or self.training.template
        settings = self.content[setting]
        return Run(
            setting=setting,
            variant=variant,
            arm=arm,
            seed=seed,
            iterations=iterations,
            cooldown=settings["cooldown"] if cooldown is None else cooldown,
            template="" if arm == BASELINE or (choice and choice.suffix) else template,
            question_template=question_template or template,
            shuffles=arm == SHUFFLED or self.shuffle_labels,
            world=WorldSettings(**settings["world"], lies=lies),
            model=self.model,
            training=replace(
                self.training, learning_rate=rate or self.training.learning_rate, template=template
            ),
            choice=choice,
        )


def choice_variant(name: str) -> str:
    """Return the variant of the runs of a choice."""
    return f"choice-{name}"


def _choice(changes: dict[str, Any]) -> Choice:
    names = {field.name for field in fields(Choice)}
    values = {name: value for name, value in changes.items() if name in names}
    return Choice(**{**values, "tokens": tuple(values.get("tokens", ()))})
