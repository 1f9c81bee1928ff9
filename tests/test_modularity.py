import numpy as np
import pytest
from _codes import (
    BAD_IDS,
    BAD_ROWS,
    CONSTANT,
    DEAD,
    DUPLICATED,
    GRID,
    IDENTITY,
    NAMES,
    ROTATED,
    golden,
    halves,
    moved,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from encdiff.errors import InputError
from encdiff.metrics import explicitness, modularity


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    arrays, published = golden(name)
    assert modularity(*arrays[:2])["modularity"] == pytest.approx(published["modularity"], abs=1e-12)
    scores = explicitness(*arrays)
    # the regression stops at a gradient of 1e-4, so another build of its solver may end elsewhere
    assert scores["explicitness_train"] == pytest.approx(published["explicitness_train"], abs=1e-4)
    assert scores["explicitness_test"] == pytest.approx(published["explicitness_test"], abs=1e-4)


@pytest.mark.parametrize(
    "codes, score",
    [(IDENTITY, 1), (CONSTANT, 0), (DUPLICATED, 1), (DEAD, 4 / 5)],
    ids=["identity", "constant", "twice", "dead"],
)
def test_known_modularity(codes, score):
    assert modularity(codes, GRID)["modularity"] == pytest.approx(score, abs=1e-12)


def test_modularity_of_a_code_for_two_factors():
    """A code that tells factors 0 and 1, of 4 values each, shares its information evenly: 1 - 1 / (F - 1)."""
    factors = np.stack(np.unravel_index(np.arange(48), (4, 4, 3)), axis=1)
    code = factors[:, :1] * 4.0 + factors[:, 1:2]
    assert modularity(code, factors)["modularity"] == pytest.approx(1 - 1 / 2)
    assert modularity(code, factors[:, :2])["modularity"] == pytest.approx(0)
    assert 0.3 < modularity(ROTATED, GRID)["modularity"] < 0.95


@settings(max_examples=20)
@given(moved())
def test_modularity_is_invariant_to_permuted_and_rescaled_dimensions(move):
    codes = np.c_[ROTATED, IDENTITY[:, 0] ** 3]
    assert modularity(move(codes), GRID)["modularity"] == pytest.approx(
        modularity(codes, GRID)["modularity"], abs=1e-12
    )


def test_known_explicitness():
    assert explicitness(*halves(IDENTITY))["explicitness_test"] > 0.95
    constant = explicitness(*halves(CONSTANT))
    assert constant["explicitness_train"] == constant["explicitness_test"] == 0.5
    assert explicitness(*halves(ROTATED))["explicitness_test"] > 0.95  # linear readout undoes a rotation
    half = explicitness(*halves(IDENTITY * [1, 1, 0, 0]))["per_factor"]
    assert half[:2].min() > 0.9 and np.all(half[2:] < 0.65)


def test_explicitness_is_the_area_of_scikit_learn():
    x, y, x_test, y_test = halves(ROTATED + np.random.default_rng(1).normal(0, 0.3, (360, 4)))
    expected = []
    for k in range(4):
        model = LogisticRegression().fit(x, y[:, k])
        expected.append(roc_auc_score(y_test[:, k][:, None] == model.classes_, model.predict_proba(x_test)))
    np.testing.assert_allclose(explicitness(x, y, x_test, y_test)["per_factor"], expected, atol=1e-12)


@settings(max_examples=5)
@given(moved(dims=4, powers=st.just(0), signs=True))
def test_explicitness_is_invariant_to_permuted_and_mirrored_dimensions(move):
    x, y, x_test, y_test = halves(ROTATED)
    there = explicitness(move(x), y, move(x_test), y_test)["explicitness_test"]
    assert there == pytest.approx(explicitness(x, y, x_test, y_test)["explicitness_test"], abs=1e-3)


@pytest.mark.parametrize("codes, factors, message", BAD_ROWS, ids=BAD_IDS)
def test_bad_input(codes, factors, message):
    with pytest.raises(InputError, match=message):
        modularity(codes, factors)
    with pytest.raises(InputError, match=message):
        explicitness(IDENTITY, GRID, codes, factors)


def test_values_that_one_set_lacks():
    x, y, x_test, y_test = halves(IDENTITY)
    with pytest.raises(InputError, match="factor 0 takes the value 9, which factors_train lacks"):
        explicitness(x, y, x_test, np.where(y_test == [5, -1, -1, -1], 9, y_test))
    with pytest.raises(InputError, match="factor 0 never takes the value 5"):
        explicitness(x, y, x_test[y_test[:, 0] < 5], y_test[y_test[:, 0] < 5])
    with pytest.raises(InputError, match="F >= 2"):
        modularity(IDENTITY, GRID[:, :1])
