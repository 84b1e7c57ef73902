"""Draw the rows: a mean, its interval and the seeds for each."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.study.rows import Row

_COLOURS = {"shown": "#15803d", "not shown": "#6b7280", "opposite": "#b91c1c"}


def draw(rows: list[Row], title: str, output: Path) -> None:
    """Write a PNG with one panel for accuracy and one for bits.

    Args:
        rows: The rows.
        title: What was run.
        output: The file.
    """
    panels = {unit: [row for row in rows if row.unit == unit] for unit in ("accuracy", "bits")}
    panels = {unit: group for unit, group in panels.items() if group}
    heights = [len(group) + 1 for group in panels.values()]
    figure = Figure(figsize=(10, 1.2 + 0.42 * sum(heights)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (unit, group) in zip(all_axes, panels.items(), strict=True):
        axes.axvline(0, color="black", linewidth=0.8)
        for place, row in enumerate(group):
            mean, colour = row.effect, _COLOURS[row.verdict]
            if mean.low > float("-inf"):
                axes.plot([mean.low, mean.high], [place, place], color=colour, linewidth=2)
            axes.plot(mean.values, [place] * len(mean.values), ".", color=colour, alpha=0.5)
            axes.plot([mean.mean], [place], "o", color=colour, label=row.verdict)
            if row.control is not None:
                values = row.control.values
                axes.plot(values, [place + 0.25] * len(values), "x", color="#9ca3af", markersize=4)
        labels = [f"{row.setting}: {row.question} ({row.arms.split(';')[0]})" for row in group]
        axes.set_yticks(range(len(group)), labels, fontsize=7)
        axes.set_ylim(len(group) - 0.4, -0.6)
        axes.set_xlabel(f"{unit}: difference, 95 % t-interval over seeds; x: baseline", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {h.get_label(): h for axes in all_axes for h in axes.lines if h.get_label()[0] != "_"}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
