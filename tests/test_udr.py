import numpy as np
import pytest
from _codes import GRID, IDENTITY
from scipy.stats import spearmanr

from encdiff.errors import InputError
from encdiff.metrics import udr


def copies(rng, count=3, scale=1.0):
    """The grid's factors, permuted, negated, rescaled: models that agree."""
    changes = [(rng.permutation(4), rng.choice([-scale, scale], 4)) for _ in range(count)]
    return [IDENTITY[:, order] * signs for order, signs in changes]


def rotations(rng, count=3):
    return [IDENTITY @ np.linalg.qr(rng.standard_normal((4, 4)))[0] for _ in range(count)]


def test_copies_agree_and_rotations_do_not(rng):
    agreed = udr(copies(rng, 4))
    np.testing.assert_allclose(agreed["udr"], 1, atol=1e-12)
    np.testing.assert_allclose(agreed["pairwise"], 1 - np.eye(4), atol=1e-12)
    assert udr(rotations(rng))["udr"].max() < 0.6


def test_the_lasso_of_copies_is_its_shrinkage(rng):
    """Of standardised, uncorrelated columns the Lasso's weight is 1 - alpha, and 0.9^2 / 0.9 = 0.9."""
    np.testing.assert_allclose(udr(copies(rng), kind="lasso")["udr"], 0.9, atol=1e-6)
    assert udr(rotations(rng), kind="lasso")["udr"].max() < 0.6


def test_one_that_differs_ranks_last(rng):
    score = udr([*copies(rng), *rotations(rng, 1)])["udr"]
    assert score[:3].min() == pytest.approx(1) and score[3] < 0.7


def test_a_pair_by_the_formula(rng):
    """Models of three and five codes; every column and every row says max^2 / sum."""
    a, b = rng.standard_normal((101, 3)), rng.standard_normal((101, 5))
    b[:, 1] += a[:, 2]
    r = np.array([[abs(spearmanr(x, y)[0]) for y in b.T] for x in a.T])
    columns = [max(r[:, j]) ** 2 / sum(r[:, j]) for j in range(5)]
    rows = [max(r[i]) ** 2 / sum(r[i]) for i in range(3)]
    result = udr([a, b])
    np.testing.assert_allclose(result["udr"], (np.mean(columns) + np.mean(rows)) / 2, atol=1e-12)
    np.testing.assert_allclose(result["pairwise"], result["pairwise"].T, atol=1e-12)


def test_a_score_is_the_median_of_its_pairs(rng):
    result = udr(copies(rng) + rotations(rng, 2))
    for m, column in enumerate(result["pairwise"].T):
        assert result["udr"][m] == np.median([column[k] for k in range(5) if k != m])


def test_invariant_to_permuted_rescaled_and_negated_codes(rng):
    models = rotations(rng)
    moved = [m[:, rng.permutation(4)] * rng.choice([-4.0, 4.0], 4) for m in models]
    for kind in ("spearman", "lasso"):
        np.testing.assert_allclose(udr(moved, kind=kind)["udr"], udr(models, kind=kind)["udr"], atol=1e-5)


def test_codes_that_hardly_vary_take_no_part(rng):
    noisy = [np.c_[codes, 0.001 * rng.standard_normal(360), np.full(360, 7.0)] for codes in copies(rng)]
    result = udr(noisy)
    np.testing.assert_allclose(result["udr"], 1, atol=1e-12)
    assert result["num_active_dims"].tolist() == [4, 4, 4]
    assert udr(noisy, least_spread=0)["udr"].max() < 0.99


def test_known_divergences_say_which_codes_are_informative(rng):
    noisy = [np.c_[codes, rng.standard_normal(360)] for codes in copies(rng)]
    kl = [np.array([1, 2, 0.5, 0.02, 0.009])] * 3
    np.testing.assert_allclose(udr(noisy, kl=kl)["udr"], 1, atol=1e-12)
    assert udr(noisy, kl=kl, least_kl=0.6)["num_active_dims"].tolist() == [2, 2, 2]
    assert udr(noisy)["udr"].max() < 0.95


def test_a_dead_model_agrees_with_none(rng):
    dead = np.full((360, 2), 0.3)
    result = udr([*copies(rng), dead])
    assert result["udr"][3] == 0 and result["num_active_dims"][3] == 0
    assert np.isfinite(result["pairwise"]).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: udr([IDENTITY]), "codes is list of 1; it must be a list of two arrays or more"),
        (lambda: udr(IDENTITY), "codes is ndarray of 360"),
        (lambda: udr([IDENTITY, IDENTITY[:-1]]), r"codes\[1\] has shape"),
        (lambda: udr([IDENTITY, IDENTITY * np.nan]), r"codes\[1\] holds NaN"),
        (lambda: udr([IDENTITY, IDENTITY], kind="pearson"), "kind is 'pearson'; it must be one of spearman, lasso"),
        (lambda: udr([IDENTITY, GRID], kl=[np.ones(4), np.ones(3)]), "kl has shapes"),
        (lambda: udr([IDENTITY, GRID], kl=[np.ones(4)]), "kl has shapes"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
