"""Cars3D: 183 car models from 4 elevations and 24 azimuths, in `nips2015-analogy-data.tar.gz` or unpacked."""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, Literal, cast

import numpy as np

from encdiff.data.arrays import resize
from encdiff.data.dataset import Dataset, Indices, Progress
from encdiff.data.matlab import array_of, read_arrays
from encdiff.errors import InputError
from encdiff.files.reading import damage, read_bytes

ELEVATIONS, AZIMUTHS = 4, 24
LIST = "list.txt"
MOST, LARGEST = 2**28, 1024  # bytes of a file, and pixels along a side, that are still read
REPEATS = 10  # of every image in the published training set


class Cars3D(Dataset):
    """The folder `data/cars`, one above it, or the archive that holds it: `list.txt` and a `.mat` file for each car.

    Each file's `im` is uint8 (size, size, 3, 24, 4); the object's number is its line in `list.txt`. All images are read
    at once, resized to `image_size` (64), and kept in memory; `progress(done, total)` follows the files of a folder,
    and the bytes of an archive. InputError, naming the file, when one is missing, damaged or of another shape.

    `published_misalignment` repeats an error of the published evaluation, for comparison with its figures only: it
    reads the training set, which holds every image ten times, so factors of image i come with the picture of i // 10.
    """

    factor_names = ("elevation", "azimuth", "object")
    cyclic, categories = ("azimuth",), ("object",)

    def __init__(
        self,
        path: str | os.PathLike,
        image_size: int | None = None,
        *,
        published_misalignment: bool = False,
        progress: Progress | None = None,
    ):
        self.path, self.published_misalignment = Path(path), published_misalignment
        self.name = "published-cars3d" if published_misalignment else "cars3d"
        self.image_size = 64 if image_size is None else image_size
        if self.image_size < 1:
            raise InputError(f"image_size: {image_size}; must be at least 1")
        if not self.path.exists():
            raise InputError(f"{path}: no such file or folder; must hold Cars3D's {LIST} and .mat files")
        read = _read_folder if self.path.is_dir() else _read_archive
        self._images = read(self.path, self.image_size, progress)  # (elevation, azimuth, object, size, size, 3)
        self.factor_sizes = self._images.shape[:3]
        elevations, azimuths, objects = (np.arange(n, dtype=np.float64) for n in self.factor_sizes)
        self.label_values = (elevations, azimuths * (360 / AZIMUTHS), objects)

    def images(self, indices: Indices) -> np.ndarray:
        indices = self.check_indices(indices)
        if self.published_misalignment:
            indices = indices // REPEATS
        return self._images[np.unravel_index(indices, self.factor_sizes)]


def cars_folder(path: Path) -> Path | None:
    """The folder of the list and the `.mat` files: `path`, its `cars` or its `data/cars`."""
    folders = (path, path / "cars", path / "data" / "cars")
    return next((f for f in folders if (f / LIST).is_file() and next(f.glob("*.mat"), None)), None)


def is_tar(path: Path) -> bool:
    """Whether a file is a tar archive, plain or gzipped, or the beginning of a gzipped one that is cut short."""
    try:
        with open(path, "rb") as raw, tarfile.open(fileobj=raw, mode=_mode(raw)):
            return True
    except (EOFError, zlib.error):
        return True
    except (tarfile.TarError, OSError, ValueError, OverflowError):
        return False


def _mode(raw: BinaryIO) -> Literal["r|gz", "r|"]:
    """How tarfile is to read: gzipped or plain, and as nothing else, since xz may ask for gigabytes of memory."""
    packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return "r|gz" if packed else "r|"


def _read_folder(path: Path, size: int, progress: Progress | None) -> np.ndarray:
    folder = cars_folder(path)
    if folder is None:
        raise InputError(f"{path}: holds no {LIST} beside .mat files; must be Cars3D's data/cars or a folder above it")
    names, cars = _listed(read_bytes(folder / LIST, MOST), folder / LIST), []
    for done, name in enumerate(names, start=1):
        file = folder / f"{name}.mat"
        if not file.is_file():
            raise InputError(f"{file}: no such file, but {LIST} names it")
        cars.append(_read_car(read_bytes(file, MOST), size, file))
        if progress:
            progress(done, len(names))
    return np.stack(cars, axis=2)


def _read_archive(path: Path, size: int, progress: Progress | None) -> np.ndarray:
    names, cars = None, {}
    for member, content in _members(path, progress):
        if member.name == LIST:
            names = _listed(content, f"{path}: {member}")
        else:
            cars[member.stem] = _read_car(content, size, f"{path}: {member}")
    if names is None:
        raise InputError(f"{path}: an archive without cars/{LIST}; must be nips2015-analogy-data.tar.gz")
    missing = [name for name in names if name not in cars]
    if missing:
        raise InputError(f"{path}: holds no {missing[0]}.mat, but its {LIST} names it")
    return np.stack([cars[name] for name in names], axis=2)


def _members(path: Path, progress: Progress | None) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Names and contents of the files in a folder `cars` of an archive, in one pass, nothing written to disk."""
    try:
        with open(path, "rb") as raw, tarfile.open(fileobj=raw, mode=_mode(raw)) as archive:
            for entry in archive:
                member = PurePosixPath(entry.name)
                wanted = member.name == LIST or (member.suffix == ".mat" and not member.name.startswith("."))
                if entry.isfile() and member.parent.name == "cars" and wanted:
                    if entry.size > MOST:
                        raise InputError(f"{path}: {member} holds {entry.size} bytes, must hold {MOST} at most")
                    yield member, cast(IO[bytes], archive.extractfile(entry)).read()  # a file's
                if progress:
                    progress(raw.tell(), path.stat().st_size)
    except InputError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: a damaged or truncated archive ({error}); copy it again") from error


def _listed(content: bytes, source: str | Path) -> list[str]:
    names = content.decode(errors="replace").split()
    names = [PurePosixPath(name).name.removesuffix(".mat") for name in names]
    if not names or len(set(names)) < len(names):
        raise InputError(f"{source}: {len(names)} names, {len(set(names))} different; must list each car once")
    return names


def _read_car(content: bytes, size: int, source: str | Path) -> np.ndarray:
    """The views of one car, uint8 (4, 24, size, size, 3)."""
    with damage(f"{source}: not a readable MATLAB file"):
        arrays = read_arrays(content)
    if "im" not in arrays:
        raise InputError(f"{source}: a MATLAB file without `im`; must be a car of Cars3D")
    dtype, shape, pixels = arrays["im"]
    square = len(shape) == 5 and 0 < shape[0] == shape[1] <= LARGEST
    if dtype != "uint8" or not square or shape[2:] != (3, AZIMUTHS, ELEVATIONS):
        raise InputError(f"{source}: im is {dtype} {shape}; must be uint8 (size, size, 3, {AZIMUTHS}, {ELEVATIONS})")
    images = array_of(shape, pixels)
    views = images.transpose(4, 3, 0, 1, 2).reshape(-1, *images.shape[:3])
    return resize(views, size).reshape(ELEVATIONS, AZIMUTHS, size, size, 3)
