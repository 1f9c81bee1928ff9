from itertools import permutations

import numpy as np
import pytest
from _codes import BAD_IDS, BAD_ROWS, CONSTANT, GRID, IDENTITY, moved
from hypothesis import given, settings
from scipy.stats import pearsonr, spearmanr

from encdiff.errors import InputError
from encdiff.metrics import mcc

KINDS = {"pearson": pearsonr, "spearman": spearmanr}


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_copies_match_exactly(rng, kind):
    order = rng.permutation(4)
    codes = np.c_[IDENTITY * [2, -1, 0.1, -7], rng.standard_normal(360)][:, [*order, 4]]
    result = mcc(codes, GRID, kind=kind)
    assert result["mcc"] == pytest.approx(1, abs=1e-12)
    np.testing.assert_array_equal(result["assignment"], np.argsort(order))


@pytest.mark.parametrize("kind", KINDS)
def test_every_assignment_is_tried_and_the_best_taken(rng, kind):
    factors = rng.integers(0, 7, (203, 3))
    codes = factors @ rng.standard_normal((3, 5)) + rng.standard_normal((203, 5))
    signed = np.array([[KINDS[kind](code, factor)[0] for factor in factors.T] for code in codes.T])
    best = max(np.mean([abs(signed[c, f]) for f, c in enumerate(chosen)]) for chosen in permutations(range(5), 3))
    result = mcc(codes, factors, kind=kind)
    np.testing.assert_allclose(result["correlation"], signed, atol=1e-12)
    assert result["mcc"] == pytest.approx(best, abs=1e-12)


def test_a_greedy_match_would_be_worse():
    """Code 0 knows both factors; each factor's best code is code 0, the best assignment gives it to factor 1."""
    a, b = (column.ravel() for column in np.meshgrid([0, 1], [0, 1]))
    factors = np.tile(np.c_[a, b], (5, 1))
    codes = np.c_[3 * factors[:, 0] + 2 * factors[:, 1], factors[:, 0] + 1e-9 * factors[:, 1] ** 2]
    assert mcc(codes, factors)["assignment"].tolist() == [1, 0]


def test_monotonic_codes_need_ranks():
    codes = np.exp(3.0 * GRID)
    assert mcc(codes, GRID, kind="spearman")["mcc"] == pytest.approx(1, abs=1e-12)
    assert mcc(codes, GRID)["mcc"] < 0.9


def test_independent_codes_match_nothing(rng):
    assert mcc(rng.standard_normal((20_001, 4)), rng.integers(0, 9, (20_001, 4)))["mcc"] < 0.03
    assert mcc(CONSTANT, GRID)["mcc"] == 0


def test_factors_without_a_code_count_nothing():
    result = mcc(IDENTITY[:, [3]], GRID)
    assert result["mcc"] == pytest.approx(1 / 4, abs=1e-12) and result["assignment"].tolist() == [-1, -1, -1, 0]


@settings(max_examples=20)
@given(moved(dims=4, signs=True))
def test_invariant_to_permuted_rescaled_and_negated_codes(move):
    codes = IDENTITY @ np.random.RandomState(3).standard_normal((4, 4))
    assert mcc(move(codes), GRID)["mcc"] == pytest.approx(mcc(codes, GRID)["mcc"], abs=1e-12)


@pytest.mark.parametrize("codes, factors, message", BAD_ROWS, ids=BAD_IDS)
def test_bad_input(codes, factors, message):
    with pytest.raises(InputError, match=message) as error:
        mcc(codes, factors)
    assert "\n" not in str(error.value)


def test_unknown_kind():
    with pytest.raises(InputError, match="kind is 'kendall'; it must be one of pearson, spearman"):
        mcc(IDENTITY, GRID, kind="kendall")
