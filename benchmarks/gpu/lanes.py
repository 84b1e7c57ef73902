"""Lanes: kinds of batches that one model trains on in turn, so that they can be compared.

Their definitions alone, without torch; `alternating.py` makes their samples.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One kind of batch.

    Attributes:
        meaning: What it is, for the report.
        template: Prefix of each document; None: the run's own.
        packing: Strategy; None: the run's own.
        cooldown: Whether its samples are those of the cooldown.
        documents: Whether attention keeps documents apart; else each sequence is one.
        packed: Whether the kernel for packed documents is used.
        num_bounds: Length of `cu_seqlens`; None: what the largest pack of all plans needs.
    """

    meaning: str
    template: str | None = None
    packing: str | None = None
    cooldown: bool = False
    documents: bool = True
    packed: bool = True
    num_bounds: int | None = None


LANES = {
    "baseline": Lane(meaning="no metadata, truncate", template=""),
    "conditioned": Lane(meaning="with prefixes, truncate"),
    "cooldown": Lane(meaning="plain documents of the cooldown, truncate", cooldown=True),
    "split": Lane(meaning="with prefixes, split", packing="split"),
    "best-fit": Lane(meaning="with prefixes, best-fit", packing="best-fit"),
    "one-document": Lane(
        meaning="full causal attention, packed kernel", template="", documents=False
    ),
    "no-documents": Lane(
        meaning="full causal attention, plain kernel", template="", documents=False, packed=False
    ),
    **{
        f"borders-{n}": Lane(meaning=f"conditioned, cu_seqlens of {n}", num_bounds=n)
        for n in (65, 129, 257, 513, 1025)
    },
}
