import numpy as np
import pytest

from encdiff.errors import InputError
from encdiff.fields.grid import Grid
from encdiff.fields.kalman import EXACT, gaspari_cohn, update
from encdiff.fields.sensors import Sensors

GRID = Grid(("a", "b"), 3, 4)
N = 24  # 2 channels of 12 pixels
POINTS = [[0.1, 0.1], [0.9, 0.5], [0.4, 0.9], [0.4, 0.9]]
VALUES = [[0.3, np.nan], [-1.0, 2.0], [np.nan, 0.5], [0.1, 0.6]]
SIGMA = [[0.5, np.nan], [0.2, 1.0], [0.3, 0.7], [0.4, 0.1]]
SENSORS = Sensors.of(POINTS, VALUES, SIGMA)


@pytest.fixture
def rng():
    return np.random.default_rng(np.random.randint(2**31))


def operator(sensors: Sensors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """H (M, N), the values (M,) and the noise's variances (M,), from pixels found by hand."""
    rows, values, noise = [], [], []
    for (x, y), value, sigma in zip(sensors.points, sensors.values, sensors.sigma, strict=True):
        pixel = min(int(y * 3), 2) * 4 + min(int(x * 4), 3)
        for c in np.flatnonzero(~np.isnan(value)):
            rows.append(np.eye(N)[12 * c + pixel])
            values.append(value[c])
            noise.append(sigma[c] ** 2)
    return np.array(rows), np.array(values), np.array(noise)


def posterior(mean, covariance, sensors):
    """The Kalman formula, all observations at once: mean, covariance, I - K H and the normalised innovation w."""
    H, y, r = operator(sensors)
    S = H @ covariance @ H.T + np.diag(r)
    K = np.linalg.solve(S, H @ covariance).T
    A = np.eye(N) - K @ H
    return mean + K @ (y - H @ mean), A @ covariance, A, H.T @ np.linalg.solve(S, y - H @ mean)


def draw(rng, count):
    """Members of a Gaussian whose mean and covariance come along."""
    root, mean = rng.standard_normal((N, N)) / 3, rng.standard_normal(N)
    return (mean + rng.standard_normal((count, N)) @ root.T).reshape(count, *GRID.shape), mean, root @ root.T


@pytest.mark.parametrize("count", [2, 5, 25, 200])
def test_is_the_kalman_formula_of_the_ensemble(rng, count):
    members, _, _ = draw(rng, count)
    flat = members.reshape(count, N)
    mean, covariance, _, _ = posterior(flat.mean(0), np.cov(flat.T), SENSORS)
    found = update(members, SENSORS, GRID).reshape(count, N)
    np.testing.assert_allclose(found.mean(0), mean, rtol=0, atol=1e-10)
    np.testing.assert_allclose(np.cov(found.T), covariance, rtol=0, atol=1e-10)


def test_large_ensemble_has_the_exact_posterior(rng):
    """To first order the posterior's sampling errors are A (dm + dP w) and A dP A', dP being Wishart: five of them."""
    count = 4000
    members, mean, P = draw(rng, count)
    exact_mean, exact_P, A, w = posterior(mean, P, SENSORS)
    found = update(members, SENSORS, GRID).reshape(count, N)
    variance = A @ (P * (1 + w @ P @ w) + np.outer(P @ w, P @ w)) @ A.T / count
    z = (found.mean(0) - exact_mean) / np.sqrt(np.diag(variance))
    assert np.abs(z).max() < 5
    B = A @ P @ A.T
    z = (np.cov(found.T) - exact_P) / np.sqrt((np.outer(np.diag(B), np.diag(B)) + B**2) / count)
    assert np.abs(z).max() < 5
    wrong = np.cov(members.reshape(count, N).T) - exact_P  # the test can tell: an ensemble that nothing corrected
    assert np.abs(wrong / np.sqrt((np.outer(np.diag(B), np.diag(B)) + B**2) / count)).max() > 50


def test_exact_sensors_are_met(rng):
    members, _, _ = draw(rng, 25)
    sensors = Sensors.of([[0.1, 0.1], [0.9, 0.5]], [[3.0, np.nan], [-2.0, 1.0]])
    found = update(members, sensors, GRID)
    near = 20 * np.sqrt(EXACT)  # of deviations of 1 to 2
    np.testing.assert_allclose(found[:, 0, 0, 0], 3, atol=near)
    np.testing.assert_allclose(found[:, :, 1, 3], [[-2, 1]] * 25, atol=near)


def test_members_that_agree_stay(rng):
    members = np.tile(rng.standard_normal((1, *GRID.shape)), (5, 1, 1, 1))
    np.testing.assert_allclose(update(members, SENSORS, GRID), members, rtol=1e-14)
    exact = Sensors.of([[0.1, 0.1]], [[3.0, 1.0]])
    np.testing.assert_allclose(update(members, exact, GRID), members, rtol=1e-14)


def test_rounding_where_members_agree_corrects_nothing_elsewhere(rng):
    members, _, _ = draw(rng, 5)
    members[:, 0, 0, 0] = 1 + 1e-7 * rng.standard_normal(5)  # as float32 leaves it
    found = update(members, Sensors.of([[0.1, 0.1]], [[1.0, np.nan]]), GRID)
    np.testing.assert_allclose(found, members, atol=1e-3)


def test_input_is_not_written(rng):
    members, _, _ = draw(rng, 5)
    before = members.copy()
    update(members, SENSORS, GRID)
    np.testing.assert_array_equal(members, before)


def test_localised_update_is_the_formula_with_localised_covariance(rng):
    """Of one observation: gain = rho * P h / (h' P h + r), from distances by hand, on a domain in metres."""
    grid = Grid(("a", "b"), 3, 4, (0.0, 80.0, 0.0, 60.0))
    members, _, _ = draw(rng, 25)
    sensors = Sensors.of([[9.0, 11.0]], [[2.0, np.nan]], 0.5)  # in pixel (0, 0), whose centre is (10, 10)
    x, y = np.meshgrid([10, 30, 50, 70], [10, 30, 50])
    rho = np.tile(gaspari_cohn(np.hypot(x - 9, y - 11) / 20), (2, 1, 1))
    P = np.cov(members.reshape(25, N).T)
    gain = (rho.ravel() * P[:, 0] / (P[0, 0] + 0.25)).reshape(GRID.shape)
    found = update(members, sensors, grid, localisation=20.0)
    np.testing.assert_allclose(found.mean(0), members.mean(0) + gain * (2 - members[:, 0, 0, 0].mean()), atol=1e-12)
    np.testing.assert_array_equal(rho == 0, np.tile(np.hypot(x - 9, y - 11) >= 40, (2, 1, 1)))
    np.testing.assert_allclose(found[:, rho == 0], members[:, rho == 0], rtol=1e-13)
    variance = (found.var(0, ddof=1) / members.var(0, ddof=1))[rho > 0]
    assert (variance < 1).all()


def test_localisation_across_a_periodic_edge(rng):
    grid = Grid(("a", "b"), 3, 4, periodic=True)
    members, _, _ = draw(rng, 25)
    found = update(members, Sensors.of([[0.01, 0.5]], [[2.0, 2.0]], 0.1), grid, localisation=0.1)
    moved = np.abs(found - members).max((0, 1))[1] > 1e-12
    np.testing.assert_array_equal(moved, [True, False, False, True])


def test_localisation_lessens_the_error_of_25_members():
    """Of a Gaussian process of short range: chance covariances with far pixels do harm."""
    rng = np.random.default_rng(0)
    grid = Grid(("a",), 16, 16)
    apart = np.linalg.norm(grid.centres[:, None] - grid.centres, axis=2)
    root = np.linalg.cholesky(np.exp(-apart / 0.1))
    errors = {None: [], 0.3: []}
    for _ in range(20):
        fields = (rng.standard_normal((26, 256)) @ root.T).reshape(26, 1, 16, 16)
        truth, members = fields[0], fields[1:]
        cells = rng.choice(256, 20, replace=False)
        sensors = Sensors.of(grid.centres[cells], truth.reshape(-1)[cells], 0.05)
        for length, found in errors.items():
            found.append((update(members, sensors, grid, localisation=length).mean(0) - truth).std())
    assert np.mean(errors[0.3]) < 0.85 * np.mean(errors[None])


def test_gaspari_cohn():
    z = np.linspace(0, 3, 301)
    rho = gaspari_cohn(z)
    assert rho[0] == 1 and gaspari_cohn(np.array(1.0)) == pytest.approx(5 / 24) and (rho[200:] == 0).all()
    assert (np.diff(rho[:201]) < 0).all() and np.abs(np.diff(rho, 2)).max() < 4e-4, "smooth, 1e-4 times a curvature"
    points = np.random.default_rng(0).random((60, 2))
    apart = np.linalg.norm(points[:, None] - points, axis=2)
    assert np.linalg.eigvalsh(gaspari_cohn(apart / 0.3)).min() > -1e-12, "a correlation"


@pytest.mark.parametrize(
    "members, sensors, localisation, message",
    [
        (np.zeros((1, 2, 3, 4)), SENSORS, None, r"members is \(1, 2, 3, 4\), must be \(E, 2, 3, 4\), E at least 2"),
        (np.zeros((5, 2, 3, 3)), SENSORS, None, "must be"),
        (np.full((5, 2, 3, 4), np.nan), SENSORS, None, "members holds NaN"),
        (np.zeros((5, 2, 3, 4)), SENSORS, 0.0, "localisation is 0.0, must be a length above 0"),
        (np.zeros((5, 2, 3, 4)), SENSORS, np.nan, "localisation is nan"),
        (np.zeros((5, 2, 3, 4)), Sensors.of([[2.0, 0]], [[1.0, 1]]), None, "x is 2, must lie in 0 to 1"),
    ],
)
def test_bad_input(members, sensors, localisation, message):
    with pytest.raises(InputError, match=message) as error:
        update(members, sensors, GRID, localisation=localisation)
    assert "\n" not in str(error.value)
