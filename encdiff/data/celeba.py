"""CelebA: aligned faces with forty attributes, in `img_align_celeba.zip` or the folder that it unpacks to."""

from __future__ import annotations

import io
import os
import zipfile
from copy import copy
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from encdiff.data.dataset import Dataset, Indices
from encdiff.data.folder import PICTURES, load_rgb
from encdiff.data.npz import read_member
from encdiff.errors import InputError
from encdiff.files.reading import damage, read_text

ATTRIBUTES, PARTITION, IMAGES = "list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"
MOST = 2**28  # bytes of a text, or of one image, that are still read
PARTITIONS = ("train", "valid", "test")


class CelebA(Dataset):
    """The folder with `list_attr_celeba.txt` and the images, or their zip file beside it; `factors` are the attributes.

    Attributes are 0 or 1 and form no grid: `indices` is refused. Images are resized so that the shorter side is 1.5
    times `image_size` (64, from 96) and cropped at the centre. `partition` (train, valid, test; default: all) needs
    `list_eval_partition.txt`. InputError, naming file and line, when one is missing, malformed or names no image.
    """

    is_grid = False

    def __init__(self, path: str | os.PathLike, image_size: int | None = None, partition: str | None = None):
        self.path = Path(path)
        self.name = "celeba"
        self.image_size = 64 if image_size is None else image_size
        if self.image_size < 1:
            raise InputError(f"image_size: {image_size}; must be at least 1")
        folder = self.path if self.path.is_dir() else self.path.parent
        self.factor_names, self._files, self._attributes = _read_attributes(folder / ATTRIBUTES)
        self.factor_sizes = (2,) * len(self.factor_names)
        self.label_values = (np.array([-1.0, 1.0]),) * len(self.factor_names)
        self._open_images()
        if partition is not None:
            self._restrict(folder / PARTITION, partition)

    def __len__(self) -> int:
        return len(self._files)

    def factors(self, indices: Indices) -> np.ndarray:
        return self._attributes[self.check_indices(indices)].astype(np.int64)

    def select(self, selection: str) -> CelebA:
        """The train, valid or test images."""
        part = copy(self)
        part._restrict((self.path if self.path.is_dir() else self.path.parent) / PARTITION, selection)
        return part

    def images(self, indices: Indices) -> np.ndarray:
        out = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        for row, index in enumerate(self.check_indices(indices)):
            name = self._files[index]
            source = self._read_member(name, self._zip) if self._zip else self._folder / name
            out[row] = centre(load_rgb(source, f"{self.path}: {name}"), self.image_size)
        return out

    def _restrict(self, path: Path, partition: str) -> None:
        keep = _read_partition(path, self._files) == _partition_number(partition)
        if not keep.any():
            raise InputError(f"{path}: names no {partition} image among the {len(self)} of {self.name}")
        self._files = [file for file, kept in zip(self._files, keep, strict=True) if kept]
        self._attributes, self.name = self._attributes[keep], f"celeba:{partition}"

    def _open_images(self) -> None:
        """Find the images, in a zip file if there is one, and see that none is missing."""
        folder = self.path
        self._zip: _Zip | None = None
        packed = folder / f"{IMAGES}.zip" if folder.is_dir() else folder
        self._folder = next((f for f in (folder / IMAGES, folder) if next(f.glob("*.jpg"), None)), None)
        if self._folder is not None:
            there = {entry.name for entry in os.scandir(self._folder)}
        elif packed.is_file():
            self._zip = _Zip(packed)
            self._members = {PurePosixPath(name).name: name for name in self._zip.open().namelist()}
            there = set(self._members)
        else:
            raise InputError(f"{folder}: holds neither {IMAGES}/*.jpg nor {IMAGES}.zip; CelebA's images must lie here")
        self.images_per_thread = 0 if self._zip else PICTURES  # a zip file has one place that is read
        missing = next((file for file in self._files if file not in there), None)
        if missing:
            raise InputError(f"{self._folder or packed}: holds no {missing}, but {ATTRIBUTES} names it")

    def _read_member(self, name: str, packed: _Zip) -> io.BytesIO:
        return io.BytesIO(read_member(self.path, packed.open(), self._members[name], MOST))


def centre(image: Image.Image, size: int) -> np.ndarray:
    """uint8 (size, size, 3): the shorter side resized to 1.5 `size`, then the middle."""
    short = round(1.5 * size)
    width, height = (short * side // min(image.size) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(
        image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    )


class _Zip:
    """A zip file that each process opens for itself: forked ones would move one another's place in it."""

    def __init__(self, path: Path):
        self.path = path.absolute()
        self._opened: tuple[int, zipfile.ZipFile] | None = None  # by which process

    def __getstate__(self) -> dict:
        return {"path": self.path, "_opened": None}

    def open(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            with damage(f"{self.path}: a damaged or truncated zip file"):
                self._opened = os.getpid(), zipfile.ZipFile(self.path)
        return self._opened[1]


def _lines(path: Path) -> list[str]:
    """The lines of a text, without blank ones at its end."""
    return read_text(path, MOST).rstrip().splitlines()


def _read_attributes(path: Path) -> tuple[tuple[str, ...], list[str], np.ndarray]:
    """Names of the attributes, image files, and bool (n, attributes)."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; CelebA's attributes must lie beside its images")
    lines = _lines(path)
    (count, header), lines = (*lines[:2], "", "")[:2], lines[2:]
    names, files = tuple(header.split()), []
    if count.strip() != str(len(lines)) or not lines or not names or len(set(names)) < len(names):
        raise InputError(f"{path}: {len(lines)} images follow {count[:20]!r} and {len(names)} names; must agree")
    if len(lines) * len(names) > sum(map(len, lines)):
        raise InputError(f"{path}: too short for {len(lines)} images of {len(names)} attributes; is it cut?")
    table = np.empty((len(lines), len(names)), bool)
    for row, line in enumerate(lines):
        file, *values = line.split() or [""]
        if len(values) != len(names) or not set(values) <= {"-1", "1"}:
            raise InputError(f"{path}: line {row + 3} must hold a file name and {len(names)} times -1 or 1")
        files.append(file)
        table[row] = [value == "1" for value in values]
    return names, files, table


def _partition_number(partition: str) -> int:
    if partition not in PARTITIONS:
        raise InputError(f"celeba:{partition}: must be celeba:{', celeba:'.join(PARTITIONS)}, or celeba for all")
    return PARTITIONS.index(partition)


def _read_partition(path: Path, files: list[str]) -> np.ndarray:
    """int64 (n,): 0, 1 or 2 for each of the image files."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; it says which images are for training, validation and testing")
    rows = [line.split() for line in _lines(path)]
    wrong = next((i for i, row in enumerate(rows, start=1) if len(row) != 2 or row[1] not in ("0", "1", "2")), None)
    if wrong:
        raise InputError(f"{path}: line {wrong} must hold a file name and 0, 1 or 2")
    number = {name: int(part) for name, part in rows}
    missing = next((file for file in files if file not in number), None)
    if missing:
        raise InputError(f"{path}: says nothing of {missing}, but {ATTRIBUTES} names it")
    return np.array([number[file] for file in files], np.int64)
