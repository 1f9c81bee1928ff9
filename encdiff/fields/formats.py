"""From what a user types to whole fields: our own files, PDEBench's HDF5 and arrays of NumPy, told by content.

Axes are named by letters: n samples, t frames, c channels, y rows, x columns. Files that do not say where their pixels
lie are taken to fill the unit square, and none but ours says whether its domain is periodic: they are taken not to be.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from encdiff.checked import LEVELS
from encdiff.data.arrays import map_npz
from encdiff.data.npz import VERSIONS, Header, open_zip, read_header
from encdiff.errors import InputError
from encdiff.fields.grid import Grid
from encdiff.fields.pdebench import open_pdebench
from encdiff.fields.store import ArrayFields, FieldData, Source, StoredFields, is_stored
from encdiff.files.reading import damage, refuse_special

ACCEPTED = (
    "must be a file that `encdiff fields render` wrote; an HDF5 file of PDEBench; an .npy file (n, C, H, W), "
    "(n, T, C, H, W) or (n, H, W); or an .npz file, or a folder of .npy files, of one (n, H, W) for each channel"
)


def open_fields(spec: str | os.PathLike) -> FieldData:
    """The fields in a file or folder, told by content, not by name; a part of them after colons: `darcy.h5:0:9000`.

    A relative path is looked for here, then in the folder that the environment's ENCDIFF_DATA names. Accepted are

    - what `encdiff fields render` wrote;
    - HDF5 of PDEBench: Darcy flow (`nu` and `tensor`), compressible flow (`Vx`, `Vy`, `density`, `pressure`), and files
      of one group for each sample (diffusion-reaction, shallow water);
    - .npy (n, C, H, W) or (n, T, C, H, W), whose channels become `channel0`, `channel1`, ..., or (n, H, W), one channel
      with the file's name;
    - an .npz, or a folder of .npy files, with one array (n, H, W) for each channel, which gives the channel its name.

    InputError, naming the file, for anything else, and for one that is damaged or holds other types or shapes.
    """
    spec = os.fspath(spec)
    found, part = _candidate(spec), None
    if found is None and (form := re.fullmatch(r"(.+):(\d{1,12}):(\d{1,12})", spec)):
        found, part = _candidate(form[1]), (int(form[2]), int(form[3]))
    if found is None:
        folder = os.environ.get("ENCDIFF_DATA")
        raise InputError(
            f"data {spec!r}: not found here{f' nor in ENCDIFF_DATA={folder}' if folder else ''}; {ACCEPTED}"
        )
    data = open_path(found)
    data.spec = str(found.resolve())
    return data.part(*part) if part else data


def open_path(path: Path) -> FieldData:
    """As `open_fields`, of a path that is there."""
    refuse_special(path)
    if path.is_dir():
        return _open_folder(path)
    if h5py.is_hdf5(path):
        return StoredFields(path) if is_stored(path) else open_pdebench(path)
    if zipfile.is_zipfile(path):
        return _open_npz(path)
    if _is_npy(path):
        return _open_npy(path)
    raise InputError(f"{path}: holds no fields (perhaps truncated); {ACCEPTED}")


def _candidate(name: str) -> Path | None:
    folder = os.environ.get("ENCDIFF_DATA")
    places = [Path(os.path.expanduser(name))] + ([Path(os.path.expanduser(folder)) / name] if folder else [])
    return next((path for path in places if path.exists()), None)


def _is_npy(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6) == b"\x93NUMPY"


def map_npy(path: Path) -> np.ndarray:
    """Memory-map an .npy file; nothing is unpickled, and what it declares must be what it holds."""
    with damage(f"{path}: a damaged .npy file"), path.open("rb") as file:
        shape, fortran, dtype = VERSIONS[np.lib.format.read_magic(file)](file)
        start, size = file.tell(), path.stat().st_size
    header = Header(shape, dtype, fortran, start)
    _check_header(path, path.name, header)
    # in whole numbers of Python's, which do not overflow
    need = start + int(np.prod(np.array(shape, dtype=object))) * dtype.itemsize
    if need != size:
        raise InputError(f"{path}: declares {need} bytes and holds {size}; it is truncated or damaged, copy it again")
    return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")


def _check_header(path: Path, name: str, header: Header) -> None:
    if header.dtype.kind not in "biuf" or min(header.shape, default=0) < 1:
        raise InputError(
            f"{path}: {name} is {header.dtype} {header.shape}; must be an array of numbers, none of 0 length"
        )


def _open_npy(path: Path) -> FieldData:
    array = map_npy(path)
    layout = {3: "nyx", 4: "ncyx", 5: "ntcyx"}.get(array.ndim)
    if layout is None:
        raise InputError(f"{path}: is {array.dtype} {array.shape}; must be (n, C, H, W), (n, T, C, H, W) or (n, H, W)")
    channels = array.shape[-3] if array.ndim > 3 else 1
    if channels > LEVELS:
        raise InputError(f"{path}: has {channels} channels, must have at most {LEVELS}: is it (n, C, H, W)?")
    names = [path.stem] if array.ndim == 3 else [f"channel{c}" for c in range(channels)]
    return _arrays(path, [Source(array, layout)], names)


def _open_folder(path: Path) -> FieldData:
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in files if _is_npy(file)]
    return _channels(path, {file.stem: map_npy(file) for file in files[: LEVELS + 1]}, ".npy files")


def _open_npz(path: Path) -> FieldData:
    with open_zip(path) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")][: LEVELS + 1]
        headers = {key: read_header(path, archive, key) for key in keys}
    for key, header in headers.items():
        _check_header(path, key, header)
        if header.fortran:
            raise InputError(f"{path}: {key} is in Fortran order, must be in C order")
    _check_channels(path, {key: header.shape for key, header in headers.items()}, "arrays")
    return _channels(path, {key: map_npz(path, key) for key in keys}, "arrays")


def _channels(path: Path, arrays: dict[str, np.ndarray], kind: str) -> FieldData:
    """Of one array for each channel."""
    _check_channels(path, {name: array.shape for name, array in arrays.items()}, kind)
    return _arrays(path, [Source(array, "nyx") for array in arrays.values()], list(arrays))


def _check_channels(path: Path, shapes: dict[str, tuple[int, ...]], kind: str) -> None:
    if not 1 <= len(shapes) <= LEVELS:
        raise InputError(f"{path}: holds {len(shapes) or 'no'} {kind}, must hold 1 to {LEVELS}: one for each channel")
    if len(set(shapes.values())) > 1 or len(next(iter(shapes.values()))) != 3:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InputError(f"{path}: holds {found}; must hold {kind} of one shape (n, H, W), one for each channel")


def _arrays(path: Path, sources: list[Source], names: Sequence[str]) -> FieldData:
    first = sources[0]
    try:
        grid = Grid(tuple(names), first.length("y"), first.length("x"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    times = np.arange(first.length("t"), dtype=np.float64) if "t" in first.layout else None
    return ArrayFields(path, sources, grid, times)
