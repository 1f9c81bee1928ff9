"""Arrays too large for a copy in each process: one of a machine, which its processes fill together and all read."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from encdiff.distributed.processes import Processes
from encdiff.errors import InputError

MEMORY = Path("/dev/shm")


def shared_rows(
    shape: tuple[int, ...],
    dtype: np.dtype | type,
    fill: Callable[[np.ndarray, int], None],
    processes: Processes,
    multiple: int = 1,
) -> np.ndarray:
    """An array of this shape, one for the processes of each machine, in memory or, where that is short, on disk.

    fill(part, start): writes the rows from `start` on into `part`; every process of a machine fills its own, which
    begins at a multiple of `multiple`. Where it fails in one process, it fails in all. The memory is free once no
    process holds the array any more, however they end.
    """
    if processes.local_size == 1:
        out = np.empty(shape, dtype)
        processes.together(lambda: fill(out, 0))
        return out
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize

    own: list[str] = []

    def make() -> str | None:
        if processes.local_rank == 0:
            own.append(_file(size))
        return own[0] if own else None

    try:
        places = processes.gather(processes.together(make))
        place = places[processes.machine * processes.local_size]
        assert place is not None, "the first process of each machine made one"
        out = processes.together(lambda: np.memmap(place, dtype, "r+", 0, shape))
    finally:
        for path in own:  # they have it open; its name is no longer needed
            os.unlink(path)
    start, stop = Processes(processes.local_rank, processes.local_size).part(shape[0], multiple)
    processes.together(lambda: fill(out[start:stop], start))
    return out


def _file(size: int) -> str:
    """A new file of so many bytes, where they are sure to fit."""
    for folder in (MEMORY, Path(tempfile.gettempdir())):
        if folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 1.1 * size:
            handle, path = tempfile.mkstemp(prefix="encdiff-", dir=folder)
            try:
                os.posix_fallocate(handle, 0, size)  # now, rather than by a signal when another has taken the room
            except OSError:
                os.unlink(path)
                continue
            finally:
                os.close(handle)
            return path
    raise InputError(f"{tempfile.gettempdir()}: {size / 2**30:.1f} GiB for shared rows do not fit; set TMPDIR to more")
