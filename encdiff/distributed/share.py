"""Which rows of every batch are a process's own."""

from dataclasses import dataclass

import numpy as np

from encdiff.errors import InputError


@dataclass(frozen=True)
class Share:
    """Process `rank` of `size` takes a slice of each of the `parts` that a batch is cut into, one after the other.

    A part of the batch is the same samples whatever the number of processes, so statistics over a part, such as batch
    norm's, are too.
    """

    rank: int = 0
    size: int = 1
    parts: int = 1

    def count(self, batch_size: int) -> int:
        """How many rows of the batch are this process's; InputError unless all get as many, of each part."""
        if batch_size % (self.size * self.parts):
            ways = [f"{self.size} processes"] * (self.size > 1) + [f"{self.parts} parts (accumulate)"] * (
                self.parts > 1
            )
            raise InputError(
                f"batch_size is {batch_size}, must be a multiple of {self.size * self.parts}, for {' x '.join(ways)}"
            )
        return batch_size // self.size

    def rows(self, batch_size: int) -> np.ndarray:
        """int64 (count,): the places of these rows in the batch, ascending."""
        each = self.count(batch_size) // self.parts
        starts = np.arange(self.parts) * (batch_size // self.parts) + self.rank * each
        return (starts[:, None] + np.arange(each)).reshape(-1)
