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
THREADS, COSTLY = 8, 64  # threads at most; where so few images are worth one, there are several


class ReadAhead:
    """Samples of a source by step, read by threads: those of the steps that follow have been begun when one is given.

    A data set whose `images_per_thread` is 1 to 64 is read by as many threads as this process has cores, 8 at most,
    which share a batch in parts of so many images. Any other is read by one thread: if more than 64 are worth it, as
    many batches at once as make so many, since threads that only copy would wait for one another. Batches lie in pinned
    memory if `pin`. A read that fails raises when its step is asked for, and is tried anew when it is asked for again.
    """

    def __init__(self, source: Source, pin: bool = False):
        self.source, self.pin = source, pin
        self._part = source.images_per_thread if isinstance(source, Dataset) else 0
        self.threads = min(THREADS, _cores()) if 0 < self._part <= COSTLY else 1
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="encdiff-batches")
        self._begun: dict[int, _Reading] = {}
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def read(self, step: int, indices: Callable[[int], np.ndarray]) -> tuple[torch.Tensor, np.ndarray]:
        """The samples at int64 `indices(step)` (n,), and these; the next are begun.

        Those are 4, more where a thread reads several at once, but no more than 256 MiB hold beyond the first.
        """
        wanted = self._begun.pop(step, None) or self._begin([indices(step)])[0]
        depth, together = self._ahead(len(wanted.indices))
        self._forget(step, step + depth, wanted)
        later = [s for s in range(step + 1, step + depth + 1) if s not in self._begun]
        for start in range(0, len(later) - together + 1, together):
            steps = later[start : start + together]
            self._begun.update(zip(steps, self._begin([indices(s) for s in steps]), strict=True))
        try:
            return wanted.result(), wanted.indices
        except Exception:
            if not wanted.shared:
                raise
            return self._begin([wanted.indices])[0].result(), wanted.indices  # another step's may have failed

    def wait(self) -> None:
        """Until all that was begun is read, or has failed."""
        for reading in self._begun.values():
            for part in reading.parts:
                part.exception()

    def _ahead(self, count: int) -> tuple[int, int]:
        """How many batches of so many samples are read ahead, and how many of these at once."""
        size = max(1, count * math.prod(self.source.sample_shape) * self.source.sample_dtype.itemsize)
        together = max(1, self._part // max(1, count))
        depth = max(1, min(BYTES // size, max(DEPTH, 2 * together)))
        return depth, max(1, min(together, depth // 2))

    def _forget(self, first: int, last: int, wanted: _Reading) -> None:
        """What is not of the steps after `first` up to `last`; a part that another step needs goes on."""
        dropped = [self._begun.pop(step) for step in list(self._begun) if not first < step <= last]
        needed = {part for reading in (wanted, *self._begun.values()) for part in reading.parts}
        for part in {part for reading in dropped for part in reading.parts} - needed:
            part.cancel()

    def _begin(self, batches: list[np.ndarray]) -> list[_Reading]:
        """One batch in parts, if it is large enough, or several at once."""
        source, count = self.source, len(batches[0])
        parts = min(self.threads, count // max(1, self._part))
        if len(batches) == 1 and parts > 1 and isinstance(source, Dataset):
            out = torch.empty((count, *source.sample_shape), dtype=source.sample_dtype, pin_memory=self.pin)
            cuts = np.linspace(0, count, parts + 1).astype(int).tolist()
            begun = [
                self._pool.submit(source.read_into, batches[0][start:stop], out.numpy()[start:stop])
                for start, stop in pairwise(cuts)
            ]
            return [_Reading(batches[0], out, begun)]
        whole = self._pool.submit(self._whole, np.concatenate(batches))
        ends = np.cumsum([len(batch) for batch in batches]).tolist()
        return [
            _Reading(batch, None, [whole], slice(end - len(batch), end), len(batches) > 1)
            for batch, end in zip(batches, ends, strict=True)
        ]

    def _whole(self, indices: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(self.source.read(indices))
        return tensor.pin_memory() if self.pin else tensor


class _Reading(NamedTuple):
    """A batch that threads fill part by part, or without `out` a slice of what one thread makes."""

    indices: np.ndarray
    out: torch.Tensor | None
    parts: list[Future]
    place: slice = slice(None)
    shared: bool = False

    def result(self) -> torch.Tensor:
        made = [part.result() for part in self.parts]
        return made[0][self.place] if self.out is None else self.out


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
