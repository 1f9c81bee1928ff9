"""HDF5 files from anywhere: what they declare is held against what they store, and they show nothing of other files."""

from __future__ import annotations

import io
import math
import os
import re
import struct
from pathlib import Path

import h5py
import numpy as np

from encdiff.errors import InputError
from encdiff.files.reading import damage, refuse_special

TIGHTEST = 1100  # no filter of HDF5's own shortens more, by a little
LARGE = 2**30  # bytes of labels, or of one chunk of images, that are still read
MOST_NAMES = 4096
HEAP, HEAP_LEAST = b"GCOL\x01\0\0\0", 4096  # how a heap of texts begins, and its least size


def open_h5(path: Path) -> h5py.File:
    """The file; InputError for a damaged one, and for one that another process writes."""
    refuse_special(path)
    try:
        with damage(f"{path}: a damaged or truncated HDF5 file"):
            return h5py.File(path, "r")
    except BlockingIOError:
        raise InputError(f"{path}: another process is writing it; wait until that has ended") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path}: a damaged or truncated HDF5 file ({error}); copy or render it again") from error


def own_array(path: Path, file: h5py.File, key: str) -> h5py.Dataset | None:
    """An array that lies in this file, all of it; None without one of this name, InputError where it lies elsewhere."""
    with damage(f"{path}: a damaged HDF5 file: {key}"):
        link = file.get(key, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise InputError(f"{path}: {key} is a link, must be an array of the file itself")
        array = file[key]
        if not isinstance(array, h5py.Dataset):
            return None
        if array.is_virtual or array.external:
            raise InputError(f"{path}: {key} lies in other files, must be an array of the file itself")
        if array.dtype.kind not in "biuf" or array.shape is None:
            raise InputError(f"{path}: {key} are {array.dtype} {array.shape}; must be an array of numbers")
        size, stored = math.prod(array.shape) * array.dtype.itemsize, array.id.get_storage_size()
        packed = TIGHTEST if array.chunks else 1
        if size > packed * stored:
            raise InputError(f"{path}: {key} declare {size} bytes, and holds {stored}; it is damaged or unfinished")
        if array.chunks and math.prod(array.chunks) * array.dtype.itemsize > LARGE:
            raise InputError(f"{path}: {key} lie in chunks of {array.chunks}; a chunk must be at most {LARGE} bytes")
    return array


def read_labels(path: Path, labels: h5py.Dataset) -> np.ndarray:
    """The whole table."""
    if labels.nbytes > LARGE:
        raise InputError(f"{path}: labels are {labels.dtype} {labels.shape}; must be at most {LARGE} bytes")
    with damage(f"{path}: a damaged or truncated HDF5 file"):
        return np.asarray(labels[()])


def read_names(path: Path, *keys: str) -> list[tuple[str, ...]]:
    """The texts in attributes of the labels; none for one that is not there."""
    said = f"{path}: a damaged or truncated HDF5 file"
    with damage(said), _Watched(path) as stream, h5py.File(stream, "r") as file:
        return [_read_texts(path, file["labels"], key) for key in keys]


def _read_texts(path: Path, labels: h5py.Dataset, key: str) -> tuple[str, ...]:
    with damage(f"{path}: a damaged HDF5 file: {key} of the labels"):
        if key not in labels.attrs:
            return ()
        attribute = labels.attrs.get_id(key)
        of_text = h5py.check_string_dtype(attribute.dtype) or attribute.dtype.kind == "S"
        if not of_text and math.prod(attribute.shape):
            raise InputError(f"{path}: {key} of the labels is {attribute.dtype}, must be texts")
        if math.prod(attribute.shape) > MOST_NAMES:
            raise InputError(f"{path}: {key} of the labels holds {attribute.shape} texts, must be one for each factor")
        return tuple(map(_text, np.atleast_1d(labels.attrs[key]).ravel().tolist()))


class _Watched(io.FileIO):
    """A file that HDF5 reads texts of, whose heaps are looked at first: a damaged one would hold it for ever."""

    def readinto(self, buffer) -> int:
        at = self.tell()
        count = super().readinto(buffer)
        content = bytes(memoryview(buffer)[:count])
        for found in re.finditer(re.escape(HEAP), content):
            self._check(at + found.start())
        return count

    def _check(self, start: int) -> None:
        """The heap's objects lie one behind the other up to its end."""
        size = struct.unpack("<Q", os.pread(self.fileno(), 8, start + 8))[0]
        if not HEAP_LEAST <= size <= LARGE:
            raise ValueError(f"a heap of {size} bytes")
        heap, place = os.pread(self.fileno(), size, start), 16
        while place + 16 <= len(heap):
            index, length = struct.unpack_from("<H6xQ", heap, place)
            place += length if index == 0 else 16 + length + -length % 8  # 0: what is free, with its own head
            if (length < 16 and index == 0) or place > size:
                raise ValueError(f"a heap with {length} bytes at {place}")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
