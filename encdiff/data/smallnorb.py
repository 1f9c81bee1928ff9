"""SmallNORB: grey photographs of fifty toys, in its own binary matrix files, `.mat` or `.mat.gz`."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from encdiff.data.arrays import resize
from encdiff.data.dataset import Dataset, Indices, Progress
from encdiff.errors import InputError

DTYPES: dict[int, np.dtype] = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4")}  # by the magic number
CATEGORIES = ("animal", "human", "airplane", "truck", "car")
LARGEST, TIGHTEST = 4096, 1032  # pixels along a side; how many bytes gzip makes of one at most
CHUNK = 256  # pairs of images read at once


class SmallNORB(Dataset):
    """The `*-dat`, `*-cat` and `*-info` files of a folder: the training part, the testing part, or both as one set.

    The left image of each pair, as RGB, resized to `image_size` (default: the file's, 96) and kept in memory. Factors
    are category, elevation, azimuth and lighting; the five toys of a category in each part differ otherwise too, so
    every combination has `instances` images, consecutive and in the order of the toys. `progress(done, total)` counts
    images. InputError, naming the file, when one is missing, damaged, of another shape, or the grid has gaps.
    """

    name = "smallnorb"
    factor_names = ("category", "elevation", "azimuth", "lighting")
    cyclic, categories = ("azimuth",), ("category", "lighting")

    def __init__(self, path: str | os.PathLike, image_size: int | None = None, progress: Progress | None = None):
        self.path = Path(path)
        files = smallnorb_files(self.path)
        if not files:
            raise InputError(f"{path}: holds no *-dat.mat or *-dat.mat.gz; must be the folder of SmallNORB's files")
        parts = [_read_part(file, image_size, progress) for file in files]
        images, labels, toys = (np.concatenate(of_parts) for of_parts in zip(*parts, strict=True))
        self.image_size = images.shape[1]
        order, found, self.instances = _grid(self.path, labels, toys)
        self._images = images[order]
        self.factor_sizes = tuple(len(values) for values in found)
        category, elevation, azimuth, lighting = (values.astype(np.float64) for values in found)
        self.label_values = category, 30 + 5 * elevation, 10 * azimuth, lighting  # angles in degrees

    def images(self, indices: Indices) -> np.ndarray:
        return np.repeat(self._images[self.check_indices(indices)][..., None], 3, axis=-1)


def smallnorb_files(folder: Path) -> list[Path]:
    """The `*-dat` files of a folder, testing before training as their names sort."""
    found = [file for file in sorted(folder.glob("*-dat.mat*")) if file.suffix in (".mat", ".gz")]
    unique = {file.name.removesuffix(".gz"): file for file in found if is_smallnorb(file)}  # one of plain and packed
    return list(unique.values())


def is_smallnorb(path: Path) -> bool:
    """Whether a file, plain or gzipped, begins with the magic number of a matrix."""
    try:
        if not path.is_file():
            return False
        with _open(path) as stream:
            return int.from_bytes(stream.read(4), "little") in DTYPES
    except (OSError, EOFError, zlib.error):
        return False


def _read_part(dat: Path, image_size: int | None, progress: Progress | None) -> tuple[np.ndarray, ...]:
    """Left images uint8 (n, size, size), factors (n, 4) and toys (n,) of one part."""
    category = _read_labels(_sibling(dat, "cat"), 1)
    info = _read_labels(_sibling(dat, "info"), 2)
    with _matrix(dat) as (stream, dtype, shape):
        square = len(shape) == 4 and shape[1] == 2 and shape[2] == shape[3]
        if dtype != np.uint8 or not square or not shape[0]:
            raise InputError(f"{dat}: {dtype} {shape}; must be uint8 (n, 2, size, size)")
        if not 0 < shape[2] <= LARGEST:
            raise InputError(f"{dat}: images of size {shape[2]}, must be 1..{LARGEST}")
        if image_size is not None and image_size < 1:
            raise InputError(f"image_size: {image_size}; must be at least 1")
        for name, found in (("cat", category.shape), ("info", info.shape)):
            if found != (shape[0], 4)[: len(found)]:
                raise InputError(f"{_sibling(dat, name)}: {found}; must be {(shape[0], 4)[: len(found)]} as {dat.name}")
        size = shape[2] if image_size is None else image_size
        out = np.empty((shape[0], size, size), np.uint8)
        for start in range(0, shape[0], CHUNK):
            count = min(CHUNK, shape[0] - start)
            pairs = np.frombuffer(_exactly(stream, count * math.prod(shape[1:]), dat), np.uint8)
            out[start : start + count] = resize(pairs.reshape(count, *shape[1:])[:, 0], size)
            if progress:
                progress(start + count, shape[0])
        _at_end(stream, dat)
    toys, elevation, azimuth, lighting = info.T
    return out, np.stack([category, elevation, azimuth, lighting], axis=1), toys


def _read_labels(path: Path, ndim: int) -> np.ndarray:
    with _matrix(path) as (stream, dtype, shape):
        if dtype.kind != "i" or len(shape) != ndim:
            raise InputError(f"{path}: {dtype} {shape}; must be int32 {('(n,)', '(n, 4)')[ndim - 1]}")
        labels = np.frombuffer(_exactly(stream, math.prod(shape) * dtype.itemsize, path), dtype).reshape(shape)
        _at_end(stream, path)
        return labels.astype(np.int64)


def _sibling(dat: Path, kind: str) -> Path:
    """The file of labels beside a `-dat` file, packed or not."""
    plain = dat.with_name(dat.name.removesuffix(".gz").replace("-dat.mat", f"-{kind}.mat"))
    packed = plain.with_name(plain.name + ".gz")
    if not plain.is_file() and not packed.is_file():
        raise InputError(f"{plain}: no such file, nor {packed.name}; {dat.name} needs it")
    return plain if plain.is_file() else packed


@contextmanager
def _matrix(path: Path) -> Iterator[tuple[BinaryIO, np.dtype, tuple[int, ...]]]:
    """The stream of a matrix behind its header, its dtype and its shape."""
    try:
        with _open(path) as stream:
            magic, ndim = np.frombuffer(_exactly(stream, 8, path), "<i4").tolist()
            if magic not in DTYPES or not 1 <= ndim <= 4:
                raise InputError(f"{path}: begins with {magic:#x} and {ndim}; must be a SmallNORB matrix of 1..4 axes")
            shape = np.frombuffer(_exactly(stream, 4 * max(3, ndim), path), "<i4")[:ndim].tolist()
            if min(shape) < 0:
                raise InputError(f"{path}: sizes {shape}; must not be negative")
            _check_size(path, stream, math.prod(shape) * DTYPES[magic].itemsize)
            yield stream, DTYPES[magic], tuple(shape)
    except (gzip.BadGzipFile, EOFError, zlib.error, struct.error) as error:
        raise InputError(f"{path}: a damaged or truncated file ({error}); copy it again") from error


def _check_size(path: Path, stream: BinaryIO, declared: int) -> None:
    """InputError where the file cannot hold what its header declares."""
    size = path.stat().st_size
    missing = declared - (TIGHTEST * size if isinstance(stream, gzip.GzipFile) else size - stream.tell())
    if missing > 0:
        raise InputError(f"{path}: truncated; {missing} bytes are missing")


def _open(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path, "rb") if packed else open(path, "rb"))


def _exactly(stream: BinaryIO, count: int, path: Path) -> bytes:
    content = stream.read(count)
    if len(content) != count:
        raise InputError(f"{path}: truncated; {count - len(content)} bytes are missing")
    return content


def _at_end(stream: BinaryIO, path: Path) -> None:
    if stream.read(1):
        raise InputError(f"{path}: goes on behind the matrix that its header describes")


def _grid(folder: Path, labels: np.ndarray, toys: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], int]:
    """The order that makes labels (n, 4) a grid with consecutive toys, the values of each factor, and images a cell."""
    pairs = [np.unique(column, return_inverse=True) for column in labels.T]
    values, ranks = [v for v, _ in pairs], [r for _, r in pairs]
    sizes = [len(v) for v in values]
    if math.prod(sizes) > len(labels):
        raise InputError(f"{folder}: {len(labels)} images in a grid of {' x '.join(map(str, sizes))}; must fill it")
    cells = np.ravel_multi_index(tuple(ranks), sizes)
    counts = np.bincount(cells, minlength=math.prod(sizes))
    if counts.min() != counts.max():
        raise InputError(
            f"{folder}: {counts.min()}..{counts.max()} images of each combination in a grid of "
            f"{' x '.join(map(str, sizes))}; must be equally many"
        )
    if len(np.unique(np.stack([cells, toys]), axis=1).T) < len(cells):
        raise InputError(f"{folder}: some toy has two images of one combination; is a part there twice?")
    return np.lexsort((toys, cells)), values, int(counts[0])
