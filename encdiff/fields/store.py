"""Whole fields by number: what every source of them offers, and our own HDF5 file of them.

The file holds `fields`, float32 (n, C, H, W) or (n, T, C, H, W), in one piece without compression, so that a sample is
one read; `done`, how many of the samples are written; and in the attribute `about` the JSON text of format, version,
kind, channels, domain, periodic, times, seed and settings.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import h5py
import numpy as np
import torch

from encdiff.data.dataset import Indices, check_indices
from encdiff.data.hdf5 import open_h5, own_array
from encdiff.errors import InputError
from encdiff.fields.grid import Grid
from encdiff.files.reading import damage, parse_json

FORMAT, VERSION = "encdiff-fields", 1
FIELDS, DONE, ABOUT = "fields", "done", "about"
MOST, CHUNK = 2000, 2**26  # samples of statistics; bytes read at once for these


class Summary(NamedTuple):
    """Each channel's mean, standard deviation, least and greatest value, float64 (C,), over so many samples."""

    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    samples: int


class FieldData(ABC):
    """Samples of fields on one grid, at one time or at T times, addressed by index.

    A subclass sets `grid`, `name`, and where there are several frames `times`; it defines `__len__` and `_read`.
    """

    grid: Grid
    name: str
    spec: str | None = None  # what `open_fields` opens it by, from any folder
    times: np.ndarray | None = None  # float64 (T,); None: samples are single fields
    images_per_chunk: int = 1  # how many samples are read, at least, to read one
    sample_dtype: ClassVar[torch.dtype] = torch.float32

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, order: np.ndarray) -> np.ndarray:
        """Numbers (n, *sample_shape) at increasing indices int64 (n,), each of them once."""

    def __repr__(self) -> str:
        grid, frames = self.grid, "" if self.times is None else f"{len(self.times)} frames of "
        channels = ", ".join(grid.channels)
        return f"<{self.name}: {len(self):,} samples, {frames}{grid.height}x{grid.width}, {channels}>"

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) or (T, C, H, W)."""
        return self.grid.shape if self.times is None else (len(self.times), *self.grid.shape)

    def read(self, indices: Indices) -> np.ndarray:
        """float32 (n, C, H, W) or (n, T, C, H, W) of integer indices (n,), in any order, repeats allowed.

        InputError outside 0..len-1, and for a sample that holds NaN, infinity or what float32 cannot.
        """
        order, inverse = np.unique(check_indices(indices, self), return_inverse=True)
        with np.errstate(over="ignore"):
            fields = np.asarray(self._read(order), dtype=np.float32)
        bad = ~np.isfinite(fields).all(axis=tuple(range(1, fields.ndim)))
        if bad.any():
            raise InputError(f"{self.name}: sample {order[bad][0]} holds NaN or infinity, must hold finite numbers")
        return fields[inverse]

    def part(self, start: int, stop: int) -> FieldData:
        """Samples start to stop - 1 as a data set of their own."""
        return Part(self, start, stop)

    def whole(self) -> tuple[FieldData, int]:
        """What this is a part of, itself if of nothing, and where it begins there."""
        return self, 0

    def statistics(self, most: int = MOST, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel, both float64 (C,); over which samples `summary` says."""
        found = self.summary(most, seed)
        return found.mean, found.std

    def summary(self, most: int = MOST, seed: int = 0) -> Summary:
        """Of each channel over all pixels and frames of all samples, or of `most` drawn by seed."""
        if most < 1:
            raise InputError(f"most is {most}, must be at least 1")
        chosen = np.arange(len(self))
        if len(self) > most:
            chosen = np.sort(np.random.default_rng(seed).choice(len(self), most, replace=False))
        step = max(1, CHUNK // (4 * math.prod(self.sample_shape)))
        parts = (self.read(chosen[start : start + step]) for start in range(0, len(chosen), step))
        mean, square, low, high = np.zeros((4, len(self.grid.channels)))
        count, low, high = 0, low + np.inf, high - np.inf
        for fields in parts:  # deviations from means so far: sums of squares would lose what varies little
            fields = np.moveaxis(fields, -3, 0).reshape(len(mean), -1).astype(np.float64)
            new, here = fields.shape[1], fields.mean(1)
            square += ((fields - here[:, None]) ** 2).sum(1) + (here - mean) ** 2 * count * new / (count + new)
            mean += (here - mean) * new / (count + new)
            count, low, high = count + new, np.minimum(low, fields.min(1)), np.maximum(high, fields.max(1))
        return Summary(mean, np.sqrt(square / count), low, high, len(chosen))

    def about(self) -> dict[str, Any]:
        """The grid and the times: what `encdiff.data.describe` says beside name, number and content."""
        return {
            "channels": list(self.grid.channels),
            "size": [self.grid.height, self.grid.width],
            "domain": list(self.grid.domain),
            "periodic": self.grid.periodic,
            "times": None if self.times is None else self.times.tolist(),
        }


class Part(FieldData):
    """Consecutive samples of other data."""

    def __init__(self, data: FieldData, start: int, stop: int):
        if not 0 <= start < stop <= len(data):
            raise InputError(f"part {start}:{stop} of {data.name}: must lie in 0:{len(data)} and hold a sample")
        self.data, self.start, self.count = data, start, stop - start
        self.grid, self.name, self.times, self.images_per_chunk = (
            data.grid,
            data.name,
            data.times,
            data.images_per_chunk,
        )
        self.spec = None if data.spec is None else f"{data.spec}:{start}:{stop}"

    def __len__(self) -> int:
        return self.count

    def whole(self) -> tuple[FieldData, int]:
        data, first = self.data.whole()
        return data, first + self.start

    def _read(self, order: np.ndarray) -> np.ndarray:
        return self.data._read(order + self.start)


class NamedAxes(NamedTuple):
    """An array of one or all channels, whose axes are named by letters: n, t, c, y, x, in any order that begins with n.

    Without n it is one sample.
    """

    array: h5py.Dataset | np.ndarray
    layout: str

    def length(self, axis: str) -> int:
        return self.array.shape[self.layout.index(axis)]

    def arranged(self, rows: np.ndarray) -> np.ndarray:
        """The rows read, in the order [n, t,] c, y, x, of one channel where there is no c."""
        layout = self.layout
        if "c" not in layout:
            rows, layout = rows[..., None], layout + "c"
        return rows.transpose([layout.index(axis) for axis in "ntcyx" if axis in layout])

    def read(self, order: np.ndarray) -> np.ndarray:
        """(len(order), [T,] C, H, W)."""
        return self.arranged(read_runs(self.array, order))


class ArrayFields(FieldData):
    """Fields whose channels lie in one or several arrays."""

    def __init__(self, path: Path, sources: list[NamedAxes], grid: Grid, times: np.ndarray | None):
        self.path, self.name, self.grid, self.times, self._sources = path, path.name, grid, times, sources
        self.images_per_chunk = max((getattr(source.array, "chunks", None) or (1,))[0] for source in sources)

    def __len__(self) -> int:
        return self._sources[0].array.shape[0]

    def _read(self, order: np.ndarray) -> np.ndarray:
        with damage(f"{self.path}: cannot be read"):
            return np.concatenate([source.read(order) for source in self._sources], axis=-3)


class StoredFields(FieldData):
    """A file that `render` wrote. InputError, naming it, where it is damaged, unfinished or of another format.

    `rendered` is what the file says of itself: kind, seed, settings and more.
    """

    def __init__(self, path: Path):
        self.path, self.name, self.spec = path, path.name, str(path.resolve())
        file = open_h5(path)
        try:
            self.rendered = read_about(path, file)
            self.grid, self.times = grid_of(path, self.rendered)
            self._fields = self._checked(own_array(path, file, FIELDS), own_array(path, file, DONE))
        except BaseException:
            file.close()  # else it stays open as long as the error is kept
            raise

    def __len__(self) -> int:
        return self._fields.shape[0]

    def _read(self, order: np.ndarray) -> np.ndarray:
        with damage(f"{self.path}: cannot be read"):
            return read_runs(self._fields, order)

    def _checked(self, fields: h5py.Dataset | None, done: h5py.Dataset | None) -> h5py.Dataset:
        must = "float32 (n, " + ", ".join(map(str, self.sample_shape)) + ")"
        if fields is None or fields.dtype != np.float32 or fields.shape[1:] != self.sample_shape or not len(fields):
            found = "none" if fields is None else f"{fields.dtype} {fields.shape}"
            raise InputError(f"{self.path}: fields are {found}, must be {must}")
        if done is None or done.shape != () or done[()] != len(fields):
            raise InputError(f"{self.path}: is unfinished, must hold {len(fields)} samples; render it again")
        return fields


def is_stored(path: Path) -> bool:
    """Whether an HDF5 file says that it is one of ours."""
    with open_h5(path) as file, damage(f"{path}: a damaged HDF5 file: {ABOUT}"):
        return ABOUT in file.attrs


def read_about(path: Path, file: h5py.File) -> dict[str, Any]:
    """What a file of ours says of itself; InputError for another."""
    with damage(f"{path}: a damaged HDF5 file: {ABOUT}"):
        attribute = file.attrs.get_id(ABOUT) if ABOUT in file.attrs else None
        # of fixed length: a damaged text of variable length would hold HDF5 for ever
        text = bytes(file.attrs[ABOUT]) if attribute and attribute.dtype.kind == "S" and attribute.shape == () else b"0"
    about = parse_json(text, f"{path}, its {ABOUT}")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(
            f"{path}: an HDF5 file of another kind, must be one of fields that `encdiff fields render` wrote"
        )
    if about.get("version") != VERSION:
        raise InputError(f"{path}: is of version {str(about.get('version'))[:20]}, must be {VERSION}; render it again")
    return about


def write_about(file: h5py.File, about: dict[str, Any]) -> None:
    """The counterpart of `read_about`."""
    file.attrs[ABOUT] = np.bytes_(json.dumps(about))


def grid_of(path: Path, about: dict[str, Any]) -> tuple[Grid, np.ndarray | None]:
    """Where the pixels of a file of ours lie, and its times."""
    keys = ("channels", "height", "width", "domain", "periodic")
    grid = Grid.from_dict({key: about.get(key) for key in keys}, f"{path}")
    times = about.get("times")
    if times is None:
        return grid, None
    if not isinstance(times, list) or not all(type(t) in (int, float) for t in times) or not increasing(times):
        raise InputError(f"{path}: times are {str(times)[:80]}, must be increasing numbers")
    return grid, np.array(times, dtype=np.float64)


def increasing(values: Sequence[float] | np.ndarray) -> bool:
    """Whether there are values, finite ones, each greater than the one before."""
    array = np.asarray(values, dtype=np.float64)
    return bool(array.ndim == 1 and array.size and np.isfinite(array).all() and (np.diff(array) > 0).all())


def read_runs(source: h5py.Dataset | np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows at increasing indices, one read for each run of neighbours: h5py's lists of indices are far slower."""
    out = np.empty((len(order), *source.shape[1:]), source.dtype)
    starts = np.flatnonzero(np.diff(order, prepend=-2) != 1)
    for start, stop in pairwise([*starts, len(order)]):
        out[start:stop] = source[order[start] : order[stop - 1] + 1]
    return out
