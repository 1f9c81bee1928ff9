"""Images in an LMDB, for collections too large for memory or for a folder: any image in constant time, by the key."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from encdiff.data.dataset import Dataset, Indices
from encdiff.data.folder import PICTURES, load_square
from encdiff.data.lmdb_check import check_lmdb
from encdiff.errors import InputError

MAGIC = 0xBEEFC0DE
COUNTS = {b"length", b"__len__", b"num-samples", b"__keys__"}  # what tools store beside the images

_OPEN: WeakValueDictionary = WeakValueDictionary()  # by path: one process must not open an LMDB twice


class LmdbImages(Dataset):
    """Every value of an LMDB (its folder, or its file), in the order of the keys, without labels.

    Values are encoded images (png, jpg, webp), treated as `ImageFolder` treats files; keys such as `length`, which
    common tools add, are left out. Needs the package `lmdb`. InputError for a damaged or empty database, a missing
    package, and from `images` for a value that is no readable image, with its key.
    """

    images_per_thread = PICTURES  # each read has a transaction of its own

    def __init__(self, path: str | os.PathLike, image_size: int | None):
        self.path, self.name = Path(path), Path(path).resolve().name
        if image_size is None or image_size < 1:
            raise InputError(f"image_size: {image_size}; an LMDB of images needs one, such as 32 (--image-size 32)")
        self.image_size = image_size
        if not is_lmdb(self.path):
            raise InputError(f"{path}: not an LMDB; must be one, or the folder of its data.mdb")
        self._file = self.path.resolve()
        self._environment = _open(self._file)
        with _errors(self.path), self._environment.begin() as transaction:
            self._keys = [key for key in transaction.cursor().iternext(values=False) if key not in COUNTS]
        if not self._keys:
            raise InputError(f"{path}: an empty LMDB; must hold encoded images")

    def __getstate__(self) -> dict:
        """Without the open file, which a copy, such as one for a worker process, opens again."""
        return {name: value for name, value in vars(self).items() if name != "_environment"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _environment=_open(state["_file"]))

    def __len__(self) -> int:
        return len(self._keys)

    def images(self, indices: Indices) -> np.ndarray:
        out = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        with _errors(self.path), self._environment.begin() as transaction:
            for row, index in enumerate(self.check_indices(indices)):
                key = self._keys[index]
                value = transaction.get(key, b"")  # without one where the keys are out of order
                out[row] = load_square(io.BytesIO(value), self.image_size, f"{self.path}: {key!r}")
        return out


def is_lmdb(path: Path) -> bool:
    """Whether a file, or the `data.mdb` of a folder, begins as an LMDB does."""
    file = path / "data.mdb" if path.is_dir() else path
    if not file.is_file():
        return False
    with open(file, "rb") as stream:
        return int.from_bytes(stream.read(20)[16:], "little") == MAGIC


def _open(path: Path):
    try:
        import lmdb
    except ImportError:
        raise InputError(f"{path}: an LMDB needs the package lmdb: pip install encdiff[lmdb]") from None
    key = str(path.resolve())
    if environment := _OPEN.get(key):
        return environment
    check_lmdb(path, path / "data.mdb" if path.is_dir() else path)
    with _errors(path):
        environment = lmdb.open(key, subdir=path.is_dir(), readonly=True, lock=False, readahead=False)
    return _OPEN.setdefault(key, environment)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Errors of the library, of any kind, as one that names the file."""
    import lmdb

    try:
        yield
    except lmdb.Error as error:
        raise InputError(f"{path}: a damaged LMDB ({error}); copy it again") from error
