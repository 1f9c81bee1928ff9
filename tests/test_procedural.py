"""The renderer: geometry against independent formulas, and each factor changing what it names and nothing else."""

import colorsys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encdiff.data import procedural as pr
from encdiff.data.procedural import FACTOR_SIZES, SHAPES, ProceduralShapes3D, render
from encdiff.errors import InputError

SIZE = 48
FLOOR, WALL, OBJECT, HIGHLIGHT = range(4)
VIEWS = [(s, k, o) for s in (0, 4, 7) for k in range(4) for o in (0, 7, 14)]


def levels(scale, shape, orientation, size=SIZE):
    """Brightness maps (size, size, 4) of a view given by factor values."""
    _, _, _, scales, _, degrees = pr.factor_labels()
    return pr.view(scales[scale], SHAPES[shape], degrees[orientation], size).reshape(size, size, 4)


def pixel(point, orientation, size=SIZE):
    """Where a point of the room appears: column, row (floats), by a pinhole camera written from its definition."""
    angle = np.deg2rad(np.linspace(-30, 30, 15)[orientation])
    eye = np.array([pr.CAMERA_DISTANCE * np.sin(angle), -pr.CAMERA_DISTANCE * np.cos(angle), pr.CAMERA_HEIGHT])
    forward = np.array([0, 0, pr.TARGET_HEIGHT]) - eye
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    offset = np.asarray(point) - eye
    x, y = offset @ right / (offset @ forward), offset @ up / (offset @ forward)
    return (x / pr.HALF_VIEW + 1) * size / 2 - 0.5, (1 - y / pr.HALF_VIEW) * size / 2 - 0.5


def distance_to(shape, points, scale):
    """Signed distance (n,) of points (n, 3) to the object: an independent description of the four solids."""
    x, y, z = points.T / scale
    flat = np.hypot(x, y)
    if shape == "sphere":
        return scale * (np.sqrt(flat**2 + (z - 1) ** 2) - 1)
    if shape == "capsule":
        return scale * (np.hypot(flat, z - z.clip(0.65, 1.75)) - 0.65)
    box = (abs(x) - 0.85, abs(y) - 0.85, abs(z - 0.85) - 0.85)
    sides = np.stack((flat - 0.85, abs(z - 0.9) - 0.9) if shape == "cylinder" else box)
    return scale * (np.linalg.norm(sides.clip(0), axis=0) + sides.max(axis=0).clip(max=0))


@pytest.mark.parametrize("shape", SHAPES)
def test_rays_meet_the_solid(shape):
    rng = np.random.default_rng()
    scale = rng.uniform(0.75, 1.25)
    origin = rng.normal(size=(3, 400)) * 0.4 + np.array([[1.0], [-6.0], [3.0]])
    aim = rng.uniform([-1.2, -1.2, 0], [1.2, 1.2, 3], (400, 3)).T
    aim[2] = np.minimum(aim[2], origin[2] - 0.1)  # the top is only ever seen from above
    rays = (aim - origin) * rng.uniform(0.5, 2, 400)  # of any length
    t, normal = pr.hit_object(shape, scale, origin, rays)
    hit = np.isfinite(t)
    assert 40 < hit.sum() < 390
    along = np.linspace(0, 6, 1500)
    inside = np.stack([distance_to(shape, (origin + s * rays).T, scale) for s in along]).T
    assert (inside[~hit] > -1e-9).all()  # a ray that misses never enters
    points = (origin + np.where(hit, t, 0) * rays).T[hit]
    assert np.abs(distance_to(shape, points, scale)).max() < 1e-9
    before = along < t[hit][:, None] - 1e-6
    assert (inside[hit][before] > 0).all()  # and it is the first meeting
    steps = 1e-6 * np.eye(3)
    slope = [distance_to(shape, points + s, scale) - distance_to(shape, points - s, scale) for s in steps]
    gradient = np.stack(slope) / 2e-6
    smooth = np.abs(np.linalg.norm(gradient, axis=0) - 1) < 1e-4  # away from edges
    assert smooth.mean() > 0.9
    np.testing.assert_allclose(normal[:, hit][:, smooth], gradient[:, smooth], atol=1e-4)


