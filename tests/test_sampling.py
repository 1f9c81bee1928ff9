import numpy as np
import pytest
from _codes import GRID, SIZES

from encdiff.metrics import sampling
from encdiff.metrics.sampling import Grid, Table

SOURCES = {"grid": lambda: Grid(lambda factors: factors.astype(float), SIZES), "table": lambda: Table(GRID, GRID)}


def collect(rows, rng, count, size, sides):
    parts = list(rows.batches(rng, count, size, sides))
    return np.concatenate([fixed for fixed, _ in parts]), np.concatenate([z for _, z in parts])


def test_grid_draws_in_the_published_order():
    """One call for each number: the fixed factor, then every factor's values for one side, then for the other."""
    rng = np.random.RandomState(7)
    for sides in (1, 2):
        fixed, z = collect(SOURCES["grid"](), np.random.RandomState(7), 9, 5, sides)
        rng = np.random.RandomState(7)
        for vote in range(9):
            assert fixed[vote] == rng.randint(4)
            drawn = [np.stack([rng.randint(size, size=5) for size in SIZES], axis=1) for _ in range(sides)]
            drawn[-1][:, fixed[vote]] = drawn[0][: None if sides == 2 else 1, fixed[vote]]
            np.testing.assert_array_equal(z[vote], drawn)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("sides", [1, 2])
def test_batches_share_the_fixed_factor_and_nothing_else(source, sides):
    fixed, z = collect(SOURCES[source](), np.random.RandomState(), 600, 8, sides)
    for k, size in enumerate(SIZES):
        mine, other = z[fixed == k], z[fixed != k]
        if sides == 1:
            assert (mine[:, 0, :, k] == mine[:, 0, :1, k]).all() and not (other[:, 0, :, k] == other[:, 0, :1, k]).all()
        else:
            assert (mine[:, 0, :, k] == mine[:, 1, :, k]).all()
            assert abs((other[:, 0, :, k] == other[:, 1, :, k]).mean() - 1 / size) < 0.04  # chance
        np.testing.assert_allclose(np.bincount(z[..., k].astype(int).ravel()) / z[..., k].size, 1 / size, atol=0.04)


def test_table_needs_no_grid():
    keep = np.random.default_rng().permutation(360)[:120]
    fixed, z = collect(Table(GRID[keep], GRID[keep]), np.random.RandomState(), 50, 8, 1)
    known = {tuple(row) for row in GRID[keep]}
    assert all(tuple(row) in known for row in z.reshape(-1, 4).astype(int))


def test_chunks_do_not_matter_to_the_grid(monkeypatch):
    expected = collect(SOURCES["grid"](), np.random.RandomState(1), 30, 4, 2)
    monkeypatch.setattr(sampling, "BATCH_ROWS", 7 * 8)
    for ours, theirs in zip(collect(SOURCES["grid"](), np.random.RandomState(1), 30, 4, 2), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
