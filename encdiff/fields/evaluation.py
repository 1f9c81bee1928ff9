"""Reconstructions of held-out fields scored: how many sensors, how noisy, and by which method."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from encdiff.data import describe
from encdiff.errors import InputError
from encdiff.fields.baselines import BASELINES
from encdiff.fields.grid import Grid
from encdiff.fields.layouts import scattered
from encdiff.fields.model import FieldModel
from encdiff.fields.sampling import SAMPLER, STEPS
from encdiff.fields.scores import LEVELS, coverage_curve, interval, score, spread_to_error
from encdiff.fields.sensors import Sensors
from encdiff.fields.store import FieldData

OBSERVED, NOISE = (0.003, 0.01, 0.03, 0.1), (0.0, 0.05, 0.1, 0.2)
Method = Callable[[Sequence[Sensors], int, int], np.ndarray]  # of n fields, members and seed: (n, E, C, H, W)
Progress = Callable[[int, int], None]


def of_model(model: FieldModel, data: FieldData | None = None, **options: Any) -> Method:
    """A model's reconstructions, of fields in time at the `data`'s last; `options` as of `FieldModel.reconstruct`."""
    timed = {} if data is None or data.times is None else {"time": float(data.times[-1])}

    def reconstruct(sensors: Sequence[Sensors], members: int, seed: int) -> np.ndarray:
        return model.reconstruct(sensors, members, seed=seed, **timed | options).members

    if model.config.objective == "diffusion":
        reconstruct.options = {"sampler": SAMPLER, "steps": STEPS} | options  # type: ignore[attr-defined]
    return reconstruct


def of_baseline(name: str, grid: Grid) -> Method:
    """Those of a method that learns nothing, by its name in `BASELINES`."""
    if name not in BASELINES:
        raise InputError(f"method is {name!r}, must be one of {', '.join(BASELINES)}")
    method = BASELINES[name]

    def reconstruct(sensors: Sequence[Sensors], members: int, seed: int) -> np.ndarray:
        return np.stack([method(one, grid, seed, members) for one in sensors])

    if name == "kriging":
        reconstruct.quantiles = True  # type: ignore[attr-defined]
    return reconstruct


def evaluate_fields(
    methods: Mapping[str, Method],
    data: FieldData,
    *,
    observed: Sequence[float] = OBSERVED,
    noise: Sequence[float] = NOISE,
    count: int = 32,
    members: int = 25,
    memory: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Every method on the last `count` fields of the data, for each share of pixels observed and each noise.

    Args:
        methods: by name, see `of_model` and `of_baseline`; all are given the same sensors. One whose members are
            quantiles, not draws, has the attribute `quantiles`.
        data: whose last samples no method was trained on.
        observed: shares of the pixels with a sensor.
        noise: the deviation of the sensors' noise, in standard deviations of each channel over the data.
        members: of an ensemble.
        memory: of fields in time, how far back measurements may lie; 0: at the field's own time.

    Returns a dict for JSON: the protocol, the data and `rows`, one for each method, share and noise; errors relative to
    the truth's root mean square, CRPS, spread and error in standard deviations of the channel, means over fields. What
    is not a finite number, as of a method that says nothing of a channel, is None.
    """
    if not 1 <= count <= len(data):
        raise InputError(f"count is {count}, must be 1 to {len(data)}, the fields of {data.name}")
    grid, (_, std) = data.grid, data.statistics()
    fields = data.read(np.arange(len(data) - count, len(data)))
    truth = fields if data.times is None else fields[:, -1]
    rows: list[dict[str, Any]] = []
    cells = [(share, level) for share in observed for level in noise]
    for i, (share, level) in enumerate(cells):
        sensors = scattered(fields, grid, share, level * std, data.times, memory, seed, first=len(data) - count)
        here = np.stack([pixels_of(one, grid, data.times) for one in sensors])
        for j, (name, method) in enumerate(methods.items()):
            began = time.perf_counter()
            found = method(sensors, members, seed)
            seconds = (time.perf_counter() - began) / count
            rows.append(
                {"method": name, "observed": share, "noise": level, "seconds_per_field": seconds}
                | getattr(method, "options", {})
                | _finite(scored(found, truth, here, std, grid, drawn=not getattr(method, "quantiles", False)))
            )
            if progress:
                progress(i * len(methods) + j + 1, len(cells) * len(methods))
    about = {"count": count, "members": members, "memory": memory, "seed": seed}
    return {"protocol": about, "data": describe(data), "rows": rows}


def pixels_of(sensors: Sensors, grid: Grid, times: np.ndarray | None) -> np.ndarray:
    """True where a sensor measured at the last of the times, bool (1, H, W)."""
    now = sensors if sensors.times is None or times is None else sensors.select(sensors.times == times[-1])
    found = np.zeros(grid.height * grid.width, dtype=bool)
    found[grid.cells(now.points)] = True
    return found.reshape(1, grid.height, grid.width)


def scored(
    members: np.ndarray, truth: np.ndarray, observed: np.ndarray, std: np.ndarray, grid: Grid, *, drawn: bool = True
) -> dict[str, Any]:
    """The scores of one method, means over fields and channels, and of each channel by name."""
    found = score(members, truth, observed, drawn=drawn)
    in_deviations = ("crps", "spread", "error")
    scaled = {k: value / std if k in in_deviations else value for k, value in found._asdict().items()}
    ensemble = members.shape[1] > 1
    result: dict[str, Any] = {}
    for name, value in scaled.items():
        if not ensemble and name in ("coverage", "spread"):
            result[name] = None
            continue
        mean, low, high = interval(value.mean(1))
        by_channel = dict(zip(grid.channels, value.mean(0).tolist(), strict=True))
        result[name] = {"mean": float(mean), "interval": [float(low), float(high)], "channels": by_channel}
    if ensemble:
        ratio = spread_to_error(found.spread, found.error, members.shape[1], drawn=drawn)
        result["spread_to_error"] = dict(zip(grid.channels, ratio.tolist(), strict=True))
        curve = coverage_curve(members, truth, LEVELS, drawn=drawn).mean((1, 2))
        result["curve"] = {f"{level:g}": float(share) for level, share in zip(LEVELS, curve, strict=True)}
    return result


def _finite(value: Any) -> Any:
    """A result for JSON, which knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
