import warnings

import numpy as np
import pytest
from scipy.special import ndtri

from encdiff.errors import InputError
from encdiff.fields.baselines import AMPLITUDES, BASELINES, NUGGET, cubic, fit_process, kriging, linear, nearest
from encdiff.fields.grid import Grid
from encdiff.fields.scores import coverage
from encdiff.fields.sensors import Sensors

GRID = Grid(("a", "b"), 12, 16, (100.0, 140.0, -10.0, 20.0))
TORUS = Grid(GRID.channels, GRID.height, GRID.width, GRID.domain, periodic=True)
ONE = Grid(("a",), 16, 16)


@pytest.fixture
def rng():
    return np.random.default_rng(np.random.randint(2**31))


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def places(rng, count, grid=GRID):
    return grid.origin + grid.extent * rng.random((count, 2))


def pixels(grid, function):
    """A field (H, W) of x, y at the pixels' centres."""
    return function(grid.centres).reshape(grid.height, grid.width)


def plane(points):
    return 3 + 0.2 * points[:, 0] - 0.7 * points[:, 1]


CORNERS = [[100, -10], [140, -10], [100, 20], [140, 20]]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("grid", [GRID, TORUS], ids=["plain", "periodic"])
def test_shapes_and_channels(rng, name, grid):
    """Each channel of its own sensors alone, one without any NaN."""
    points, values = places(rng, 20), rng.standard_normal((20, 2))
    values[:7, 0] = np.nan
    whole = BASELINES[name](Sensors.of(points, values), grid)
    assert whole.dtype == np.float64 and whole.shape == (25 if name == "kriging" else 1, *grid.shape)
    assert np.isfinite(whole).all()
    values[:, 1] = np.nan
    part = BASELINES[name](Sensors.of(points[7:], values[7:]), grid)
    np.testing.assert_array_equal(part[:, 0], whole[:, 0])
    assert np.isnan(part[:, 1]).all()


@pytest.mark.parametrize("periodic", [False, True])
def test_nearest_by_brute_force(rng, periodic):
    points, values = places(rng, 20), rng.standard_normal((20, 2))
    apart = np.abs(GRID.centres[:, None] - points)
    if periodic:
        apart = np.minimum(apart, [40, 30] - apart)
    expected = values[np.hypot(*apart.T).T.argmin(1)].T.reshape(1, *GRID.shape)
    np.testing.assert_array_equal(nearest(Sensors.of(points, values), TORUS if periodic else GRID), expected)


@pytest.mark.parametrize("method", [linear, cubic])
def test_a_plane_is_met(rng, method):
    points = np.concatenate([CORNERS, places(rng, 20)])
    field = method(Sensors.of(points, np.stack([plane(points), np.ones(24)], 1)), GRID)
    np.testing.assert_allclose(field[0, 0], pixels(GRID, plane), atol=1e-5 if method is cubic else 1e-11)
    np.testing.assert_allclose(field[0, 1], 1, atol=1e-12)


@pytest.mark.parametrize("method", [linear, cubic])
def test_beyond_the_triangles_the_nearest(rng, method):
    points = np.array([[110.0, 0], [120, 0], [110, 11]])
    sensors = Sensors.of(points, np.stack([plane(points)] * 2, 1))
    x, y = GRID.centres.T
    inside = ((x > 110) & (y > 0) & ((x - 110) / 10 + y / 11 < 1)).reshape(GRID.height, GRID.width)
    expected = np.where(inside, pixels(GRID, plane), nearest(sensors, GRID)[0, 0])
    assert inside.any() and not inside.all()
    np.testing.assert_allclose(method(sensors, GRID)[0, 0], expected, atol=1e-5 if method is cubic else 1e-11)


@pytest.mark.parametrize("method", [linear, cubic])
@pytest.mark.parametrize("points", [CORNERS[:1], CORNERS[:2], [[100, -10], [110, -2.5], [140, 20]]])
def test_without_a_triangle_the_nearest(method, points):
    sensors = Sensors.of(points, np.arange(2.0 * len(points)).reshape(-1, 2))
    np.testing.assert_array_equal(method(sensors, GRID), nearest(sensors, GRID))


