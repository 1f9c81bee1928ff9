"""Samples of an equation rendered into a file by several processes, and gone on with where that was interrupted."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from joblib import Parallel, cpu_count, delayed

from encdiff.data.hdf5 import open_h5, own_array
from encdiff.errors import InputError, Stopped
from encdiff.fields.darcy import Darcy
from encdiff.fields.equations import EQUATIONS, samples
from encdiff.fields.store import DONE, FIELDS, FORMAT, VERSION, StoredFields, read_about, write_about
from encdiff.fields.vorticity import Vorticity
from encdiff.files.temporaries import atomic_path, errors_of

BATCH = 2**18  # numbers that a process hands over at once: some tenths of a second of work
RESERVE = 2**20  # bytes of disk for HDF5's own structures
Progress = Callable[[int, int], None]  # called with (done, total)


def render(
    path: str | os.PathLike,
    kind: str,
    size: int = 64,
    count: int = 1000,
    seed: int = 0,
    processes: int | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> None:
    """Write `count` samples of an equation, of size x size pixels, into an HDF5 file that `open_fields` opens.

    Sample i depends on `seed`, i and the settings alone. Samples are kept in `path.partial` as they are made, and the
    file appears, or replaces an older one, when all are. After an interruption the same call goes on where that one
    ended; Ctrl-C raises Stopped, which says so.

    Args:
        kind: darcy or vorticity; `settings` are the fields of `Darcy` or `Vorticity`.
        processes: at most so many; None: one for each core.
        progress: called with (done, total) samples.
        overwrite: replace an existing file.

    Raises InputError for impossible settings, an existing file, and where `path.partial` was begun with other settings
    or is being written by another process; OSError, naming the file, for a full disk and where a process was killed.
    """
    path = Path(path)
    if kind not in EQUATIONS:
        raise InputError(f"kind is {kind!r}, must be one of {', '.join(EQUATIONS)}")
    for name, value, low in (("count", count, 1), ("seed", seed, 0), ("processes", processes, 1)):
        if not (value is None and name == "processes") and (not isinstance(value, int) or not low <= value < 2**31):
            raise InputError(f"{name} is {value!r}, must be an integer of at least {low}, below 2^31")
    known = [field.name for field in dataclasses.fields(EQUATIONS[kind])]
    if unknown := [name for name in settings if name not in known]:
        raise InputError(f"{unknown[0]} is no setting of {kind}, must be one of {', '.join(known)}")
    equation = EQUATIONS[kind].from_dict({"size": size} | settings, kind)
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"{path}: must be a file name in an existing folder")
    partial = path.with_name(f"{path.name}.partial")
    about, shape = described(equation, kind, seed), (count, *_sample_shape(equation))
    if path.exists() and not overwrite:
        if _is_made(path, about, count):
            return
        raise InputError(f"{path}: exists already, of other samples; choose another name or overwrite it")
    if not partial.exists():
        with atomic_path(partial) as temporary:
            _create(temporary, about, shape)
    with _opened(partial, about, shape) as begun, errors_of(partial):
        _fill(begun, equation, seed, processes or cpu_count(), progress)
        if os.fstat(begun.file).st_ino != partial.stat().st_ino:
            raise InputError(f"{partial}: was replaced by another process meanwhile; render it again")
        os.replace(partial, path)


def described(equation: Darcy | Vorticity, kind: str, seed: int) -> dict[str, Any]:
    """What the file says of itself."""
    grid, times = equation.grid, equation.times
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "seed": seed,
        "times": None if times is None else times.tolist(),
        **dataclasses.asdict(grid),
        "settings": dataclasses.asdict(equation),
    }


def _is_made(path: Path, about: dict[str, Any], count: int) -> bool:
    """Whether a file holds just these samples."""
    try:
        made = StoredFields(path)
    except (InputError, OSError):
        return False
    return made.rendered == json.loads(json.dumps(about)) and len(made) == count


class _Begun(NamedTuple):
    """An unfinished file, and where in it the samples and their number are."""

    path: Path
    file: int
    shape: tuple[int, ...]
    fields: int
    done: int


def _sample_shape(equation: Darcy | Vorticity) -> tuple[int, ...]:
    return equation.grid.shape if equation.times is None else (len(equation.times), *equation.grid.shape)


def _create(path: Path, about: dict[str, Any], shape: tuple[int, ...]) -> None:
    """A file with all its space, whose samples are still to be written.

    They are written beside HDF5, at the place that it gave them: a process that is killed leaves the file as sound as
    it was, and on a full disk there is an error in place of HDF5's end of the process.
    """
    need, free = 4 * math.prod(shape) + RESERVE, shutil.disk_usage(path.parent).free
    if need > free:
        raise OSError(errno.ENOSPC, f"needs {need / 2**30:.1f} GiB of disk, {free / 2**30:.1f} are free")
    with h5py.File(path, "w") as file:
        write_about(file, about)
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_layout(h5py.h5d.CONTIGUOUS)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        h5py.h5d.create(file.id, FIELDS.encode(), h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple(shape), layout)
        file.create_dataset(DONE, data=np.int64(0), dtype="<i8")
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


@contextmanager
def _opened(path: Path, about: dict[str, Any], shape: tuple[int, ...]) -> Iterator[_Begun]:
    """The unfinished file, for this process alone; InputError where it was begun with other settings."""
    with open_h5(path) as file:
        before = read_about(path, file)
        found = [own_array(path, file, key) for key in (FIELDS, DONE)]
        arrays = [array for array in found if array is not None and not array.chunks]
        if len(arrays) < 2 or not arrays[0].shape:
            raise InputError(f"{path}: is damaged; delete it to begin anew")
        _refuse_others(path, before | {"count": len(arrays[0])}, json.loads(json.dumps(about)) | {"count": shape[0]})
        if [(array.shape, array.dtype.str) for array in arrays] != [(shape, "<f4"), ((), "<i8")]:
            raise InputError(f"{path}: is damaged; delete it to begin anew")
        places = [array.id.get_offset() for array in arrays]
    with open(path, "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process is writing it; wait until that has ended") from None
        except OSError:  # not every network's file system has locks
            pass
        yield _Begun(path, file.fileno(), shape, *places)


def _refuse_others(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    flat = [about | (about["settings"] if isinstance(about.get("settings"), dict) else {}) for about in (before, now)]
    changed = [key for key in flat[1] if key != "settings" and flat[0].get(key) != flat[1][key]]
    if changed:
        key = next((key for key in ("kind", "size", "count", "seed", "frames") if key in changed), changed[0])
        raise InputError(
            f"{path}: was begun with {key} {str(flat[0].get(key))[:80]}, now it is {flat[1][key]}; "
            "render as it was begun, or delete it to begin anew"
        )


def _fill(begun: _Begun, equation: Darcy | Vorticity, seed: int, processes: int, progress: Progress | None) -> None:
    """Write the samples that are missing."""
    total, size = begun.shape[0], math.prod(begun.shape[1:])
    done = first = int.from_bytes(os.pread(begun.file, 8, begun.done), "little")
    if not 0 <= done <= total:
        raise InputError(f"{begun.path}: is damaged; delete it to begin anew")
    step = max(1, BATCH // size)
    starts = range(first, total, step)
    jobs = (delayed(samples)(equation, seed, start, min(start + step, total)) for start in starts)
    workers = Parallel(n_jobs=max(1, min(processes, len(starts))), return_as="generator")
    try:
        if progress:
            progress(done, total)
        for fields in workers(jobs):
            _write(begun.file, fields.astype("<f4"), begun.fields + 4 * done * size)
            done += len(fields)
            _write(begun.file, np.array(done, "<i8"), begun.done)
            if progress:
                progress(done, total)
    except KeyboardInterrupt:
        raise Stopped(f"{begun.path}: stopped; {_kept(done, total)}") from None
    except BrokenExecutor:
        raise OSError(f"a process was killed, perhaps for want of memory; {_kept(done, total)}") from None


def _kept(done: int, total: int) -> str:
    return f"{done:,} of {total:,} samples are kept, the same command goes on from there"


def _write(file: int, array: np.ndarray, place: int) -> None:
    content = memoryview(array.tobytes())
    while content:
        written = os.pwrite(file, content, place)
        content, place = content[written:], place + written
