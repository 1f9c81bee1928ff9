"""Google's Shapes3D, `3dshapes.h5`, and files of the same schema: read in pieces, never whole, and written.

The schema: `images` uint8 (n, H, H, 3) and `labels` float64 (n, F), a complete grid of factor values, last fastest.
The original has 480,000 images of 64x64 and six factors; files of other factors, which `write_shapes3d` makes, name
them in the attribute `factor_names` of `labels`. Also read: an `.npz` with `images`, and `labels` unless it is the full
grid.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from encdiff.data.arrays import ArrayFile, grid_of, map_npz
from encdiff.data.dataset import ACCEPTED, Dataset, Progress
from encdiff.data.hdf5 import open_h5, own_array, read_labels, read_names
from encdiff.data.npz import open_zip, read_array
from encdiff.data.procedural import FACTOR_NAMES, FACTOR_SIZES, ProceduralShapes3D, factor_labels
from encdiff.errors import InputError
from encdiff.files.temporaries import atomic_path

CHUNK_BYTES = 100_000  # written per compressed piece: a random image costs the unpacking of one piece
RESERVE = 2**20  # bytes of disk kept free for HDF5's own structures
NAMES, CYCLIC, CATEGORIES = "factor_names", "cyclic", "categories"  # attributes of `labels` in files of other factors


class Shapes3D(ArrayFile):
    """A file of the `3dshapes.h5` schema, or an `.npz` of its images, with the factor sizes that its labels show.

    `image_size`, if given, must divide the file's size; pictures are then averaged over square blocks. `progress(done,
    total)` is called while a compressed .npz is unpacked. InputError, naming the file, when it is missing, truncated,
    foreign, of wrong types or shapes, or no complete grid.
    """

    factor_names: tuple[str, ...] = FACTOR_NAMES
    cyclic: tuple[str, ...] = ProceduralShapes3D.cyclic
    categories: tuple[str, ...] = ProceduralShapes3D.categories

    def __init__(self, path: str | os.PathLike, image_size: int | None = None, progress: Progress | None = None):
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file; {ACCEPTED}")
        if h5py.is_hdf5(path):
            labels: np.ndarray | None
            images, labels, (self.factor_names, self.cyclic, self.categories) = _open_h5(path)
        elif zipfile.is_zipfile(path):
            images, labels = _open_npz(path, progress)
        else:
            raise InputError(f"{path}: neither HDF5 nor npz (perhaps truncated); {ACCEPTED}")
        self._set_images(path, images, 3, image_size)
        self.label_values = self._grid(labels, len(images))
        self.factor_sizes = tuple(len(values) for values in self.label_values)

    def _grid(self, labels: np.ndarray | None, count: int) -> tuple[np.ndarray, ...]:
        if labels is not None:
            return grid_of(self.path, labels, count, len(self.factor_names))
        if count != math.prod(FACTOR_SIZES):
            raise InputError(
                f"{self.path}: {count} images without labels; only the full grids of Shapes3D (480000) and MPI3D "
                "(1036800 or 460800) need none"
            )
        return factor_labels()


def write_shapes3d(
    path: str | os.PathLike,
    dataset: Dataset,
    batch: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a grid of any factors to `path` in the `3dshapes.h5` schema, `batch` images at a time.

    The file appears, or replaces an older one, only when complete; an error or Ctrl-C leaves nothing behind.
    `progress(done, total)` is called after each batch. InputError for a data set that is no grid with one image of
    each combination, and for a missing folder; OSError, naming the file, for a full disk.
    """
    path = Path(path)
    if not dataset.factor_sizes or not dataset.is_grid or dataset.instances != 1:
        raise InputError(
            f"{dataset.name}: an .h5 file holds a grid of factors, one image of each; --shards 1GB takes any set"
        )
    if batch < 1:
        raise InputError(f"batch: {batch}; must be at least 1")
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"{path}: must be a file name in an existing folder")
    with atomic_path(path) as partial, _h5_errors():
        with open(partial, "wb") as probe:
            _reserve(probe.fileno(), 0, RESERVE)
        # no cache of chunks: what it holds back is written at the end, beyond what was reserved
        with h5py.File(partial, "w", rdcc_nbytes=0) as file:
            _write(file, dataset, batch, progress)
            size = file.id.get_filesize()
        os.truncate(partial, min(size, partial.stat().st_size))  # give back what was reserved in vain


def _write(file: h5py.File, dataset: Dataset, batch: int, progress: Callable[[int, int], None] | None):
    total, size = len(dataset), dataset.image_size
    chunk = (min(total, max(1, CHUNK_BYTES // (3 * size * size))), size, size, 3)
    options = {"chunks": chunk, "compression": "gzip", "compression_opts": 1}  # 1: the fastest
    images = file.create_dataset("images", (total, size, size, 3), np.uint8, **options)
    labels = file.create_dataset("labels", (total, len(dataset.factor_names)), np.float64)
    if dataset.factor_names != FACTOR_NAMES:
        for key, names in ((NAMES, dataset.factor_names), (CYCLIC, dataset.cyclic), (CATEGORIES, dataset.categories)):
            labels.attrs.create(key, list(names), dtype=h5py.string_dtype())
    for start in range(0, total, batch):
        indices = np.arange(start, min(start + batch, total))
        pixels = dataset.images(indices)
        space = pixels.nbytes + pixels.nbytes // 50 + labels.nbytes + RESERVE  # gzip may lengthen noise a little
        _reserve(file.id.get_vfd_handle(), file.id.get_filesize(), space)
        images[start : start + batch], labels[start : start + batch] = pixels, dataset.labels(indices)
        if progress:
            progress(start + len(indices), total)
    file.flush()


def _reserve(descriptor: int, start: int, size: int) -> None:
    """Claim disk space before HDF5 writes there, for on a full disk HDF5 ends the process with a segmentation fault."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(descriptor, start, size)


@contextmanager
def _h5_errors() -> Iterator[None]:
    """What h5py says in several lines where it cannot write, as the system's error."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not (cause := re.search(r"errno = (\d+)", str(error))):
            raise
        raise OSError(int(cause[1]), os.strerror(int(cause[1]))) from error


def _open_h5(path: Path) -> tuple[h5py.Dataset, np.ndarray, tuple[tuple[str, ...], ...]]:
    file = open_h5(path)
    try:
        images, labels = (own_array(path, file, key) for key in ("images", "labels"))
        missing = [key for key, value in (("images", images), ("labels", labels)) if value is None]
        if missing:
            raise InputError(f"{path}: an HDF5 file without {' and '.join(missing)}; must hold the 3dshapes schema")
        return images, read_labels(path, labels), _names(path)
    except BaseException:
        file.close()  # else it stays open, and locked, as long as the error is kept
        raise


def _names(path: Path) -> tuple[tuple[str, ...], ...]:
    """Factor names, cyclic ones and categories: those of Shapes3D unless the labels name theirs."""
    named = read_names(path, NAMES, CYCLIC, CATEGORIES)
    if not named[0]:
        return FACTOR_NAMES, ProceduralShapes3D.cyclic, ProceduralShapes3D.categories
    if len(set(named[0])) < len(named[0]) or not all(named[0]):
        raise InputError(f"{path}: the labels' factor_names are {named[0]}; must be different names")
    return tuple(named)


def _open_npz(path: Path, progress: Progress | None) -> tuple[np.ndarray, np.ndarray | None]:
    images = map_npz(path, "images", progress)
    with open_zip(path) as archive:
        return images, read_array(path, archive, "labels") if "labels.npy" in archive.namelist() else None
