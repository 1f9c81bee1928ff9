"""Figures of a comparison: the scores of each method, and the same beside what training took."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from encdiff.files.temporaries import atomic_path

DRAWN_BY = ("FactorVAE score", "DCI disentanglement", "MIG", "swaps exact")


def draw_scores(found: Mapping[str, Mapping[str, Mapping]], title: str, path: Path) -> None:
    """A panel for each score: each method's seeds as points, and a box around them; nothing without such scores."""
    shown = [score for score in DRAWN_BY if score in found]
    if not shown:
        return
    figure = Figure(figsize=(11, 3.2 * math.ceil(len(shown) / 2)), layout="constrained")
    figure.suptitle(title)
    for i, score in enumerate(shown):
        axes, by = figure.add_subplot(math.ceil(len(shown) / 2), 2, i + 1), found[score]
        axes.boxplot([of["values"] for of in by.values()], tick_labels=list(by), widths=0.6, showfliers=False)
        for place, of in enumerate(by.values(), 1):
            axes.plot([place] * len(of["values"]), of["values"], "o", color="C0", markersize=4, alpha=0.7)
        axes.set_title(score)
        axes.grid(axis="y", alpha=0.3)
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right")
    _save(figure, path)


def draw_costs(rows: Sequence[Mapping], protocol: str, path: Path) -> None:
    """Mean scores beside the seconds of training; a line through those that none beats in less time."""
    shown = [score for score in DRAWN_BY if any(score in row["scores"].get(protocol, {}) for row in rows)]
    if not shown:
        return
    figure = Figure(figsize=(11, 3.6 * math.ceil(len(shown) / 2)), layout="constrained")
    for i, score in enumerate(shown):
        axes = figure.add_subplot(math.ceil(len(shown) / 2), 2, i + 1)
        _draw_cost(axes, rows, protocol, score)
    _save(figure, path)


def _draw_cost(axes: Axes, rows: Sequence[Mapping], protocol: str, score: str) -> None:
    points: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in rows:
        value = row["scores"].get(protocol, {}).get(score)
        if isinstance(value, float | int):
            points.setdefault((row["method"], row["steps"]), []).append((row["seconds"], value))
    means = sorted((*np.mean(of, 0).tolist(), name) for (name, _), of in points.items())
    frontier = [p for i, p in enumerate(means) if not any(other[1] >= p[1] for other in means[:i])]
    axes.plot([p[0] for p in frontier], [p[1] for p in frontier], color="0.7", drawstyle="steps-post", zorder=0)
    colours = dict(zip(dict.fromkeys(row["method"] for row in rows), colormaps["tab20"](np.arange(20)), strict=False))
    for seconds, value, name in means:
        axes.plot(seconds, value, "o", markersize=5, color=colours[name])
        axes.annotate(name, (seconds, value), xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set_xlabel("seconds of training (of the processor on a CPU)")
    axes.set_title(score)
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
