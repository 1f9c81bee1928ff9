import json
from pathlib import Path

import numpy as np
import pytest
from _codes import BAD_IDS, BAD_ROWS
from hypothesis import given, settings
from hypothesis import strategies as st

from encdiff.errors import InputError
from encdiff.metrics import factor_vae_score, sampling
from encdiff.metrics.factor_vae import factor_vae_score_rows

GOLDEN = Path(__file__).parent / "golden"
SIZES = (6, 4, 5, 3)
GRID = np.stack(np.unravel_index(np.arange(360), SIZES), axis=1)
CENTRED = (GRID / np.array(SIZES) - 0.5).astype(np.float32)
SMALL = dict(num_variance=500, num_train=400, num_eval=300, batch_size=16)


def golden_codes(name):
    """Codes of the whole grid (the arrays miss two images): affine in the factors, for `mixed` under tanh."""
    arrays = np.load(GOLDEN / "metrics.npz")
    codes = arrays[f"{name}:codes_train"].astype(np.float64)
    codes = np.arctanh(codes) if name == "mixed" else codes
    rows = CENTRED[np.ravel_multi_index(arrays[f"{name}:factors_train"].T.astype(int), SIZES)].astype(np.float64)
    weights, *_ = np.linalg.lstsq(np.c_[rows, np.ones(len(rows))], codes, rcond=None)
    grid = np.c_[CENTRED, np.ones(360)] @ weights
    return (np.tanh(grid) if name == "mixed" else grid).astype(np.float32)


@pytest.mark.parametrize("name", ["identity", "rotated", "mixed", "duplicated", "dead_dim"])
def test_golden_scores_are_reproduced_seed_by_seed(name):
    published = json.loads((GOLDEN / "metrics.json").read_text())[name]["factor_vae"]
    counts = dict(num_variance=2_000, num_train=2_000, num_eval=1_000)
    codes = golden_codes(name)
    ours = [factor_vae_score(codes, SIZES, **counts, seed=seed)["eval_accuracy"] for seed in (0, 1, 2)]
    assert ours == published


@pytest.mark.parametrize("name", ["identity", "rotated", "mixed", "duplicated", "dead_dim"])
def test_golden_codes_are_rebuilt(name):
    arrays = np.load(GOLDEN / "metrics.npz")
    rows = np.ravel_multi_index(arrays[f"{name}:factors_test"].T.astype(int), SIZES)
    np.testing.assert_allclose(golden_codes(name)[rows], arrays[f"{name}:codes_test"], atol=1e-6)


def test_known_answers():
    rng = np.random.default_rng()
    constant = factor_vae_score(np.full((360, 3), 0.7), SIZES, **SMALL)
    assert constant == {"train_accuracy": 0.0, "eval_accuracy": 0.0, "num_active_dims": 0}
    identity = factor_vae_score(CENTRED, SIZES, **SMALL)
    assert identity == {"train_accuracy": 1.0, "eval_accuracy": 1.0, "num_active_dims": 4}
    twice = factor_vae_score(np.tile(CENTRED, 2), SIZES, **SMALL)
    assert twice == {"train_accuracy": 1.0, "eval_accuracy": 1.0, "num_active_dims": 8}
    dead = np.c_[CENTRED[:, :2], np.full(360, 0.3), CENTRED[:, 2:]]
    assert factor_vae_score(dead, SIZES, threshold=0.0, **SMALL)["num_active_dims"] == 4
    noise = factor_vae_score(rng.standard_normal((360, 5)), SIZES, **SMALL)
    assert noise["eval_accuracy"] < 0.6
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    assert factor_vae_score(CENTRED @ rotation, SIZES, **SMALL)["eval_accuracy"] < 1


def test_one_code_names_one_factor():
    """A code of factor 1 alone varies least in every vote, so the score is that factor's share of the votes."""
    score = factor_vae_score(CENTRED[:, 1:2], SIZES, num_train=400)["eval_accuracy"]
    assert 0.23 < score < 0.28  # chance, 1/4: the single dimension can stand for one factor only


