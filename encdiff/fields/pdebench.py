"""HDF5 files of PDEBench (arXiv 2210.07182), told by the arrays in them.

- Darcy flow: `nu` (n, x, y) and `tensor` (n, 1, x, y).
- Compressible flow: `Vx`, `Vy`, `density`, `pressure`, each (n, t, x, y).
- Diffusion-reaction and shallow water: a group for each sample, with `data` (t, y, x, c), `grid/x`, `grid/y`, `grid/t`.

Coordinates are those of the pixels' centres, or one more, of their edges; of times there may be one more than frames.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import h5py
import numpy as np

from encdiff.checked import LEVELS
from encdiff.data.hdf5 import open_h5, own_array
from encdiff.errors import InputError
from encdiff.fields.grid import Grid
from encdiff.fields.store import ArrayFields, FieldData, Source, increasing
from encdiff.files.reading import damage

LONGEST = 2**20  # numbers of a coordinate
MOST_GROUPS = 2**17
FLOW = ("Vx", "Vy", "density", "pressure")
MUST = f"must hold nu and tensor, {', '.join(FLOW)}, or groups of samples with data (T, H, W, C)"


def open_pdebench(path: Path) -> FieldData:
    """The fields of a file; InputError, naming it, for another kind of HDF5 file or a damaged one."""
    file = open_h5(path)
    try:
        with damage(f"{path}: a damaged HDF5 file"):
            keys = list(islice(file, MOST_GROUPS + 1))
        if {"nu", "tensor"} <= set(keys):
            return _darcy(path, file)
        if set(FLOW) <= set(keys):
            return _flow(path, file)
        groups = sorted(key for key in keys if key.isdigit())
        if groups and len(keys) <= MOST_GROUPS:
            return Groups(path, file, groups)
        found = ", ".join(keys[:8]) or "nothing"
        raise InputError(f"{path}: an HDF5 file of {found}; {MUST}, or what `encdiff fields render` wrote")
    except BaseException:
        file.close()  # else it stays open as long as the error is kept
        raise


def _darcy(path: Path, file: h5py.File) -> FieldData:
    nu, tensor = (_source(path, file, *named) for named in (("nu", "nxy"), ("tensor", "ncxy")))
    if tensor.array.shape != (nu.array.shape[0], 1, *nu.array.shape[1:]):
        raise InputError(
            f"{path}: nu {nu.array.shape} and tensor {tensor.array.shape}; must be (n, X, Y), (n, 1, X, Y)"
        )
    domain = _domain(path, file, "x-coordinate", "y-coordinate", *nu.array.shape[1:])
    grid = _grid(path, ("permeability", "pressure"), nu, domain)
    return ArrayFields(path, [nu, tensor], grid, None)


def _flow(path: Path, file: h5py.File) -> FieldData:
    sources = [_source(path, file, key, "ntxy") for key in FLOW]
    shapes = {source.array.shape for source in sources}
    if len(shapes) > 1:
        raise InputError(f"{path}: {', '.join(FLOW)} are of shapes {sorted(shapes)}; must be of one")
    _, frames, *size = next(iter(shapes))
    domain = _domain(path, file, "x-coordinate", "y-coordinate", *size)
    times = _times(path, file, "t-coordinate", frames)
    return ArrayFields(path, sources, _grid(path, FLOW, sources[0], domain), times)


class Groups(FieldData):
    """A file of one group for each sample; all must be of the shape of the first."""

    def __init__(self, path: Path, file: h5py.File, groups: list[str]):
        self.path, self.name, self._file, self._groups = path, path.name, file, groups
        first = self._sample(groups[0])
        self._shape = first.array.shape
        frames, height, width, channels = self._shape
        if channels > LEVELS:
            raise InputError(f"{path}: has {channels} channels, must have at most {LEVELS}")
        place = f"{groups[0]}/grid"
        self._own_group(place)
        domain = _domain(path, file, f"{place}/x", f"{place}/y", width, height)
        self.grid = _grid(path, tuple(f"channel{c}" for c in range(channels)), first, domain)
        self.times = _times(path, file, f"{place}/t", frames)

    def __len__(self) -> int:
        return len(self._groups)

    def _read(self, order: np.ndarray) -> np.ndarray:
        fields = np.empty((len(order), *self.sample_shape), np.float32)
        for field, index in zip(fields, order, strict=True):
            source = self._sample(self._groups[index])
            with damage(f"{self.path}: {self._groups[index]} cannot be read"):
                field[:] = source.arranged(source.array[()])
        return fields

    def _sample(self, name: str) -> Source:
        self._own_group(name)
        source = _source(self.path, self._file, f"{name}/data", "tyxc")
        if source.array.shape != getattr(self, "_shape", source.array.shape):
            raise InputError(f"{self.path}: {name}/data is {source.array.shape}, must be {self._shape} as the first")
        return source

    def _own_group(self, name: str) -> None:
        with damage(f"{self.path}: a damaged HDF5 file: {name}"):
            if not isinstance(self._file.get(name, getlink=True), h5py.HardLink):
                raise InputError(f"{self.path}: {name} is no group of the file itself, must be one; {MUST}")


def _source(path: Path, file: h5py.File, key: str, layout: str) -> Source:
    array = own_array(path, file, key)
    if array is None or array.ndim != len(layout) or not array.size:
        found = "not there" if array is None else f"{array.dtype} {array.shape}"
        raise InputError(f"{path}: {key} is {found}; must be numbers ({', '.join(layout)})")
    return Source(array, layout)


def _grid(path: Path, channels: tuple[str, ...], source: Source, domain: tuple[float, ...]) -> Grid:
    try:
        return Grid(channels, source.length("y"), source.length("x"), domain)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _domain(path: Path, file: h5py.File, x: str, y: str, width: int, height: int) -> tuple[float, ...]:
    return (*_ends(path, x, _coordinate(path, file, x), width), *_ends(path, y, _coordinate(path, file, y), height))


def _ends(path: Path, key: str, values: np.ndarray | None, count: int) -> tuple[float, float]:
    """Where an axis begins and ends; 0 and 1 without coordinates."""
    if values is None:
        return 0.0, 1.0
    if len(values) not in (count, count + 1) or not increasing(values) or len(values) < 2:
        raise InputError(f"{path}: {key} must be {count} or {count + 1} increasing numbers")
    first, last = float(values[0]), float(values[-1])
    pixel = (last - first) / (len(values) - 1)
    if np.abs(np.diff(values) - pixel).max() > 0.01 * pixel + 1e-6 * np.abs(values).max():  # some are float32
        raise InputError(f"{path}: {key} must be equally far apart")
    half = 0.0 if len(values) > count else pixel / 2
    return first - half, last + half


def _times(path: Path, file: h5py.File, key: str, count: int) -> np.ndarray:
    """Of the frames; their numbers where the file names none."""
    values = _coordinate(path, file, key)
    if values is None:
        return np.arange(count, dtype=np.float64)
    if len(values) not in (count, count + 1) or not increasing(values[:count]):
        raise InputError(f"{path}: {key} must be {count} or {count + 1} increasing numbers")
    return values[:count]


def _coordinate(path: Path, file: h5py.File, key: str) -> np.ndarray | None:
    array = own_array(path, file, key)
    if array is None:
        return None
    if array.ndim != 1 or array.size > LONGEST:
        raise InputError(f"{path}: {key} is {array.dtype} {array.shape}; must be numbers (n,)")
    with damage(f"{path}: a damaged HDF5 file: {key}"):
        return np.asarray(array[()], dtype=np.float64)
