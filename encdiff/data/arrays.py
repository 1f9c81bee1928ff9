"""Images that lie in one array of an HDF5 or .npz file: mapped or read in pieces, never whole."""

from __future__ import annotations

import logging
import math
import os
import shutil
import struct
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from PIL import Image

from encdiff.data.dataset import Dataset, Indices, Progress
from encdiff.data.npz import open_zip, read_header
from encdiff.errors import InputError
from encdiff.files.reading import damage
from encdiff.files.temporaries import atomic_path

log = logging.getLogger("encdiff.data")

COPY = 2**24  # bytes unpacked at once


class ArrayFile(Dataset):
    """Base of sets whose images are uint8 (n, size, size, 3), or (n, size, size) in grey, in an array of one file.

    `image_size`, if given, must divide the file's size; pictures are then averaged over square blocks.
    """

    def _set_images(self, path: Path, images: h5py.Dataset | np.ndarray, channels: int, image_size: int | None):
        self.path, self.name, self._images, self._file = path, path.name, images, path.absolute()
        shape, dtype = images.shape, images.dtype
        tail = (3,) if channels == 3 else ()
        square = len(shape) == 3 + len(tail) and shape[1] == shape[2] and shape[3:] == tail and min(shape) > 0
        if dtype != np.uint8 or not square:
            must = f"(n, size, size{', 3' * (channels == 3)})"
            raise InputError(f"{path}: images are {dtype} {tuple(shape)}; must be uint8 {must}")
        self.image_size = shape[1] if image_size is None else image_size
        if self.image_size < 1 or shape[1] % self.image_size:
            raise InputError(f"image_size: {image_size}; must divide {shape[1]}, the size of the images in {path}")

    def __getstate__(self) -> dict:
        """In place of images in a file where they lie: a copy, such as one for a worker process, opens it again."""
        return vars(self) | {"_images": _Place.of(self._images, self._file)}

    def __setstate__(self, state: dict) -> None:
        images = state["_images"]
        vars(self).update(state, _images=images.open() if isinstance(images, _Place) else images)

    @property
    def images_per_chunk(self) -> int:  # type: ignore[override]  # read alone, here too
        """How many images must be unpacked to read one: many in a file that was written without thought of it."""
        return (getattr(self._images, "chunks", None) or (1,))[0]

    def images(self, indices: Indices) -> np.ndarray:
        order, inverse = np.unique(self.check_indices(indices), return_inverse=True)
        try:
            images = read_rows(self._images, order)
        except (OSError, RuntimeError, ValueError, TypeError) as error:  # h5py, by kind of damage
            raise InputError(f"{self.path}: cannot be read, perhaps damaged ({error}); copy it again") from error
        return resize(self._to_rgb(images), self.image_size)[inverse]

    def _to_rgb(self, images: np.ndarray) -> np.ndarray:
        return images


class _Place(NamedTuple):
    """Where images lie: the name of an HDF5 data set, or what NumPy maps a file by."""

    file: str | Path
    name: str | None
    mapped: tuple = ()

    @classmethod
    def of(cls, images: h5py.Dataset | np.ndarray, file: Path) -> _Place | np.ndarray:
        """Of images in `file` or a map of another; an array in memory stays as it is."""
        if isinstance(images, h5py.Dataset):
            return cls(file, images.name)
        if isinstance(images, np.memmap):
            return cls(str(images.filename), None, (images.dtype, "r", images.offset, images.shape))
        return images

    def open(self) -> h5py.Dataset | np.ndarray:
        try:
            return h5py.File(self.file, "r")[self.name] if self.name else np.memmap(self.file, *self.mapped)
        except (OSError, KeyError, ValueError) as error:
            raise InputError(f"{self.file}: cannot be opened again ({error}); must stay as it was") from error


def map_npz(path: Path, key: str, progress: Progress | None = None) -> np.ndarray:
    """Memory-map one array of an .npz file without loading or unpickling it.

    A compressed one is first unpacked, once, into a file beside it: `FILE.npz.KEY.npy`.
    """
    with open_zip(path) as archive:
        shape, dtype, fortran, header = read_header(path, archive, key)
        if dtype.kind == "U" or fortran:
            raise InputError(f"{path}: {key} are {dtype}{' in Fortran order' * fortran}; must be uint8 in C order")
        if not math.prod(shape):
            return np.empty(shape, dtype)
        member = archive.getinfo(f"{key}.npy")
        if member.compress_type == zipfile.ZIP_STORED:
            with damage(f"{path}: a damaged or foreign .npz file"):
                return np.memmap(path, dtype, "r", _data_offset(path, member) + header, shape)
        return np.memmap(_unpacked(path, archive, member, progress), dtype, "r", header, shape)


