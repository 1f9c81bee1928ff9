"""Random batches whose order depends on seed and step alone, so that training resumes anywhere, to the bit."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from encdiff.data.dataset import Source
from encdiff.data.order import KeyedPermutation
from encdiff.data.readahead import ReadAhead
from encdiff.distributed.processes import Processes, processes
from encdiff.distributed.rows import shared_rows
from encdiff.distributed.share import Share
from encdiff.errors import InputError

log = logging.getLogger("encdiff.data")

READ = 512  # images read at once when the whole set is loaded
LISTED = 2**24  # images of a set whose order is a list in memory; above, it is computed


class Batches:
    """Shuffled batches of a data set, without an end.

    Every epoch visits each image once, in the order of `np.random.default_rng((seed, epoch)).permutation(n)`, or of
    `encdiff.data.order.KeyedPermutation(n, seed, epoch)`, which takes no memory, for more than 2^24 images; the
    epochs are one stream cut into batches, so nothing is dropped and a batch may span epochs. Images stay on `device`
    as uint8 if they fit in `resident_gib` GiB, by default 4 of a CPU's memory or 0.4 of what a GPU has free (read at
    construction; `progress(done, total)` is called meanwhile); otherwise threads read the batches after the one just
    asked for (`encdiff.data.readahead`), for a GPU into pinned memory, so that they are copied beside the work.
    share: which rows of each batch this process reads (`distributed.Share`); None: all.
    InputError for an empty set, a batch below 1 or that cannot be shared, or a negative seed.
    """

    def __init__(
        self,
        dataset: Source,
        batch_size: int,
        seed: int = 0,
        resident_gib: float | None = None,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
        share: Share | None = None,
    ):
        if batch_size < 1:
            raise InputError(f"batch_size: {batch_size}; must be at least 1")
        if seed < 0:
            raise InputError(f"seed: {seed}; must be at least 0")
        if not len(dataset):
            raise InputError(f"{dataset.name}: holds no images")
        self.dataset, self.batch_size, self.seed, self.device = dataset, batch_size, seed, torch.device(device)
        self.rows = (share or Share()).rows(batch_size)
        resident_gib = _resident_gib(self.device) if resident_gib is None else resident_gib
        self._permutations: dict[int, np.ndarray | KeyedPermutation] = {}
        self._ahead: ReadAhead | None = None
        self._data: torch.Tensor | None = None
        fits = len(dataset) * math.prod(dataset.sample_shape) * dataset.sample_dtype.itemsize <= resident_gib * 2**30
        if all(processes().gather(fits)):  # of several processes, which read it together, none or all hold it
            self._data = read_all(dataset, progress, processes()).to(self.device)
        else:
            if dataset.images_per_chunk > batch_size:
                log.warning(
                    "%s keeps %d images in a chunk: random batches of it are slow; rewrite it once with"
                    " `encdiff data convert`",
                    dataset.name, dataset.images_per_chunk,
                )  # fmt: skip
            self._ahead = ReadAhead(dataset, pin=self.device.type == "cuda")

    @property
    def resident(self) -> bool:
        """Whether the whole data set is held in memory."""
        return self._data is not None

    def batch_indices(self, step: int) -> np.ndarray:
        """int64 (rows,): a function of the data set's length, batch size, seed, step and share only."""
        if step < 0:
            raise InputError(f"step: {step}; must be at least 0")
        position = step * self.batch_size + self.rows
        epochs, offsets = np.divmod(position, len(self.dataset))
        return np.concatenate([self._permutation(e)[offsets[epochs == e]] for e in np.unique(epochs).tolist()])

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The images uint8 (rows, H, W, 3) of `batch_indices(step)` and these indices int64, on the device.

        Of another `Source` what that reads.
        """
        if self._data is not None:
            indices = self._to_device(self._host(self.batch_indices(step)))
            return self._data[indices], indices
        assert self._ahead is not None, "of a set that is not resident"
        images, found = self._ahead.read(step, self.batch_indices)
        return self._to_device(images), self._to_device(self._host(found))

    def images(self, step: int) -> torch.Tensor:
        """The images of `batch(step)`."""
        return self.batch(step)[0]

    def everything(self, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        """All images of a resident set in order, or these, uint8 (n, H, W, 3) at a time, on the device."""
        assert self._data is not None, "of a resident set"
        yield from self._data[start:stop].split(READ)

    def _host(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)

    def _permutation(self, epoch: int) -> np.ndarray | KeyedPermutation:
        if epoch not in self._permutations:
            if len(self._permutations) > 1:  # two suffice: a batch touches an epoch and perhaps the next
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = _order(len(self.dataset), self.seed, epoch)
        return self._permutations[epoch]


def _order(count: int, seed: int, epoch: int) -> np.ndarray | KeyedPermutation:
    if count > LISTED:
        return KeyedPermutation(count, seed, epoch)
    return np.random.default_rng((seed, epoch)).permutation(count)


def _resident_gib(device: torch.device) -> float:
    return 0.4 * torch.cuda.mem_get_info(device)[0] / 2**30 if device.type == "cuda" else 4.0


def read_all(
    dataset: Source, progress: Callable[[int, int], None] | None = None, among: Processes | None = None
) -> torch.Tensor:
    """Every image of a data set, uint8 (n, H, W, 3), in order; `progress(done, total)` after each read.

    `among` several processes of a machine each reads its part, and all hold the one array, which is not to be written.
    """

    def fill(part: np.ndarray, first: int) -> None:
        for start in range(0, len(part), READ):
            stop = min(start + READ, len(part))
            part[start:stop] = dataset.read(np.arange(first + start, first + stop))
            if progress:
                progress(stop, len(part))

    dtype = torch.empty((), dtype=dataset.sample_dtype).numpy().dtype
    shape = (len(dataset), *dataset.sample_shape)
    return torch.from_numpy(shared_rows(shape, dtype, fill, among or Processes(), READ))
