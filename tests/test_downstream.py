import numpy as np
import pytest
from _codes import BAD_IDS, BAD_ROWS, BINARY, CONSTANT, DEAD, DUPLICATED, GRID, IDENTITY, ROTATED, halves
from sklearn.ensemble import GradientBoostingClassifier

from encdiff.errors import InputError
from encdiff.metrics import downstream


def test_known_answers():
    for codes in (IDENTITY, DUPLICATED, DEAD, ROTATED):
        assert downstream(*halves(codes), n_jobs=1)["accuracy_full"] > 0.9
    x, y, x_test, y_test = halves(CONSTANT)
    share = [(y_test[:, k] == np.bincount(y[:, k]).argmax()).mean() for k in range(4)]
    assert downstream(x, y, x_test, y_test, n_jobs=1)["per_factor"][-1] == pytest.approx(share)


def test_sizes_and_efficiency():
    told = []
    result = downstream(
        *halves(IDENTITY), sizes=(20, 100, 9999), n_jobs=1, progress=lambda done, total: told.append((done, total))
    )
    assert list(result["sizes"]) == [20, 100, 240] and told[-1] == (12, 12)
    np.testing.assert_allclose(result["accuracy"], result["per_factor"].mean(axis=1))
    assert result["sample_efficiency"] == pytest.approx(result["accuracy"][0] / result["accuracy"][-1])
    assert result["accuracy"][0] < result["accuracy"][1] < result["accuracy_full"]
    single = downstream(*halves(IDENTITY), sizes=(9999,), n_jobs=1)
    assert single["sample_efficiency"] is None and "one size" in single["undefined"]


def test_set_of_one_value_predicts_it():
    rows = np.arange(64)[:, None] * [1.0, 1.0]
    factors = np.c_[np.arange(64) >= 60, np.arange(64) % 2].astype(int)
    result = downstream(rows, factors, rows, factors, sizes=(2, 64), n_jobs=1, seed=0)
    assert result["per_factor"][0, 0] == pytest.approx(60 / 64)


def test_boosted_trees_are_scikit_learns():
    codes = BINARY @ np.random.RandomState(0).standard_normal((3, 3)) + np.random.RandomState(1).normal(0, 0.5, (64, 3))
    x, y, x_test, y_test = halves(codes, BINARY)
    ours = downstream(x, y, x_test, y_test, predictor="boosted_trees", sizes=(9999,), n_jobs=1, seed=4)
    rows = np.random.RandomState(4).permutation(len(x))
    for k in range(3):
        model = GradientBoostingClassifier(random_state=4).fit(x[rows], y[rows, k])
        assert ours["per_factor"][0, k] == model.score(x_test, y_test[:, k])


@pytest.mark.parametrize("codes, factors, message", BAD_ROWS, ids=BAD_IDS)
def test_bad_input(codes, factors, message):
    with pytest.raises(InputError, match=message):
        downstream(codes, factors, IDENTITY, GRID, n_jobs=1)


def test_bad_options():
    with pytest.raises(InputError, match="^predictor is 'forest'; it must be one of logistic, boosted_trees"):
        downstream(*halves(IDENTITY), predictor="forest")
    with pytest.raises(InputError, match="^sizes is 1;"):
        downstream(*halves(IDENTITY), sizes=(1, 10))
    with pytest.raises(InputError, match="^n_jobs is 0"):
        downstream(*halves(IDENTITY), n_jobs=0)
