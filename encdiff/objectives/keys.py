"""Random numbers of an objective: keyed like the noise, so that a resumed run and any batch size repeat them."""

from typing import NamedTuple

import torch
from torch import Tensor

from encdiff import ops

APART = 0x9E3779B97F4A7C15  # between the seeds of two uses: 2^64 by the golden ratio


class Key(NamedTuple):
    """What keys the noise of a batch (`ops.normal`); every `use`, from 1 up, has numbers of its own."""

    seed: int
    sample_ids: Tensor  # (B,) int64
    draw: int | Tensor = 0

    def uniform(self, shape: tuple[int, ...], use: int) -> Tensor:
        """Numbers in [0, 1) of `shape` (B, ...), float32."""
        return ops.uniform(shape, (self.seed + use * APART) % 2**64, self.sample_ids, self.draw, dtype=torch.float32)


GUMBEL, TOKENS, PAIRS, SKIPS = 1, 2, 3, 16  # uses; from SKIPS up one for each skip connection
