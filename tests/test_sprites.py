"""Procedural sprites: areas, positions and turns against formulas, and an exact grid."""

import numpy as np
import pytest

from encdiff.data import SubGrid, open_dataset
from encdiff.data.sprites import FACTOR_SIZES, RADIUS, SHAPES, ProceduralSprites, render
from encdiff.errors import InputError

SIZE = 96


def moments(image):
    """Area, centre x and y, and the angle of the long axis, in units of the image's width."""
    weight = image[..., 0].astype(float) / 255
    at = (np.arange(len(image)) + 0.5) / len(image)
    area = weight.sum()
    x, y = (weight.sum(0) @ at) / area, (weight.sum(1) @ at) / area
    dx, dy = at - x, at - y
    xx, yy, xy = weight.sum(0) @ dx**2, weight.sum(1) @ dy**2, dy @ weight @ dx
    return area / len(image) ** 2, x, y, 0.5 * np.arctan2(2 * xy, xx - yy)


@pytest.mark.parametrize("shape, area", [("square", 2.0), ("ellipse", np.pi / 2), ("heart", 3.6619 / 1.43**2)])
def test_area_follows_the_scale(shape, area):
    # in units of the radius: a square of diagonal 2, half-axes 1 and 1/2, and the heart curve's known area
    for scale in range(6):
        found, *_ = moments(render([[SHAPES.index(shape), scale, 7, 16, 16]], SIZE)[0])
        radius = RADIUS * (0.5 + 0.1 * scale)
        assert found == pytest.approx(area * radius**2, rel=0.01)


@pytest.mark.parametrize("shape", [0, 1])
def test_position_is_the_centre(shape):
    for x, y in [(0, 0), (31, 0), (0, 31), (31, 31), (5, 20)]:
        _, *centre, _ = moments(render([[shape, 5, 3, x, y]], SIZE)[0])
        np.testing.assert_allclose(centre, RADIUS + (1 - 2 * RADIUS) * np.array([x, y]) / 31, atol=1e-3)


def test_turn_is_clockwise_by_nine_degrees():
    for k in range(20):
        *_, angle = moments(render([[1, 5, k, 15, 16]], SIZE)[0])
        difference = np.rad2deg(angle) - 9 * k
        assert (difference + 90) % 180 - 90 == pytest.approx(0, abs=0.5)


def test_heart_points_down_at_zero_and_turns_by_a_quarter():
    upright, quarter = (render([[2, 5, k, 0, 0]], 100)[0, :36, :36, 0].astype(int) for k in (0, 10))
    np.testing.assert_array_equal(upright, upright[:, ::-1])
    rows = np.flatnonzero(upright.any(axis=1))
    assert (upright[rows[3]] > 0).sum() > 2 * (upright[rows[-4]] > 0).sum()  # wide above, pointed below
    assert np.abs(quarter - np.rot90(upright, -1)).mean() < 3


def test_every_shape_stays_inside_at_the_border():
    kinds = [[s, 5, o] for s in range(3) for o in range(0, 40, 7)]
    areas = [
        render(np.array([[*kind, x, y] for kind in kinds]), 256).astype(float).sum(axis=(1, 2, 3))
        for x, y in ((16, 16), (0, 0), (31, 31))
    ]
    np.testing.assert_allclose(areas[1:], areas[:1] * 2, rtol=0.01)


def test_pictures_differ_but_for_symmetry():
    data = SubGrid(ProceduralSprites(32), (3, 6, 8, 3, 3))
    images = data.images(np.arange(len(data))).reshape(3, 6, 8, 9, -1)
    for shape, distinct in enumerate([2, 4, 8]):  # of eight turns by 45 degrees
        assert len(np.unique(images[shape].reshape(6 * 8 * 9, -1), axis=0)) == 6 * distinct * 9


@pytest.mark.parametrize("size", [1, 2, 5, 17, 64])
def test_bytes_do_not_depend_on_the_batch(size):
    rng = np.random.default_rng()
    factors = rng.integers(0, FACTOR_SIZES, (50, 5))
    images = render(factors, size)
    assert images.shape == (50, size, size, 3) and images.dtype == np.uint8
    order = rng.permutation(50)
    np.testing.assert_array_equal(render(factors[order], size), images[order])
    np.testing.assert_array_equal(render(factors[31:32], size), images[31:32])
    assert render(factors[:0], size).shape == (0, size, size, 3)


def test_resolutions_agree():
    fine, coarse = render([[2, 4, 11, 9, 20]], 128)[0], render([[2, 4, 11, 9, 20]], 16)[0]
    assert np.abs(fine.reshape(16, 8, 16, 8, 3).mean(axis=(1, 3)) - coarse).max() < 32


def test_grid():
    data = open_dataset("sprites", 8)
    assert len(data) == 737_280 and data.factor_sizes == (3, 6, 40, 32, 32) and data.image_size == 8
    np.testing.assert_allclose(data.labels([737_279])[0], [2, 1, 2 * np.pi * 39 / 40, 1, 1])
    part = open_dataset("sprites:3,2,4,3,3")
    assert part.factor_sizes == (3, 2, 4, 3, 3) and part.image_size == 64 and part.spec == "sprites:3,2,4,3,3"
    assert [v.tolist() for v in part.values] == [[0, 1, 2], [0, 5], [0, 10, 20, 30], [0, 16, 31], [0, 16, 31]]
    np.testing.assert_array_equal(part.images([7])[0], render([[0, 0, 0, 31, 16]])[0])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ProceduralSprites(0), "image_size: 0"),
        (lambda: open_dataset("sprites:4,1,1,1,1"), "4 values of shape; must be 1..3"),
        (lambda: open_dataset("sprites:1,1"), "grid: 2 entries; must be 5"),
        (lambda: open_dataset("sprites:a"), "sprites:a: must be values per factor such as 3,6,40,32,32"),
        (lambda: render([[0, 0, 40, 0, 0]]), "outside 0..size-1"),
        (lambda: render([[0, 0, 0, 0]]), "factors: int64"),
        (lambda: ProceduralSprites(8).images([737_280]), "indices: 737280"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(InputError) as error:
        make()
    assert words in str(error.value)
