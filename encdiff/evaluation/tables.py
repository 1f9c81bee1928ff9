"""Scores for people: a table, a picture of the importance matrix."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from encdiff.evaluation.drawn import DRAWN
from encdiff.files.temporaries import atomic_path
from encdiff.metrics import METRICS
from encdiff.terminal import plain

SHOWN = METRICS | DRAWN


def format_table(results: Mapping[str, dict]) -> Table:
    """A table with one column for each named result of `evaluate` and one row for each score."""
    table = Table(title=plain(" / ".join(sorted({r["data"]["name"] for r in results.values()}))))
    table.add_column("score", overflow="fold")
    for name in results:
        table.add_column(plain(name), justify="right", overflow="fold")
    for metric, field, row in score_fields(results.values()):
        table.add_row(row, *(_cell(result, metric, field) for result in results.values()))
    if all("factor_vae" in result for result in results.values()):
        table.add_row("active dimensions", *map(_active, results.values()))
    table.add_row("protocol", *(_protocol(result) for result in results.values()))
    return table


def score_fields(results: Iterable[Mapping]) -> list[tuple[str, str, str]]:
    """(metric, field, title) of every score that some result has."""
    held = [name for name in SHOWN if any(name in result for result in results)]
    rows = []
    for name in held:
        rows.append((name, SHOWN[name].headline, SHOWN[name].title))
        rows += [(name, field, title) for field, title in SHOWN[name].further.items()]
    return rows


def format_swaps(found: Mapping) -> Table:
    """A table of what `counterfactual` found, for rich's console: a row a factor, and one for the reconstructions."""
    table = Table(title=f"swaps of {found['pairs']} pairs, read by the nearest true image")
    for i, column in enumerate(("factor", "arrived", "others kept", "exact", "95 %", "PSNR", "concepts")):
        table.add_column(column, justify="right" if 0 < i < 6 else "left", overflow="fold")
    for name, swap in found["factors"].items():
        concepts = ", ".join(map(str, swap["concepts"])) or swap.get("undefined", "")
        if "exact" not in swap:
            table.add_row(plain(name), *["-"] * 5, swap["undefined"])
            continue
        rates = (f"{swap[rate]:.2f}" for rate in ("arrived", "kept", "exact"))
        table.add_row(plain(name), *rates, _interval(swap["exact_interval"]), f"{swap['psnr']:.1f}", concepts)
    rebuilt = found["reconstruction"]
    table.add_row(
        "reconstructed", "", "", f"{rebuilt['exact']:.2f}", _interval(rebuilt["exact_interval"]),
        f"{rebuilt['psnr']:.1f}", "",
    )  # fmt: skip
    return table


def _interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:.2f} .. {ends[1]:.2f}"


def _cell(result: Mapping, metric: str, field: str) -> str:
    if (value := result.get(metric, {}).get(field)) is None:
        return "undefined" if metric in result else "-"
    return _over_summary(result, metric, field) or f"{value:.3f}"


def _over_summary(result: Mapping, metric: str, field: str) -> str:
    """Mean and deviation over the seeds, where there are several."""
    summary = result.get("summary", {}).get(metric)
    if summary and field != SHOWN[metric].headline:
        summary = summary.get("further", {}).get(field)
    return f"{summary['mean']:.3f} +- {summary['std']:.3f}" if summary and summary["std"] is not None else ""


def _active(result: Mapping) -> str:
    return _over_summary(result, "factor_vae", "num_active_dims") or str(result["factor_vae"]["num_active_dims"])


def _protocol(result: Mapping) -> str:
    seed, count = result["protocol"]["seed"], result.get("summary", {}).get("seeds", 1)
    return f"{result['protocol']['name']}, " + (f"seed {seed}" if count == 1 else f"seeds {seed} to {seed + count - 1}")


def plot_importance(result: Mapping, path: str | Path) -> None:
    """Save a PNG heat map of `result`'s DCI importance matrix: factors down, code dimensions across."""
    importance = np.asarray(result["dci"]["importance"]).T
    factors, codes = importance.shape
    figure = Figure(figsize=(2 + 0.4 * codes, 1.5 + 0.4 * factors), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(importance, vmin=0, vmax=max(1.0, importance.max()), cmap="viridis", aspect="auto")
    axes.set_xticks(range(codes))
    axes.set_yticks(range(factors), labels=[name.replace("_", " ") for name in result["data"]["factor_names"]])
    axes.set_xlabel("code dimension")
    seed = f", seed {result['protocol']['seed']} alone" if "summary" in result else ""  # of several
    axes.set_title(f"DCI importance (disentanglement {result['dci']['disentanglement']:.3f}{seed})")
    figure.colorbar(image, ax=axes)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
