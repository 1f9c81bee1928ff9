"""Images in a folder of `.npy` files, for sets larger than memory: mapped, so that a random image costs its copy.

The folder holds `images-00000.npy`, `images-00001.npy`, ..., uint8 (n, S, S, 3) each; `index.json`, which says the
format, the size of the images, how many each file holds, and of labelled sets what the factors are; and
`factors.npy`, integers (n, F), where these form no grid.
"""

from __future__ import annotations

import math
import mmap
import os
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from encdiff.data.arrays import resize
from encdiff.data.dataset import Dataset, Indices
from encdiff.data.npz import npy_header
from encdiff.errors import InputError
from encdiff.files.reading import damage, read_json, refuse_special

FORMAT, VERSION = "encdiff-shards", 1
INDEX, FACTORS = "index.json", "factors.npy"
BEGINNING = f'{{"format": "{FORMAT}"'  # of the index; what the folder is known by
OPEN = 128  # files kept mapped, each at the price of a descriptor
INTEGERS = (np.uint8, np.uint16, np.uint32, np.int64)  # that factors are kept as
LARGEST, MOST, MOST_FACTORS = 2**14, 2**62, 4096  # side of an image; images; factors


class ShardedArrays(Dataset):
    """A folder that `write_shards` wrote, any image of it in constant time, with the factors that its index tells.

    `image_size`, if given, must divide the file's size; pictures are then averaged over square blocks. Files are mapped
    when first read, the last 128 stay so. InputError, naming the file, for an index that is damaged or disagrees with
    the files: at once where one is missing, special or too short, and from `images` where its header says otherwise.
    """

    images_per_thread = 512

    def __init__(self, path: str | os.PathLike, image_size: int | None = None):
        self.path = Path(path)
        self.name, self._folder = self.path.resolve().name, self.path.absolute()
        index = _read_index(self.path / INDEX)
        self._stored, self._lengths = index["image_size"], index["lengths"]
        self._starts = np.cumsum([0, *self._lengths])
        self.image_size = self._stored if image_size is None else image_size
        if self.image_size < 1 or self._stored % self.image_size:
            raise InputError(f"image_size: {image_size}; must divide {self._stored}, the size of the images in {path}")
        for shard, length in enumerate(self._lengths):
            _check_size(self._folder / shard_name(shard), length * 3 * self._stored**2)
        if factors := index["factors"]:
            self.factor_names, self.factor_sizes = tuple(factors["names"]), tuple(factors["sizes"])
            self.label_values = tuple(np.array(values, np.float64) for values in factors["labels"])
            self.cyclic, self.categories = tuple(factors["cyclic"]), tuple(factors["categories"])
            self.is_grid, self.instances = factors["grid"], factors["instances"]
        self._open()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict:
        """Without the maps, which a copy, such as one for a worker process, opens again."""
        return {name: value for name, value in vars(self).items() if name not in ("_map", "_factors")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._open()

    def images(self, indices: Indices) -> np.ndarray:
        wanted = self.check_indices(indices)
        out = np.empty((len(wanted), *self.sample_shape), np.uint8)
        self.read_into(wanted, out)
        return out

    def read_into(self, indices: Indices, out: np.ndarray) -> None:
        """As `images`, into `out`; in the order of the files."""
        wanted, stored = self.check_indices(indices), (self._stored, self._stored, 3)
        whole = out if self.image_size == self._stored else np.empty((len(wanted), *stored), np.uint8)
        rows = np.argsort(wanted)
        shards = np.searchsorted(self._starts, wanted[rows], side="right") - 1
        places = wanted[rows] - self._starts[shards]
        cuts = np.flatnonzero(np.diff(shards, prepend=-1, append=-1)).tolist()
        for start, stop in pairwise(cuts):
            images = self._map(int(shards[start]))
            for row, place in zip(rows[start:stop].tolist(), places[start:stop].tolist(), strict=True):
                whole[row] = images[place]  # one fancy index would copy twice, and a join would keep Python's lock
        if whole is not out:
            out[...] = resize(whole, self.image_size)

    def factors(self, indices: Indices) -> np.ndarray:
        if self.is_grid:
            return super().factors(indices)
        values = self._factors[self.check_indices(indices)].astype(np.int64)
        if values.size and (values.min() < 0 or (values >= np.array(self.factor_sizes)).any()):
            raise InputError(f"{self.path / FACTORS}: a factor lies outside of its values; it is damaged")
        return values

    def _open(self) -> None:
        tail = (self._stored, self._stored, 3)
        self._map = lru_cache(OPEN)(partial(_map_shard, self._folder, self._lengths, tail))
        if not self.is_grid:
            shape = len(self), len(self.factor_names)
            self._factors = _map(self._folder / FACTORS, shape, "integers", INTEGERS)


def is_sharded(path: Path) -> bool:
    """Whether a folder holds an index that begins as ours does."""
    file = path / INDEX
    if not file.is_file():
        return False
    with open(file, "rb") as stream:
        return stream.read(len(BEGINNING)) == BEGINNING.encode()


def shard_name(shard: int) -> str:
    """The file of a number, counted from 0."""
    return f"images-{shard:05}.npy"


def _read_index(path: Path) -> dict[str, Any]:
    """What the index says, every entry of its type and in agreement with the others."""
    index = read_json(path)
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
        raise InputError(f"{path}: must be of format {FORMAT} and version {VERSION}; is it of a later encdiff?")
    size, lengths, factors = _entries(index, "image_size", "lengths", "factors")
    _need(path, "image_size", size, _whole(size, LARGEST), f"a number in 1..{LARGEST}")
    counts = isinstance(lengths, list) and all(_whole(n, MOST) for n in lengths) and 1 <= sum(lengths) <= MOST
    _need(path, "lengths", lengths, counts, "numbers above 0, one a file")
    if factors is not None:
        _need(path, "factors", factors, isinstance(factors, dict), "null, or an object")
        _check_factors(path, factors, sum(lengths))
    return index


def _check_factors(path: Path, factors: dict[str, Any], count: int) -> None:
    names, sizes, labels = _entries(factors, "names", "sizes", "labels")
    _need(path, "names", names, _texts(names) and 1 <= len(names) <= MOST_FACTORS, "different texts, one a factor")
    fits = isinstance(sizes, list) and len(sizes) == len(names) and all(_whole(n, 2**31) for n in sizes)
    _need(path, "sizes", sizes, fits, "numbers above 0, one a factor")
    fits = isinstance(labels, list) and len(labels) == len(names) and all(map(_numbers, labels, sizes))
    _need(path, "labels", labels, fits, "lists of numbers, one a factor, as many as it has values")
    for key in ("cyclic", "categories"):
        (named,) = _entries(factors, key)
        _need(path, key, named, _texts(named) and set(named) <= set(names), "names of factors")
    grid, instances = _entries(factors, "grid", "instances")
    _need(path, "grid", grid, isinstance(grid, bool), "true or false")
    _need(path, "instances", instances, _whole(instances, MOST), "a number above 0")
    if grid and math.prod(sizes) * instances != count:
        raise InputError(f"{path}: {count} images, but a grid of {' x '.join(map(str, sizes))} x {instances}")


def _entries(given: dict[str, Any], *keys: str) -> list[Any]:
    """The entries of these names, None where one is missing, which it is from now on."""
    return [given.setdefault(key, None) for key in keys]


def _need(path: Path, key: str, value: Any, fits: bool, must: str) -> None:
    if not fits:
        raise InputError(f"{path}: {key} is {str(value)[:80]}, must be {must}; it is damaged or of another program")


def _whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v for v in value) and len(set(value)) == len(value)


