"""Draw both runs' losses from their logs, with the switch marked.

    python examples/local_demo/plots.py MECO.log BASELINE.log --output losses.png

Training losses are drawn faintly as they are and strongly as a running mean; what validation said
is drawn as points. Costs a second. Given up: interaction; TensorBoard has that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_meco.run.training_log import History

MECO, BASELINE, INK, FAINT = "#2563eb", "#ea580c", "#1f2937", "#6b7280"


def main() -> int:
    """Read the logs and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("meco", type=Path, help="log of the run with metadata")
    parser.add_argument("baseline", type=Path, help="log of the run without")
    parser.add_argument("--output", type=Path, required=True, help="the PNG to write")
    args = parser.parse_args()
    draw(History.read(args.meco), History.read(args.baseline), args.output)
    print(f"written to {args.output}")
    return 0


def draw(meco: History, baseline: History, output: Path) -> None:
    """Write the picture of two runs.

    Args:
        meco: The run with metadata.
        baseline: The run without.
        output: The PNG to write.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    draw_training(axes, meco, MECO, "MeCo, training")
    draw_validation(axes, meco, "conditioned", MECO, "o", "MeCo, validation with URL")
    draw_validation(axes, meco, "shuffled", MECO, "v", "MeCo, validation with a wrong URL")
    draw_validation(axes, meco, "plain", "white", "o", "MeCo, validation without URL")
    draw_training(axes, baseline, BASELINE, "baseline, training")
    draw_validation(axes, baseline, "plain", BASELINE, "s", "baseline, validation")
    draw_switch(axes, meco)
    axes.set_xlim(0, 1.02 * max(step.iteration for step in meco.steps))
    axes.set_ylim(*limits(meco, baseline))
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(0.86, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(output, dpi=130)


def draw_training(axes: Axes, log: History, colour: str, label: str) -> None:
    """Draw a run's training loss."""
    iterations = [step.iteration for step in log.steps]
    losses = [step.loss for step in log.steps]
    axes.plot(iterations, losses, color=colour, alpha=0.15, linewidth=0.8)
    axes.plot(iterations, smoothed(losses), color=colour, linewidth=1.6, label=label)


def draw_validation(
    axes: Axes, log: History, name: str, colour: str, marker: str, label: str
) -> None:
    """Draw what validation said under one name."""
    points = [(v.iteration, v.losses[name]) for v in log.validations.values() if name in v.losses]
    if points:
        edge = MECO if colour == "white" else INK
        iterations, losses = zip(*points, strict=True)
        axes.scatter(
            iterations, losses, 42, colour, marker=marker, label=label, zorder=3, edgecolor=edge
        )


def draw_switch(axes: Axes, log: History) -> None:
    """Mark where the run goes over to plain documents."""
    if log.phases is None:
        return
    switch = log.phases.switch_iteration + 0.5
    axes.axvline(switch, color=INK, linestyle="--", linewidth=1)
    axes.axvspan(switch, log.phases.num_iterations, color="#e5e7eb", alpha=0.6, zorder=0)
    for text, side in (("URL first  ", "right"), ("  plain", "left")):
        axes.text(switch, 0.02, text, ha=side, color=FAINT, transform=axes.get_xaxis_transform())


def limits(*logs: History) -> tuple[float, float]:
    """Return the range of losses to show: all but the steep beginning."""
    shown = [step.loss for log in logs for step in log.steps[len(log.steps) // 20 :]]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    return low - 0.05 * (high - low), high


def smoothed(values: list[float], share: float = 0.06) -> list[float]:
    """Return the mean over a window around each value; a mean of the past would lag behind."""
    half = max(1, round(share * len(values) / 2))
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


if __name__ == "__main__":
    raise SystemExit(main())