@pytest.mark.parametrize("orientation", [0, 5, 7, 14])
def test_room_is_where_a_pinhole_camera_sees_it(orientation):
    maps = levels(2, 2, orientation)
    rng = np.random.default_rng(orientation)
    corner = np.array([0, np.sqrt(2) * pr.WALL_DISTANCE])
    along = np.array([[-1, -1], [1, -1]]) / np.sqrt(2)  # the two walls, from the corner towards the camera
    seen = 0
    for reach, height, side in zip(
        rng.uniform(0, 3, 300), rng.uniform(0.3, 5, 300), rng.integers(0, 2, 300), strict=True
    ):
        foot = corner + reach * along[side]
        for point, surface in [((*foot, height), WALL), ((*(foot * 0.9), 0.0), FLOOR)]:
            column, row = np.rint(pixel(point, orientation)).astype(int)
            if 0 <= column < SIZE and 0 <= row < SIZE and not maps[row, column, OBJECT]:
                seen += 1
                assert maps[row, column, surface] > 0
    assert seen > 100
    column, row = np.rint(pixel((0, 0, 0.8), orientation)).astype(int)
    assert (maps[row, column, [FLOOR, WALL]] == 0).all() and maps[row, column, OBJECT] > 0


def test_orientation_moves_the_corner_of_the_walls():
    columns = []
    for orientation in range(15):
        top = levels(0, 3, orientation)[0, :, WALL].astype(int)
        columns.append(np.abs(np.diff(top)).argmax() + 0.5)
        height = next(h for h in np.linspace(2, 9, 400) if pixel((0, 3 * np.sqrt(2), h), orientation)[1] < 0)
        assert abs(columns[-1] - pixel((0, 3 * np.sqrt(2), height), orientation)[0]) <= 1.5
    assert (np.diff(columns) > 0).all() and columns[-1] - columns[0] > SIZE / 3


def test_sphere_covers_the_cone_it_should():
    fine = pr.SUBPIXELS
    for scale, radius in enumerate(np.linspace(0.75, 1.25, 8)):
        seen = levels(scale, 2, 7)[..., OBJECT] > 0
        steps = pr.HALF_VIEW * ((np.arange(SIZE * fine) + 0.5) * 2 / (SIZE * fine) - 1)
        x, y = np.meshgrid(steps, steps)
        centre = np.array([0, pr.CAMERA_DISTANCE, radius - pr.CAMERA_HEIGHT])
        forward = np.array([0, pr.CAMERA_DISTANCE, pr.TARGET_HEIGHT - pr.CAMERA_HEIGHT])
        forward /= np.linalg.norm(forward)
        rays = forward + x[..., None] * np.array([1, 0, 0]) + y[..., None] * np.array([0, forward[2], -forward[1]])
        cosine = rays @ centre / np.linalg.norm(rays, axis=-1) / np.linalg.norm(centre)
        cone = np.arccos(cosine) < np.arcsin(radius / np.linalg.norm(centre))
        np.testing.assert_array_equal(seen, cone.reshape(SIZE, fine, SIZE, fine).any(axis=(1, 3)))


@pytest.mark.parametrize("factor", [FLOOR, WALL, OBJECT])
def test_a_hue_changes_its_surface_and_nothing_else(factor):
    rng = np.random.default_rng(factor)
    for view in VIEWS:
        before = np.array([*rng.integers(0, 10, 3), *view])
        after = before.copy()
        after[factor] = (before[factor] + rng.integers(1, 10)) % 10
        one, two = render(np.stack([before, after]), SIZE)
        changed = (one != two).any(axis=-1)
        maps = levels(*view)
        seen = maps[..., factor] > 0
        assert not changed[~seen].any()
        pure = (maps[..., factor] > 40) & (np.delete(maps, factor, axis=-1) == 0).all(axis=-1)
        assert pure.sum() > 30 and changed[pure].all()


def test_surfaces_partition_the_picture():
    for view in VIEWS:
        maps = levels(*view).astype(int)
        assert maps.sum(axis=-1).max() <= 256 and (maps[..., :3].max(axis=-1) > 0).all()
        assert not (maps[..., HIGHLIGHT][maps[..., OBJECT] == 0]).any()