def _numbers(value: Any, count: int) -> bool:
    real = isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    return real and len(value) == count


def _check_size(path: Path, least: int) -> None:
    """InputError for a file that is missing, special or shorter than its images."""
    if not path.is_file():
        if path.exists():
            refuse_special(path)
        raise InputError(f"{path}: no such file, but {INDEX} names it; copy the folder again")
    if path.stat().st_size < least:
        raise InputError(f"{path}: holds {path.stat().st_size} bytes, its images have {least}; copy it again")


def _map_shard(folder: Path, lengths: list[int], tail: tuple[int, ...], shard: int) -> np.ndarray:
    return _map(folder / shard_name(shard), (lengths[shard], *tail), "uint8", (np.uint8,))


def _map(path: Path, shape: tuple[int, ...], must: str, kinds: tuple[type, ...]) -> np.ndarray:
    """The array of a `.npy` file, mapped; InputError unless it is of this shape and one of these types."""
    _check_size(path, math.prod(shape))
    with damage(f"{path}: a damaged or foreign .npy file"), open(path, "rb") as file:
        header, size = npy_header(file), os.fstat(file.fileno()).st_size
        if not any(header.dtype == kind for kind in kinds) or header.shape != shape or header.fortran:
            raise InputError(f"{path}: is {header.dtype} {header.shape}; must be {must} {shape} by {INDEX}")
        if size != header.length + math.prod(shape) * header.dtype.itemsize:
            raise InputError(
                f"{path}: holds {size} bytes, which are not those of {header.dtype} {shape}; copy it again"
            )
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, header.dtype, math.prod(shape), header.length).reshape(shape)
