"""A user's table of sensors: a CSV file of what was measured where."""

import csv
import re
from pathlib import Path

import numpy as np

from encdiff.errors import InputError
from encdiff.fields.grid import Grid
from encdiff.fields.sensors import Sensors
from encdiff.files.reading import read_bytes
from encdiff.files.temporaries import atomic_path

BYTES = 2**24  # half a million sensors: a few were asked for
DELIMITERS = ",;\t"
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def read_sensors(path: str | Path, grid: Grid, time: float | None = None) -> Sensors:
    """The sensors of a CSV file; with `time`, those measured then or before.

    UTF-8, cells separated by commas, semicolons or tabs; blank lines and those that begin with # are passed over. The
    first line names the columns, in any order:

    - `x`, `y`: the place, in the units of the grid's domain;
    - a channel's name: its value, empty where it is not measured; `value` will do where there is one channel;
    - `t`: when it was measured;
    - `sigma`, or `sigma_` and a channel's name, which goes before: the standard deviation of the noise, 0 without it.

    Raises InputError, in one line with the file's, for anything else, and as `Sensors.check`; OSError for no file.
    """
    rows = _rows(path)
    if not rows:
        raise InputError(f"{path}: is empty, must begin with a line of column names, such as {_example(grid)}")
    line, header = rows[0]
    columns = _columns(f"{path}, line {line}", header, grid)
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise InputError(f"{path}, line {line}: has {len(row)} cells, must have {len(header)}, as the header has")
    lines = np.array([line for line, _ in rows[1:]], np.int64)
    table = {name: _numbers(path, name, lines, [row[at] for _, row in rows[1:]]) for name, at in columns.items()}
    sensors = _sensors(path, table, lines, grid)
    sensors.check(grid)
    return sensors if time is None else sensors.until(time)


def _rows(path: str | Path) -> list[tuple[int, list[str]]]:
    """Line numbers, from 1, and the cells of every line that holds some."""
    try:
        text = read_bytes(path, BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not text in UTF-8 ({error.reason}), must be a CSV file") from None
    lines = [(n, line) for n, line in enumerate(re.split(r"\r\n|\r|\n", text), 1) if line.lstrip()[:1] not in ("", "#")]
    delimiter = max(DELIMITERS, key=lines[0][1].count) if lines else ","
    return [(n, _cells(f"{path}, line {n}", line, delimiter)) for n, line in lines]


def _cells(place: str, line: str, delimiter: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter, strict=True))]
    except csv.Error as error:
        raise InputError(f"{place}: is no line of a CSV file ({error})") from None


def _columns(place: str, header: list[str], grid: Grid) -> dict[str, int]:
    """Where each column stands, by name; `value` by that of the one channel."""
    if all(map(NUMBER.fullmatch, header)):
        raise InputError(f"{place}: is of numbers, must be the names of the columns, such as {_example(grid)}")
    channels = grid.channels
    if len(channels) == 1 and "value" not in channels:
        header = [channels[0] if name == "value" else name for name in header]
    known = _known(grid)
    for name in header:
        if name not in known:
            raise InputError(f"{place}: has a column {name[:80]!r}, must have of {', '.join(known)}")
        if header.count(name) > 1:
            raise InputError(f"{place}: has two columns of {name}, must have one")
    for name in ("x", "y"):
        if name not in header:
            raise InputError(f"{place}: has no column {name}, must have x, y and a channel, such as {_example(grid)}")
    if not set(channels) & set(header):
        raise InputError(f"{place}: has no channel, must have at least one of {', '.join(channels)}")
    return {name: at for at, name in enumerate(header)}


def _known(grid: Grid) -> list[str]:
    """The names that columns may have; InputError where a channel's cannot be told from another or is no cell."""
    names = ["x", "y", *grid.channels, "t", "sigma", *(f"sigma_{name}" for name in grid.channels)]
    if len(set(names)) < len(names) or any(name != name.strip() or not name.isprintable() for name in names):
        own = ", ".join(grid.channels)
        raise InputError(f"channels are {own}; in a table they must have names other than x, y, t, sigma, sigma_...")
    return names


def _example(grid: Grid) -> str:
    return ",".join(("x", "y", *grid.channels))


def _numbers(path: str | Path, name: str, lines: np.ndarray, cells: list[str]) -> np.ndarray:
    """A column as float64; NaN for an empty cell, but of a place or time, which must be given."""
    needed = name in ("x", "y", "t")
    for line, cell in zip(lines, cells, strict=True):
        if not (NUMBER.fullmatch(cell) and np.isfinite(float(cell))) and (cell or needed):
            may = "" if needed else ", or empty where nothing is measured"
            raise InputError(f"{path}, line {line}: {name} is {cell[:80]!r}, must be a finite number{may}")
    return np.array([float(cell or "nan") for cell in cells])


def _sensors(path: str | Path, table: dict[str, np.ndarray], lines: np.ndarray, grid: Grid) -> Sensors:
    unknown = np.full(len(lines), np.nan)
    values = np.stack([table.get(name, unknown) for name in grid.channels], axis=1)
    own = np.stack([table.get(f"sigma_{name}", unknown) for name in grid.channels], axis=1)
    sigma = np.where(np.isnan(own), table.get("sigma", unknown)[:, None], own)
    for c, name in enumerate(grid.channels):
        if {"sigma", f"sigma_{name}"} & table.keys():
            missing = np.isnan(sigma[:, c]) & ~np.isnan(values[:, c])
            if missing.any():
                raise InputError(
                    f"{path}, line {lines[missing.argmax()]}: sigma of {name} is empty, must be a number; 0 if exact"
                )
    points = np.stack([table["x"], table["y"]], axis=1)
    return Sensors(points, values, np.nan_to_num(sigma), table.get("t"), lines, str(path))


def write_sensors(path: str | Path, sensors: Sensors, grid: Grid) -> None:
    """A CSV file that `read_sensors` reads as the same sensors, whole or not at all; raises as `Sensors.check`."""
    sensors.check(grid)
    _known(grid)
    measured = ~np.isnan(sensors.values)
    columns = {"x": sensors.points[:, 0], "y": sensors.points[:, 1]}
    if sensors.times is not None:
        columns["t"] = sensors.times
    columns |= {name: sensors.values[:, c] for c, name in enumerate(grid.channels) if measured[:, c].any()}
    sigma = np.where(measured, sensors.sigma, np.nan)
    columns |= {f"sigma_{name}": sigma[:, c] for c, name in enumerate(grid.channels) if (sigma[:, c] > 0).any()}
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow("" if np.isnan(number) else repr(float(number)) for number in row)
