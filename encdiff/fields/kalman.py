"""An ensemble of fields corrected by a few more observations: the ensemble Kalman update, in its square-root form.

A serial square-root filter (Whitaker and Hamill 2002), one observation after the other. With independent noise its mean
and covariance are exactly those of the Kalman formula with the ensemble's own covariance. Perturbed observations give
that in expectation only: their noise, of E draws, correlates by chance with the members', an error of order
1 / sqrt(E), which 25 members do not hide.
"""

import numpy as np

from encdiff.errors import InputError
from encdiff.fields.grid import Grid
from encdiff.fields.sensors import Sensors

# Variance of an exact value's noise, relative to the members' of its channel, averaged over pixels. Were it 0, members
# that agree at a pixel but for rounding would be corrected elsewhere by that rounding's chance covariances.
EXACT = 1e-8


def update(members: np.ndarray, sensors: Sensors, grid: Grid, *, localisation: float | None = None) -> np.ndarray:
    """Members (E, C, H, W), E >= 2, corrected to agree with the sensors, as float64 (E, C, H, W).

    Every pixel and channel moves by its covariance with the members' values at a sensor's pixel, so that a measured
    channel corrects the others. Members that all agree at a sensor cannot be corrected by it. A sigma below
    sqrt(EXACT) times the channel's spread, 0 too, counts as that; `times` are not looked at.

    localisation: a length in the domain's units; covariances are multiplied by Gaspari and Cohn's correlation (1999,
    eq. 4.10), which falls to 0 at twice this distance, since 25 members have chance covariances with far pixels. The
    result then depends, a little, on the order of the sensors.

    Raises InputError for members of other shapes or values, and as `Sensors.check`.
    """
    members = _checked(members, grid)
    sensors.check(grid)
    if localisation is not None and not 0 < localisation < np.inf:
        raise InputError(f"localisation is {localisation}, must be a length above 0")
    flat = members.reshape(len(members), -1)
    mean = flat.mean(0)
    deviations = np.where(np.ptp(flat, 0) > 0, flat - mean, 0.0)  # the mean of equal numbers is rounded
    least = EXACT * deviations.var(0, ddof=1).reshape(len(grid.channels), -1).mean(1)
    pixels = grid.cells(sensors.points)
    for s, c in np.argwhere(~np.isnan(sensors.values)):
        state = c * grid.height * grid.width + pixels[s]
        noise = max(sensors.sigma[s, c] ** 2, least[c])
        weight = 1.0 if localisation is None else _weights(sensors.points[s], grid, localisation)
        _assimilate(mean, deviations, state, sensors.values[s, c], noise, weight)
    return (mean + deviations).reshape(members.shape)


def _assimilate(mean, deviations, state: int, value: float, noise: float, weight: np.ndarray | float) -> None:
    """One observation of element `state`, in place: mean (N,), deviations (E, N), weight (N,) of the covariances."""
    seen = deviations[:, state].copy()
    variance = seen @ seen / (len(seen) - 1)
    if variance == 0:
        return
    gain = weight * (seen @ deviations) / (len(seen) - 1) / (variance + noise)
    mean += gain * (value - mean[state])
    # the reduced gain with which the deviations' covariance is the formula's, their eq. 13
    deviations -= np.outer(seen, gain / (1 + np.sqrt(noise / (variance + noise))))


def _weights(point: np.ndarray, grid: Grid, length: float) -> np.ndarray:
    """Localisation about a point, (C H W,)."""
    apart = np.abs(grid.centres - point)
    if grid.periodic:
        apart = np.minimum(apart, grid.extent - apart)
    return np.tile(gaspari_cohn(np.hypot(*apart.T) / length), len(grid.channels))


def gaspari_cohn(distance: np.ndarray) -> np.ndarray:
    """A fifth-order correlation like a Gaussian's with compact support: 1 at 0, 5/24 at 1, 0 from 2 on."""
    z = np.minimum(np.abs(distance), 2.0)
    near = ((((-z / 4 + 1 / 2) * z + 5 / 8) * z - 5 / 3) * z * z) + 1
    far = ((((z / 12 - 1 / 2) * z + 5 / 8) * z + 5 / 3) * z - 5) * z + 4 - 2 / (3 * np.maximum(z, 1))
    return np.where(z <= 1, near, np.maximum(far, 0))


def _checked(members: np.ndarray, grid: Grid) -> np.ndarray:
    members = np.asarray(members, np.float64)
    if members.ndim != 4 or members.shape[1:] != grid.shape or len(members) < 2:
        raise InputError(f"members is {members.shape}, must be (E, {', '.join(map(str, grid.shape))}), E at least 2")
    if not np.isfinite(members).all():
        raise InputError("members holds NaN or infinite values, must be finite")
    return members
