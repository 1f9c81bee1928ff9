import math
from itertools import product

import numpy as np
import pytest
from _codes import BAD_IDS, BAD_ROWS, CONSTANT, GRID, IDENTITY
from scipy.spatial.distance import pdist

from encdiff.errors import InputError
from encdiff.metrics import flatness

SIZES = (3, 4, 5)
FACTORS = np.array(list(product(*map(range, SIZES))))


def by_hand(codes, p_width, p_length):
    """Mean over factors of (mean width / mean length), traversal by traversal."""
    ratios = []
    for axis, size in enumerate(SIZES):
        others = [f for f in range(3) if f != axis]
        widths, lengths = [], []
        for fixed in product(*(range(SIZES[o]) for o in others)):
            path = codes[(FACTORS[:, others] == fixed).all(axis=1)]
            steps = [np.linalg.norm(path[(k + 1) % size] - path[k], p_length) for k in range(size)]
            widths.append(pdist(path, "minkowski", p=p_width).max())
            lengths.append(sum(steps) - max(steps))
        ratios.append(np.mean(widths) / np.mean(lengths))
    return np.mean(ratios)


def assert_same(result, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, atol=1e-12)


@pytest.mark.parametrize("change", [lambda c: c, lambda c: -3 * c[:, ::-1], lambda c: np.c_[c, CONSTANT] + 2])
def test_one_code_for_each_factor_is_flat(change):
    result = flatness(change(IDENTITY), GRID)
    for name in ("flatness", "flatness_l1", "flatness_l2", "axis_ratio", "linear_ratio"):
        assert result[name] == pytest.approx(1, abs=1e-12)


def test_any_codes_against_every_traversal(rng):
    codes = rng.standard_normal((60, 5))
    result = flatness(codes, FACTORS)
    for name, norms in {"flatness": (2, 1), "flatness_l1": (1, 1), "flatness_l2": (2, 2)}.items():
        assert result[name] == pytest.approx(by_hand(codes, *norms), abs=1e-12)


@pytest.mark.parametrize("size", [3, 7, 12])
def test_a_circle_has_its_diameter_over_its_open_chords(size):
    """Factor 0 goes round a circle, factor 1 along a line."""
    factors = np.array(list(product(range(size), range(2))))
    angle = 2 * math.pi * factors[:, 0] / size
    codes = np.c_[np.cos(angle), np.sin(angle), factors[:, 1]]
    width = 2 * math.sin(math.pi * (size // 2) / size)
    steps = np.abs(np.diff(np.exp(2j * np.pi * np.arange(size + 1) / size)))
    result = flatness(codes, factors)
    assert result["flatness_l2"] == pytest.approx((width / (steps[0] * (size - 1)) + 1) / 2, abs=1e-12)
    assert result["linear_ratio"] == pytest.approx((0.25 + 1) / 2, abs=1e-12), "half the variance, of K = 3 shares"


def test_lines_across_the_axes_are_straight_but_not_flat():
    mixed = np.array([[1, 1, 0, 0], [1, -1, 0, 0], [0, 0, 1, 1], [0, 0, 1, -1]])
    result = flatness(IDENTITY @ mixed, GRID)
    assert result["flatness"] == pytest.approx(1 / math.sqrt(2), abs=1e-12)
    assert [result["flatness_l2"], result["linear_ratio"]] == pytest.approx([1, 1], abs=1e-12)
    assert result["axis_ratio"] == pytest.approx((1 / 2 - 1 / 4) / (3 / 4), abs=1e-12)


def test_a_factor_out_of_order_takes_the_long_way():
    codes = IDENTITY.copy()
    codes[:, 0] = np.array([0, 3, 1, 4, 2, 5])[GRID[:, 0]]  # steps 3 2 3 2 3 and 5 back
    np.testing.assert_allclose(flatness(codes, GRID)["per_factor"], [5 / 13, 1, 1, 1], atol=1e-12)


def test_a_factor_that_moves_nothing_counts_nothing():
    result = flatness(IDENTITY * [1, 1, 0, 1], GRID)
    assert result["flatness"] == pytest.approx(3 / 4) and result["axis_ratio"] == pytest.approx(3 / 4)
    assert flatness(CONSTANT, GRID)["flatness"] == 0


def test_permuted_and_negated_codes_and_shuffled_rows_change_nothing(rng):
    codes, order = rng.standard_normal((60, 5)), rng.permutation(60)
    moved = (codes[:, rng.permutation(5)] * rng.choice([-2.0, 2.0], 5))[order]
    assert_same(flatness(moved, FACTORS[order] * 7 - 3), flatness(codes, FACTORS))


def test_images_of_the_same_factors_are_averaged(rng):
    codes, noise = rng.standard_normal((60, 3)), rng.standard_normal((60, 3))
    twice = flatness(np.r_[codes + noise, codes - noise], np.r_[FACTORS, FACTORS])
    assert_same(twice, flatness(codes, FACTORS))


def test_traversals_are_drawn_by_the_seed(rng):
    codes = rng.standard_normal((60, 3))
    some, again, other = (flatness(codes, FACTORS, traversals=4, seed=s)["flatness"] for s in (1, 1, 2))
    assert some == again != other
    assert flatness(codes, FACTORS, traversals=20, seed=3)["flatness"] == flatness(codes, FACTORS)["flatness"]


def test_missing_combinations_are_refused(rng):
    with pytest.raises(InputError, match="hold 59 of 60 combinations of values; flatness needs all .*complete grid$"):
        flatness(rng.standard_normal((59, 3)), FACTORS[1:])
    many = rng.integers(0, 50, (200, 12))
    with pytest.raises(InputError, match="hold 200 of [0-9]{20,} combinations"):
        flatness(rng.standard_normal((200, 3)), many)


@pytest.mark.parametrize(
    "codes, factors, message", [*BAD_ROWS, (IDENTITY[:, :1], GRID, "N >= 2")], ids=[*BAD_IDS, "one code"]
)
def test_bad_input(codes, factors, message):
    with pytest.raises(InputError, match=message) as error:
        flatness(codes, factors)
    assert "\n" not in str(error.value)


def test_no_traversals():
    with pytest.raises(InputError, match="traversals is 0"):
        flatness(IDENTITY, GRID, traversals=0)
