"""dSprites, `dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz`: white shapes on black, without its pickled metadata."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from encdiff.data.arrays import ArrayFile, check_order, grid_of, map_npz
from encdiff.data.dataset import Progress
from encdiff.data.npz import open_zip, read_array
from encdiff.errors import InputError

FACTOR_NAMES = ("shape", "scale", "orientation", "x", "y")


class DSprites(ArrayFile):
    """The dSprites schema: `imgs` uint8 (n, size, size) of 0 and 1, `latents_classes` int64 and `latents_values`
    float64 (n, 6), a complete grid of colour, shape, scale, orientation, x and y.

    Colour has one value only and is left out of the factors. Images are RGB of 0 and 255. `image_size`, if given, must
    divide the file's (64). The published file is compressed: `imgs` are unpacked beside it once, 3 GB, and `progress(
    done, total)` is called meanwhile. `metadata` is a pickle and never read. InputError names the file.
    """

    factor_names = FACTOR_NAMES
    cyclic, categories = ("orientation",), ("shape",)

    def __init__(self, path: str | os.PathLike, image_size: int | None = None, progress: Progress | None = None):
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file; must be a dSprites .npz file")
        classes, values = _latents(path)
        images = map_npz(path, "imgs", progress)
        self._set_images(path, images, 1, image_size)
        label_values = grid_of(path, values, len(images), 6, "latents_values")
        sizes = [len(v) for v in label_values]
        if sizes[0] != 1:
            raise InputError(f"{path}: {sizes[0]} colours; dSprites has one")
        if classes.shape != values.shape or classes.dtype != np.int64:
            raise InputError(f"{path}: latents_classes are {classes.dtype} {classes.shape}; must be int64 (n, 6)")
        check_order(path, classes, sizes, "latents_classes")
        self.label_values, self.factor_sizes = label_values[1:], tuple(sizes[1:])

    def _to_rgb(self, images: np.ndarray) -> np.ndarray:
        if images.size and images.max() > 1:
            raise InputError(f"{self.path}: imgs hold {images.max()}; dSprites has 0 and 1 only")
        return np.repeat(255 * images[..., None], 3, axis=-1)


def _latents(path: Path) -> tuple[np.ndarray, np.ndarray]:
    keys = ("imgs", "latents_classes", "latents_values")
    with open_zip(path) as archive:
        missing = [key for key in keys if f"{key}.npy" not in archive.namelist()]
        if missing:
            raise InputError(f"{path}: an archive without {' and '.join(missing)}; must hold the dSprites schema")
        return read_array(path, archive, keys[1]), read_array(path, archive, keys[2])