@pytest.mark.parametrize("std, dims", [(0.049, 4), (0.051, 5)])
def test_pruning_threshold_is_on_the_standard_deviation(std, dims):
    extra = np.random.default_rng(1).standard_normal(360)
    extra *= std / extra.std()
    codes = np.c_[CENTRED, extra]
    assert factor_vae_score(codes, SIZES, **SMALL | {"num_variance": 100_000})["num_active_dims"] == dims


def test_function_of_factors_equals_grid_and_chunks_do_not_matter(monkeypatch):
    codes = np.random.default_rng().standard_normal((360, 5)).astype(np.float32)
    expected = factor_vae_score(codes, SIZES, **SMALL)
    monkeypatch.setattr(sampling, "BATCH_ROWS", 7 * 16)
    assert factor_vae_score(lambda f: codes[np.ravel_multi_index(f.T, SIZES)], SIZES, **SMALL) == expected


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(0, 2**32 - 1))
def test_invariant_to_permuted_and_rescaled_dimensions(data, seed):
    """Powers of two are exact in float; the smallest leaves every dimension above the pruning threshold."""
    dims = data.draw(st.integers(2, 7))
    order = data.draw(st.permutations(range(dims)))
    powers = data.draw(st.lists(st.integers(-1, 9), min_size=dims, max_size=dims))
    signs = data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=dims, max_size=dims))
    codes = np.tanh(CENTRED @ np.random.RandomState(seed).uniform(1, 3, (4, dims))).astype(np.float32)
    assert codes.std(axis=0).min() > 0.2
    moved = (codes * np.exp2(powers) * signs)[:, order]
    assert factor_vae_score(moved, SIZES, seed=seed, **SMALL) == factor_vae_score(codes, SIZES, seed=seed, **SMALL)


def with_nan():
    codes = CENTRED.copy()
    codes[5, 1] = np.nan
    return codes


@pytest.mark.parametrize(
    "codes, sizes, options, names",
    [
        (with_nan(), SIZES, {}, "codes"),
        (CENTRED[:-1], SIZES, {}, "codes"),
        (CENTRED[:, 0], SIZES, {}, "codes"),
        (CENTRED[:, :0], SIZES, {}, "codes"),
        (CENTRED.astype(str), SIZES, {}, "codes"),
        (CENTRED.astype(np.float64) * 1e300, SIZES, {}, "codes"),
        (lambda factors: CENTRED[:3], SIZES, {}, "codes"),
        (CENTRED, (6, 4, 15, 1), {}, "factor_sizes"),
        (CENTRED, (360,), {}, "factor_sizes"),
        (CENTRED, SIZES, {"num_train": 0}, "num_train"),
        (CENTRED, SIZES, {"batch_size": 1}, "batch_size"),
        (CENTRED, SIZES, {"num_variance": 2.5}, "num_variance"),
        (CENTRED, SIZES, {"threshold": float("nan")}, "threshold"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(codes, sizes, options, names):
    with pytest.raises(InputError, match=f"^{names}") as error:
        factor_vae_score(codes, sizes, **options)
    assert "\n" not in str(error.value)


def test_rows_need_no_grid_and_are_held_out():
    odd = GRID.sum(axis=1) % 2 == 1
    result = factor_vae_score_rows(CENTRED[odd], GRID[odd], CENTRED[~odd], GRID[~odd], **SMALL)
    assert result == {"train_accuracy": 1.0, "eval_accuracy": 1.0, "num_active_dims": 4}
    swapped = factor_vae_score_rows(CENTRED[odd], GRID[odd], CENTRED[~odd][:, ::-1], GRID[~odd], **SMALL)
    assert swapped["train_accuracy"] == 1 and swapped["eval_accuracy"] < 0.2
    codes = np.tanh(CENTRED @ np.random.RandomState(2).standard_normal((4, 5)))
    large = dict(num_train=3000, num_eval=3000)
    rows = factor_vae_score_rows(codes, GRID, codes, GRID, **large)["eval_accuracy"]
    assert rows == pytest.approx(factor_vae_score(codes, SIZES, **large)["eval_accuracy"], abs=0.05)


@pytest.mark.parametrize("codes, factors, message", BAD_ROWS, ids=BAD_IDS)
def test_bad_rows(codes, factors, message):
    with pytest.raises(InputError, match=message):
        factor_vae_score_rows(codes, factors, CENTRED, GRID)