def npz_header(path: Path, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of one array of an .npz file."""
    with open_zip(path) as archive:
        shape, dtype, _, _ = read_header(path, archive, key)
        return shape, dtype


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: behind its own header, whose last two fields are of any length."""
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)
        name_length, extra_length = struct.unpack("<2H", file.read(4))
    return member.header_offset + 30 + name_length + extra_length


def _unpacked(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, progress: Progress | None) -> Path:
    """The file beside an archive that holds one member of it, made if there is none of its size and later date."""
    target = path.with_name(f"{path.name}.{member.filename}")
    if target.is_file():
        found = target.stat()
        if found.st_size == member.file_size and found.st_mtime >= path.stat().st_mtime:
            return target
    free, need = shutil.disk_usage(path.parent).free, member.file_size
    if need > free or not os.access(path.parent, os.W_OK):
        state = f"{free / 2**30:.1f} GiB are free" if need > free else "the folder may not be written to"
        raise InputError(
            f"{path}: is compressed, and unpacking it needs {need / 2**30:.1f} GiB in its folder; {state}: move it"
        )
    log.warning("%s is compressed: unpacking %.2f GiB once, into %s", path, need / 2**30, target.name)
    said = f"{path}: a damaged or foreign .npz file"
    with damage(said), archive.open(member) as source, atomic_path(target) as partial, open(partial, "wb") as out:
        while block := source.read(COPY):
            out.write(block)
            if progress:
                progress(out.tell(), need)
    return target


def read_rows(source: h5py.Dataset | np.ndarray, order: np.ndarray) -> np.ndarray:
    """Images at increasing indices, one read for each run of neighbours: h5py's lists of indices are far slower."""
    out = np.empty((len(order), *source.shape[1:]), np.uint8)
    starts = np.flatnonzero(np.diff(order, prepend=-2) != 1)
    for start, stop in pairwise([*starts, len(order)]):
        out[start:stop] = source[order[start] : order[stop - 1] + 1]
    return out


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 (n, H, H[, 3]) as (n, size, size[, 3]): averages over square blocks, rounded half up, where `size` divides
    H, and Pillow's antialiased bicubic filter where it does not."""
    count, whole = images.shape[:2]
    block, rest = divmod(whole, size)
    if whole == size:
        return images
    if rest:
        bicubic = [np.asarray(Image.fromarray(i).resize((size, size), Image.Resampling.BICUBIC)) for i in images]
        return np.stack(bicubic) if bicubic else np.empty((0, size, size, *images.shape[3:]), np.uint8)
    blocks = images.reshape(count, size, block, size, block, *images.shape[3:])
    sums = blocks.sum(axis=(2, 4), dtype=np.uint32)
    return ((2 * sums + block**2) // (2 * block**2)).astype(np.uint8)


def grid_of(path: Path, labels: np.ndarray, count: int, columns: int, name: str = "labels") -> tuple[np.ndarray, ...]:
    """The values of each factor, in the order of the grid that float64 labels (n, columns) form; InputError if none."""
    if labels.shape != (count, columns) or labels.dtype != np.float64:
        raise InputError(
            f"{path}: {name} are {labels.dtype} {labels.shape}; must be float64 ({count}, {columns}) for its images"
        )
    if not np.isfinite(labels).all():
        raise InputError(f"{path}: {name} hold NaN or infinity")
    values, ranks = zip(*map(_in_order, labels.T), strict=True)
    sizes = [len(v) for v in values]
    if math.prod(sizes) != count:
        raise InputError(f"{path}: {count} images, but its {name} span a grid of {' x '.join(map(str, sizes))}")
    check_order(path, np.stack(ranks, axis=1), sizes, name)
    return values


def check_order(path: Path, ranks: np.ndarray, sizes: Sequence[int], name: str) -> None:
    """InputError unless row i of integer ranks (n, F) holds the factors of image i of a complete grid."""
    expected = np.stack(np.unravel_index(np.arange(len(ranks)), sizes), axis=1)
    wrong = np.flatnonzero((ranks != expected).any(axis=1))
    if wrong.size:
        raise InputError(f"{path}: {name} leave the order of a grid (last factor fastest) at image {wrong[0]}")


def _in_order(column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different values of a column in order of appearance, and the rank of every entry."""
    _, start, inverse = np.unique(column.round(6), return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(start))
    return column[np.sort(start)], rank[inverse]
