import numpy as np
import pytest
from scipy.stats import norm

from encdiff.errors import InputError
from encdiff.fields.scores import (
    LEVELS,
    coverage,
    coverage_curve,
    crps,
    interval,
    nominal,
    nrmse,
    rank_histogram,
    rmse,
    score,
    spread,
    spread_to_error,
)  # fmt: skip

SHAPE = (3, 2, 16, 16)  # n, C, H, W


@pytest.fixture
def rng():
    return np.random.default_rng(np.random.randint(2**31))


def calibrated(rng, count, draw=None):
    """`count` members and a truth from one distribution, which differs from pixel to pixel."""
    draw = draw or rng.standard_normal
    scale, shift = rng.uniform(0.1, 10, SHAPE), rng.normal(0, 5, SHAPE)
    every = draw((SHAPE[0], count + 1, *SHAPE[1:])) * scale[:, None] + shift[:, None]
    return every[:, 1:], every[:, 0]


def test_nrmse_by_hand():
    truth = np.array([3.0, 4.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
    mean = truth + np.array([1.0, 1.0, 1.0, -1.0]).reshape(1, 1, 2, 2)
    assert nrmse(mean, truth) == pytest.approx(2 / 5)
    assert rmse(mean, truth) == pytest.approx(1)
    assert nrmse(mean, truth, truth > 3) == pytest.approx(1 / 4)
    assert np.isnan(nrmse(mean, truth, truth > 9)), "no pixels"
    assert np.isinf(nrmse(mean, truth, truth == 0)), "an error beside nothing"


def test_scores_of_each_field_and_channel_are_its_own(rng):
    members, truth = calibrated(rng, 5)
    observed = rng.random(SHAPE) < 0.2
    every = score(members, truth, observed)
    for n, c in np.ndindex(SHAPE[:2]):
        one = score(members[n : n + 1, :, c : c + 1], truth[n : n + 1, c : c + 1], observed[n : n + 1, c : c + 1])
        for whole, part in zip(every, one, strict=True):
            np.testing.assert_allclose(whole[n, c], part[0, 0], rtol=1e-12)
    assert (every.nrmse_unobserved != every.nrmse).all()


@pytest.mark.parametrize("count", [1, 2, 5, 24])
@pytest.mark.parametrize("fair", [False, True])
def test_crps_is_the_double_sum(rng, count, fair):
    if fair and count == 1:
        with pytest.raises(InputError, match="must be of at least 2"):
            crps(np.zeros((1, 1, 1, 2, 2)), np.zeros((1, 1, 2, 2)), fair=True)
        return
    members, truth = calibrated(rng, count)
    members[:, count // 2] = members[:, 0]  # ties
    pairs = np.abs(members[:, :, None] - members[:, None]).sum((1, 2)) / (2 * count * (count - fair))
    pixels = np.abs(members - truth[:, None]).mean(1) - pairs
    np.testing.assert_allclose(crps(members, truth, fair=fair), pixels.mean((2, 3)), rtol=1e-12)
    where = rng.random(SHAPE) < 0.5
    np.testing.assert_allclose(
        crps(members, truth, where, fair=fair), (pixels * where).sum((2, 3)) / where.sum((2, 3)), rtol=1e-12
    )


def test_crps_of_one_member_is_the_absolute_error(rng):
    members, truth = calibrated(rng, 1)
    np.testing.assert_allclose(crps(members, truth), np.abs(members[:, 0] - truth).mean((2, 3)), rtol=1e-14)


def test_crps_of_many_quantiles_is_the_gaussian_one():
    """Gneiting and Raftery 2007, eq. 22."""
    z = np.linspace(-4, 4, 64)
    exact = z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi)
    quantiles = np.tile(norm.ppf((np.arange(2000) + 0.5) / 2000), (64, 1))
    np.testing.assert_allclose(crps(quantiles[..., None, None, None], z.reshape(-1, 1, 1, 1))[:, 0], exact, atol=1e-4)


def test_crps_of_drawn_members(rng):
    """For members and truth of N(0, 1): (1 + 1/E) / sqrt(pi), and 1 / sqrt(pi) if fair; means of 30,000 pixels."""
    members, truth = rng.standard_normal((20, 4, 1, 40, 40)), rng.standard_normal((20, 1, 40, 40))
    for fair, expected in ((False, 1.25), (True, 1.0)):
        found = crps(members, truth, fair=fair)
        error = found.std(ddof=1) / np.sqrt(20)
        assert abs(found.mean() - expected / np.sqrt(np.pi)) < 5 * error
        assert error < 0.01


@pytest.mark.parametrize("count", [2, 4, 5, 25])
@pytest.mark.parametrize("draw", ["standard_normal", "standard_cauchy", "standard_exponential"])
def test_drawn_members_cover_the_nominal_share_of_any_distribution(rng, count, draw):
    members, truth = calibrated(rng, count, getattr(rng, draw))
    curve = coverage_curve(members, truth, (*LEVELS, 0.99)).mean((1, 2))
    for level, share in zip((*LEVELS, 0.99), curve, strict=True):
        expected = min(level, (count - 1) / (count + 1))
        assert nominal(level, count) == pytest.approx(expected)
        assert share == pytest.approx(expected, abs=5 * 0.5 / np.sqrt(truth.size))


@pytest.mark.parametrize("count", [2, 5, 25])
def test_quantiles_cover_the_nominal_share(rng, count):
    _, truth = calibrated(rng, 1)
    truth = rng.standard_normal(truth.shape)
    quantiles = norm.ppf((np.arange(count) + 0.5) / count).reshape(1, count, 1, 1, 1)
    members = np.broadcast_to(quantiles, (3, count, *SHAPE[1:]))
    for level in (0.3, 0.5, 0.9, 0.99):
        expected = min(level, 1 - 1 / count)
        assert nominal(level, count, drawn=False) == pytest.approx(expected)
        share = coverage(members, truth, level, drawn=False).mean()
        assert share == pytest.approx(expected, abs=5 * 0.5 / np.sqrt(truth.size))


def test_coverage_by_hand():
    """Of 25 members 1 .. 25 the 90 % band mixes [1, 25] and [2, 24], 0.7 to 0.3."""
    members = np.arange(1.0, 26).reshape(1, 25, 1, 1, 1)
    for truth, share in ((0.9, 0), (1, 0.7), (1.5, 0.7), (2, 1), (13.5, 1), (24, 1), (24.5, 0.7), (25.1, 0)):
        assert coverage(members, np.full((1, 1, 1, 1), truth)) == pytest.approx(share)


def test_all_members_equal_to_the_truth_cover_it():
    truth = np.ones((1, 1, 2, 2))
    assert coverage(np.ones((1, 7, 1, 2, 2)), truth) == 1
    np.testing.assert_allclose(rank_histogram(np.ones((1, 7, 1, 2, 2)), truth), 1 / 8)


def test_rank_histogram(rng):
    members, truth = calibrated(rng, 3)
    ranks = (members < truth[:, None]).sum(1)
    for c, shares in enumerate(rank_histogram(members, truth)):
        np.testing.assert_allclose(shares, np.bincount(ranks[:, c].ravel(), minlength=4) / ranks[:, c].size)
        np.testing.assert_allclose(shares, 0.25, atol=5 * 0.5 / np.sqrt(ranks[:, c].size))
    half = np.array([1.0, 2.0, 2.0]).reshape(1, 3, 1, 1, 1)  # the truth ties with two: rank 1, 2 or 3
    np.testing.assert_allclose(rank_histogram(half, np.full((1, 1, 1, 1), 2.0)), [[0, 1 / 3, 1 / 3, 1 / 3]])
    where = ranks > 1
    np.testing.assert_allclose(rank_histogram(members, truth, where)[:, :2], 0)


def test_spread_and_error_of_calibrated_members_agree(rng):
    members, truth = rng.standard_normal((40, 4, 1, 20, 20)), rng.standard_normal((40, 1, 20, 20))
    found = spread_to_error(spread(members), rmse(members.mean(1), truth), 4)
    assert found == pytest.approx(1, abs=0.04)  # 16,000 pixels: a standard error of 0.007
    np.testing.assert_allclose(spread(members)[0], members[0].std(0, ddof=1).__pow__(2).mean() ** 0.5)
    assert spread_to_error(spread(members), rmse(members.mean(1), truth), 4, drawn=False) == pytest.approx(
        found / np.sqrt(1.25)
    )


def test_one_member_has_no_spread_and_no_band(rng):
    members, truth = calibrated(rng, 1)
    assert np.isnan(spread(members)).all() and np.isnan(coverage(members, truth)).all()


def test_interval_covers_the_mean_as_often_as_it_says(rng):
    """95 % of 400 intervals from 40 fields: 380, sd 4.4; percentiles are a little narrow, some 93 %."""
    low, high = interval(rng.standard_normal((40, 400)))[1:]
    assert 350 < ((low <= 0) & (high >= 0)).sum() < 396
    values = rng.standard_normal((40, 3, 2))
    mean, low, high = interval(values, seed=1)
    np.testing.assert_allclose(mean, values.mean(0))
    half = 1.96 * values.std(0) / np.sqrt(40)
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.06)
    np.testing.assert_array_equal(interval(values, seed=1)[1], low)
    assert (interval(values, seed=2)[1] != low).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: crps(np.zeros((2, 3, 1, 4, 4)), np.zeros((2, 1, 4, 5))), "members .* must be"),
        (lambda: crps(np.zeros((2, 1, 4, 4)), np.zeros((2, 1, 4, 4))), "members .* must be"),
        (lambda: coverage(np.zeros((1, 2, 1, 2, 2)), np.zeros((1, 1, 2, 2)), 1.0), "level is 1.0"),
        (lambda: coverage(np.zeros((1, 0, 1, 2, 2)), np.zeros((1, 1, 2, 2))), "members .* must be"),
        (lambda: interval(np.zeros((0, 2))), "values holds no fields"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
