"""Compare both runs at the switch and at the end: a table, what it shows, and what it cannot show.

Every number comes from the two training logs and from `meco plan --json`. Given up: error bars; one
run of a few minutes says nothing about the next one, and the text says so.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from training_log import TrainingLog


def comparison(meco: TrainingLog, baseline: TrainingLog) -> list[dict[str, Any]]:
    """Return the validation losses of both runs at the switch and at the end.

    Args:
        meco: The run with metadata; must have said where it switches.
        baseline: The run without.

    Returns:
        Two rows: `at` ("switch", "end"), `iteration`, `meco_conditioned`, `meco_plain`, `baseline`.

    Raises:
        KeyError: A run did not validate at one of the two.
    """
    assert meco.phases is not None
    places = {"switch": meco.phases.switch_iteration, "end": meco.phases.num_iterations}
    return [
        {
            "at": name,
            "iteration": iteration,
            "meco_conditioned": meco.validations[iteration].losses["conditioned"],
            "meco_plain": meco.validations[iteration].losses["plain"],
            "baseline": baseline.validations[iteration].losses["plain"],
        }
        for name, iteration in places.items()
    ]


def print_comparison(console: Console, rows: list[dict[str, Any]], plan: dict[str, Any]) -> None:
    """Print the table and what to make of it.

    Args:
        console: Where to.
        rows: What `comparison` returned.
        plan: What `meco plan --json` printed for the run with metadata.
    """
    table = Table("iteration", title="Validation loss, nats per token", title_justify="left")
    for name in ("MeCo, with URL", "MeCo, without", "baseline"):
        table.add_column(name, justify="right")
    for row in rows:
        losses = (row["meco_conditioned"], row["meco_plain"], row["baseline"])
        table.add_row(f"{row['iteration']} ({row['at']})", *(f"{loss:.3f}" for loss in losses))
    console.print(table)
    console.print(explanation(rows, plan))


def explanation(rows: list[dict[str, Any]], plan: dict[str, Any]) -> str:
    """Return what the table shows and what it cannot show."""
    total = plan["total"]
    tokens = total["prefix_tokens"] + total["body_tokens"]
    prefix_share = total["prefix_tokens"] / tokens
    gains = [row["meco_plain"] - row["meco_conditioned"] for row in rows]
    distance = rows[1]["meco_plain"] - rows[1]["baseline"]
    use = "A URL in front makes the same text cheaper" if gains[0] > 0 else "A URL has no use yet"
    side = "above" if distance > 0 else "below"
    paragraphs = (
        "Compare along a row; the two rows are about different documents.",
        f"{use}: by {gains[0]:+.3f} at the switch. The cooldown teaches the model to do without, "
        f"and at the end the difference is {gains[1]:+.3f}.",
        f"Without URL, MeCo ends {abs(distance):.3f} {side} the baseline. That is no verdict: "
        f"{tokens / 1e6:.2g} million tokens are far too few, and {100 * prefix_share:.1f} % of "
        "them are prefix. The paper's gain appears from about 64 billion on, and in downstream "
        "tasks (56.7 against 55.7 on average), not in perplexity.",
        "What this does show: both phases, one after the other in one run of Megatron's own "
        "trainer, and what each of them does to the loss.",
    )
    return "\n".join(paragraphs)
