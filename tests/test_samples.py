import numpy as np
import pytest
from _codes import BAD_IDS, BAD_ROWS, GRID, IDENTITY, halves

from encdiff.errors import InputError
from encdiff.metrics.samples import check_samples, check_split, relabel, split_rows


def test_types_and_values_survive():
    codes, factors = check_samples(IDENTITY.astype(np.float32), GRID.astype(np.uint8))
    assert (codes.dtype, factors.dtype) == (np.float64, np.int64)
    np.testing.assert_array_equal(factors, GRID)
    assert check_samples(IDENTITY, GRID > 1)[1].max() == 1


@pytest.mark.parametrize("codes, factors, message", BAD_ROWS, ids=BAD_IDS)
def test_bad_rows(codes, factors, message):
    with pytest.raises(InputError, match=message) as error:
        check_samples(codes, factors)
    assert "\n" not in str(error.value)


def test_messages_name_the_factor_and_the_set():
    with pytest.raises(InputError, match="^factors_test: factor hue is constant"):
        check_samples(IDENTITY, GRID * [1, 0, 1, 1], rows="test", factor_names=("size", "hue"))


def test_sets_that_do_not_match():
    x, y, x_test, y_test = halves(IDENTITY)
    with pytest.raises(InputError, match="^test holds 3 codes and 4 factors"):
        check_split(x, y, x_test[:, :3], y_test)
    with pytest.raises(InputError, match="factor 2 takes the value 4, which factors_train lacks"):
        check_split(x[y[:, 2] < 4], y[y[:, 2] < 4], x_test, y_test)
    with pytest.raises(InputError, match="360 rows and factors 359"):
        split_rows(IDENTITY, GRID[1:], 0)


def test_split_is_seeded_and_complete():
    rows = np.arange(50)[:, None]
    x, y, x_test, y_test = split_rows(rows, rows, 3)
    assert len(x) == 40 and sorted([*x[:, 0], *x_test[:, 0]]) == list(range(50))
    np.testing.assert_array_equal(x, split_rows(rows, rows, 3)[0])
    assert not np.array_equal(x, split_rows(rows, rows, 4)[0])
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("far", [1, 10**12])
def test_relabel(far):
    factors = np.array([[5, -far], [-2, 7], [5, 7], [9, 8]])
    labels, values = relabel(factors)
    np.testing.assert_array_equal(labels, [[1, 0], [0, 1], [1, 1], [2, 2]])
    np.testing.assert_array_equal(values[0], [-2, 5, 9])
    np.testing.assert_array_equal(values[1], [-far, 7, 8])
