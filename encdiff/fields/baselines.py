"""Whole fields from sensors without learning: the nearest sensor, linear and cubic interpolation, Kriging.

Every method takes Sensors and their Grid and returns float64 (E, C, H, W): 1 field, Kriging an ensemble of `members`.
Channels are reconstructed one by one; one that is measured nowhere is NaN throughout. `times` are not looked at. On a
periodic grid sensors are seen across its edges. Values at one and the same place are averaged by their inverse
variances; where some are exact, these alone. Errors are those of `Sensors.check`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from scipy.interpolate import CloughTocher2DInterpolator, LinearNDInterpolator
from scipy.spatial import QhullError, cKDTree
from scipy.special import ndtri
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

from encdiff.errors import InputError
from encdiff.fields.grid import Grid
from encdiff.fields.sensors import Sensors, merging

SMOOTHNESS = (0.5, 1.5, 2.5, np.inf)  # of Matern kernels: from fields with jumps to the Gaussian's smooth ones
NUGGET = 1e-10  # added to every variance, of values standardised; keeps the matrix definite
AMPLITUDES = (1e-3, 1e5)  # bounds of the process's variance, of values standardised


def nearest(sensors: Sensors, grid: Grid, seed: int = 0, members: int = 1) -> np.ndarray:
    """The value of the nearest sensor: Voronoi cells. float64 (1, C, H, W); seed and members change nothing."""
    return _each_channel(sensors, grid, lambda points, values, sigma: _nearest(points, values, grid)[None])


def linear(sensors: Sensors, grid: Grid, seed: int = 0, members: int = 1) -> np.ndarray:
    """Linear on the Delaunay triangles between sensors, beyond them the nearest; float64 (1, C, H, W).

    Fewer than 3 sensors, or all on one line, have no triangle: the nearest everywhere. seed and members change nothing.
    """
    return _each_channel(sensors, grid, lambda p, v, _: _triangles(LinearNDInterpolator, p, v, grid)[None])


def cubic(sensors: Sensors, grid: Grid, seed: int = 0, members: int = 1) -> np.ndarray:
    """As `linear`, piecewise cubic and once continuously differentiable (Clough and Tocher)."""
    return _each_channel(sensors, grid, lambda p, v, _: _triangles(CloughTocher2DInterpolator, p, v, grid)[None])


def kriging(sensors: Sensors, grid: Grid, seed: int = 0, members: int = 25) -> np.ndarray:
    """Gaussian process regression, float64 (members, C, H, W); nothing is drawn, so seed changes nothing.

    Member e is, pixel by pixel, the quantile (e + 1/2) / E of the predictive Gaussian of the field without noise: mean,
    spread, band and CRPS are those of its marginals, while one member alone is no plausible field. `fit_process` has
    the model. A channel whose values are all equal says nothing of how it varies: its members agree, but for a part of
    the noise.
    """
    if members < 1:
        raise InputError(f"members is {members}, must be at least 1")
    quantiles = ndtri((np.arange(members) + 0.5) / members)[:, None]

    def predict(points, values, sigma):
        mean, scale = values.mean(), values.std() or sigma.max()
        if not scale:
            return np.full((members, grid.height, grid.width), mean)
        process = fit_process(points, (values - mean) / scale, sigma / scale, grid)
        with _silenced(UserWarning, "Predicted variances smaller than 0"):  # by rounding, at exact sensors
            at, deviation = process.predict(_embedded(grid.centres - grid.origin, grid), return_std=True)
        return (mean + scale * (at + quantiles * deviation)).reshape(members, grid.height, grid.width)

    return _each_channel(sensors, grid, predict)


BASELINES: dict[str, Callable[..., np.ndarray]] = {
    "nearest": nearest, "linear": linear, "cubic": cubic, "kriging": kriging,
}  # fmt: skip


def fit_process(points: np.ndarray, values: np.ndarray, sigma: np.ndarray, grid: Grid) -> GaussianProcessRegressor:
    """The Gaussian process of points (S, 2), from the grid's origin, and standardised values (S,) of known sigma (S,).

    Mean 0, variance and length by the marginal likelihood, of the Matern kernels of SMOOTHNESS the most likely. Lengths
    lie between half a pixel and ten domains. On a periodic grid each axis is a circle, in 4 dimensions, between whose
    points the distance is the chord: so the kernel stays positive definite.
    """
    low, high = (grid.extent / [grid.width, grid.height]).min() / 2, 10 * grid.extent.max()
    start = grid.extent.max() / 10
    fitted = []
    for nu in SMOOTHNESS:
        kernel = ConstantKernel(1.0, AMPLITUDES) * Matern(max(start, low), (low, high), nu=nu)
        process = GaussianProcessRegressor(kernel, alpha=sigma**2 + NUGGET)
        with _silenced(ConvergenceWarning, "The optimal value found|lbfgs failed to converge"):  # at a bound, or flat
            fitted.append(process.fit(_embedded(points, grid), values))
    return max(fitted, key=lambda process: process.log_marginal_likelihood_value_)


def _embedded(points: np.ndarray, grid: Grid) -> np.ndarray:
    if not grid.periodic:
        return points
    angle, radius = 2 * np.pi * points / grid.extent, grid.extent / (2 * np.pi)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _each_channel(sensors: Sensors, grid: Grid, method: Callable[..., np.ndarray]) -> np.ndarray:
    """`method(points, values, sigma)` -> (E, H, W) of each channel's sensors, with points from the grid's origin."""
    sensors.check(grid)
    points = sensors.points - grid.origin
    if grid.periodic:
        points = points % grid.extent  # one of the domain's two edges
    fields = []
    for values, sigma in zip(sensors.values.T, sensors.sigma.T, strict=True):
        there = ~np.isnan(values)
        fields.append(method(*_merged(points[there], values[there], sigma[there])) if there.any() else None)
    count = next(len(field) for field in fields if field is not None)
    unknown = np.full((count, grid.height, grid.width), np.nan)
    return np.stack([unknown if field is None else field for field in fields], axis=1)


def _merged(points: np.ndarray, values: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One value for each place, and its sigma."""
    places, which = np.unique(points, axis=0, return_inverse=True)
    which = which.reshape(-1)
    if len(places) == len(points):
        return points, values, sigma
    weights, sigma = merging(which, sigma)
    return places, np.bincount(which, weights * values), sigma


def _nearest(points: np.ndarray, values: np.ndarray, grid: Grid) -> np.ndarray:
    tree = cKDTree(points, boxsize=grid.extent if grid.periodic else None)
    return values[tree.query(grid.centres - grid.origin)[1]].reshape(grid.height, grid.width)


def _triangles(interpolator: Callable, points: np.ndarray, values: np.ndarray, grid: Grid) -> np.ndarray:
    field = _nearest(points, values, grid)
    if grid.periodic:
        shifts = grid.extent * np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(-1, 1, 2)
        points, values = (points + shifts).reshape(-1, 2), np.tile(values, 9)
    if len(points) < 3:
        return field
    mean, scale = values.mean(), values.std() or 1.0  # the cubic's tolerance is of values about 1
    try:
        with _silenced(Warning, "Gradient estimation did not converge"):
            found = interpolator(points, (values - mean) / scale)(grid.centres - grid.origin)
    except QhullError:  # all on one line
        return field
    found = mean + scale * found.reshape(field.shape)
    return np.where(np.isnan(found), field, found)


@contextmanager
def _silenced(category: type[Warning], begins: str) -> Iterator[None]:
    """Without one warning, by its class and its beginning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", begins, category)
        yield
