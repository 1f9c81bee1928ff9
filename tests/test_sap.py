import numpy as np
import pytest
from _codes import BAD_IDS, BAD_ROWS, BINARY, GRID, IDENTITY, NAMES, ROTATED, golden, halves, moved
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import LinearSVC

from encdiff.errors import InputError
from encdiff.metrics import sap
from encdiff.metrics.sap import _Machines


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    arrays, published = golden(name)
    assert sap(*arrays)["sap"] == pytest.approx(published["sap"], abs=1e-12)


def on_binary(codes):
    return sap(codes, BINARY, codes, BINARY)


def test_known_answers():
    identity = BINARY - 0.5
    result = on_binary(identity)
    np.testing.assert_allclose(result["accuracy"], np.where(np.eye(3), 1, 0.5))
    assert result["sap"] == pytest.approx(0.5)
    assert on_binary(np.tile(identity, 2))["sap"] == 0
    assert on_binary(np.full((64, 3), 0.3))["sap"] == 0
    assert on_binary(np.c_[identity, np.zeros(64)])["sap"] == pytest.approx(0.5)
    assert sap(*halves(ROTATED))["sap"] < sap(*halves(IDENTITY))["sap"]


@pytest.mark.parametrize(
    "classes, scale, offset, C", [(2, 1, 0, 0.01), (3, 5, 2, 0.01), (7, 0.2, -1, 1.0), (2, 30, 9, 0.3)]
)
def test_machines_reach_the_optimum(classes, scale, offset, C):
    """LinearSVC minimises the same function, in passes over the points; classes overlap, are unequal and have ties."""
    rng = np.random.default_rng()
    labels = np.r_[np.arange(classes), rng.binomial(classes - 1, 0.4, 300)]
    x = np.round(labels + rng.normal(0, 1, len(labels)), 1) * scale + offset
    order = np.argsort(x, kind="stable")
    w, b = _Machines(x[order], labels[order], classes, C).solve()
    model = LinearSVC(C=C, class_weight="balanced", dual=False, tol=1e-12, max_iter=10_000).fit(x[:, None], labels)
    np.testing.assert_allclose(w, model.coef_[:, 0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(b, model.intercept_, rtol=1e-4, atol=1e-6)


@settings(max_examples=10)
@given(moved(dims=4, powers=st.just(0), signs=True))
def test_invariant_to_permuted_and_mirrored_dimensions(move):
    """Not to scale: the penalty is on slopes. Mirrored codes can only tie otherwise, and these do not tie."""
    x, y, x_test, y_test = halves(ROTATED + 0.01 * np.random.RandomState(0).standard_normal((360, 4)))
    assert sap(move(x), y, move(x_test), y_test)["sap"] == pytest.approx(sap(x, y, x_test, y_test)["sap"], abs=1e-12)


@pytest.mark.parametrize(
    "codes, factors, message", [*BAD_ROWS, (IDENTITY[:, :1], GRID, "N >= 2")], ids=[*BAD_IDS, "one code"]
)
def test_bad_input(codes, factors, message):
    with pytest.raises(InputError, match=message):
        sap(codes, factors, IDENTITY, GRID)


@pytest.mark.parametrize("C", [0, -1, float("nan")])
def test_bad_penalty(C):
    with pytest.raises(InputError, match="^C is"):
        sap(IDENTITY, GRID, IDENTITY, GRID, C=C)
