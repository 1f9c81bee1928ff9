"""Rows for the metrics that fix one factor in a batch: from a complete grid, or from any table of codes and factors."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from encdiff.metrics.samples import check_samples, relabel

BATCH_ROWS = 65_536  # rows encoded at once: bounds memory, does not change the result


class Grid:
    """Every combination of factors exists; `encode` turns factors int64 (m, F) into codes float64 (m, N).

    Factors are drawn in the order of the field's standard library, number by number from one RandomState, so that a
    seed gives its batches.
    """

    def __init__(self, encode: Callable[[np.ndarray], np.ndarray], factor_sizes: Sequence[int]):
        self.encode, self.sizes, self.num_factors = encode, tuple(factor_sizes), len(factor_sizes)

    def sample(self, rng: np.random.RandomState, n: int) -> np.ndarray:
        """Codes (n, N), uniform."""
        return self.encode(sample_factors(rng, self.sizes, n))

    def batches(self, rng: np.random.RandomState, count: int, size: int, sides: int = 1) -> Iterator[tuple]:
        """Batches whose one factor is fixed, some hundred at a time: the factors (c,) and codes (c, sides, size, N).

        sides 1: all rows of a batch share the factor's value. sides 2: row by row the two sides share it.
        """
        step = max(1, BATCH_ROWS // (size * sides))
        for start in range(0, count, step):
            fixed, factors = self._draw(rng, min(step, count - start), size, sides)
            yield fixed, self.encode(factors.reshape(-1, len(self.sizes))).reshape(*factors.shape[:3], -1)

    def _draw(self, rng, count: int, size: int, sides: int) -> tuple[np.ndarray, np.ndarray]:
        """Fixed factor (count,) and factors (count, sides, size, F)."""
        below = np.concatenate([[len(self.sizes)], np.tile(np.repeat(self.sizes, size), sides)])
        drawn = rng.randint(np.broadcast_to(below, (count, len(below))))  # the stream of one call for each number
        fixed, factors = drawn[:, 0], drawn[:, 1:].reshape(count, sides, len(self.sizes), size)
        every = np.arange(count)
        factors[every, -1, fixed] = factors[every, 0, fixed] if sides == 2 else factors[every, 0, fixed, :1]
        return fixed, factors.transpose(0, 1, 3, 2)


class Table:
    """Any rows: codes (n, N) and factors (n, F); rows that share a factor's value are drawn from those there are.

    On a complete grid the batches have the distribution of `Grid`'s, but not its stream.
    """

    def __init__(self, codes: np.ndarray, factors: np.ndarray):
        self.codes, factors = check_samples(codes, factors, least_factors=2, settled=False)
        self.labels, self.num_factors = relabel(factors)[0], factors.shape[1]
        self.order = [np.argsort(column, kind="stable") for column in self.labels.T]
        self.counts = [np.bincount(column) for column in self.labels.T]
        self.starts = [counts.cumsum() - counts for counts in self.counts]

    def sample(self, rng: np.random.RandomState, n: int) -> np.ndarray:
        """Codes (n, N), uniform with repetition."""
        return self.codes[rng.randint(len(self.codes), size=n)]

    def batches(self, rng: np.random.RandomState, count: int, size: int, sides: int = 1) -> Iterator[tuple]:
        """As `Grid.batches`."""
        step = max(1, BATCH_ROWS // (size * sides))
        for start in range(0, count, step):
            fixed = rng.randint(self.num_factors, size=min(step, count - start))
            rows = rng.randint(len(self.codes), size=(len(fixed), sides, size))
            shared = rows[:, 0] if sides == 2 else np.repeat(rows[:, 0, :1], size, axis=1)
            rows[:, -1] = self._like(rng, fixed, shared)
            yield fixed, self.codes[rows]

    def _like(self, rng, fixed: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """For each of rows (c, size) a random one with the same value of its batch's fixed factor."""
        drawn, u = np.empty_like(rows), rng.random_sample(rows.shape)
        for k in range(self.num_factors):
            mine = fixed == k
            value = self.labels[rows[mine], k]
            drawn[mine] = self.order[k][self.starts[k][value] + (u[mine] * self.counts[k][value]).astype(np.int64)]
        return drawn


def sample_factors(rng: np.random.RandomState, factor_sizes: Sequence[int], n: int) -> np.ndarray:
    """int64 (n, F), uniform; factor by factor, which is the order of the field's standard library."""
    return np.stack([rng.randint(size, size=n) for size in factor_sizes], axis=1).astype(np.int64, copy=False)
