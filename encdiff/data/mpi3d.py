"""MPI3D: a robot arm moves an object; toy, realistic, real and real-complex images in `.npz` files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from encdiff.data.arrays import ArrayFile, map_npz
from encdiff.data.dataset import Progress
from encdiff.errors import InputError

FACTOR_NAMES = (
    "object_color", "object_shape", "object_size", "camera_height", "background_color", "first_axis", "second_axis",
)  # fmt: skip
FAMILIES = {  # by the number of images
    1_036_800: (6, 6, 2, 3, 3, 40, 40),  # toy, realistic, real
    460_800: (4, 4, 2, 3, 3, 40, 40),  # real complex, and the challenge's files without held-out factors
}


class MPI3D(ArrayFile):
    """An MPI3D `.npz` file: `images` uint8 (n, size, size, 3) without labels, whose number shows the factor sizes.

    `image_size`, if given, must divide the file's (64). `label_values` are the factor values themselves. `progress(
    done, total)` is called while a compressed file is unpacked. InputError, naming the file, for any other content.
    """

    factor_names = FACTOR_NAMES
    categories = ("object_color", "object_shape", "background_color")

    def __init__(self, path: str | os.PathLike, image_size: int | None = None, progress: Progress | None = None):
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file; must be an MPI3D .npz file")
        images = map_npz(path, "images", progress)
        self._set_images(path, images, 3, image_size)
        if len(images) not in FAMILIES:
            raise InputError(f"{path}: {len(images)} images; MPI3D has {' or '.join(map(str, FAMILIES))}")
        self.factor_sizes = FAMILIES[len(images)]
        self.label_values = tuple(np.arange(size, dtype=np.float64) for size in self.factor_sizes)
