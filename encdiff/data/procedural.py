"""A ray-traced room with the six factors of Shapes3D, rendered on demand: the data set that needs no download.

An object rests on the floor before the corner of two walls; the camera orbits around it. Units: the radius of the
sphere at scale 1. Axes: x right, y away from the camera, z up. Which surface a pixel sees and how brightly depends on
scale, shape and orientation only (480 views in the full grid), so views are traced once and kept; hues are a product.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from encdiff.data.dataset import Dataset, Factors, Indices, check_factors, grid_values
from encdiff.errors import InputError

FACTOR_NAMES = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
FACTOR_SIZES = (10, 10, 10, 8, 4, 15)
SHAPES = ("cube", "cylinder", "sphere", "capsule")
SCALES = (0.75, 1.25)
ORIENTATIONS = (-30.0, 30.0)  # degrees of the camera around the vertical axis
SATURATION, VALUE = 0.9, 1.0

CAMERA_DISTANCE, CAMERA_HEIGHT, TARGET_HEIGHT, HALF_VIEW = 6.5, 3.2, 1.25, 0.37  # HALF_VIEW: tangent of half the angle
WALL_DISTANCE = 3.0  # from the object's axis to either wall
WALL_NORMALS = np.array([[1.0, -1.0, 0.0], [-1.0, -1.0, 0.0]]) / np.sqrt(2)  # left, right; they meet behind the object
LIGHT = np.array([[-2.5], [-4.0], [7.0]])
UP = np.array([[0.0], [0.0], [1.0]])
TINY = 1e-12  # keeps divisors from 0
SUBPIXELS = 2  # each pixel averages 2 x 2 rays
CHUNK = 32  # images coloured at once: small enough for the cache


def factor_labels(sizes: Sequence[int] = FACTOR_SIZES) -> tuple[np.ndarray, ...]:
    """The float64 labels that `3dshapes.h5` stores for each factor: hues 0..0.9, scales, shape numbers, degrees."""
    hues = tuple(np.arange(n) / n for n in sizes[:3])
    return (
        *hues,
        np.linspace(*SCALES, sizes[3]),
        np.arange(sizes[4], dtype=np.float64),
        np.linspace(*ORIENTATIONS, sizes[5]),
    )


def render(factors: Factors, image_size: int = 64, sizes: Sequence[int] = FACTOR_SIZES) -> np.ndarray:
    """uint8 (n, image_size, image_size, 3) pictures of integer factors (n, 6), each in 0..sizes-1.

    The order is FACTOR_NAMES. Hues divide the circle, scales and orientations their ranges, into `sizes` values.
    The same factors give the same bytes, whatever else is in the batch.
    """
    factors = check_factors(factors, tuple(sizes))
    labels = factor_labels(sizes)
    palettes = [np.array([colorsys.hsv_to_rgb(h, SATURATION, VALUE) for h in hues]) for hues in labels[:3]]
    white = np.ones((len(factors), 3))
    colours = np.stack([p[f] for p, f in zip(palettes, factors.T[:3], strict=True)] + [white], axis=1)
    colours = np.rint(255 * colours).astype(np.float32)  # (n, 4, 3): floor, wall, object, highlight
    out = np.empty((len(factors), image_size * image_size, 3), np.uint8)
    for start in range(0, len(factors), CHUNK):
        part = slice(start, start + CHUNK)
        views = [view(labels[3][s], SHAPES[k], labels[5][o], image_size) for s, k, o in factors[part, 3:]]
        # Whole numbers below 2**24, so the product is exact and does not depend on the order of summation.
        total = np.stack(views).astype(np.float32) @ colours[part]
        out[part] = np.minimum(total / 255 + 0.5, 255)
    return out.reshape(-1, image_size, image_size, 3)


@lru_cache(maxsize=512)
def view(scale: float, shape: str, degrees: float, image_size: int) -> np.ndarray:
    """Brightness uint8 (image_size**2, 4) of floor, wall, object and highlight in every pixel; 0 where not seen."""
    eye, rays = camera(image_size * SUBPIXELS, np.deg2rad(degrees))
    t_floor = np.where(rays[2] < 0, -eye[2] / np.minimum(rays[2], -TINY), np.inf)
    slope = WALL_NORMALS @ rays  # negative where a ray approaches the wall
    t_walls = np.where(slope < 0, -(WALL_DISTANCE + WALL_NORMALS @ eye) / np.minimum(slope, -TINY), np.inf)
    t_object, normal = hit_object(shape, scale, eye, rays)
    depth = np.stack([t_floor, *t_walls, t_object])
    nearest = depth.argmin(axis=0)

    points = eye + depth.min(axis=0) * rays
    room = np.column_stack([UP, WALL_NORMALS.T, UP])
    diffuse, highlight = shade(points, np.where(nearest == 3, normal, room[:, nearest]), rays)
    diffuse = np.where(nearest == 3, np.minimum(diffuse, 1 - highlight), diffuse * shadow(shape, scale, points))

    seen = nearest == np.arange(4)[:, None]
    maps = np.stack([seen[0] * diffuse, (seen[1] | seen[2]) * diffuse, seen[3] * diffuse, seen[3] * highlight])
    maps = maps.reshape(4, image_size, SUBPIXELS, image_size, SUBPIXELS).mean(axis=(2, 4))
    levels = np.ascontiguousarray(np.rint(255 * maps).astype(np.uint8).reshape(4, -1).T)
    levels.flags.writeable = False  # every later picture of this view shares them
    return levels


def camera(pixels: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Position (3, 1) and unit rays (3, pixels**2), row by row from the top left; `angle` in radians."""
    steps = HALF_VIEW * ((np.arange(pixels) + 0.5) * 2 / pixels - 1)
    right, down = (grid.ravel() for grid in np.meshgrid(steps, steps))
    pitch = np.arctan2(CAMERA_HEIGHT - TARGET_HEIGHT, CAMERA_DISTANCE)
    ahead, drop = np.cos(pitch), np.sin(pitch)
    rays = np.stack([right, ahead - down * drop, -drop - down * ahead])
    rays /= np.sqrt((rays**2).sum(axis=0))
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    return turn @ np.array([[0.0], [-CAMERA_DISTANCE], [CAMERA_HEIGHT]]), turn @ rays


