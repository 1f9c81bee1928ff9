"""White shapes on black with the five factors and sizes of dSprites, rendered on demand at any resolution.

Units: the image is 1 wide; x to the right, y down. Unlike dSprites, whose first and last orientation are the same
picture, 40 orientations divide the full turn; a square still repeats after a quarter of it, an ellipse after a half.
"""

from __future__ import annotations

import numpy as np

from encdiff.data.dataset import Dataset, Factors, Indices, check_factors
from encdiff.errors import InputError

FACTOR_NAMES = ("shape", "scale", "orientation", "x", "y")
FACTOR_SIZES = (3, 6, 40, 32, 32)
SHAPES = ("square", "ellipse", "heart")
RADIUS = 0.18  # of the circle around any shape at scale 1
HEART = 1.43  # radius of the circle around the curve (x^2 + y^2 - 1)^3 = x^2 y^3
SUBPIXELS = 4  # a pixel's brightness is the share of 4 x 4 points inside the shape
CHUNK = 8  # images drawn at once: small enough for the cache


def factor_labels() -> tuple[np.ndarray, ...]:
    """What the values stand for, float64: shape numbers, scales 0.5..1, radians, and positions 0..1 of the centre."""
    positions = np.linspace(0, 1, FACTOR_SIZES[3])
    turns = np.arange(FACTOR_SIZES[2]) * (2 * np.pi / FACTOR_SIZES[2])
    return np.arange(3, dtype=np.float64), np.linspace(0.5, 1, FACTOR_SIZES[1]), turns, positions, positions


def render(factors: Factors, image_size: int = 64) -> np.ndarray:
    """uint8 (n, image_size, image_size, 3) pictures of integer factors (n, 5), each in 0..FACTOR_SIZES-1.

    Positions 0 and 1 put the largest shape just inside the border. The same factors give the same bytes.
    """
    factors = check_factors(factors, FACTOR_SIZES)
    out = np.zeros((len(factors), image_size, image_size), np.uint8)
    for start in range(0, len(factors), CHUNK):
        _draw(out[start : start + CHUNK], factors[start : start + CHUNK])
    return np.repeat(out[..., None], 3, axis=-1)


def _draw(out: np.ndarray, factors: np.ndarray) -> None:
    """Paint the shapes into zeros (n, size, size), each within a window that would hold the largest."""
    size = out.shape[1]
    window = min(size, int(np.ceil(2 * RADIUS * size)) + 1)
    _, scales, turns, *positions = factor_labels()
    low = [(1 - 2 * RADIUS) * values[f] for values, f in zip(positions, factors.T[3:], strict=True)]  # centre - RADIUS
    corners = [np.clip(np.floor(edge * size).astype(int), 0, size - window) for edge in low]
    points = (np.arange(window * SUBPIXELS) + 0.5) / SUBPIXELS
    x, y = ((points + c[:, None]) / size - e[:, None] - RADIUS for c, e in zip(corners, low, strict=True))

    radius = RADIUS * scales[factors[:, 1]]
    cos, sin = ((table[factors[:, 2]] / radius)[:, None, None] for table in (np.cos(turns), np.sin(turns)))
    u = x[:, None] * cos + y[:, :, None] * sin  # the shape's own axes, in units of its radius
    v = y[:, :, None] * cos - x[:, None] * sin
    inside = np.empty(u.shape, bool)
    for kind, is_inside in enumerate((_in_square, _in_ellipse, _in_heart)):
        chosen = factors[:, 0] == kind
        inside[chosen] = is_inside(u[chosen], v[chosen])
    counts = inside.reshape(-1, window, SUBPIXELS, window, SUBPIXELS).sum(axis=(2, 4))
    levels = np.rint(counts * (255 / SUBPIXELS**2)).astype(np.uint8)
    for image, patch, left, top in zip(out, levels, *corners, strict=True):
        image[top : top + window, left : left + window] = patch


def _in_square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) <= np.sqrt(0.5)


def _in_ellipse(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u * u + 4 * v * v <= 1


def _in_heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    x2, y = (HEART * u) ** 2, -HEART * v  # the curve's y points up
    y2 = y * y
    excess = x2 + y2 - 1
    return excess * excess * excess <= x2 * y2 * y


class ProceduralSprites(Dataset):
    """The renderer as a data set of 737,280 images; `SubGrid` takes a part. InputError for an `image_size` below 1."""

    name = "sprites"
    factor_names, factor_sizes = FACTOR_NAMES, FACTOR_SIZES
    cyclic, categories = ("orientation",), ("shape",)

    def __init__(self, image_size: int = 64):
        if image_size < 1:
            raise InputError(f"image_size: {image_size}; must be at least 1")
        self.image_size, self.label_values = image_size, factor_labels()

    def images(self, indices: Indices) -> np.ndarray:
        return render(self.factors(indices), self.image_size)
