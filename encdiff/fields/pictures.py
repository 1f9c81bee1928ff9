"""Pictures of reconstructions: truth, sensors, mean, spread, error and members; and how errors go with the sensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from encdiff.errors import InputError
from encdiff.fields.grid import Grid
from encdiff.fields.model import Reconstruction
from encdiff.fields.sensors import Sensors
from encdiff.files.temporaries import atomic_path

MEMBERS = 3  # shown
MARKERS = "osD^vP*X"


def reconstruction_picture(
    found: Reconstruction,
    grid: Grid,
    sensors: Sensors | None = None,
    truth: np.ndarray | None = None,
    title: str = "",
) -> Figure:
    """A row for each channel: [truth,] sensors, mean, spread, [error,] and some members.

    Args:
        found: of one field: mean (C, H, W).
        sensors: drawn where they are, in the colour of what they measured; fainter the longer ago.
        truth: (C, H, W), where it is known.
    """
    if found.mean.shape != grid.shape:
        raise InputError(f"mean is {found.mean.shape}, must be {grid.shape}")
    rows = [_cells(found, c, sensors, truth) for c in range(len(grid.channels))]
    columns = max(map(len, rows))
    figure = Figure(figsize=(2.3 * columns, 2.35 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for c, (line, cells) in enumerate(zip(axes, rows, strict=True)):
        for axis, cell in zip(line, cells, strict=True):
            _draw(axis, figure, cell, grid)
            if cell.field is None and sensors is not None:
                _dots(axis, sensors, c, cell)
        line[0].set_ylabel(grid.channels[c])
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


class _Cell(NamedTuple):
    label: str
    field: np.ndarray | None  # (H, W); None: sensors alone
    colours: str
    low: float
    high: float


def _cells(found: Reconstruction, c: int, sensors: Sensors | None, truth: np.ndarray | None) -> list[_Cell]:
    """The row of a channel."""
    shown = found.mean[c] if truth is None else truth[c]
    values, cells = ("viridis", float(shown.min()), float(shown.max())), []
    if truth is not None:
        cells.append(_Cell("truth", truth[c], *values))
    if sensors is not None:
        count = int((~np.isnan(sensors.values[:, c])).sum())
        cells.append(_Cell(f"{count} sensor{'s' * (count != 1)}", None, *values))
    cells.append(_Cell("reconstruction" if found.spread is None else "mean", found.mean[c], *values))
    if found.spread is not None:
        cells.append(_Cell("spread", found.spread[c], "magma", 0.0, float(found.spread[c].max()) or 1.0))
    if truth is not None:
        error = found.mean[c] - truth[c]
        most = float(abs(error).max()) or 1.0
        cells.append(_Cell("error of the mean", error, "RdBu_r", -most, most))
    if found.spread is not None:
        cells += [_Cell(f"member {e}", member[c], *values) for e, member in enumerate(found.members[:MEMBERS], 1)]
    return cells


def _draw(axis: Axes, figure: Figure, cell: _Cell, grid: Grid) -> None:
    x0, x1, y0, y1 = grid.domain
    axis.set(xticks=[x0, x1], yticks=[y0, y1], xlim=(x0, x1), ylim=(y0, y1), aspect="equal")
    axis.tick_params(labelsize=6, length=2)
    axis.set_title(cell.label, fontsize=9)
    if cell.field is not None:
        drawn = axis.imshow(
            cell.field, origin="lower", extent=grid.domain, cmap=cell.colours, vmin=cell.low, vmax=cell.high,
            interpolation="nearest",
        )  # fmt: skip
        bar = figure.colorbar(drawn, ax=axis, location="bottom", shrink=0.9, pad=0.02)
        bar.ax.tick_params(labelsize=6)
        bar.ax.locator_params(nbins=4)


def _dots(axis: Axes, sensors: Sensors, channel: int, cell: _Cell) -> None:
    axis.set_facecolor("#eef0f3")
    measured = ~np.isnan(sensors.values[:, channel])
    if not measured.any():
        return
    shown = np.ones(int(measured.sum()))
    if sensors.times is not None:
        age = sensors.times.max() - sensors.times[measured]
        shown = 1 - 0.8 * age / (age.max() or 1.0)
    x, y = sensors.points[measured].T
    share = (sensors.values[measured, channel] - cell.low) / ((cell.high - cell.low) or 1.0)
    colours = colormaps[cell.colours](share, alpha=shown)
    axis.scatter(x, y, c=colours, s=12, linewidths=0.3, edgecolors="#1f2430")


def error_curves(result: Mapping[str, Any], score: str = "nrmse") -> Figure:
    """A score over the share of pixels observed, a line for each method, a panel for each noise; bars: 95 %."""
    rows, styles = result["rows"], _styles(result)
    levels = sorted({row["noise"] for row in rows})
    figure = Figure(figsize=(3.2 * len(levels) + 1.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(levels), squeeze=False, sharey=True)[0]
    for axis, level in zip(axes, levels, strict=True):
        for method, style in styles.items():
            found = [r for r in rows if r["noise"] == level and r["method"] == method]
            found = sorted((r for r in found if r[score] and r[score]["mean"] is not None), key=lambda r: r["observed"])
            if found:
                x, y = [100 * r["observed"] for r in found], np.array([r[score]["mean"] for r in found])
                ends = np.array([r[score]["interval"] for r in found], dtype=float)
                axis.errorbar(x, y, abs(ends - y[:, None]).T, markersize=4, linewidth=1.2, capsize=2, **style)
        shares = sorted({100 * row["observed"] for row in rows})
        axis.set(xscale="log", xlabel="observed, % of the pixels", title=f"noise {100 * level:g} %")
        axis.set_xticks(shares, [f"{share:g}" for share in shares])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(ylabel={"nrmse": "nRMSE", "crps": "CRPS"}.get(score, score), ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def calibration_picture(result: Mapping[str, Any]) -> Figure:
    """What share of the truth lies inside the ensembles' bands, of every method that has one, over all its rows."""
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="#6b7280", linewidth=1, linestyle=":", label="calibrated")
    for method, style in _styles(result).items():
        curves = [row["curve"] for row in result["rows"] if row["method"] == method and "curve" in row]
        if curves:
            shares = np.mean([list(curve.values()) for curve in curves], 0)
            axis.plot([float(level) for level in curves[0]], shares, markersize=4, **style)
    axis.set(xlabel="nominal level of the band", ylabel="share of pixels inside", xlim=(0, 1), ylim=(0, 1))
    axis.set_title(f"all shares observed and all noises, {result['protocol']['members']} members", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _styles(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour, marker and label of each method, the same in every picture of a table."""
    methods = dict.fromkeys(row["method"] for row in result["rows"])
    return {m: {"color": f"C{k}", "marker": MARKERS[k % len(MARKERS)], "label": m} for k, m in enumerate(methods)}


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