def shade(points: np.ndarray, normals: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ambient plus Lambert light, and a Blinn-Phong highlight, each (n,) in 0..1."""
    light = LIGHT - points
    light /= np.sqrt((light**2).sum(axis=0))
    half = light - rays
    half /= np.sqrt((half**2).sum(axis=0))
    highlight = np.maximum((normals * half).sum(axis=0), 0)
    return 0.4 + 0.6 * np.maximum((normals * light).sum(axis=0), 0), 0.35 * highlight**40


def shadow(shape: str, scale: float, points: np.ndarray) -> np.ndarray:
    """Factor (n,) by which the object darkens points of the room: cast from the light, and soft around its foot."""
    cast = np.isfinite(hit_object(shape, scale, points, LIGHT - points)[0])
    contact = np.exp(-(points**2).sum(axis=0) / (0.7 * scale) ** 2)
    return (1 - 0.4 * cast) * (1 - 0.35 * contact)


def hit_object(shape: str, scale: float, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance (n,), in units of each ray's length, at which rays (3, n) enter the object, and its normal there (3, n).

    Rays start outside, at `origin` (3, 1) or (3, n); where they miss, the distance is inf. The object stands on 0.
    """
    origin, rays = origin / scale, rays / scale
    if shape == "cube":
        return hit_box(origin, rays, np.array([[0.85], [0.85], [1.7]]))
    if shape == "sphere":
        return hit_sphere(origin, rays, 1.0, 1.0)
    if shape == "cylinder":
        return first(hit_tube(origin, rays, 0.85, 0.0, 1.8), hit_disc(origin, rays, 0.85, 1.8))
    caps = [hit_sphere(origin, rays, 0.65, height) for height in (0.65, 1.75)]
    return first(hit_tube(origin, rays, 0.65, 0.65, 1.75), *caps)


def hit_box(origin, rays, corner):
    """The box |x| <= corner[0], |y| <= corner[1], 0 <= z <= corner[2]: entered with the last of three slabs."""
    inverse = 1 / np.where(np.abs(rays) < TINY, TINY, rays)
    low, high = (corner * [[-1], [-1], [0]] - origin) * inverse, (corner - origin) * inverse
    enter, leave = np.minimum(low, high), np.maximum(low, high)
    normal = np.where(np.arange(3)[:, None] == enter.argmax(axis=0), -np.sign(rays), 0.0)
    return _where(enter.max(axis=0), enter.max(axis=0) < leave.min(axis=0)), normal


def hit_sphere(origin, rays, radius, height):
    """A sphere around (0, 0, height)."""
    from_centre = origin - height * UP
    t = _enter(from_centre, rays, radius)
    return t, _at(from_centre, rays, t) / radius


def hit_tube(origin, rays, radius, low, high):
    """The side of an upright cylinder between two heights."""
    t = _enter(origin[:2], rays[:2], radius)
    x, y, z = _at(origin, rays, t)
    return _where(t, (low <= z) & (z <= high)), np.stack([x, y, np.zeros_like(z)]) / radius


def hit_disc(origin, rays, radius, height):
    """A disc that faces up, met from above."""
    t = _where((height - origin[2]) / np.minimum(rays[2], -TINY), rays[2] < 0)
    return _where(t, (_at(origin, rays, t)[:2] ** 2).sum(axis=0) <= radius**2), np.broadcast_to(UP, rays.shape)


def first(*hits):
    """Of several (distance, normal), the nearest."""
    t, normal = hits[0]
    for other_t, other_normal in hits[1:]:
        normal = np.where(other_t < t, other_normal, normal)
        t = np.minimum(t, other_t)
    return t, normal


def _enter(origin, rays, radius):
    """Smaller t > 0 with |origin + t ray| = radius, inf without one."""
    a, b, c = (rays**2).sum(axis=0), (origin * rays).sum(axis=0), (origin**2).sum(axis=0) - radius**2
    square = b * b - a * c
    return _where((-b - np.sqrt(np.maximum(square, 0))) / np.maximum(a, TINY), square > 0)


def _where(t, condition):
    return np.where(condition & (t > 0), t, np.inf)


def _at(origin, rays, t):
    return origin + np.where(np.isfinite(t), t, 0.0) * rays


class ProceduralShapes3D(Dataset):
    """The renderer as a data set of `factor_sizes` images, by default all 480,000 of the full grid.

    `grid` holds for each factor either how many of its values to take or a tuple of indices into its full range, as in
    `SubGrid`: every value is one of the full grid's. InputError for an impossible grid.
    """

    name = "procedural"
    factor_names = FACTOR_NAMES
    cyclic, categories = FACTOR_NAMES[:3], ("shape",)

    def __init__(self, image_size: int = 64, grid: Sequence[int | Sequence[int]] = FACTOR_SIZES):
        if image_size < 1:
            raise InputError(f"image_size: {image_size}; must be at least 1")
        self.image_size = image_size
        self.values = grid_values(self, FACTOR_SIZES, grid)
        self.factor_sizes = tuple(len(v) for v in self.values)
        self.label_values = tuple(full[v] for full, v in zip(factor_labels(), self.values, strict=True))

    def images(self, indices: Indices) -> np.ndarray:
        values = self.factors(indices)
        full = np.stack([v[f] for v, f in zip(self.values, values.T, strict=True)], axis=1)
        return render(full, self.image_size)
