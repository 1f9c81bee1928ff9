"""Reconstructions and tables as files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from encdiff.errors import InputError
from encdiff.fields.grid import Grid
from encdiff.fields.model import Reconstruction
from encdiff.fields.pictures import calibration_picture, error_curves, save_figure
from encdiff.fields.scores import Scores
from encdiff.files.reading import read_json
from encdiff.files.temporaries import atomic_path, disk_errors

SCORES = {  # of the tables in Markdown
    "nRMSE": "nrmse", "nRMSE at unobserved pixels": "nrmse_unobserved", "CRPS": "crps",
    "Share of pixels in the 90 % band": "coverage", "Seconds for each field": "seconds_per_field",
}  # fmt: skip
ROW = {"method", "observed", "noise", "seconds_per_field", *Scores._fields}
HEADER = ("method", "observed", "noise", "nRMSE", "unobserved", "CRPS", "90 % band", "spread/error", "s/field")


def write_reconstruction(path: str | Path, found: Reconstruction, grid: Grid) -> None:
    """`mean`, `spread` and `members`, with the grid's `channels` and `domain`, as .npz or .h5, whole or not at all."""
    path = check_suffix(Path(path))
    arrays: dict[str, Any] = {"mean": found.mean, "members": found.members}
    arrays |= {} if found.spread is None else {"spread": found.spread}
    arrays |= {"channels": list(grid.channels), "domain": grid.domain}
    with atomic_path(path) as temporary, disk_errors(RuntimeError):
        if path.suffix == ".npz":
            with temporary.open("wb") as file:
                np.savez_compressed(file, **arrays)
            return
        with h5py.File(temporary, "w") as file:
            for name, array in arrays.items():
                file[name] = array


def check_suffix(path: Path) -> Path:
    """The path, of a file that `write_reconstruction` can write; InputError else."""
    if path.suffix not in (".npz", ".h5", ".hdf5"):
        raise InputError(f"{path}: must end in .npz or .h5")
    return path


def write_evaluation(folder: str | Path, result: Mapping[str, Any]) -> list[Path]:
    """`fields.json`, its table `fields.md` and pictures of errors and calibration; returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table, text = folder / "fields.md", folder / "fields.json"
    with atomic_path(text) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    with atomic_path(table) as temporary:
        temporary.write_text(markdown(result), "utf-8")
    pictures = {"errors.png": error_curves(result), "crps.png": error_curves(result, "crps")}
    if any("curve" in row for row in result["rows"]):
        pictures["calibration.png"] = calibration_picture(result)
    for name, figure in pictures.items():
        save_figure(figure, folder / name)
    return [text, table, *(folder / name for name in pictures)]


def added(result: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """The result with the rows of other methods that a folder's `fields.json` holds, in front.

    InputError where that is of other data, sensors or settings, or no table of ours; without a file the result.
    """
    path = Path(folder) / "fields.json"
    if not path.is_file():
        return dict(result)
    before = read_json(path)
    if not (isinstance(before, dict) and isinstance(before.get("rows"), list)):
        raise InputError(f"{path}: holds no rows, must be what `encdiff fields evaluate` wrote")
    now = json.loads(json.dumps(result))
    for name in now.keys() - {"rows"}:
        if before.get(name) != now[name]:
            raise InputError(f"{path}: was made with {name} {before.get(name)}, not {now[name]}; use another folder")
    if not all(isinstance(row, dict) and row.keys() >= ROW for row in before["rows"]):
        raise InputError(f"{path}: a row is none of `encdiff fields evaluate`; use another folder")
    methods = {row["method"] for row in now["rows"]}
    rows = [row for row in before["rows"] if row["method"] not in methods] + now["rows"]
    return now | {"rows": rows}


def report_rows(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows of a table, a row for each method, share observed and noise."""
    return HEADER, [_cells(row) for row in result["rows"]]


def markdown(result: Mapping[str, Any]) -> str:
    """Tables of Markdown, one for each score: a row for each noise and method, a column for each share observed."""
    shares = sorted({row["observed"] for row in result["rows"]})
    channels = ", ".join(result["data"]["channels"])
    protocol, parts = result["protocol"], []
    drawn = dict.fromkeys(
        f"{r['method']} by {r['sampler']}, {r['steps']} steps" for r in result["rows"] if "sampler" in r
    )
    said = (
        f"{protocol['count']} fields of {result['data']['name']}, {protocol['members']} members; in brackets {channels}"
    )
    parts.append("; ".join([said, *drawn]) + ".\n")
    header = ["noise", "method", *(f"{100 * share:g} % observed" for share in shares)]
    for title, name in SCORES.items():
        found: dict[tuple[float, str], dict[float, str]] = {}
        for row in result["rows"]:
            found.setdefault((row["noise"], row["method"]), {})[row["observed"]] = _mean(row, name)
        lines = [header, ["---"] * len(header)]
        for (noise, method), cells in sorted(found.items(), key=lambda item: item[0][0]):
            lines.append([f"{100 * noise:g} %", method, *(cells.get(share, "-") for share in shares)])
        parts.append(f"### {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    return "\n".join(parts)


def _mean(row: Mapping[str, Any], name: str) -> str:
    """Over the channels, and in brackets each."""
    value = row[name]
    if isinstance(value, float):
        return f"{value:.2g}"
    if value is None or value["mean"] is None:
        return "-"
    channels = value["channels"].values()
    each = " ".join("-" if v is None else f"{v:.3f}" for v in channels)
    return f"{value['mean']:.3f}" + (f" ({each})" if len(channels) > 1 else "")


def _cells(row: Mapping[str, Any]) -> list[str]:
    def said(number: float | None, digits: int) -> str:
        return "-" if number is None else f"{number:.{digits}f}"

    ratio = row.get("spread_to_error")
    return [
        row["method"], f"{100 * row['observed']:g} %", f"{100 * row['noise']:g} %", _mean(row, "nrmse"),
        _mean(row, "nrmse_unobserved"), _mean(row, "crps"), _mean(row, "coverage"),
        "-" if ratio is None else " ".join(said(value, 2) for value in ratio.values()),
        f"{row['seconds_per_field']:.2g}",
    ]  # fmt: skip
