"""Data sets of images with known factors, one file per format; see `open_dataset`."""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch

from encdiff.errors import InputError

__all__ = ["Dataset", "describe", "open_dataset", "to_float", "to_uint8"]


class Dataset(ABC):
    """Square RGB images, addressed by index; a labelled set is a complete grid of factors, the last one fastest.

    A subclass sets `name`, `image_size` and, when labelled, `factor_names`, `factor_sizes` and `label_values` (all
    empty otherwise), and defines `images`; an unlabelled one defines `__len__` too.
    """

    name: str
    spec: str | None = None  # what `open_dataset` opens it by, from any folder
    image_size: int
    factor_names: tuple[str, ...] = ()
    factor_sizes: tuple[int, ...] = ()
    images_per_chunk: int = 1  # how many are read, at least, to read one
    label_values: tuple[np.ndarray, ...] = ()  # float64 (size,) for each factor: what its values stand for

    def __len__(self) -> int:
        return math.prod(self.factor_sizes)

    @abstractmethod
    def images(self, indices) -> np.ndarray:
        """uint8 (n, H, W, 3) for integer indices (n,), in any order, repeats allowed; InputError outside 0..len-1."""

    def factors(self, indices) -> np.ndarray:
        """int64 (n, F) factor values, each in 0..size-1, of integer indices (n,)."""
        self._need_labels()
        return np.stack(np.unravel_index(self.check_indices(indices), self.factor_sizes), axis=-1).astype(np.int64)

    def indices(self, factors) -> np.ndarray:
        """int64 (n,) indices of the images with integer factor values (n, F); the inverse of `factors`."""
        self._need_labels()
        values = check_factors(factors, self.factor_sizes)
        return np.ravel_multi_index(tuple(values.T), self.factor_sizes).astype(np.int64)

    def labels(self, indices) -> np.ndarray:
        """float64 (n, F) physical values (hue 0..0.9, degrees, ...) of integer indices (n,)."""
        columns = zip(self.label_values, self.factors(indices).T, strict=True)
        return np.stack([values[column] for values, column in columns], axis=1)

    def check_indices(self, indices) -> np.ndarray:
        """The indices as int64 (n,); InputError when they are not integers (n,) in 0..len-1."""
        array = np.asarray(indices)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise InputError(f"indices: {array.dtype} of shape {array.shape}; must be integers of shape (n,)")
        if array.size and (array.min() < 0 or array.max() >= len(self)):
            raise InputError(f"indices: {array.min()}..{array.max()}; {self.name} has 0..{len(self) - 1}")
        return array.astype(np.int64)

    def _need_labels(self) -> None:
        if not self.factor_sizes:
            raise InputError(f"{self.name}: has no factors; a labelled data set is needed here")


def check_factors(factors, sizes: tuple[int, ...]) -> np.ndarray:
    """Factor values as int64 (n, F); InputError when they are not integers (n, F) with 0 <= value < size."""
    array = np.asarray(factors)
    if array.ndim != 2 or array.shape[1] != len(sizes) or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"factors: {array.dtype} of shape {array.shape}; must be integers of shape (n, {len(sizes)})")
    if array.size and (array.min() < 0 or (array >= np.array(sizes)).any()):
        raise InputError(f"factors: a value lies outside 0..size-1 of the sizes {tuple(sizes)}")
    return array.astype(np.int64)


def describe(dataset: Dataset, probes: int = 8) -> dict:
    """Name, sizes and a SHA-256 over `probes` evenly spaced images: enough to tell whether two data sets are one."""
    images = dataset.images(np.linspace(0, len(dataset) - 1, probes).astype(np.int64))
    return {
        "name": dataset.name,
        "images": len(dataset),
        "image_size": int(dataset.image_size),
        "factor_names": list(dataset.factor_names),
        "factor_sizes": [int(size) for size in dataset.factor_sizes],
        "sha256": hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest(),
    }


def to_float(images) -> torch.Tensor:
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


def open_dataset(spec: str | os.PathLike, image_size: int | None = None) -> Dataset:
    """The data set that `spec` names, told by content, not by file name.

    `procedural` or `procedural:5,5,5,4,4,5` (values per factor) renders, 64x64 unless `image_size` says otherwise; a
    file is read as `3dshapes.h5` or an `.npz` of its images, reduced to `image_size` if given; a folder holds images,
    resized to `image_size`. A relative path that does not exist is looked up in the folder that the environment's
    ENCDIFF_DATA names. InputError for anything else.
    """
    if str(spec).partition(":")[0] == "procedural":
        dataset, dataset_spec = _open_procedural(str(spec), image_size), str(spec)
    else:
        path = _find(spec)
        dataset, dataset_spec = _open_path(path, image_size), str(path.resolve())
    dataset.spec = dataset_spec
    return dataset


ACCEPTED = "must be procedural[:5,5,5,4,4,5], a 3dshapes .h5 file, an .npz file with `images`, or a folder of images"


def _open_path(path: Path, image_size: int | None) -> Dataset:
    # Imported here: each format's module imports this one, and h5py loads only when a file needs it.
    if path.is_dir():
        from encdiff.data.folder import ImageFolder

        return ImageFolder(path, image_size)
    from encdiff.data.shapes3d import Shapes3D

    return Shapes3D(path, image_size)


def _open_procedural(spec: str, image_size: int | None) -> Dataset:
    from encdiff.data.procedural import FACTOR_SIZES, ProceduralShapes3D

    _, colon, counts = spec.partition(":")
    try:
        grid = [int(count) for count in counts.split(",")] if colon else FACTOR_SIZES
    except ValueError:
        raise InputError(f"data {spec!r}: {ACCEPTED}") from None
    return ProceduralShapes3D(64 if image_size is None else image_size, grid)


def _find(spec: str | os.PathLike) -> Path:
    path, folder = Path(spec).expanduser(), os.environ.get("ENCDIFF_DATA")
    for candidate in [path] + ([Path(folder).expanduser() / path] if folder else []):
        if candidate.exists():
            return candidate
    also = f" nor in ENCDIFF_DATA={folder}" if folder else ""
    raise InputError(f"data {str(spec)!r}: not found here{also}; {ACCEPTED}")
