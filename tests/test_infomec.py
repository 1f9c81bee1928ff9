import numpy as np
import pytest
from _codes import BAD_IDS, BAD_ROWS, CONSTANT, DEAD, DUPLICATED, GRID, IDENTITY, ROTATED, moved
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_selection import mutual_info_classif

from encdiff.errors import InputError
from encdiff.metrics import infomec


def both(codes, **options):
    return infomec(codes, GRID, codes, GRID, **options)


@pytest.mark.parametrize(
    "codes, infom, infoc, dims",
    [(IDENTITY, 1, 1, 4), (DUPLICATED, 1, (1 / 2 - 1 / 8) / (1 - 1 / 8), 8), (DEAD, 1, 1, 4)],
    ids=["identity", "twice", "dead"],
)
def test_known_answers(codes, infom, infoc, dims):
    """On the complete grid distinct codes are counted without error; neighbours come near."""
    counted = both(codes, estimator="discrete")
    assert (counted["infom"], counted["infoc"]) == (pytest.approx(infom), pytest.approx(infoc))
    assert counted["infoe"] > 0.99 and counted["num_active_dims"] == dims
    near = both(codes)
    assert (near["infom"], near["infoc"]) == (pytest.approx(infom, abs=0.05), pytest.approx(infoc, abs=0.05))


def test_constant_codes_are_undefined():
    result = both(CONSTANT)
    assert result["infom"] is None and result["infoc"] is None and result["undefined"] == "no code is active"
    assert result["infoe"] == pytest.approx(0, abs=1e-6)


def test_one_code_has_no_compactness():
    result = both(IDENTITY[:, :1], estimator="discrete")
    assert result["infom"] == pytest.approx(1)
    assert result["infoc"] is None and result["undefined"] == "InfoC needs two active codes"


def test_rotated_codes_are_explicit_but_not_modular():
    result = both(ROTATED)
    assert result["infom"] < 0.7 and result["infoc"] < 0.7 and result["infoe"] > 0.99


def test_factor_without_information_is_named():
    counted = both(IDENTITY[:, :2], estimator="discrete")
    np.testing.assert_allclose(counted["nmi"], np.eye(2, 4), atol=1e-12)
    assert counted["infom"] == pytest.approx(1)
    assert counted["infoc"] is None and counted["undefined"] == "no code tells anything of factor 2"
    half = both(IDENTITY[:, :2])["infoe"]
    assert half == pytest.approx(0.5, abs=0.02), "two of four factors can be read"


def test_matrix_is_information_by_entropy():
    result = both(ROTATED)
    z = (ROTATED - ROTATED.mean(axis=0)) / ROTATED.std(axis=0)
    for k, size in enumerate((6, 4, 5, 3)):
        plain = mutual_info_classif(z, GRID[:, k], discrete_features=False, n_neighbors=10, random_state=1)
        np.testing.assert_allclose(result["nmi"][:, k], plain / np.log(size), atol=0.02)


def test_narrow_codes_are_inactive():
    noise = np.random.default_rng(0).uniform(-1, 1, (360, 1))
    assert both(np.c_[IDENTITY, 0.01 * noise])["num_active_dims"] == 4
    assert both(np.c_[IDENTITY, 0.01 * IDENTITY[:, :1]], active_range=0.001)["num_active_dims"] == 5


def test_codes_without_information_are_inactive():
    irrelevant = np.repeat([[0.0], [1.0]], 360, axis=0)  # the grid twice, told apart by a code
    twice, factors = np.c_[np.tile(IDENTITY, (2, 1)), irrelevant], np.tile(GRID, (2, 1))
    result = infomec(twice, factors, twice, factors, estimator="discrete")
    assert result["num_active_dims"] == 4 and result["infom"] == result["infoc"] == pytest.approx(1)


@settings(max_examples=3)
@given(moved(dims=4, powers=st.integers(-1, 1), signs=True))
def test_invariant_to_permuted_and_rescaled_dimensions(move):
    """Within the ranges that stay active; the regression stops after 100 iterations, wherever it is."""
    here, there = both(ROTATED), both(move(ROTATED))
    for name in ("infom", "infoc", "infoe"):
        assert here[name] == pytest.approx(there[name], abs=0.01)


@pytest.mark.parametrize("codes, factors, message", BAD_ROWS, ids=BAD_IDS)
def test_bad_input(codes, factors, message):
    with pytest.raises(InputError, match=message):
        infomec(IDENTITY, GRID, codes, factors)


def test_bad_options():
    with pytest.raises(InputError, match="^estimator is 'kernel'; it must be one of neighbors, discrete"):
        both(IDENTITY, estimator="kernel")
    with pytest.raises(InputError, match="^neighbors is 0"):
        both(IDENTITY, neighbors=0)
    with pytest.raises(InputError, match="360 rows; that is not discrete"):
        both(ROTATED + np.random.default_rng(0).random((360, 4)), estimator="discrete")
