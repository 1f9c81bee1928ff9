"""Google's Shapes3D, `3dshapes.h5`, and files of the same schema: read in pieces, never whole, and written.

The schema: `images` uint8 (n, H, H, 3) and `labels` float64 (n, 6), a complete grid of factor values, last fastest.
The original has 480,000 images of 64x64. Also read: an `.npz` with `images`, and `labels` unless it is the full grid.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np

from encdiff.data import ACCEPTED, Dataset
from encdiff.data.procedural import FACTOR_NAMES, FACTOR_SIZES, factor_labels
from encdiff.errors import InputError

CHUNK_BYTES = 100_000  # written per compressed piece: a random image costs the unpacking of one piece
RESERVE = 2**20  # bytes of disk kept free for HDF5's own structures


class Shapes3D(Dataset):
    """A file of the `3dshapes.h5` schema, or an `.npz` of its images, with the factor sizes that its labels show.

    `image_size`, if given, must divide the file's size; pictures are then averaged over square blocks.
    InputError, naming the file, when it is missing, truncated, foreign, of wrong types or shapes, or no complete grid.
    """

    factor_names = FACTOR_NAMES

    def __init__(self, path: str | os.PathLike, image_size: int | None = None):
        self.path = Path(path)
        self.name = self.path.name
        if not self.path.is_file():
            raise InputError(f"{path}: no such file; {ACCEPTED}")
        if h5py.is_hdf5(self.path):
            self._images, labels = _open_h5(self.path)
        elif zipfile.is_zipfile(self.path):
            self._images, labels = _open_npz(self.path)
        else:
            raise InputError(f"{path}: neither HDF5 nor npz (perhaps truncated); {ACCEPTED}")
        self._check_images()
        self.label_values = _grid(self.path, labels, len(self._images))
        self.factor_sizes = tuple(len(values) for values in self.label_values)
        size = self._images.shape[1]
        self.image_size = size if image_size is None else image_size
        if self.image_size < 1 or size % self.image_size:
            raise InputError(f"image_size: {image_size}; must divide {size}, the size of the images in {path}")

    @property
    def images_per_chunk(self) -> int:
        """How many images must be unpacked to read one: many in a file that was written without thought of it."""
        return (getattr(self._images, "chunks", None) or (1,))[0]

    def images(self, indices) -> np.ndarray:
        order, inverse = np.unique(self.check_indices(indices), return_inverse=True)
        try:
            images = _read(self._images, order)[inverse]
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read, perhaps damaged ({error}); copy it again") from error
        return _reduce(images, self.image_size)

    def _check_images(self) -> None:
        shape, dtype = self._images.shape, self._images.dtype
        square = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3 and min(shape) > 0
        if dtype != np.uint8 or not square:
            raise InputError(f"{self.path}: images are {dtype} {tuple(shape)}; must be uint8 (n, size, size, 3)")


def write_shapes3d(
    path: str | os.PathLike,
    dataset: Dataset,
    batch: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a labelled six-factor data set to `path` in the `3dshapes.h5` schema, `batch` images at a time.

    The file appears, or replaces an older one, only when complete; an error or Ctrl-C leaves nothing behind.
    `progress(done, total)` is called after each batch. InputError for another kind of data set or a missing folder;
    OSError, naming the file, for a full disk.
    """
    path = Path(path)
    if dataset.factor_names != FACTOR_NAMES:
        raise InputError(f"{dataset.name}: factors {dataset.factor_names}; the 3dshapes schema holds {FACTOR_NAMES}")
    if batch < 1:
        raise InputError(f"batch: {batch}; must be at least 1")
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"{path}: must be a file name in an existing folder")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as probe:
            _reserve(probe.fileno(), 0, RESERVE, path)
        with h5py.File(partial, "w") as file:
            _write(file, dataset, batch, progress, path)
            size = file.id.get_filesize()
        os.truncate(partial, min(size, partial.stat().st_size))  # give back what was reserved in vain
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write(file: h5py.File, dataset: Dataset, batch: int, progress: Callable[[int, int], None] | None, path: Path):
    total, size = len(dataset), dataset.image_size
    chunk = (min(total, max(1, CHUNK_BYTES // (3 * size * size))), size, size, 3)
    options = {"chunks": chunk, "compression": "gzip", "compression_opts": 1}  # 1: the fastest
    images = file.create_dataset("images", (total, size, size, 3), np.uint8, **options)
    labels = file.create_dataset("labels", (total, len(FACTOR_NAMES)), np.float64)
    for start in range(0, total, batch):
        indices = np.arange(start, min(start + batch, total))
        pixels = dataset.images(indices)
        space = pixels.nbytes + pixels.nbytes // 50 + labels.nbytes + RESERVE  # gzip may lengthen noise a little
        _reserve(file.id.get_vfd_handle(), file.id.get_filesize(), space, path)
        images[start : start + batch], labels[start : start + batch] = pixels, dataset.labels(indices)
        if progress:
            progress(start + len(indices), total)
    file.flush()


def _reserve(descriptor: int, start: int, size: int, path: Path) -> None:
    """Claim disk space before HDF5 writes there, for on a full disk HDF5 ends the process with a segmentation fault."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            os.posix_fallocate(descriptor, start, size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


def _open_h5(path: Path) -> tuple[h5py.Dataset, np.ndarray]:
    try:
        file = h5py.File(path, "r")
        found = {key: file.get(key) for key in ("images", "labels")}
        missing = [key for key, value in found.items() if not isinstance(value, h5py.Dataset)]
        if missing:
            raise InputError(f"{path}: an HDF5 file without {' and '.join(missing)}; must hold the 3dshapes schema")
        return found["images"], np.asarray(found["labels"][()])
    except OSError as error:
        raise InputError(f"{path}: a damaged or truncated HDF5 file ({error}); copy or render it again") from error


def _open_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            if "images.npy" not in archive.namelist():
                raise InputError(f"{path}: an archive without images; must be an .npz with the key `images`")
            images = _map_member(path, archive, "images.npy")
        with np.load(path, allow_pickle=False) as arrays:
            return images, arrays.get("labels")
    except InputError:
        raise
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: a damaged or foreign .npz file ({error}); copy it again") from error


def _map_member(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Memory-map an array that lies uncompressed inside an .npz file."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        raise InputError(
            f"{path}: images are compressed and would fill {member.file_size / 2**30:.1f} GiB of memory; "
            f"unpack {name} and repack it with `zip -0`"
        )
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read_header.get(version, read_header[1, 0])(stream)
        header = stream.tell()
    if dtype.hasobject or fortran:
        raise InputError(f"{path}: images are {dtype}{' in Fortran order' * fortran}; must be uint8 (n, size, size, 3)")
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), "<u2")
    start = member.header_offset + 30 + int(name_length) + int(extra_length)  # 30: fixed part of a zip member's header
    return np.memmap(path, dtype, "r", start + header, shape)


def _grid(path: Path, labels: np.ndarray | None, count: int) -> tuple[np.ndarray, ...]:
    """The values of each factor, in the order of the grid that the labels (n, 6) form; InputError if they form none."""
    if labels is None:
        if count != math.prod(FACTOR_SIZES):
            raise InputError(f"{path}: {count} images without labels; only the full grid of 480000 needs none")
        return factor_labels()
    if labels.shape != (count, len(FACTOR_NAMES)) or labels.dtype != np.float64:
        raise InputError(
            f"{path}: labels are {labels.dtype} {labels.shape}; must be float64 ({count}, 6) for its images"
        )
    if not np.isfinite(labels).all():
        raise InputError(f"{path}: labels hold NaN or infinity")
    values, ranks = zip(*map(_in_order, labels.T), strict=True)
    sizes = [len(v) for v in values]
    if math.prod(sizes) != count:
        raise InputError(f"{path}: {count} images, but its labels span a grid of {' x '.join(map(str, sizes))}")
    wrong = np.flatnonzero((np.stack(ranks) != np.stack(np.unravel_index(np.arange(count), sizes))).any(axis=0))
    if wrong.size:
        raise InputError(f"{path}: labels leave the order of a grid (last factor fastest) at image {wrong[0]}")
    return values


def _in_order(column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different values of a column in order of appearance, and the rank of every entry."""
    _, start, inverse = np.unique(column.round(6), return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(start))
    return column[np.sort(start)], rank[inverse]


def _read(source: h5py.Dataset | np.ndarray, order: np.ndarray) -> np.ndarray:
    """Images at increasing indices, one read for each run of neighbours: h5py's lists of indices are far slower."""
    out = np.empty((len(order), *source.shape[1:]), np.uint8)
    starts = np.flatnonzero(np.diff(order, prepend=-2) != 1)
    for start, stop in pairwise([*starts, len(order)]):
        out[start:stop] = source[order[start] : order[stop - 1] + 1]
    return out


def _reduce(images: np.ndarray, size: int) -> np.ndarray:
    """Averages over square blocks, rounded half up."""
    count, block = len(images), images.shape[1] // size
    if block == 1:
        return images
    sums = images.reshape(count, size, block, size, block, 3).sum(axis=(2, 4), dtype=np.uint32)
    return ((2 * sums + block**2) // (2 * block**2)).astype(np.uint8)
