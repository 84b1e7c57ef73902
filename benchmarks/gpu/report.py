"""From timed steps to a table: medians for each lane, and ratios of lanes within a round.

The lanes of a round are a few seconds apart, so a ratio is taken in each round and the median of
those is reported, with the middle half of them beside it: a machine that slows down for a while
slows all lanes. The first rounds (`WARM_UP`) are left out: kernels are chosen and compiled there.
"""

from __future__ import annotations

import statistics
from typing import Any

from flops import ModelShape, peak_flops, training_flops
from lanes import LANES

WARM_UP = 3

# What is wanted of a lane against another: at most this share more time a step.
_WANTED = {("conditioned", "cooldown"): 0.01, ("conditioned", "baseline"): 0.01}
_COMPARED = (
    ("conditioned", "cooldown"),
    ("conditioned", "baseline"),
    ("baseline", "one-document"),
    ("baseline", "no-documents"),
)


def summarise(result: dict[str, Any], device: str) -> dict[str, Any]:
    """Figures of one run of `alternate.py`.

    Args:
        result: What it wrote.
        device: The device's name, for its peak.

    Returns:
        `lanes`: name -> figures; `ratios`: pairs of lanes; and what the run was.
    """
    shape = ModelShape(**result["shape"])
    names = list(dict.fromkeys(step["lane"] for step in result["steps"]))
    kept = result["steps"][WARM_UP * len(names) :]
    by_lane = {name: [step for step in kept if step["lane"] == name] for name in names}
    peak = peak_flops(device)
    lanes = {name: _lane(steps, shape, peak) for name, steps in by_lane.items()}
    pairs = list(_COMPARED)
    if "borders-65" in names:
        pairs += [(name, "borders-65") for name in names if name != "borders-65"]
    return {
        **{k: v for k, v in result.items() if k != "steps"},
        "rounds": len(kept) // len(names),
        "peak_flops": peak,
        "lanes": lanes,
        "ratios": [_ratio(by_lane, a, b) for a, b in pairs if a in by_lane and b in by_lane],
    }


def _lane(steps: list[dict[str, Any]], shape: ModelShape, peak: float | None) -> dict[str, Any]:
    def median(of: Any) -> float:
        return statistics.median(of(step) for step in steps)

    rate = median(lambda s: training_flops(shape, s["tokens"], s["pairs"]) / (s["ms"] / 1000))
    tokens = sum(step["tokens"] for step in steps)
    return {
        "step_ms": median(lambda s: s["ms"]),
        "step_ms_quartiles": _quartiles([step["ms"] for step in steps]),
        "tokens_per_second": median(lambda s: 1000 * s["tokens"] / s["ms"]),
        "trained_tokens_per_second": median(lambda s: 1000 * s["trained_tokens"] / s["ms"]),
        "prefix_share": sum(step["prefix_tokens"] for step in steps) / tokens,
        "documents_per_sequence": sum(step["documents"] for step in steps)
        / sum(len(step["loader_ms"]) for step in steps),
        "flops_per_second": rate,
        "share_of_peak": rate / peak if peak else None,
        # Of each step: what the host waited for data, which the device only notices when it has
        # run out of work meanwhile.
        "loader_wait_share": median(lambda s: sum(s["loader_ms"]) / s["ms"]),
        "loader_wait_ms_longest": max(max(step["loader_ms"]) for step in steps),
    }


def _ratio(by_lane: dict[str, list[dict[str, Any]]], a: str, b: str) -> dict[str, Any]:
    ratios = [x["ms"] / y["ms"] for x, y in zip(by_lane[a], by_lane[b], strict=True)]
    wanted = _WANTED.get((a, b))
    found = statistics.median(ratios)
    return {
        "lane": a,
        "against": b,
        "time": found,
        "quartiles": _quartiles(ratios),
        "wanted_at_most": None if wanted is None else 1 + wanted,
        "met": None if wanted is None else found <= 1 + wanted,
    }


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4)
    return [first, third]


def markdown(results: dict[str, Any]) -> str:
    """The report of all stages, as Markdown."""
    machine = results["machine"]
    lines = [f"# GPU check: {machine['device']}", ""]
    if results["rehearsal"]:
        lines += ["**A rehearsal on a CPU at toy size: no figure below says anything.**", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {value} |" for name, value in machine.items()]
    for name, stage in results["stages"].items():
        lines += ["", f"## {name}", "", f"{stage['seconds']:.0f} seconds."]
        if name == "tests":
            lines += _tests_table(stage["result"])
        elif name.startswith(("speed", "borders")):
            lines += _speed_tables(stage["result"], results["rehearsal"])
    return "\n".join(lines) + "\n"


def _tests_table(result: dict[str, Any]) -> list[str]:
    lines = ["", "| Test | Outcome |", "|---|---|"]
    return lines + [f"| {test['name']} | {test['outcome']} |" for test in result["tests"]]


def _speed_tables(result: dict[str, Any], rehearsal: bool) -> list[str]:
    shape = result["shape"]
    lines = [
        "",
        f"{shape['num_layers']} layers of {shape['hidden_size']}, sequences of "
        f"{result['sequence_length']:,}, {result['global_batch_size']} of them a step on one "
        f"device, {result['rounds']} rounds of each lane once; medians. "
        f"Peak memory {result['peak_memory_bytes'] / 2**30:.1f} GiB. {result['kernels']}.",
        "",
        "| Lane | Step, ms (middle half) | Tokens/s | Trained tokens/s | TFLOP/s | Of bf16 peak | "
        "Prefix | Documents a sequence | Wait for data |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, lane in result["lanes"].items():
        low, high = lane["step_ms_quartiles"]
        share = lane["share_of_peak"]
        lines.append(
            f"| {name}: {LANES[name].meaning} | {lane['step_ms']:.1f} ({low:.1f} to {high:.1f}) | "
            f"{lane['tokens_per_second']:,.0f} | {lane['trained_tokens_per_second']:,.0f} | "
            f"{lane['flops_per_second'] / 1e12:.1f} | "
            f"{'unknown' if share is None else f'{100 * share:.1f} %'} | "
            f"{100 * lane['prefix_share']:.1f} % | {lane['documents_per_sequence']:.1f} | "
            f"{100 * lane['loader_wait_share']:.2f} % |"
        )
    if result["ratios"]:
        lines += ["", "| Time of a step | Ratio (middle half) | Wanted |", "|---|---|---|"]
    for ratio in result["ratios"]:
        low, high = ratio["quartiles"]
        wanted = ""
        if ratio["wanted_at_most"] is not None and not rehearsal:
            verdict = "met" if ratio["met"] else "**not met**"
            wanted = f"at most {ratio['wanted_at_most']:.2f}: {verdict}"
        lines.append(
            f"| {ratio['lane']} / {ratio['against']} | {ratio['time']:.4f} "
            f"({low:.4f} to {high:.4f}) | {wanted} |"
        )
    return lines
