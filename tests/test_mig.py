import numpy as np
import pytest
from _codes import BAD_IDS, BAD_ROWS, CONSTANT, DEAD, DUPLICATED, GRID, IDENTITY, NAMES, ROTATED, golden, moved
from hypothesis import given, settings

from encdiff.errors import InputError
from encdiff.metrics import mig


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    arrays, published = golden(name)
    assert mig(*arrays[:2])["mig"] == pytest.approx(published["mig"], abs=1e-12)


@pytest.mark.parametrize(
    "codes, score",
    [(IDENTITY, 1), (CONSTANT, 0), (DUPLICATED, 0), (DEAD, 1)],
    ids=["identity", "constant", "twice", "dead"],
)
def test_known_answers(codes, score):
    assert mig(codes, GRID)["mig"] == pytest.approx(score, abs=1e-12)


def test_rotated_codes_have_a_small_gap():
    assert mig(ROTATED, GRID)["mig"] < 0.5


def test_gap_by_hand():
    """Code 0 is factor 0; code 1 is its "and" with factor 1: I(and; f0) = H(1/4) - 1/2 bit, of 1 bit."""
    factors = np.tile([[0, 0], [0, 1], [1, 0], [1, 1]], (4, 1))
    codes = np.c_[factors[:, 0], factors.min(axis=1)].astype(float)
    h = -(np.log2(1 / 4) / 4 + np.log2(3 / 4) * 3 / 4)
    result = mig(codes, factors)
    np.testing.assert_allclose(result["mutual_information"] / np.log(2), [[1, 0], [h - 0.5, h - 0.5]], atol=1e-12)
    np.testing.assert_allclose(result["gaps"], [1.5 - h, h - 0.5], atol=1e-12)


@settings(max_examples=20)
@given(moved())
def test_invariant_to_permuted_and_rescaled_dimensions(move):
    codes = np.c_[ROTATED, IDENTITY[:, 0] ** 3]
    assert mig(move(codes), GRID)["mig"] == pytest.approx(mig(codes, GRID)["mig"], abs=1e-12)


@pytest.mark.parametrize(
    "codes, factors, message", [*BAD_ROWS, (IDENTITY[:, :1], GRID, "N >= 2")], ids=[*BAD_IDS, "one code"]
)
def test_bad_input(codes, factors, message):
    with pytest.raises(InputError, match=message) as error:
        mig(codes, factors)
    assert "\n" not in str(error.value)
