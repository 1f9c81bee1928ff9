import math

import numpy as np
import pytest
from _codes import BAD_IDS, BAD_ROWS, CONSTANT, GRID, IDENTITY, moved
from hypothesis import given, settings
from scipy.linalg import sqrtm
from sklearn.metrics import mutual_info_score

from encdiff.errors import InputError
from encdiff.metrics import gaussian_total_correlation, gaussian_wasserstein_correlation, unsupervised


def with_covariance(rng, covariance, n=2_003):
    """Codes (n, N) whose sample covariance, divided by n - 1, is the given one."""
    white = rng.standard_normal((n, len(covariance)))
    white -= white.mean(axis=0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + rng.standard_normal(len(covariance))


@pytest.mark.parametrize("rho", [0.0, 0.3, -0.9])
def test_two_codes_by_hand(rng, rho):
    """TC = -1/2 log(1 - rho^2); of unit variances the roots of R are sqrt(1 +- rho)."""
    codes = with_covariance(rng, np.array([[1, rho], [rho, 1]]))
    distance = 4 - 2 * (math.sqrt(1 + rho) + math.sqrt(1 - rho))
    assert gaussian_total_correlation(codes) == pytest.approx(-0.5 * math.log(1 - rho**2), abs=1e-10)
    assert gaussian_wasserstein_correlation(codes) == pytest.approx(distance, abs=1e-10)


def test_several_codes_against_determinant_and_matrix_root(rng):
    mixed = rng.standard_normal((5, 7))
    covariance = mixed @ mixed.T
    codes, variances = with_covariance(rng, covariance), np.diag(covariance)
    total = 0.5 * (np.log(variances).sum() - np.linalg.slogdet(covariance)[1])
    distance = 2 * variances.sum() - 2 * np.trace(sqrtm(np.diag(variances) @ covariance)).real
    assert gaussian_total_correlation(codes) == pytest.approx(total, rel=1e-9)
    assert gaussian_wasserstein_correlation(codes) == pytest.approx(distance, rel=1e-9)
    result = unsupervised(codes, rng.integers(0, 3, (2_003, 2)))
    assert result["total_correlation"] == pytest.approx(total, rel=1e-9)
    assert result["wasserstein_correlation_norm"] == pytest.approx(distance / variances.sum(), rel=1e-9)


def test_information_of_every_pair_of_codes(rng):
    codes = rng.standard_normal((301, 4)) @ rng.standard_normal((4, 4))
    binned = [np.digitize(code, np.histogram(code, 7)[1][:-1]) for code in codes.T]
    pairs = [mutual_info_score(binned[i], binned[j]) for i in range(4) for j in range(i)]
    result = unsupervised(codes, rng.integers(0, 5, (301, 1)), bins=7)
    assert result["mutual_info_score"] == pytest.approx(np.mean(pairs), abs=1e-12)


def test_a_grid_of_independent_codes_depends_on_nothing():
    result = unsupervised(IDENTITY, GRID)
    for name in ("total_correlation", "wasserstein_correlation", "wasserstein_correlation_norm", "mutual_info_score"):
        assert result[name] == pytest.approx(0, abs=1e-12)
    assert "undefined" not in result


def test_constant_codes_are_left_out_and_counted():
    codes = IDENTITY @ np.random.RandomState(1).standard_normal((4, 3))
    plain, dead = unsupervised(codes, GRID), unsupervised(np.c_[codes, CONSTANT], GRID)
    assert dead == pytest.approx(plain, abs=1e-12) and dead["num_active_dims"] == 3
    assert gaussian_total_correlation(np.c_[codes, CONSTANT]) == pytest.approx(plain["total_correlation"], abs=1e-12)


@pytest.mark.parametrize("codes, left", [(CONSTANT, 0), (np.c_[CONSTANT, IDENTITY[:, 0]], 1)])
def test_fewer_than_two_varying_codes_are_undefined(codes, left):
    result = unsupervised(codes, GRID)
    assert result["total_correlation"] is None and result["mutual_info_score"] is None
    assert result["undefined"] == f"{left} of the codes vary; dependence needs two"


@pytest.mark.parametrize("weights", [[1, 0, 0, 0], [1, -2, 0.3, 0]], ids=["copy", "combination"])
def test_singular_codes_have_infinite_total_correlation_and_a_finite_distance(weights):
    codes = np.c_[IDENTITY, IDENTITY @ np.array(weights)]
    result = unsupervised(codes, GRID)
    assert math.isinf(gaussian_total_correlation(codes)) and result["total_correlation"] is None
    assert "singular" in result["undefined"] and result["wasserstein_correlation"] > 0.01


def test_few_rows_are_singular(rng):
    assert math.isinf(gaussian_total_correlation(rng.standard_normal((5, 5))))
    assert math.isfinite(gaussian_total_correlation(rng.standard_normal((6, 5))))


@settings(max_examples=20)
@given(moved(dims=4, signs=True))
def test_total_correlation_is_invariant_to_permuted_rescaled_and_negated_codes(move):
    codes = IDENTITY @ np.random.RandomState(3).standard_normal((4, 4))
    assert gaussian_total_correlation(move(codes)) == pytest.approx(gaussian_total_correlation(codes), rel=1e-9)
    same_scale = np.sign(move(np.ones((1, 4))))
    flipped = codes * same_scale
    assert gaussian_wasserstein_correlation(flipped) == pytest.approx(gaussian_wasserstein_correlation(codes), rel=1e-9)


@pytest.mark.parametrize("codes, factors, message", BAD_ROWS, ids=BAD_IDS)
def test_bad_input(codes, factors, message):
    with pytest.raises(InputError, match=message):
        unsupervised(codes, factors)


@pytest.mark.parametrize("codes", [np.zeros(3), np.zeros((1, 3)), np.full((4, 2), np.nan), 3.0])
def test_bad_codes(codes):
    for function in (gaussian_total_correlation, gaussian_wasserstein_correlation):
        with pytest.raises(InputError, match="^codes "):
            function(codes)
