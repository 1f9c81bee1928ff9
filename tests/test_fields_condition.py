"""What the network is told of sensors: the nearest of each pixel, masks, noise and ages."""

from dataclasses import replace

import numpy as np
import pytest
from _fields import CONFIG, TIMED, some_sensors

from encdiff.errors import InputError
from encdiff.fields import Grid, Sensors
from encdiff.fields.condition import describe_pixels, make_condition, nearest
from encdiff.fields.layouts import measure

GRIDS = [
    Grid(("a",), 6, 9, (0.0, 1.0, 0.0, 1.0)),
    Grid(("a",), 8, 5, (-2.0, 4.0, 10.0, 12.0), periodic=True),
    Grid(("a",), 7, 7, (0.0, 0.1, 5.0, 45.0), periodic=True),
]


def distances(grid: Grid, points: np.ndarray, ages: np.ndarray, speed: float) -> np.ndarray:
    """(H W, S) by the definition, in lengths of the longer side."""
    apart = np.abs(grid.centres[:, None] - points)
    if grid.periodic:
        apart = np.minimum(apart, grid.extent - apart)
    return np.sqrt((apart**2).sum(-1) / grid.extent.max() ** 2 + (ages * speed) ** 2)


@pytest.mark.parametrize("speed", [0.0, 0.4])
@pytest.mark.parametrize("count", [1, 3, 30])
@pytest.mark.parametrize("grid", GRIDS, ids=["plain", "periodic", "narrow"])
def test_nearest_is_the_nearest(grid, count, speed):
    rng = np.random.default_rng(count)
    points, ages = grid.origin + grid.extent * rng.random((count, 2)), rng.integers(0, 4, count) / 2
    found, by_hand = nearest(grid, points, ages, speed), distances(grid, points, ages, speed)
    pixels = np.arange(grid.height * grid.width)
    own = (grid.cells(points) == pixels[:, None]) & (ages == 0)  # these go before all others
    by_hand[~own & own.any(1, keepdims=True)] = np.inf
    np.testing.assert_allclose(by_hand[pixels, found], by_hand.min(1), rtol=1e-12)


def test_ages_count_as_lengths_at_a_right_angle():
    grid = Grid(("a",), 1, 10)
    points, ages = np.array([[0.05, 0.5], [0.95, 0.5]]), np.array([1.0, 0.0])
    # from pixel j the old one is as far as the new one where (0.1 j)^2 + speed^2 = (0.1 (9 - j))^2: 0.3 for j = 4
    assert nearest(grid, points, ages, 0.29).tolist() == [0] * 5 + [1] * 5
    assert nearest(grid, points, ages, 0.31).tolist() == [0] * 4 + [1] * 6
    assert nearest(grid, points, ages, 0.0).tolist() == nearest(grid, points).tolist() == [0] * 5 + [1] * 5


def test_the_mask_is_the_pixels_that_hold_a_sensor():
    """Also where a sensor of the next pixel lies nearer to the centre."""
    grid = CONFIG.grid  # pixels of a side of 1/16
    points = np.array([[0.001, 0.5 / 16], [1.001 / 16, 0.5 / 16], [0.99999, 1.0], [0.5, 0.5]])
    told = describe_pixels(Sensors.of(points, np.arange(8.0).reshape(4, 2)), CONFIG)
    values, mask, sigma = told
    assert np.abs(points[1] - grid.centres[0]).sum() < np.abs(points[0] - grid.centres[1]).sum()
    expected = np.zeros(256)
    expected[grid.cells(points)] = 1
    assert expected.sum() == 4 and (mask.reshape(2, 256) == expected).all() and not sigma.any()
    in_units = values.reshape(2, 256).T * CONFIG.std + CONFIG.mean
    np.testing.assert_allclose(in_units[grid.cells(points)], np.arange(8.0).reshape(4, 2), rtol=1e-6)


