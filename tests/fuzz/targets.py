"""The targets by name, and which cases a seed stands for."""

from __future__ import annotations

from collections.abc import Iterator

from fuzz.core_target import CoreTarget
from fuzz.corpus_targets import CORPUS_TARGETS
from fuzz.harness import Case, Target
from fuzz.other_targets import OTHER_TARGETS

TARGETS: dict[str, type[Target]] = {
    target.name: target for target in (CoreTarget, *CORPUS_TARGETS, *OTHER_TARGETS)
}


def cases(names: list[str], seed: int) -> Iterator[Case]:
    """Cases without end, the targets in turn."""
    number = seed * 1_000_000
    while True:
        yield from (Case(name, number) for name in names)
        number += 1
