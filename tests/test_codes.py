"""What metrics make of codes that are constant but for rounding, far from 0, or near the ends of the doubles."""

import numpy as np
import pytest
from _codes import GRID, IDENTITY, golden

from encdiff.errors import InputError
from encdiff.metrics import METRICS, dci, dci_quick, downstream, mig
from encdiff.metrics.codes import check_codes, for_trees, settle

NOISE = np.random.RandomState(1).standard_normal((360, 4)) * 0.05
CODES = IDENTITY[:, :4] + NOISE
BINARY = (GRID > np.median(GRID, axis=0)).astype(int)
QUICK = {
    "factor_vae": dict(num_variance=500, num_train=200, num_eval=100, batch_size=16),
    "beta_vae": dict(num_train=200, num_eval=100, batch_size=16),
    "dci_quick": dict(n_jobs=1, rounds=3),
    "dci": dict(n_jobs=1),
    "downstream": dict(n_jobs=1),
}
SHIFTED = sorted(set(METRICS) - {"dci", "downstream", "explicitness", "sap"})  # whose models have no penalty
EACH = sorted(set(METRICS) - {"dci"})  # dci_quick is the same with fewer rounds


def scored(name, codes):
    factors = BINARY if name == "tad" else GRID
    return METRICS[name](codes, factors, **QUICK.get(name, {}))[METRICS[name].headline]


def spread(codes, scale):
    """Codes of which the first column has the scale."""
    return codes * np.r_[scale, np.ones(codes.shape[1] - 1)]


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("scale", [1e300, 1.7e308, 1e-300, 1e-320, 2.0**600, 1e30])
def test_extreme_columns_give_finite_scores(name, scale):
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        value = scored(name, spread(CODES, scale)) and scored(name, CODES * scale)
    assert value is not None and 0 <= value <= 2  # TAD's highest, of four attributes


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("constant", [0.3, 1e17, 1e308, 1e-308])
def test_a_column_that_is_constant_but_for_rounding_counts_as_a_constant_one(name, constant):
    wobble = np.where(np.arange(360) % 7 == 0, np.nextafter(constant, np.inf), constant)
    almost, whole = (np.c_[CODES, column] for column in (wobble, np.full(360, constant)))
    assert scored(name, almost) == pytest.approx(scored(name, whole), abs=1e-12)


def test_the_sum_of_a_tenth_and_two():
    column = np.where(np.arange(360) % 2, 0.3, 0.1 + 0.2)
    assert mig(np.c_[CODES, column], GRID)["mutual_information"][4].max() == 0
    assert METRICS["modularity"](np.c_[CODES, column], GRID)["per_code"][4] == 0


@pytest.mark.parametrize("name", SHIFTED)
def test_a_shift_costs_nothing(name):
    codes = np.round(CODES * 2**20) / 2**20  # so that adding 2^27 is exact
    assert scored(name, codes + 2.0**27) == pytest.approx(scored(name, codes), abs=0.02)


def seen_by_trees(change) -> tuple[dict, float]:
    """What trees say of changed codes: scores by their importances, and how well they predict."""
    codes, factors = change(CODES[:, [0, 2]]), GRID[:, [0, 2]]
    rows = codes[::2], factors[::2], codes[1::2], factors[1::2]
    few = dict(predictor="boosted_trees", sizes=(180,), n_jobs=1)
    return dci(*rows, n_jobs=1), downstream(*rows, **few)["accuracy_full"]


def test_trees_see_small_and_shifted_codes():
    plain, accuracy = seen_by_trees(lambda c: c)
    assert plain["disentanglement"] > 0.5
    for change in (lambda c: c * 1e-6, lambda c: spread(c, 1e-8), lambda c: c + 1e8, lambda c: c * 1e6):
        other, moved = seen_by_trees(change)
        np.testing.assert_allclose(other["importance"], plain["importance"], atol=0.02)
        assert moved == pytest.approx(accuracy, abs=0.05)


def test_golden_codes_reach_the_trees_as_they_are():
    for name in ("identity", "rotated", "mixed", "duplicated", "dead_dim"):
        codes = golden(name)[0][0].astype(np.float64)
        (scaled,) = for_trees(codes)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log2(scaled / codes)
        assert np.array_equal(settle(codes)[0], codes)
        assert np.isin(ratio[np.isfinite(ratio)], range(-20, 40)).all(), "by powers of two alone"


def test_what_is_settled():
    column = np.linspace(0, 1, 5)[:, None]
    train, test = settle(1e9 + column, 1e9 + column / 2)
    np.testing.assert_allclose(train - test, column / 2, atol=1e-6)
    assert settle(column * 1e-310)[0].max() >= 2.0**-101 and settle(column * 1e308)[0].max() <= 2.0**100
    assert settle(column)[0] is column
    single = np.float32([[0.1], [np.nextafter(np.float32(0.1), np.float32(1))]])
    assert np.ptp(check_codes("codes", single, 2)) == 0 and np.ptp(check_codes("codes", np.float64(single), 2)) > 0
    assert (
        len(for_trees(column, column * 1e300)) == 2
        and np.isfinite(np.float32(for_trees(column, column * 1e300)[1])).all()
    )


def test_booleans_are_factors_for_every_metric():
    for function in (mig, lambda c, f: dci_quick(c, f, c, f, n_jobs=1, rounds=1)):
        function(CODES, BINARY.astype(bool))
    with pytest.raises(InputError, match="factors is uint64"):
        mig(CODES, BINARY.astype(np.uint64) + np.uint64(2**63))
