from pathlib import Path

import numpy as np
import pytest

from encdiff.errors import InputError
from encdiff.evaluation import protocol as module
from encdiff.evaluation.protocol import Protocol, score_grid, score_rows, settings_of, summarize
from encdiff.metrics import METRICS

GOLDEN = np.load(Path(__file__).parent / "golden/metrics.npz")
SIZES = (3, 4, 5)
FACTORS = np.stack(np.unravel_index(np.arange(60), SIZES), axis=1)
SMALL = dict(
    factor_vae_variance=300, factor_vae_train=200, factor_vae_eval=100, factor_vae_batch=32,
    beta_vae_train=200, beta_vae_eval=100, beta_vae_batch=32, dci_train=400, dci_test=200,
)  # fmt: skip


def spy(monkeypatch, name):
    """What the metric is given."""
    seen = {}

    def function(*rows, **options):
        seen.update(rows=rows, options=options)
        return {METRICS[name].headline: 0.5}

    monkeypatch.setitem(METRICS, name, module.replace(METRICS[name], function=function))
    return seen


def test_samples_follow_the_published_stream(monkeypatch):
    """The golden arrays are 1,000 training and then 500 test samples of RandomState(0)."""
    seen = spy(monkeypatch, "dci")
    sizes = (6, 4, 5, 3)
    codes = np.stack(np.unravel_index(np.arange(360), sizes), axis=1) * 1.0
    score_grid(codes, sizes, Protocol(dci_train=1_000, dci_test=500), ("dci",))
    train_codes, train, test_codes, test = seen["rows"]
    np.testing.assert_array_equal(train, GOLDEN["mixed:factors_train"])
    np.testing.assert_array_equal(test, GOLDEN["mixed:factors_test"])
    np.testing.assert_array_equal(train_codes, train)
    np.testing.assert_array_equal(test_codes, test)


def test_paper_protocol_gives_the_published_numbers_of_samples(monkeypatch):
    seen = spy(monkeypatch, "sap")
    given = {}
    monkeypatch.setattr(module, "factor_vae_score", lambda codes, sizes, **options: given.update(options) or {})
    score_grid(FACTORS * 1.0, SIZES, settings_of("paper", 7), ("factor_vae", "sap"))
    assert [len(rows) for rows in seen["rows"]] == [10_000, 10_000, 5_000, 5_000]
    assert given == dict(
        num_variance=10_000, num_train=10_000, num_eval=5_000, batch_size=64, threshold=0.05, seed=7
    )  # fmt: skip


def test_held_out_rows_are_four_fifths_and_the_rest(monkeypatch):
    seen = spy(monkeypatch, "sap")
    score_grid(FACTORS * 1.0, SIZES, settings_of("heldout", 1), ("sap",))
    train, _, test, factors = seen["rows"]
    assert (len(train), len(test)) == (48, 12)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test]), axis=0), np.sort(FACTORS, axis=0))
    np.testing.assert_array_equal(test, factors)
    score_grid(FACTORS * 1.0, SIZES, settings_of("heldout", 1, dci_train=20, dci_test=5), ("sap",))
    np.testing.assert_array_equal(seen["rows"][0], train[:20])
    assert len(seen["rows"][2]) == 5


@pytest.mark.parametrize("name", sorted(METRICS.keys() - {"tad"}))
def test_every_metric_runs_by_every_protocol(name):
    codes = FACTORS * [1.0, -1.0, 0.3] + 0.01 * np.random.default_rng(0).normal(size=(60, 3))
    options = {"n_jobs": 1}
    told = []
    by_grid = score_grid(
        codes, SIZES, settings_of("paper", **SMALL), (name,), report=lambda *t: told.append(t), **options
    )
    many = np.tile(codes, (4, 1)), np.tile(FACTORS, (4, 1))
    by_rows = score_rows(*many, settings_of("heldout", **SMALL), (name,), **options)
    for result in (by_grid, by_rows):
        if name == "unsupervised":  # 0 of independent codes
            assert 0 <= result[name]["total_correlation"] < 0.05
            continue
        assert result[name][METRICS[name].headline] > (0.3 if name in ("downstream", "sap") else 0.6)
    assert told[0] == (name, 0, 1) and told[-1][1] == told[-1][2]


def test_flatness_gets_every_row_of_a_grid_and_says_what_is_missing(rng):
    codes = rng.normal(size=(60, 3))
    whole = METRICS["flatness"](codes, FACTORS)
    assert score_grid(codes, SIZES, settings_of("quick"), ("flatness",))["flatness"] == whole
    assert score_grid(codes, SIZES, settings_of("heldout"), ("flatness",))["flatness"] == whole
    told = []
    with pytest.raises(InputError, match="hold 59 of 60 combinations"):
        metrics = ("mig", "flatness")
        score_rows(codes[1:], FACTORS[1:], settings_of("heldout"), metrics, report=lambda *t: told.append(t))
    assert told == [], "before anything is computed"


def test_attributes_are_scored_by_rows():
    rng = np.random.default_rng(0)
    attributes = rng.integers(2, size=(400, 3))
    codes = attributes + 0.1 * rng.normal(size=(400, 3))
    assert score_rows(codes, attributes, settings_of("heldout"), ("tad",))["tad"]["num_captured"] == 3


def test_a_summary_of_seeds():
    results = [{"dci": {"disentanglement": v}} for v in (0.5, 0.7, 0.9)]
    summary = summarize(results, ("dci",))["dci"]
    assert summary["mean"] == pytest.approx(0.7) and summary["std"] == pytest.approx(0.2)
    low, high = summary["interval"]
    assert 0.5 <= low < 0.7 < high <= 0.9
    assert summarize(results[:1], ("dci",))["dci"] == {"values": [0.5], "mean": 0.5, "std": None, "interval": None}
    assert summarize([*results, {"dci": {"disentanglement": None}}], ("dci",))["dci"]["mean"] is None


def test_the_name_says_whether_a_protocol_was_changed():
    assert module.named("paper", settings_of("paper", 3))["name"] == "paper"
    assert module.named("paper", settings_of("paper", dci_train=9))["name"] == "custom"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: settings_of("best"), "protocol is 'best'"),
        (lambda: settings_of("paper", votes=3), "votes is no field"),
        (lambda: settings_of("paper", subset="all"), "subset is no field"),
        (lambda: settings_of("paper", -1), "seed is -1"),
        (lambda: settings_of("paper", dci_train=0), "dci_train"),
        (lambda: score_grid(FACTORS * 1.0, (3, 4, 4), Protocol()), "there are 60 images"),
        (lambda: score_grid(FACTORS * 1.0, SIZES, Protocol(), ("luck",)), "metric is 'luck'; it must be one of"),
        (lambda: score_rows(FACTORS * np.nan, FACTORS, Protocol()), "codes holds NaN"),
        (lambda: score_rows(FACTORS[:5] * 1.0, FACTORS[:5], Protocol()), "factor 0 is constant"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
