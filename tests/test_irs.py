import numpy as np
import pytest
from _codes import BAD_IDS, BAD_ROWS, CONSTANT, DEAD, DUPLICATED, GRID, IDENTITY, NAMES, ROTATED, SIZES, golden, moved
from hypothesis import given, settings
from hypothesis import strategies as st

from encdiff.errors import InputError
from encdiff.metrics import irs


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    """The published arithmetic is float32 here: 1e-8 apart."""
    arrays, published = golden(name)
    assert irs(*arrays[:2])["irs"] == pytest.approx(published["irs"], abs=1e-7)


@pytest.mark.parametrize("codes, dims", [(IDENTITY, 4), (DUPLICATED, 8), (DEAD, 4)], ids=["identity", "twice", "dead"])
def test_codes_of_one_factor_each_are_robust(codes, dims):
    result = irs(codes, GRID)
    assert result["irs"] == pytest.approx(1) and result["num_active_dims"] == dims


def test_constant_codes_are_undefined():
    result = irs(CONSTANT, GRID)
    assert result["irs"] is None and result["undefined"] == "every code is constant"


def test_by_hand():
    """f0 + f1 lies in 0, 1, 1, 2: while one factor is held it moves by 1/2 of the 1 it moves in all."""
    factors = np.tile([[0, 0], [0, 1], [1, 0], [1, 1]], (3, 1))
    total = factors.sum(axis=1, keepdims=True).astype(float)
    assert irs(total, factors)["irs"] == pytest.approx(0.5)
    both = irs(np.c_[total, 0.5 * factors[:, 0]], factors)  # deviations 1 and 1/4 weigh 0.5 and 1
    assert both["irs"] == pytest.approx((0.5 * 1 + 1 * 0.25) / 1.25)


def test_quantile_against_a_plain_loop():
    codes = np.random.default_rng().standard_normal((360, 3))
    largest = np.abs(codes - codes.mean(axis=0)).max(axis=0)
    moves = np.zeros((3, 4))
    for i in range(3):
        for k in range(4):
            groups = [codes[GRID[:, k] == value, i] for value in range(SIZES[k])]
            moves[i, k] = np.mean([np.quantile(np.abs(g - g.mean()), 0.9) for g in groups])
    expected = np.average(1 - (moves / largest[:, None]).min(axis=1), weights=largest)
    assert irs(codes, GRID, quantile=0.9)["irs"] == pytest.approx(expected, abs=1e-12)


@settings(max_examples=20)
@given(moved(dims=4, powers=st.just(0), signs=True), st.integers(-8, 8))
def test_invariant_to_permuted_mirrored_and_together_rescaled_dimensions(move, power):
    codes = ROTATED + 0.1 * IDENTITY**2
    assert irs(move(codes) * 2.0**power, GRID)["irs"] == pytest.approx(irs(codes, GRID)["irs"], abs=1e-12)


@pytest.mark.parametrize("codes, factors, message", BAD_ROWS, ids=BAD_IDS)
def test_bad_input(codes, factors, message):
    with pytest.raises(InputError, match=message):
        irs(codes, factors)