def test_cubic_is_better_than_linear_and_linear_than_nearest(rng):
    def wave(points):
        return np.sin(points[:, 0] / 8) * np.cos(points[:, 1] / 8)

    points = np.concatenate([CORNERS, places(rng, 150)])
    sensors = Sensors.of(points, np.stack([wave(points)] * 2, 1))
    errors = [np.abs(BASELINES[name](sensors, GRID).mean(0)[0] - pixels(GRID, wave)).mean() for name in BASELINES]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 8 * errors[3], dict(zip(BASELINES, errors, strict=True))


@pytest.mark.parametrize("name", BASELINES)
def test_a_periodic_field_is_seen_across_the_edge(rng, name):
    """Shifted by whole pixels around the domain, sensors give the shifted field."""
    grid = Grid(("a",), 12, 16, GRID.domain, periodic=True)
    points, values = places(rng, 30), rng.standard_normal(30)
    field = BASELINES[name](Sensors.of(points, values), grid)
    moved = grid.origin + (points - grid.origin + [7 * 2.5, 5 * 2.5]) % grid.extent
    shifted = BASELINES[name](Sensors.of(moved, values), grid)
    # the cubic's slopes depend on all sensors, a little on where the tiles around the domain end; Kriging iterates
    close = {"cubic": 2e-2, "kriging": 1e-3}.get(name, 1e-9)
    differs = np.abs(shifted - np.roll(field, (5, 7), (2, 3))) > close
    assert differs.mean() < 0.01, "but for ties"
    apart = BASELINES[name](Sensors.of(points, values), Grid(("a",), 12, 16, GRID.domain))
    assert (np.abs(apart - field) > 5 * close).mean() > 0.02, "the edge matters"


@pytest.mark.parametrize("name", BASELINES)
def test_values_of_one_place_are_averaged(rng, name):
    """Inverse variances 4 and 1; two ends of a periodic domain are one place; an exact value goes alone."""
    points, values = places(rng, 8), rng.standard_normal((8, 2))
    twice = np.concatenate([points, points[:1], [[100, 5], [140, 5]]])
    several = np.concatenate([values, [[5, 6]], [[1, 2], [3, 4]]])
    sigma = np.concatenate([[[0.5, 0]], np.full((7, 2), 0.1), [[1, 1]], np.ones((2, 2))])
    once = np.concatenate([points, [[100, 5]]])
    averaged = np.concatenate([[[(4 * values[0, 0] + 5) / 5, values[0, 1]]], values[1:], [[2, 3]]])
    combined = np.concatenate([[[5**-0.5, 0]], np.full((7, 2), 0.1), np.full((1, 2), 0.5**0.5)])
    found = BASELINES[name](Sensors.of(twice, several, sigma), TORUS)
    np.testing.assert_allclose(found, BASELINES[name](Sensors.of(once, averaged, combined), TORUS), atol=1e-3)


def matern(points, others, length, nu):
    r = np.linalg.norm(points[:, None] - others, axis=2) / length
    if nu == np.inf:
        return np.exp(-r * r / 2)
    a = np.sqrt(2 * nu) * r
    return {0.5: 1, 1.5: 1 + a, 2.5: 1 + a + a * a / 3}[nu] * np.exp(-a)


def gaussian_process(rng, points, length, nu):
    covariance = matern(points, points, length, nu) + 1e-10 * np.eye(len(points))
    return np.linalg.cholesky(covariance) @ rng.standard_normal(len(points))


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5, np.inf])
def test_kriging_is_the_formula(rng, nu):
    """Mean and variance by hand from the fitted variance, length and smoothness, at noisy and exact sensors."""
    points = rng.random((40, 2))
    values, sigma = 7 + 3 * gaussian_process(rng, points, 0.3, nu), np.where(np.arange(40) < 20, 0.3, 0.0)
    mean, scale = values.mean(), values.std()
    process = fit_process(points, (values - mean) / scale, sigma / scale, ONE)
    variance, length = process.kernel_.k1.constant_value, process.kernel_.k2.length_scale
    K = variance * matern(points, points, length, process.kernel_.k2.nu)
    K += np.diag((sigma / scale) ** 2 + NUGGET)
    k = variance * matern(points, ONE.centres, length, process.kernel_.k2.nu)
    expected = mean + k.T @ np.linalg.solve(K, values - mean)
    deviation = scale * np.sqrt(np.maximum(variance - (k * np.linalg.solve(K, k)).sum(0), 0))
    found = kriging(Sensors.of(points, values, sigma), ONE, members=4)[:, 0].reshape(4, -1)
    np.testing.assert_allclose(found.mean(0), expected, atol=1e-5)
    np.testing.assert_allclose((found[3] - found[0]) / (2 * ndtri(7 / 8)), deviation, atol=1e-4)
    np.testing.assert_allclose((found[2] - found[1]) / (2 * ndtri(5 / 8)), deviation, atol=1e-4)


