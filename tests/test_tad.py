import numpy as np
import pytest
from _codes import BAD_IDS, BAD_ROWS, BINARY, GRID, IDENTITY, moved
from hypothesis import given, settings

from encdiff.errors import InputError
from encdiff.metrics import tad


def test_known_answers():
    identity = BINARY - 0.5
    result = tad(identity, BINARY)
    assert result["tad"] == pytest.approx(3 * 0.5) and list(result["captured"]) == [0, 1, 2]
    np.testing.assert_allclose(result["auroc"], np.where(np.eye(3), 1, 0.5))
    assert tad(-identity, BINARY)["tad"] == pytest.approx(1.5), "a code may point either way"
    twice = tad(np.tile(identity, 2), BINARY)
    assert twice["tad"] == 0 and twice["num_captured"] == 3
    constant = tad(np.full((64, 2), 0.3), BINARY)
    assert constant["tad"] == 0 and constant["num_captured"] == 0
    assert tad(np.c_[identity, np.zeros(64)], BINARY)["tad"] == pytest.approx(1.5)
    rotated = tad(identity @ np.linalg.qr(np.random.default_rng(3).standard_normal((3, 3)))[0], BINARY)
    assert rotated["tad"] < 1.2


def test_attributes_that_others_tell_take_no_part():
    """Attribute 3 repeats attribute 0 but for one row in eight: each takes more than half of the other's entropy."""
    copy = np.where(np.arange(64) % 8 == 1, 1 - BINARY[:, 0], BINARY[:, 0])
    attributes = np.c_[BINARY, copy].astype(bool)
    result = tad(BINARY - 0.5, attributes)
    assert list(result["independent"]) == [1, 2] and result["tad"] == pytest.approx(1.0)
    assert tad(BINARY - 0.5, attributes, most_entropy_reduction=0.6)["num_captured"] == 4


def test_threshold_of_capture():
    rng = np.random.default_rng(0)
    attributes = rng.integers(0, 2, (4000, 2))
    codes = attributes * [3.0, 0.5] + rng.standard_normal((4000, 2))  # areas of 0.98 and 0.64
    result = tad(codes, attributes)
    assert list(result["captured"]) == [0]
    assert result["tad"] == pytest.approx(result["auroc"][0, 0] - result["auroc"][1, 0])
    assert tad(codes, attributes, least_auroc=0.6)["num_captured"] == 2


@settings(max_examples=20)
@given(moved(dims=3, signs=True))
def test_invariant_to_permuted_and_rescaled_dimensions(move):
    codes = BINARY @ np.random.RandomState(1).standard_normal((3, 3))
    assert tad(move(codes), BINARY)["tad"] == pytest.approx(tad(codes, BINARY)["tad"], abs=1e-12)


@pytest.mark.parametrize("codes, factors, message", BAD_ROWS, ids=BAD_IDS)
def test_bad_input(codes, factors, message):
    with pytest.raises(InputError, match=message):
        tad(codes, factors)


def test_attributes_have_two_values():
    with pytest.raises(InputError, match="attribute 0 takes 6 values"):
        tad(IDENTITY, GRID)
