"""Orders without an array: permutations by their definition, uniform, and found at once."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from encdiff.data.order import KeyedPermutation
from encdiff.errors import InputError


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 31, 1000, 4096, 65_535, 65_537, 300_007])
def test_every_index_once(n):
    rng = np.random.default_rng()
    permutation = KeyedPermutation(n, int(rng.integers(2**62)), int(rng.integers(2**20)))
    indices = permutation[np.arange(n)]
    assert indices.dtype == np.int64 and len(permutation) == n
    np.testing.assert_array_equal(np.sort(indices), np.arange(n))
    np.testing.assert_array_equal(permutation.inverse(indices), np.arange(n))


@settings(max_examples=60)
@given(st.integers(1, 2**62), st.integers(0, 2**80), st.integers(0, 2**40), st.data())
def test_inverse_of_any_length(n, seed, epoch, data):
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True)))
    indices = KeyedPermutation(n, seed, epoch)[positions]
    assert indices.min() >= 0 and indices.max() < n and len(set(indices.tolist())) == len(positions)
    np.testing.assert_array_equal(KeyedPermutation(n, seed, epoch).inverse(indices), positions)
    np.testing.assert_array_equal(KeyedPermutation(n, seed, epoch)[positions[::-1]], indices[::-1])


def test_the_order_stays_what_it_is():
    """Runs are resumed by it: these numbers, written down when it was made, must never change."""
    assert KeyedPermutation(10**9, 1, 2)[np.arange(4)].tolist() == [953159136, 58812440, 115855716, 834661079]
    assert KeyedPermutation(10, 7)[np.arange(10)].tolist() == [2, 0, 6, 9, 7, 4, 5, 8, 3, 1]


def test_seed_and_epoch_decide():
    n = 100_003
    orders = [KeyedPermutation(n, *key)[np.arange(n)] for key in ((0, 0), (0, 1), (1, 0), (2**32, 0), (0, 2**32))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 12, "1 on average"


@pytest.mark.parametrize("n", [2, 3, 5, 8, 11, 20])
def test_any_index_at_any_position_as_often(n):
    keys = 2000
    counts = np.zeros((n, n))
    for seed in range(keys):
        counts[np.arange(n), KeyedPermutation(n, seed, 3)[np.arange(n)]] += 1
    statistic = ((counts - keys / n) ** 2 / (keys / n)).sum()
    assert chi2.sf(statistic, (n - 1) ** 2) > 1e-6, "rows and columns have given sums"


def test_all_orders_of_four_as_often():
    seen = np.zeros(256)
    for seed in range(4800):
        seen[KeyedPermutation(4, seed)[np.arange(4)] @ np.array([64, 16, 4, 1])] += 1
    counts = seen[seen > 0]
    assert len(counts) == 24 and chi2.sf(((counts - 200) ** 2 / 200).sum(), 23) > 1e-6


@pytest.mark.parametrize("n", [2**20, 10**6 + 3, 2**33 + 1, 10**12])
def test_neighbours_are_independent(n):
    """Of places one, two, ... apart; the correlation of so many has a deviation of 0.001."""
    count, seed = 10**6, int(np.random.default_rng().integers(2**40))
    indices = KeyedPermutation(n, seed)[np.arange(count)] / n
    for lag in (1, 2, 64, 1024):
        assert abs(np.corrcoef(indices[:-lag], indices[lag:])[0, 1]) < 6e-3
    assert abs(np.corrcoef(indices, np.arange(count))[0, 1]) < 6e-3
    pairs = np.histogram2d(indices[:-1], indices[1:], 16, ((0, 1), (0, 1)))[0] / (count / 256)
    steps = np.histogram(np.diff(indices) % 1, 64, (0, 1))[0] / (count / 64)
    assert abs(pairs - 1).max() < 0.1 and abs(steps - 1).max() < 0.06, "deviations of 0.016 and 0.008"


def test_shapes_and_nothing_at_all():
    permutation = KeyedPermutation(50, 3)
    square = permutation[np.arange(6, dtype=np.uint8).reshape(2, 3)]
    assert square.shape == (2, 3) and permutation[np.array([], int)].shape == (0,)
    assert permutation[4] == square[1, 1] and permutation[4].shape == ()


def test_a_million_indices_within_a_second():
    permutation, positions = KeyedPermutation(3 * 10**9, 0), np.random.default_rng().integers(3 * 10**9, size=10**6)
    begin = time.thread_time()
    permutation[positions]
    assert time.thread_time() - begin < 1


def test_memory_is_that_of_the_positions():
    tracemalloc.start()
    KeyedPermutation(2**62, 5)[np.arange(1000)]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: KeyedPermutation(0, 1), "n: 0; must lie in 1"),
        (lambda: KeyedPermutation(2**62 + 1, 1), "must lie in 1..2\\^62"),
        (lambda: KeyedPermutation(5, -1), "seed and epoch: -1 and 0"),
        (lambda: KeyedPermutation(5, 1, -2), "seed and epoch: 1 and -2"),
        (lambda: KeyedPermutation(5, 1)[np.array([0, 5])], "positions: 0..5; must lie in 0..4"),
        (lambda: KeyedPermutation(5, 1)[np.array([-1])], "positions: -1"),
        (lambda: KeyedPermutation(5, 1)[np.array([0.5])], "positions: float64; must be integers"),
        (lambda: KeyedPermutation(5, 1).inverse(7), "indices: 7..7"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(InputError, match=words):
        make()