def test_fit_is_the_most_likely(rng):
    """No other length, variance or smoothness of a coarse grid has a greater marginal likelihood."""
    points = rng.random((30, 2))
    values = gaussian_process(rng, points, 0.2, 1.5)
    values = (values - values.mean()) / values.std()
    best = fit_process(points, values, np.full(30, 0.1), ONE).log_marginal_likelihood_value_

    def likelihood(nu, length, variance):
        K = variance * matern(points, points, length, nu) + (0.01 + NUGGET) * np.eye(30)
        fit, volume = values @ np.linalg.solve(K, values), np.linalg.slogdet(K)[1]
        return -(fit + volume + 30 * np.log(2 * np.pi)) / 2

    others = [
        likelihood(nu, length, variance)
        for nu in (0.5, 1.5, 2.5, np.inf)
        for length in np.geomspace(0.04, 9, 25)
        for variance in np.geomspace(*AMPLITUDES, 25)
    ]
    assert max(others) - 1e-6 < best < max(others) + 1


def test_kriging_meets_exact_sensors(rng):
    cells = rng.choice(256, 30, replace=False)
    field = gaussian_process(rng, ONE.centres, 0.3, 1.5)
    found = kriging(Sensors.of(ONE.centres[cells], field[cells]), ONE)[:, 0].reshape(25, -1)
    np.testing.assert_allclose(found[:, cells], np.tile(field[cells], (25, 1)), atol=1e-3)


def test_kriging_covers_draws_of_its_own_process():
    """90 % bands of 20 fields; hyperparameters are fitted to 60 sensors each, so a little less than 0.9 is expected."""
    rng = np.random.default_rng(0)
    members, truths = [], []
    for _ in range(20):
        field = gaussian_process(rng, ONE.centres, 0.3, 1.5)
        cells = rng.choice(256, 60, replace=False)
        noisy = field[cells] + 0.1 * rng.standard_normal(60)
        members.append(kriging(Sensors.of(ONE.centres[cells], noisy, 0.1), ONE))
        truths.append(field.reshape(1, 16, 16))
    shares = coverage(np.stack(members), np.stack(truths), drawn=False)
    assert shares.mean() == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize(
    "points, values, sigma",
    [
        ([[0.5, 0.5]], [2.0], 0.0),
        ([[0.5, 0.5], [0.1, 0.1]], [2.0, 2.0], 0.0),
        ([[0.5, 0.5], [0.5, 0.5]], [1.0, 3.0], 0.1),
    ],
    ids=["one", "equal", "one place"],
)
@pytest.mark.parametrize("name", BASELINES)
def test_few_sensors_give_a_constant(name, points, values, sigma):
    found = BASELINES[name](Sensors.of(points, values, sigma), ONE)
    np.testing.assert_allclose(found.mean(0), 2, atol=1e-9)
    assert found.std(0).max() <= sigma


@pytest.mark.parametrize("name", BASELINES)
def test_unfortunate_sensors(rng, name):
    """Many close together, and values of any size."""
    points = np.concatenate([0.5 + 1e-9 * rng.random((30, 2)), 0.2 + 1e-5 * rng.random((30, 2)), rng.random((5, 2))])
    for scale in (1e-200, 1e-12, 1.0, 1e23):
        values = scale * (1e6 + rng.standard_normal(65))
        assert np.isfinite(BASELINES[name](Sensors.of(points, values), ONE)).all()


def test_bad_input():
    sensors = Sensors.of([[0.5, 0.5]], [1.0])
    with pytest.raises(InputError, match="members is 0, must be at least 1"):
        kriging(sensors, ONE, members=0)
    for method in BASELINES.values():
        with pytest.raises(InputError, match="sensors: has values of 1 channels, must be 2: a, b"):
            method(sensors, GRID)
