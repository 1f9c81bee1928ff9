"""Where sensors are put, and what they measure of a known field: for training, evaluation and trying out."""

import numpy as np

from encdiff.errors import InputError
from encdiff.fields.grid import Grid
from encdiff.fields.sensors import Sensors


def random_pixels(grid: Grid, observed: float, rng: np.random.Generator) -> np.ndarray:
    """Centres (S, 2) of different random pixels, a share `observed` of all, at least one."""
    pixels = grid.height * grid.width
    if not 0 < observed <= 1:
        raise InputError(f"observed is {observed}, must be a share above 0 and at most 1")
    return grid.centres[rng.choice(pixels, max(1, round(observed * pixels)), replace=False)]


def lattice(grid: Grid, rows: int, columns: int) -> np.ndarray:
    """Points (rows * columns, 2) in rows and columns, each in the middle of its part of the domain."""
    if rows < 1 or columns < 1:
        raise InputError(f"rows and columns are {rows} and {columns}, must be at least 1")
    i, j = np.divmod(np.arange(rows * columns), columns)
    return grid.origin + grid.extent * (np.stack([j, i], axis=1) + 0.5) / [columns, rows]


def tracks(
    grid: Grid, count: int, times: np.ndarray, speed: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Moving sensors: `count` start anywhere and go straight, and measure at each of `times`.

    `speed` is in the domain's units of length for one of time. At the border they turn back; of a periodic domain they
    leave by one side and enter by the other. Returns points (count * T, 2) and times (count * T,), sensor by sensor.
    """
    if count < 1 or not speed >= 0:
        raise InputError(f"count and speed are {count} and {speed}, must be at least 1 and 0 or more")
    times = np.asarray(times, np.float64)
    begin, angle = rng.random((count, 1, 2)) * grid.extent, rng.uniform(0, 2 * np.pi, (count, 1))
    gone = speed * (times - times[0])
    at = (begin + np.stack([gone * np.cos(angle), gone * np.sin(angle)], axis=-1)) / grid.extent
    at = at % 1 if grid.periodic else 1 - abs(1 - at % 2)  # a triangle wave turns back at both ends
    return grid.origin + grid.extent * at.reshape(-1, 2), np.tile(times, count)


def measure(
    field: np.ndarray,
    grid: Grid,
    points: np.ndarray,
    sigma: np.ndarray | float = 0.0,
    rng: np.random.Generator | None = None,
    *,
    times: np.ndarray | None = None,
    when: np.ndarray | None = None,
) -> Sensors:
    """What sensors at points (S, 2) measure: each the value of its pixel and noise.

    Args:
        field: (C, H, W); of a field in time (T, C, H, W), with its `times` (T,) and, of each sensor, `when` (S,): the
            last frame at that time or before counts.
        sigma: the noise's standard deviation, a number or what broadcasts to (S, C); `rng` draws it.
    """
    points, shape = np.asarray(points, np.float64), np.shape(field)
    if shape[-3:] != grid.shape or len(shape) != (3 if times is None else 4):
        raise InputError(
            f"field is {shape}, must be {grid.shape}, or with times ({'T' if times is None else len(times)}, ..)"
        )
    x0, x1, y0, y1 = grid.domain
    if not ((points >= [x0, y0]) & (points <= [x1, y1])).all():
        raise InputError(f"points must lie in x {x0:g} to {x1:g}, y {y0:g} to {y1:g}")
    frames = np.asarray(field, np.float64).reshape(-1, len(grid.channels), grid.height * grid.width)
    frame = np.zeros(len(points), dtype=np.int64)
    if times is not None:
        when = np.full(len(points), times[-1]) if when is None else when
        frame = np.searchsorted(times, when, side="right") - 1
        if (frame < 0).any():
            raise InputError(f"when begins at {np.min(when):g}, before the first of times {times[0]:g}")
    values = frames[frame, :, grid.cells(points)]
    sigma = np.broadcast_to(sigma, values.shape)
    if not (np.isfinite(sigma) & (sigma >= 0)).all():
        raise InputError(f"sigma is {sigma.min():g} to {sigma.max():g}, must be 0 or more")
    if (sigma > 0).any():
        if rng is None:
            raise InputError("rng is None, must be given where sigma is above 0")
        values = values + sigma * rng.standard_normal(values.shape)
    return Sensors.of(points, values, sigma, None if times is None else when)


def scattered(
    fields: np.ndarray,
    grid: Grid,
    observed: float,
    sigma: np.ndarray | float = 0.0,
    times: np.ndarray | None = None,
    memory: float = 0.0,
    seed: int = 0,
    first: int = 0,
) -> list[Sensors]:
    """Sensors at random pixels of n fields (n, C, H, W), or (n, T, C, H, W) whose last frame is to be found.

    `observed` is their share of the pixels. Of fields in time each measured at a random frame of the last `memory`.
    Field i's are a function of (seed, first + i), of `observed` and sigma.
    """
    found = []
    for i, field in enumerate(fields):
        rng = np.random.default_rng((seed, first + i))
        points, when = random_pixels(grid, observed, rng), None
        if times is not None:
            when = rng.choice(times[times >= times[-1] - memory], len(points))
        found.append(measure(field, grid, points, sigma, rng, times=times, when=when))
    return found
