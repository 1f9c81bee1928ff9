"""What every data set is: images by index, their factors, parts of the grid; and images as what a model takes."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from encdiff.errors import InputError

Progress = Callable[[int, int], None]  # called with (done, total)
Indices = Sequence[int] | np.ndarray  # (n,) integers
Factors = Sequence[Sequence[int]] | np.ndarray  # (n, F) integers
ACCEPTED = (  # by `open_dataset`, and said where something else is met
    "must be procedural[:5,5,5,4,4,5] or sprites[:3,6,40,32,32]; a 3dshapes .h5 file; an .npz file of Shapes3D "
    "(`images`), MPI3D or dSprites; the files of Cars3D, SmallNORB or CelebA; an LMDB of images; "
    "a folder of images, or of shards that `encdiff data convert --shards` wrote; or Hugging Face Datasets, hf:PATH"
)


class Source(Protocol):
    """What batches are cut from, and a run is begun on: arrays of one shape, by index."""

    name: str
    sample_dtype: ClassVar[torch.dtype]

    @property
    def spec(self) -> str | None: ...  # what opens it again, from any folder
    @property
    def images_per_chunk(self) -> int: ...
    @property
    def sample_shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def read(self, indices: Indices) -> np.ndarray: ...  # (n, *sample_shape)
    def about(self) -> dict[str, Any]: ...  # of its fingerprint, beside name, length and content


class Dataset(ABC):
    """Square RGB images, addressed by index; most labelled sets are a complete grid of factors, the last one fastest.

    A subclass sets `name`, `image_size` and, when labelled, `factor_names`, `factor_sizes` and `label_values` (all
    empty otherwise), and defines `images`; an unlabelled one defines `__len__` too, and one that is labelled but no
    grid (CelebA) sets `is_grid` to False and defines `__len__` and `factors`.
    """

    name: str
    spec: str | None = None  # what `open_dataset` opens it by, from any folder
    image_size: int
    factor_names: tuple[str, ...] = ()
    factor_sizes: tuple[int, ...] = ()
    images_per_chunk: int = 1  # how many are read, at least, to read one
    label_values: tuple[np.ndarray, ...] = ()  # float64 (size,) for each factor: what its values stand for
    is_grid: bool = True  # every combination of factors has equally many images; without meaning where unlabelled
    instances: int = 1  # images of each combination of factors; consecutive
    cyclic: tuple[str, ...] = ()  # factors whose last value is next to the first: hues, full turns
    categories: tuple[str, ...] = ()  # factors whose values have no order
    images_per_thread: int = 0  # how many are worth a thread's while; 0 where threads must not read at once
    sample_dtype: ClassVar[torch.dtype] = torch.uint8

    def __len__(self) -> int:
        return math.prod(self.factor_sizes) * self.instances

    def __repr__(self) -> str:
        factors = ", ".join(f"{name} {size}" for name, size in zip(self.factor_names, self.factor_sizes, strict=True))
        return f"<{self.name}: {len(self):,} images of {self.image_size}x{self.image_size}, {factors or 'no factors'}>"

    @abstractmethod
    def images(self, indices: Indices) -> np.ndarray:
        """uint8 (n, H, W, 3) for integer indices (n,), in any order, repeats allowed; InputError outside 0..len-1."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(H, W, 3) of an image."""
        return self.image_size, self.image_size, 3

    def read(self, indices: Indices) -> np.ndarray:
        """The images, as batches are cut from them."""
        return self.images(indices)

    def read_into(self, indices: Indices, out: np.ndarray) -> None:
        """As `read`, into `out`, an array of that shape and type."""
        out[...] = self.read(indices)

    def about(self) -> dict[str, Any]:
        """What `describe` says of this kind of data."""
        return {
            "image_size": int(self.image_size),
            "factor_names": list(self.factor_names),
            "factor_sizes": [int(size) for size in self.factor_sizes],
        }

    def factors(self, indices: Indices) -> np.ndarray:
        """int64 (n, F) factor values, each in 0..size-1, of integer indices (n,)."""
        self._need_grid()
        cells = self.check_indices(indices) // self.instances
        return np.stack(np.unravel_index(cells, self.factor_sizes), axis=-1).astype(np.int64)

    def indices(self, factors: Factors, rng: np.random.RandomState | None = None) -> np.ndarray:
        """int64 (n,) indices of the images with integer factor values (n, F); the inverse of `factors`.

        Where several images share the factors (`instances` > 1), one drawn by `rng`, or without it the first.
        """
        self._need_grid()
        values = check_factors(factors, self.factor_sizes)
        first = np.ravel_multi_index(tuple(values.T), self.factor_sizes).astype(np.int64) * self.instances
        return first if rng is None or self.instances == 1 else first + rng.randint(self.instances, size=len(first))

    @property
    def is_complete(self) -> bool:
        """Whether every combination of factors has its one image."""
        return bool(self.factor_sizes) and self.is_grid and self.instances == 1

    def batches(self, size: int = 2048, progress: Progress | None = None) -> Iterator[np.ndarray]:
        """All images in order, uint8 (size, H, W, 3) at a time."""
        for start in range(0, len(self), size):
            end = min(start + size, len(self))
            yield self.images(np.arange(start, end))
            if progress:
                progress(end, len(self))

    def pairs(self, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Random indices int64 (count,) of sources and targets that differ in every factor of more than one value."""
        self._need_grid()
        if count < 1 or seed < 0:
            raise InputError(f"count and seed are {count} and {seed}; must be at least 1 and 0")
        rng, sizes = np.random.default_rng(seed), np.array(self.factor_sizes)
        targets = self.factors(rng.integers(len(self), size=count))
        ahead = 1 + rng.integers(np.maximum(sizes - 1, 1), size=targets.shape)  # each other value as often
        return self.indices((targets + ahead) % sizes), self.indices(targets)

    def swapped(self, sources: Indices, targets: Indices, factor: int) -> np.ndarray:
        """int64 (n,) indices of the images with the targets' factors but this one, which is the sources'."""
        factors = self.factors(targets)
        factors[:, factor] = self.factors(sources)[:, factor]
        return self.indices(factors)

    def labels(self, indices: Indices) -> np.ndarray:
        """float64 (n, F) physical values (hue 0..0.9, degrees, ...) of integer indices (n,)."""
        columns = zip(self.label_values, self.factors(indices).T, strict=True)
        return np.stack([values[column] for values, column in columns], axis=1)

    def select(self, selection: str) -> Dataset:
        """The part that a spec names after its colon: values per factor such as "5,5,5,4,4,5"; see `SubGrid`."""
        try:
            counts = [int(count) for count in selection.split(",")]
        except ValueError:
            raise InputError(
                f"{self.name}:{selection}: must be values per factor such as {','.join(map(str, self.factor_sizes))}"
                if self.factor_sizes and self.is_grid
                else f"{self.name}:{selection}: has no grid of factors to select from"
            ) from None
        return SubGrid(self, counts)

    def check_indices(self, indices: Indices) -> np.ndarray:
        """The indices as int64 (n,); InputError when they are not integers (n,) in 0..len-1."""
        return check_indices(indices, self)

    def _need_grid(self) -> None:
        if not self.factor_sizes:
            raise InputError(f"{self.name}: has no factors; a labelled data set is needed here")
        if not self.is_grid:
            raise InputError(f"{self.name}: is labelled, but no complete grid of factors, which is needed here")


class SubGrid(Dataset):
    """Some values of every factor of a grid; everything else is as in `dataset`.

    `grid` holds for each factor either how many of its values to take or a tuple of them. k values of a cyclic factor
    are spread over the circle (floor(i * size / k)), of a category they are the first k, of any other factor they are
    spread over its range with both ends. InputError for an impossible grid.
    """

    def __init__(self, dataset: Dataset, grid: Sequence[int | Sequence[int]]):
        dataset._need_grid()
        self.dataset, self.name, self.image_size = dataset, dataset.name, dataset.image_size
        self.factor_names, self.cyclic, self.categories = dataset.factor_names, dataset.cyclic, dataset.categories
        self.images_per_chunk, self.instances = dataset.images_per_chunk, dataset.instances
        self.images_per_thread = dataset.images_per_thread
        self.values = grid_values(dataset, dataset.factor_sizes, grid)
        self.factor_sizes = tuple(len(values) for values in self.values)
        self.label_values = tuple(full[v] for full, v in zip(dataset.label_values, self.values, strict=True))

    def images(self, indices: Indices) -> np.ndarray:
        full = np.stack([v[f] for v, f in zip(self.values, self.factors(indices).T, strict=True)], axis=1)
        return self.dataset.images(self.dataset.indices(full) + self.check_indices(indices) % self.instances)


def grid_values(dataset: Dataset, sizes: Sequence[int], grid: Sequence[int | Sequence[int]]) -> tuple[np.ndarray, ...]:
    """For each factor the int64 (k,) values, of 0..size-1, that an entry of `grid` stands for; see `SubGrid`."""
    names = dataset.factor_names
    if len(grid) != len(names):
        raise InputError(f"grid: {len(grid)} entries; must be {len(names)}, one for each of {', '.join(names)}")
    return tuple(_factor_values(dataset, *factor) for factor in zip(names, sizes, grid, strict=True))


def _factor_values(dataset, name: str, size: int, entry: int | Sequence[int]) -> np.ndarray:
    if not isinstance(entry, int | np.integer):
        values = np.asarray(entry)
        whole = values.ndim == 1 and values.size and values.dtype.kind in "iu"
        if not whole or len(set(values.tolist())) < len(values):
            raise InputError(f"grid: {entry!r} for {name}; must be a count or a tuple of different indices")
        if values.min() < 0 or values.max() >= size:
            raise InputError(f"grid: {entry!r} for {name}; indices must lie in 0..{size - 1}")
        return values.astype(np.int64)
    if not 1 <= entry <= size:
        raise InputError(f"grid: {entry} values of {name}; must be 1..{size}")
    if name in dataset.cyclic:
        return np.arange(entry) * size // entry
    if name in dataset.categories:
        return np.arange(entry)
    return np.rint(np.linspace(0, size - 1, entry)).astype(np.int64)


def check_indices(indices: Indices, source: Source) -> np.ndarray:
    """The indices as int64 (n,); InputError when they are not integers (n,) in 0..len-1 of the source."""
    array = np.asarray(indices)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"indices: {array.dtype} of shape {array.shape}; must be integers of shape (n,)")
    if array.size and (array.min() < 0 or array.max() >= len(source)):
        raise InputError(f"indices: {array.min()}..{array.max()}; {source.name} has 0..{len(source) - 1}")
    return array.astype(np.int64)


def check_factors(factors: Factors, sizes: tuple[int, ...]) -> np.ndarray:
    """Factor values as int64 (n, F); InputError when they are not integers (n, F) with 0 <= value < size."""
    array = np.asarray(factors)
    if array.ndim != 2 or array.shape[1] != len(sizes) or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"factors: {array.dtype} of shape {array.shape}; must be integers of shape (n, {len(sizes)})")
    if array.size and (array.min() < 0 or (array >= np.array(sizes)).any()):
        raise InputError(f"factors: a value lies outside 0..size-1 of the sizes {tuple(sizes)}")
    return array.astype(np.int64)


def describe(dataset: Source, probes: int = 8) -> dict:
    """Name, sizes and a SHA-256 over `probes` evenly spaced images: enough to tell whether two data sets are one."""
    images = dataset.read(np.linspace(0, len(dataset) - 1, probes).astype(np.int64))
    digest = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    return {"name": dataset.name, "images": len(dataset), **dataset.about(), "sha256": digest}


def to_float(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Images uint8 (n, H, W, 3), array or tensor, as float32 (n, 3, H, W) in [-1, 1]; InputError for anything else."""
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(f"images: {images.dtype} of shape {tuple(images.shape)}; must be uint8 of shape (n, H, W, 3)")
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images float (n, 3, H, W) as uint8 (n, H, W, 3): the inverse of `to_float`; values beyond [-1, 1] are clipped."""
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images: {images.dtype} of shape {tuple(images.shape)}; must be float of shape (n, 3, H, W)")
    levels = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