def test_the_sensors_of_a_pixel_count_together():
    centre = CONFIG.grid.centres[17]
    points, values = centre + np.array([[0.02, 0.0], [0.0, -0.001], [0.0, 0.03]]), [[1, 2], [3, 4], [8, 7]]

    def told(sigma, times=None, config=CONFIG):
        value, _, noise, *_ = describe_pixels(Sensors.of(points, values, sigma, times), config, times and 1.0)
        return value[:, 1, 1] * config.std + config.mean, noise[:, 1, 1] * config.std

    value, noise = told(0.0)  # exact: the mean
    assert value == pytest.approx([4, 13 / 3], rel=1e-6) and not noise.any()
    value, noise = told([[0, 0.1], [0.1, 0.1], [0.1, 0.2]])  # what is exact alone; by inverse variances
    assert value == pytest.approx([1, (2 + 4 + 7 / 4) / 2.25], rel=1e-6)
    assert noise == pytest.approx([0, 0.1 / 2.25**0.5], rel=1e-6)
    value, noise = told([[1e-200] * 2, [1e-200] * 2, [1, 1]])  # whose squares no number holds
    assert value == pytest.approx([2, 3], rel=1e-6) and np.isfinite(noise).all()
    config = replace(CONFIG, memory=2.0, speed=1.0)
    assert told(0.0, [1.0, 1.0, 0.0], config)[0] == pytest.approx([2, 3], rel=1e-6)  # of the field's time alone


def test_channels_are_measured_apart():
    sensors = Sensors.of([[0.1, 0.1], [0.9, 0.9]], [[1, np.nan], [np.nan, 2]], [[0.4, 0], [0, 0.2]])
    values, mask, sigma = describe_pixels(sensors, CONFIG)
    assert (values[0] == np.float32((1 - 5) / 2)).all() and (values[1] == np.float32((2 + 3) / 0.5)).all()
    assert mask.sum((1, 2)).tolist() == [1, 1] and mask[0, 1, 1] == mask[1, 14, 14] == 1
    assert sigma[0] == pytest.approx(0.4 / 2) and sigma[1] == pytest.approx(0.2 / 0.5)
    nowhere = Sensors.of([[0.1, 0.1]], [[1, np.nan]], 0.1)
    assert not describe_pixels(nowhere, CONFIG)[:, 1].any()


def test_what_is_known_exactly():
    sensors = Sensors.of([[0.1, 0.1], [0.9, 0.9]], [[1.0, 2.0], [3.0, 4.0]], [[0, 0.1], [0, 0]])
    exact = make_condition([sensors], CONFIG).exact[0]
    assert exact[:, 1, 1].tolist() == [1, 0] and exact[:, 14, 14].tolist() == [1, 1] and exact.sum() == 3


def test_ages():
    sensors = Sensors.of([[0.1, 0.1], [0.9, 0.9], [0.1, 0.1]], [1.0, 2.0, 9.0], times=[10.0, 11.5, 12.0])
    condition = make_condition([sensors, sensors], TIMED, [11.5, None])
    first, last = condition.age
    assert first[0, 1, 1] == (11.5 - 10) / 2 and first[0, 14, 14] == 0  # in units of the memory
    assert condition.mask[0].sum() == 1 and condition.mask[0, 0, 14, 14] == 1  # what is of another time is not known
    assert last[0, 1, 1] == 0 and last[0, 14, 14] == 0.5 / 2 and condition.values[1, 0, 1, 1] == (9 - 5) / 2
    untimed = Sensors.of(sensors.points[:2], [1.0, 2.0])
    assert not make_condition([untimed], TIMED).age.any() and make_condition([untimed], TIMED).mask.sum() == 2


def test_what_is_older_than_the_memory_is_left_out():
    sensors = Sensors.of([[0.1, 0.1], [0.9, 0.9]], [1.0, 2.0], times=[0.3, 1.1])
    assert make_condition([sensors], TIMED, [2.3]).age.max() == pytest.approx(1)  # 2.3 - 0.3 is rounded to above 2
    left = make_condition([sensors], TIMED, [2.5])
    assert (left.values == (2 - 5) / 2).all()
    with pytest.raises(InputError, match="time is 4, the last of sensors before is at 1.1; the model remembers 2"):
        make_condition([sensors], TIMED, [4.0])


