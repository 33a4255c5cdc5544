"""A comparison as a picture: the metric against shots, a panel a data set, a line a method with its spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltaprompt.errors import ConfigError
from deltaprompt.study.comparison import Comparison
from deltaprompt.study.tables import CALLED

COLOURS = ("#2a6f97", "#bc4749", "#6a994e", "#e09f3e", "#7b2cbf", "#495057", "#1b998b", "#b08968", "#d81159", "#3a3a8c")
MARKERS = "osD^vPX*<>"
ACROSS = 3  # panels at most
WIDTH, HEIGHT = 4.2, 3.4  # inches of a panel


def check_installed() -> None:
    """Raises where there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise ConfigError(
            "a comparison that is kept has a plot, and matplotlib, which draws it, is missing: "
            "pip install 'deltaprompt[plots]', or leave --out away"
        ) from e


def plot(c: Comparison, path: Path) -> None:
    """Writes the picture, in the format of the path's suffix."""
    from matplotlib.figure import Figure

    names = list(c.test_rows)
    across = min(len(names), ACROSS)
    down = -(-len(names) // across)
    figure = Figure(figsize=(WIDTH * across, HEIGHT * down + 0.5), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel, name in zip(panels, names, strict=False):
        _draw(c, name, panel)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _draw(c: Comparison, data: str, panel: Any) -> None:
    """One data set; shots stand at equal distances."""
    shots = [k for name, k in c.columns if name == data]
    for number, total in enumerate(c.totals):
        figures = [c.at(total.method, data, k) for k in shots]
        points = [(place, f.mean, f.std) for place, f in enumerate(figures) if f.mean is not None]
        x, means, stds = ([point[i] for point in points] for i in range(3))
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        panel.plot(x, means, color=colour, marker=marker, markersize=4, linewidth=1.3, label=total.method)
        low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
        if len(points) > 1:
            panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        else:
            panel.errorbar(x, means, stds, color=colour, capsize=3, linewidth=1)
    panel.set_xticks(range(len(shots)), [str(k) for k in shots])
    panel.set_title(f"{data} ({c.test_rows[data]:,} test rows)", fontsize=9)
    panel.set_xlabel("shots", fontsize=8)
    panel.set_ylabel(f"{CALLED[c.metric]}, mean ± std", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.grid(axis="y", alpha=0.3, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