@pytest.mark.parametrize("factor", [3, 4, 5], ids=["scale", "shape", "orientation"])
def test_form_leaves_the_hues(factor):
    rng = np.random.default_rng(factor)
    hues = rng.permutation(10)[:3]
    for value in range(FACTOR_SIZES[factor]):
        factors = np.array([*hues, 4, 1, 7])
        factors[factor] = value
        image = render(factors[None], SIZE)[0]
        maps = levels(*factors[3:])
        for surface, hue in enumerate(hues):
            pure = (maps[..., surface] > 60) & (np.delete(maps, surface, axis=-1) == 0).all(axis=-1)
            for rgb in image[pure][::7]:
                error = colorsys.rgb_to_hsv(*(rgb / 255))[0] - hue / 10
                assert abs((error + 0.5) % 1 - 0.5) < 0.015


@pytest.mark.parametrize("factor", [3, 4], ids=["scale", "shape"])
def test_scale_and_shape_leave_the_room(factor):
    rng = np.random.default_rng(factor)
    for orientation in (0, 7, 14):
        factors = np.tile([*rng.integers(0, 10, 3), 4, 1, orientation], (FACTOR_SIZES[factor], 1))
        factors[:, factor] = np.arange(len(factors))
        images = render(factors, SIZE)
        room = [images[:, : SIZE // 8], images[:, : SIZE // 3, : SIZE // 8], images[:, -SIZE // 8 :, : SIZE // 4]]
        for part in room:  # above, beside and before the object and its shadow; contact shading fades below 3 levels
            assert np.abs(part.astype(int) - part[:1]).max() <= 3


def test_scale_grows_and_shapes_differ():
    areas = np.array([[(levels(s, k, 7)[..., OBJECT] > 0).sum() for k in range(4)] for s in range(8)])
    assert (np.diff(areas, axis=0) > 0).all()
    masks = np.stack([levels(4, k, 7)[..., OBJECT] > 0 for k in range(4)])
    for one in range(4):
        for two in range(one):
            assert (masks[one] ^ masks[two]).sum() > 20


def test_only_the_cube_turns_its_outline():
    for k, shape in enumerate(SHAPES):
        masks = np.stack([levels(4, k, o)[..., OBJECT] > 0 for o in range(15)])
        moved = (masks ^ masks[7]).sum(axis=(1, 2)).max()
        assert moved > 30 if shape == "cube" else moved <= 4


def test_every_view_is_different():
    views = np.stack(np.meshgrid([3], [6], [9], range(8), range(4), range(15), indexing="ij"), -1).reshape(-1, 6)
    images = render(views, 24).reshape(480, -1).astype(int)
    assert len(np.unique(images, axis=0)) == 480
    grid = images.reshape(8, 4, 15, -1)
    for axis in (0, 2):
        assert np.abs(np.diff(grid, axis=axis)).mean(axis=-1).min() > 0.3  # neighbours are told apart by eye


@pytest.mark.parametrize("size", [1, 7, 33])
def test_same_factors_same_bytes(size):
    rng = np.random.default_rng(size)
    factors = rng.integers(0, FACTOR_SIZES, (70, 6))
    images = render(factors, size)
    assert images.shape == (70, size, size, 3) and images.dtype == np.uint8
    order = rng.permutation(70)
    pr.view.cache_clear()
    np.testing.assert_array_equal(render(factors[order], size), images[order])
    np.testing.assert_array_equal(render(factors[5:6], size), images[5:6])
    assert render(factors[:0], size).shape == (0, size, size, 3)


def test_colours_are_the_named_hues():
    rng = np.random.default_rng(0)
    hue = rng.integers(0, 10)
    image = render(np.array([[0, hue, 0, 0, 2, 0]]), SIZE)[0]
    brightness = levels(0, 2, 0)[0, -1].astype(float)  # top right: wall only
    expected = np.rint(255 * np.array(colorsys.hsv_to_rgb(hue / 10, 0.9, 1.0))) * brightness[WALL] / 255
    assert brightness[[FLOOR, OBJECT, HIGHLIGHT]].sum() == 0
    np.testing.assert_allclose(image[0, -1], expected, atol=0.501)


def test_finer_sizes_than_the_original():
    sizes = (20, 10, 10, 8, 4, 29)
    coarse, fine = np.array([[3, 1, 2, 3, 1, 4]]), np.array([[6, 1, 2, 3, 1, 8]])
    np.testing.assert_array_equal(render(fine, SIZE, sizes), render(coarse, SIZE))


def test_labels_are_those_of_the_file():
    data = ProceduralShapes3D(8)
    assert len(data) == 480_000 and data.factor_sizes == FACTOR_SIZES and data.image_size == 8
    first, last, one = data.labels([0, 479_999, 15])
    np.testing.assert_array_equal(first, [0, 0, 0, 0.75, 0, -30])
    np.testing.assert_allclose(last, [0.9, 0.9, 0.9, 1.25, 3, 30], atol=1e-12)
    np.testing.assert_array_equal(one, [0, 0, 0, 0.75, 1, -30])
    assert data.labels([3]).dtype == np.float64


def test_sub_grid_takes_values_of_the_full_grid():
    full, part = ProceduralShapes3D(16), ProceduralShapes3D(16, (5, 3, 1, 4, 2, 5))
    expected = ([0, 2, 4, 6, 8], [0, 3, 6], [0], [0, 2, 5, 7], [0, 1], [0, 4, 7, 10, 14])
    assert [v.tolist() for v in part.values] == list(expected)
    rng = np.random.default_rng(1)
    indices = rng.integers(0, len(part), 40)
    same = np.stack([v[f] for v, f in zip(part.values, part.factors(indices).T, strict=True)], axis=1)
    np.testing.assert_array_equal(part.labels(indices), full.labels(full.indices(same)))
    np.testing.assert_array_equal(part.images(indices), full.images(full.indices(same)))


def test_explicit_grid_keeps_the_order_given():
    data = ProceduralShapes3D(16, ((7, 1), 2, (4,), 1, (3, 0), 3))
    assert data.factor_sizes == (2, 2, 1, 1, 2, 3)
    np.testing.assert_allclose(data.labels([0])[0], [0.7, 0, 0.4, 0.75, 3, -30])


@given(st.tuples(*(st.integers(1, n) for n in FACTOR_SIZES)), st.data())
def test_index_and_factors_round_trip(grid, draw):
    data = ProceduralShapes3D(4, grid)
    indices = draw.draw(st.lists(st.integers(0, len(data) - 1), max_size=8))
    factors = data.factors(indices)
    assert factors.dtype == np.int64 and factors.shape == (len(indices), 6)
    assert data.indices(factors).tolist() == indices
    weights = np.cumprod([1, *grid[:0:-1]])[::-1]  # last factor fastest
    assert (factors @ weights).tolist() == indices


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ProceduralShapes3D(0), "image_size: 0"),
        (lambda: ProceduralShapes3D(8, (10, 10)), "grid: 2 entries"),
        (lambda: ProceduralShapes3D(8, (11, 1, 1, 1, 1, 1)), "floor_hue; must be 1..10"),
        (lambda: ProceduralShapes3D(8, (1, 1, 1, 1, 0, 1)), "shape; must be 1..4"),
        (lambda: ProceduralShapes3D(8, (1, 1, 1, (8,), 1, 1)), "scale; indices must lie in 0..7"),
        (lambda: ProceduralShapes3D(8, (1, 1, 1, (2, 2), 1, 1)), "tuple of different indices"),
        (lambda: ProceduralShapes3D(8, (1, 1, 1, (), 1, 1)), "tuple of different indices"),
        (lambda: render(np.zeros((2, 5), int)), "factors: int64"),
        (lambda: render(np.zeros((2, 6))), "factors: float64"),
        (lambda: render(np.array([[0, 0, 0, 0, 4, 0]])), "outside 0..size-1"),
        (lambda: render(np.array([[0, -1, 0, 0, 0, 0]])), "outside 0..size-1"),
        (lambda: ProceduralShapes3D(8).images([480_000]), "indices: 480000"),
        (lambda: ProceduralShapes3D(8).images([-1]), "indices: -1"),
        (lambda: ProceduralShapes3D(8).images([0.5]), "indices: float64"),
        (lambda: ProceduralShapes3D(8).images([[1]]), "shape (1, 1)"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(InputError) as error:
        make()
    assert words in str(error.value) and "\n" not in str(error.value)