def test_times_that_do_not_fit():
    timed = some_sensors(times=np.arange(1.0, 10.0), channels=1)
    with pytest.raises(InputError, match="time is 0.5, before the first of sensors at 1"):
        make_condition([timed], TIMED, [0.5])
    with pytest.raises(InputError, match="sensors: has times, but the model was trained on fields without"):
        make_condition([timed], replace(TIMED, memory=0.0, speed=0.0))
    with pytest.raises(InputError, match="times are 2, must be 1"):
        make_condition([timed], TIMED, [1.0, 2.0])


@pytest.mark.parametrize(
    "points, values, options, message",
    [
        (np.zeros((0, 2)), np.zeros((0, 2)), {}, "sensors: holds no sensors, must hold at least one"),
        ([[0.5, 0.5]], [1.0], {}, "has values of 1 channels, must be 2: a, b"),
        ([[0.5, 0.5], [1.2, 0.5]], np.ones((2, 2)), {}, "sensor 1: x is 1.2, must lie in 0 to 1; are the units"),
        ([[0.5, np.nan]], np.ones((1, 2)), {}, "sensor 0: y is nan, must lie in"),
        ([[0.5, 0.5]], [[np.nan, np.nan]], {}, "sensor 0: has no value"),
        ([[0.5, 0.5]], [[np.inf, 0]], {}, "sensor 0: value is inf, must lie in -1e"),
        ([[0.5, 0.5]], np.ones((1, 2)), {"sigma": -1}, "sensor 0: sigma is -1, must be 0 or more"),
        ([[0.5, 0.5]], np.ones((1, 2)), {"sigma": np.nan}, "sensor 0: sigma is nan, must be 0 or more"),
        ([[0.5, 0.5]], np.ones((1, 2)), {"times": np.nan}, "sensor 0: t is nan, must be finite"),
        ([[0.5, 0.5]] * 2, [[1, 1], [1, 2]], {}, "sensor 1: value is 2.0, on sensor 0 at the same place and time 1.0"),
    ],
)
def test_impossible_sensors(points, values, options, message):
    with pytest.raises(InputError, match=message) as error:
        Sensors.of(points, values, **options).check(CONFIG.grid)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "points, values, options, message",
    [
        ([0.5, 0.5], [1.0], {}, r"points \(2,\) and values \(1, 1\) must be \(S, 2\) and \(S, C\)"),
        ([[0.5, 0.5]], [1.0, 2.0], {}, r"points \(1, 2\) and values \(2, 1\)"),
        ([[0.5, 0.5]], [1.0], {"sigma": [1, 2, 3]}, "sigma and times must be numbers, or fit"),
        ([[0.5, 0.5]], [1.0], {"times": [1, 2]}, "sigma and times must be numbers, or fit"),
    ],
)
def test_shapes_that_do_not_fit(points, values, options, message):
    with pytest.raises(InputError, match=message):
        Sensors.of(points, values, **options)


def test_values_in_other_units_are_refused():
    with pytest.raises(
        InputError, match="sensors, sensor 1: a value is .* deviations from the mean of the fields that"
    ):
        describe_pixels(Sensors.of([[0.1, 0.1], [0.5, 0.5]], [[5, -3], [1200, -3]]), CONFIG)


def test_what_is_measured_must_lie_in_the_field():
    field = np.zeros(CONFIG.grid.shape)
    with pytest.raises(InputError, match="points must lie in x 0 to 1, y 0 to 1"):
        measure(field, CONFIG.grid, np.array([[2.0, 0.5]]))
    with pytest.raises(InputError, match=r"field is \(3, 2, 16, 16\), must be \(2, 16, 16\)"):
        measure(np.zeros((3, 2, 16, 16)), CONFIG.grid, np.array([[0.5, 0.5]]))
