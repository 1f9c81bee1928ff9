import numpy as np
import pytest
from _codes import BAD_IDS, BAD_ROWS, CONSTANT, DEAD, DUPLICATED, GRID, IDENTITY, NAMES, ROTATED, SIZES, golden, moved
from hypothesis import given, settings
from hypothesis import strategies as st
from test_factor_vae import golden_codes

from encdiff.errors import InputError
from encdiff.metrics import beta_vae_score
from encdiff.metrics.beta_vae import beta_vae_score_rows

SMALL = dict(num_train=300, num_eval=200, batch_size=16)


@pytest.mark.parametrize("name", NAMES)
def test_golden_scores_are_reproduced(name):
    score = beta_vae_score(golden_codes(name), SIZES, num_train=1_000, num_eval=500)["eval_accuracy"]
    assert [score] == golden(name)[1]["beta_vae"]


def test_known_answers():
    for codes in (IDENTITY, DUPLICATED, DEAD):
        assert beta_vae_score(codes, SIZES, **SMALL)["eval_accuracy"] == 1
    assert beta_vae_score(CONSTANT, SIZES, **SMALL)["eval_accuracy"] == pytest.approx(1 / 4, abs=0.08)  # chance
    assert beta_vae_score(IDENTITY[:, :1], SIZES, **SMALL)["eval_accuracy"] < 0.7
    assert 0.4 < beta_vae_score(ROTATED, SIZES, **SMALL)["eval_accuracy"] < 1


def test_rows_need_no_grid_and_are_held_out():
    odd = GRID.sum(axis=1) % 2 == 1
    result = beta_vae_score_rows(IDENTITY[odd], GRID[odd], IDENTITY[~odd], GRID[~odd], **SMALL)
    assert result == {"train_accuracy": 1.0, "eval_accuracy": 1.0}
    broken = beta_vae_score_rows(IDENTITY[odd], GRID[odd], IDENTITY[~odd][:, ::-1], GRID[~odd], **SMALL)
    assert broken["train_accuracy"] == 1 and broken["eval_accuracy"] < 0.2, "another assignment of codes"
    grid = beta_vae_score(ROTATED, SIZES, num_train=2000, num_eval=2000)["eval_accuracy"]
    rows = beta_vae_score_rows(ROTATED, GRID, ROTATED, GRID, num_train=2000, num_eval=2000)["eval_accuracy"]
    assert rows == pytest.approx(grid, abs=0.05)


@settings(max_examples=5)
@given(moved(dims=4, powers=st.just(0), signs=True))
def test_invariant_to_permuted_and_mirrored_dimensions(move):
    """Not to scale: the regression's penalty is on slopes. Rounding of the regression may turn a rare point."""
    one, other = (beta_vae_score(codes, SIZES, **SMALL)["eval_accuracy"] for codes in (ROTATED, move(ROTATED)))
    assert one == pytest.approx(other, abs=0.011)


@pytest.mark.parametrize("codes, factors, message", BAD_ROWS, ids=BAD_IDS)
def test_bad_rows(codes, factors, message):
    with pytest.raises(InputError, match=message):
        beta_vae_score_rows(codes, factors, IDENTITY, GRID, **SMALL)


@pytest.mark.parametrize(
    "codes, sizes, options, message",
    [
        (IDENTITY[:-1], SIZES, {}, "^codes"),
        (IDENTITY * np.nan, SIZES, {}, "^codes"),
        (lambda factors: IDENTITY[:3], SIZES, {}, "^codes"),
        (IDENTITY, (360,), {}, "^factor_sizes"),
        (IDENTITY, SIZES, {"num_train": 1}, "^num_train is 1; so few"),
        (IDENTITY, SIZES, {"batch_size": 0}, "^batch_size"),
    ],
    ids=["length", "nan", "function", "one factor", "one point", "empty batch"],
)
def test_bad_grid(codes, sizes, options, message):
    with pytest.raises(InputError, match=message):
        beta_vae_score(codes, sizes, **options)
