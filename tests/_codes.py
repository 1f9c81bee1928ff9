"""Representations of known quality on a small complete grid, and the golden arrays of the metrics."""

import json
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("identity", "rotated", "mixed", "duplicated", "dead_dim")
ARRAYS = ("codes_train", "factors_train", "codes_test", "factors_test")
SIZES = (6, 4, 5, 3)
GRID = np.stack(np.unravel_index(np.arange(360), SIZES), axis=1)  # factors (360, 4)
IDENTITY = GRID / np.array(SIZES) - 0.5
CONSTANT = np.full((360, 4), 0.3)
DUPLICATED = np.tile(IDENTITY, 2)
DEAD = np.c_[IDENTITY, np.full(360, 0.7)]
ROTATED = IDENTITY @ np.linalg.qr(np.random.RandomState(5).standard_normal((4, 4)))[0]
BINARY = np.stack(np.unravel_index(np.arange(64) % 8, (2, 2, 2)), axis=1)  # factors (64, 3), every combination


def with_nan(codes):
    codes = codes.copy()
    codes[5, 1] = np.nan
    return codes


BAD_ROWS = [  # codes, factors and what the message says; for metrics of any rows
    (with_nan(IDENTITY), GRID, "codes.* NaN"),
    (IDENTITY[:-1], GRID, "codes.* has shape"),
    (IDENTITY[:, 0], GRID, "codes.* has shape"),
    (IDENTITY.astype(str), GRID, "codes.* has dtype"),
    (IDENTITY, GRID + 0.5, "factors.* float64"),
    (IDENTITY, GRID[:, 0], "factors.* must be integers"),
    (IDENTITY, GRID * [1, 0, 1, 1], "factors.*factor 1 is constant"),
    (IDENTITY[::29], np.c_[GRID[::29], np.arange(13)], "factors.*factor 4 has 13 values; 26 samples"),
]
BAD_IDS = ["nan", "length", "shape", "text", "fractions", "vector", "constant factor", "few samples"]


def golden(name):
    """Arrays by ARRAYS and the published scores."""
    with np.load(GOLDEN / "metrics.npz") as arrays:
        return [arrays[f"{name}:{part}"] for part in ARRAYS], json.loads((GOLDEN / "metrics.json").read_text())[name]


def halves(codes, factors=GRID, seed=0):
    """The rows shuffled, two thirds to train and one to test."""
    order = np.random.RandomState(seed).permutation(len(codes))
    train, test = order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]
    return codes[train], factors[train], codes[test], factors[test]


POWERS = st.integers(-3, 9)


@st.composite
def moved(draw, dims=5, powers=POWERS, signs=False):
    """A function that permutes and rescales code dimensions; powers of two are exact in floating point."""
    order = draw(st.permutations(range(dims)))
    scales = np.exp2(draw(st.lists(powers, min_size=dims, max_size=dims)))
    if signs:
        scales *= draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=dims, max_size=dims))
    return lambda codes: (codes * scales)[:, order]
