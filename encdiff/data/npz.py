"""Zip archives, .npz files above all: what a member declares is held against the file before anything is allocated."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from encdiff.errors import InputError
from encdiff.files.reading import damage, refuse_special

PACKED = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}  # compressions, and the most that they can shorten
LARGE, LIKELY = 2**28, 100  # an array in memory of more bytes than this is not packed more tightly than so
SHORT, LONG = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
VERSIONS = {(1, 0): SHORT, (2, 0): LONG, (3, 0): LONG}  # 3 encodes the names of fields otherwise; we take none


class Header(NamedTuple):
    """What the .npy inside says of itself, and where its numbers begin."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    length: int


@contextmanager
def open_zip(path: Path, kind: str = ".npz file") -> Iterator[zipfile.ZipFile]:
    """A zip archive; InputError, naming it, for a damaged one."""
    refuse_special(path)
    with damage(f"{path}: a damaged or foreign {kind}"):
        archive = zipfile.ZipFile(path)
    with archive:
        yield archive


def check_member(path: Path, archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A member that can be read, by its declared sizes; InputError for any other."""
    member = archive.getinfo(name)
    if member.flag_bits & 1:
        raise InputError(f"{path}: {name} is encrypted, must be readable without a password")
    if member.compress_type not in PACKED:
        raise InputError(f"{path}: {name} has compression {member.compress_type}, must be stored or deflated")
    if member.header_offset + member.compress_size > Path(archive.filename or path).stat().st_size:
        raise InputError(f"{path}: truncated: {name} ends behind the file; copy it again")
    if member.file_size > PACKED[member.compress_type] * member.compress_size:
        raise InputError(f"{path}: {name} declares {member.file_size} bytes, more than can be in it; it is damaged")
    return member


def read_member(path: Path, archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """The content of a member of at most `most` bytes."""
    member = check_member(path, archive, name)
    if member.file_size > most:
        raise InputError(f"{path}: {name} holds {member.file_size} bytes, must hold {most} at most")
    with damage(f"{path}: {name} is damaged"):
        return archive.read(member)


def read_header(path: Path, archive: zipfile.ZipFile, key: str) -> Header:
    """Shape and type of an array, whose size must be the member's; nothing else of it is read."""
    if f"{key}.npy" not in archive.namelist():
        raise InputError(f"{path}: an archive without {key}; must be an .npz with the key `{key}`")
    member = check_member(path, archive, f"{key}.npy")
    with damage(f"{path}: a damaged or foreign .npz file: {key}"), archive.open(member) as stream:
        header = npy_header(stream)
    shape, dtype = header.shape, header.dtype
    if dtype.kind not in "biufU":
        raise InputError(f"{path}: a damaged or foreign .npz file, not an .npz of arrays: {key} are {dtype}")
    if min(shape, default=1) < 0 or member.file_size != header.length + math.prod(shape) * dtype.itemsize:
        raise InputError(f"{path}: a damaged or foreign .npz file ({key} are not {shape}); copy it again")
    return header


def npy_header(stream: IO[bytes]) -> Header:
    """What a .npy file says of itself; of a damaged one an error of any kind."""
    version = np.lib.format.read_magic(stream)
    shape, fortran, dtype = VERSIONS[version](stream)
    return Header(shape, dtype, fortran, stream.tell())


def read_array(path: Path, archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """One array, in memory; nothing is unpickled."""
    header, member = read_header(path, archive, key), archive.getinfo(f"{key}.npy")
    if member.file_size > max(LARGE, LIKELY * member.compress_size):
        raise InputError(f"{path}: {key} would fill {member.file_size} bytes of memory out of {member.compress_size}")
    with damage(f"{path}: a damaged or foreign .npz file: {key}"), archive.open(member) as stream:
        stream.read(header.length)
        content = stream.read()  # to the end, where the checksum is compared
        if header.dtype.kind == "U":
            _check_text(np.frombuffer(content, f"{header.dtype.byteorder}u4"))
        array = np.frombuffer(content, header.dtype) if content else np.empty(0, header.dtype)
        return array.reshape(header.shape, order="F" if header.fortran else "C")


def _check_text(points: np.ndarray) -> None:
    """ValueError for numbers that stand for no character, of which Python makes a text without looking."""
    if ((points > 0x10FFFF) | ((points >= 0xD800) & (points < 0xE000))).any():
        raise ValueError("text of no characters")
