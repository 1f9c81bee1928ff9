"""From sensors to what is known of each pixel: its nearest sensor, exactly, by scipy's KD-tree."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.spatial import cKDTree

from encdiff.errors import InputError
from encdiff.fields.config import FieldConfig
from encdiff.fields.grid import Grid
from encdiff.fields.network import Condition
from encdiff.fields.sensors import Sensors, merging

FARTHEST = 30  # deviations of a channel: a value beyond is of other fields, or in other units


def nearest(grid: Grid, points: np.ndarray, ages: np.ndarray | None = None, speed: float = 0.0) -> np.ndarray:
    """For every pixel the index of the nearest of S points (S, 2): int64 (H W,).

    Distances are measured in lengths of the domain's longer side, on a periodic domain across its ends; with `ages`
    (S,) a point is farther by age * speed, at a right angle. A pixel's own point of age 0 goes before any other.
    """
    side = grid.extent.max()
    at, places = (grid.centres - grid.origin) / side, (points - grid.origin) / side
    box = grid.extent / side if grid.periodic else np.zeros(2)
    if grid.periodic:
        places = places % box
    if ages is not None and speed:
        at, places = (np.column_stack([a, z]) for a, z in ((at, np.zeros(len(at))), (places, ages * speed)))
        box = np.append(box, 0.0)
    tree = cKDTree(places, boxsize=box if grid.periodic else None)
    _, found = tree.query(at)
    own = np.arange(len(points)) if ages is None else np.flatnonzero(ages == 0)
    cells = grid.cells(points[own])
    distance = np.linalg.norm(points[own] - grid.centres[cells], axis=1)
    farthest_first = np.argsort(-distance, kind="stable")
    found[cells[farthest_first]] = own[farthest_first]  # the last of a pixel's counts
    return found


def describe_pixels(sensors: Sensors, config: FieldConfig, time: float | None = None) -> np.ndarray:
    """What a field's pixels are told by sensors: values, mask, sigma [and age], float32 (3 or 4, C, H, W).

    In units of the network: values and sigma standardised, ages by the configuration's memory. `time` is the field's;
    what was measured later, or longer before than that memory, is left out.
    """
    grid = config.grid
    sensors.check(grid)
    if time is not None:
        sensors = sensors.until(time, config.memory)
    age = np.zeros(len(sensors)) if sensors.times is None or time is None else time - sensors.times
    values = (sensors.values - config.mean) / config.std
    sensors.refuse(
        np.nanmax(abs(values), axis=1) > FARTHEST,
        lambda s: (
            f"a value is {np.nanmax(abs(values[s])):.3g} deviations from the mean of the fields that were learnt,"
            f" must be at most {FARTHEST}; are the units theirs?"
        ),
    )
    told = np.zeros((3 + config.timed, len(config.channels), grid.height * grid.width), dtype=np.float32)
    for c in range(len(config.channels)):
        measured = ~np.isnan(values[:, c])
        if not measured.any():
            continue
        sigma = sensors.sigma[:, c] / config.std[c]
        points, value, sigma, ages = _merged(
            grid, *(part[measured] for part in (sensors.points, values[:, c], sigma, age))
        )
        found = nearest(grid, points, ages, config.speed)
        told[0, c], told[2, c] = value[found], sigma[found]
        told[1, c] = (grid.cells(points)[found] == np.arange(len(found))) & (ages[found] == 0)
        if config.timed:
            told[3, c] = ages[found] / config.memory
    return told.reshape(*told.shape[:2], grid.height, grid.width)


def _merged(
    grid: Grid, points: np.ndarray, values: np.ndarray, sigma: np.ndarray, ages: np.ndarray
) -> list[np.ndarray]:
    """One sensor, where its first is, for all of a pixel that measured at the field's time (`merging`)."""
    now = ages == 0
    cells, first, of = np.unique(grid.cells(points[now]), return_index=True, return_inverse=True)
    if len(cells) == now.sum():
        return [points, values, sigma, ages]
    weights, together = merging(of, sigma[now])
    merged = points[now][first], np.bincount(of, weights * values[now]), together, np.zeros(len(cells))
    return [np.concatenate([a, b[~now]]) for a, b in zip(merged, (points, values, sigma, ages), strict=True)]


def make_condition(
    sensors: Sequence[Sensors],
    config: FieldConfig,
    times: Sequence[float | None] | None = None,
    device: torch.device | str = "cpu",
) -> Condition:
    """The condition of B reconstructions, from the sensors of each, at the fields' times.

    Raises InputError where sensors do not fit the configuration (`Sensors.check`), have times where the model knows
    none, and where a time lies before a reconstruction's first sensor, or too long after its last (`Sensors.until`).
    """
    times = [None] * len(sensors) if times is None else list(times)
    if len(times) != len(sensors):
        raise InputError(f"times are {len(times)}, must be {len(sensors)}, one for each set of sensors")
    parts = []
    for one, time in zip(sensors, times, strict=True):
        if one.times is not None and not config.timed:
            raise InputError(f"{one.source}: has times, but the model was trained on fields without; leave them out")
        parts.append(describe_pixels(one, config, _time_of(one, time)))
    told = torch.from_numpy(np.stack(parts)).to(device)
    return Condition(*told.unbind(1))


def _time_of(sensors: Sensors, time: float | None) -> float | None:
    """The field's time: as given, else that of the latest sensor."""
    if sensors.times is None:
        return None
    return float(sensors.times.max()) if time is None else time
