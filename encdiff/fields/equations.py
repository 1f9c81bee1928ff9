"""The equations that can be rendered, and samples of them by number."""

import numpy as np
from threadpoolctl import threadpool_limits

from encdiff.fields.darcy import Darcy
from encdiff.fields.vorticity import Vorticity

EQUATIONS: dict[str, type[Darcy] | type[Vorticity]] = {"darcy": Darcy, "vorticity": Vorticity}


def samples(equation: Darcy | Vorticity, seed: int, start: int, stop: int) -> np.ndarray:
    """float32 (stop - start, [T,] C, H, W): samples start to stop - 1, each a function of seed and its number alone.

    On one thread, so that the sums are the same on any machine's number of cores.
    """
    with threadpool_limits(1):
        drawn = [equation.sample(generator(seed, number)) for number in range(start, stop)]
    return np.array(drawn, dtype=np.float32)


def generator(seed: int, number: int) -> np.random.Generator:
    """Of the sample of this number."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
