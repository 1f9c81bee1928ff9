"""Reading samples for the steps to come while others are at work: several batches ahead, each by several threads."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from encdiff.data.dataset import Dataset, Source

DEPTH, BYTES = 4, 2**28  # batches read ahead, at most; bytes that these may fill, but for one batch of any size
THREADS = 8  # at most


class ReadAhead:
    """Samples of a source by step, read by threads: those of the steps that follow have been begun when one is given.

    A data set whose `images_per_thread` is not 0 is read by as many threads as this process has cores, 8 at most, which
    share each batch in parts of so many images at least; any other by one. Batches lie in pinned memory if `pin`. A
    read that fails raises when its step is asked for, and is tried anew when that is asked for again.
    """

    def __init__(self, source: Source, pin: bool = False):
        self.source, self.pin = source, pin
        self._part = source.images_per_thread if isinstance(source, Dataset) else 0
        self.threads = min(THREADS, _cores()) if self._part else 1
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="encdiff-batches")
        self._begun: dict[int, _Reading] = {}
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def read(self, step: int, indices: Callable[[int], np.ndarray]) -> tuple[torch.Tensor, np.ndarray]:
        """The samples (n, *sample_shape) at int64 `indices(step)` (n,), and these; the next are begun.

        Those are 4, or as many as 256 MiB hold, but one at least; `indices` is asked in any order.
        """
        wanted = self._begun.pop(step, None) or self._begin(indices(step))
        last = step + max(1, min(DEPTH, BYTES // max(1, wanted.bytes)))
        for other in [s for s in self._begun if not step < s <= last]:
            self._begun.pop(other).cancel()
        for later in range(step + 1, last + 1):
            if later not in self._begun:
                self._begun[later] = self._begin(indices(later))
        return wanted.result(), wanted.indices

    def wait(self) -> None:
        """Until all that was begun is read, or has failed."""
        for reading in self._begun.values():
            for part in reading.parts:
                part.exception()

    def _begin(self, indices: np.ndarray) -> _Reading:
        source, count = self.source, len(indices)
        size = count * math.prod(source.sample_shape) * source.sample_dtype.itemsize
        parts = min(self.threads, count // max(1, self._part))
        if parts < 2 or not isinstance(source, Dataset):
            return _Reading(indices, None, [self._pool.submit(self._whole, indices)], size)
        out = torch.empty((count, *source.sample_shape), dtype=source.sample_dtype, pin_memory=self.pin)
        cuts = np.linspace(0, count, parts + 1).astype(int).tolist()
        begun = [
            self._pool.submit(source.read_into, indices[start:stop], out.numpy()[start:stop])
            for start, stop in pairwise(cuts)
        ]
        return _Reading(indices, out, begun, size)

    def _whole(self, indices: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(self.source.read(indices))
        return tensor.pin_memory() if self.pin else tensor


class _Reading(NamedTuple):
    """A batch that threads fill part by part, or without `out` one that a thread makes."""

    indices: np.ndarray
    out: torch.Tensor | None
    parts: list[Future]
    bytes: int

    def result(self) -> torch.Tensor:
        made = [part.result() for part in self.parts]
        return made[0] if self.out is None else self.out

    def cancel(self) -> None:
        for part in self.parts:
            part.cancel()


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
