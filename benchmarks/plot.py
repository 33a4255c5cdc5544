"""The ratios as a picture: `benchmarks/results.png`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.paired import Pair

FASTER, SLOWER = "#2a6f97", "#b08968"


def plot(pairs: Sequence[Pair], out: Path) -> None:
    """A bar for each ratio, from 1, on a logarithmic axis; the thin line is the range over the rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1 + 0.24 * len(pairs)), layout="constrained")
    axes = figure.subplots()
    places = range(len(pairs))
    colours = [FASTER if p.ratio >= 1 else SLOWER for p in pairs]
    axes.barh(places, [p.ratio - 1 for p in pairs], left=1, color=colours, height=0.7)
    axes.hlines(places, [p.low for p in pairs], [p.high for p in pairs], color="#333333", linewidth=0.8)
    axes.axvline(1, color="#333333", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(places, [f"{p.name} ({p.ratio:.2f})" for p in pairs], fontsize=7)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("the other's time or size, of ours: right of 1 ours is faster or smaller")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)
