import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdiff.errors import InputError
from encdiff.metrics import completeness, dci, dci_quick, disentanglement

GOLDEN = Path(__file__).parent / "golden"
ARRAYS = ("codes_train", "factors_train", "codes_test", "factors_test")
SIZES = (3, 2, 4)
# Unseeded ties among trees leave more than rounding: four deviations over 40 seeds (mixed), spread of 8 seeds (others).
SPREAD = {"rotated": 0.0015, "mixed": 0.005, "duplicated": 0.02}


def sample(encode, n=120, seed=None):
    factors = np.random.default_rng(seed).integers(0, SIZES, (n, 3))
    codes = np.asarray(encode(factors / np.array(SIZES) - 0.5), np.float32)
    return codes[: 2 * n // 3], factors[: 2 * n // 3], codes[2 * n // 3 :], factors[2 * n // 3 :]


@pytest.mark.parametrize("name", ["identity", "rotated", "mixed", "duplicated", "dead_dim"])
def test_golden_scores(name):
    published = json.loads((GOLDEN / "metrics.json").read_text())[name]["dci"]
    arrays = np.load(GOLDEN / "metrics.npz")
    ours = dci(*(arrays[f"{name}:{part}"] for part in ARRAYS), n_jobs=1)
    for score, repeats in published.items():
        slack = 1e-9 if score.startswith("informativeness") else SPREAD.get(name, 1e-9)
        assert min(repeats) - slack <= ours[score] <= max(repeats) + slack, score


def test_scores_of_known_importances():
    assert disentanglement(np.eye(4)) == pytest.approx(1, abs=1e-8)
    assert completeness(np.eye(4)) == pytest.approx(1, abs=1e-8)
    for flat in (np.ones((5, 3)), np.zeros((5, 3))):
        assert disentanglement(flat) == pytest.approx(0, abs=1e-8)
        assert completeness(flat) == pytest.approx(0, abs=1e-8)
    one_code_for_all = np.array([[1.0, 1.0], [0, 0], [0, 0], [0, 0]])
    assert disentanglement(one_code_for_all) == pytest.approx(0, abs=1e-8)
    assert completeness(one_code_for_all) == pytest.approx(1, abs=1e-8)
    two_codes_each = np.array([[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]])
    assert disentanglement(two_codes_each) == pytest.approx(1, abs=1e-8)
    assert completeness(two_codes_each) == pytest.approx(0.5, abs=1e-8)  # 1 - log 2 / log 4
    weighted = np.array([[0.75, 0.25], [0.25, 0.0]])  # shares 0.8 and 0.2; entropy of (3/4, 1/4) is 0.811278 bits
    assert disentanglement(weighted) == pytest.approx(0.8 * (1 - 0.8112781) + 0.2, abs=1e-6)


def test_identity_constant_and_dead_codes():
    identity = dci(*sample(lambda z: z), n_jobs=1)
    assert min(identity["disentanglement"], identity["completeness"], identity["informativeness_test"]) > 0.999
    np.testing.assert_allclose(identity["importance"], np.eye(3), atol=1e-6)
    constant = dci(*sample(lambda z: np.full((len(z), 4), 0.3)), n_jobs=1)
    assert max(constant["disentanglement"], constant["completeness"]) < 1e-8
    assert constant["informativeness_test"] < 0.7
    dead = dci(*sample(lambda z: np.c_[z[:, :1], np.zeros(len(z)), z[:, 1:]]), n_jobs=1)
    assert min(dead["disentanglement"], dead["completeness"]) > 0.999
    assert dead["importance"][1].max() == 0


def test_rotated_codes_are_entangled_and_seeded():
    parts = sample(lambda z: z @ np.linalg.qr(np.random.default_rng(5).standard_normal((3, 3)))[0], seed=6)
    first, again = dci(*parts, n_jobs=1, seed=3), dci(*parts, n_jobs=1, seed=3)
    assert first["disentanglement"] < 0.7
    np.testing.assert_array_equal(first["importance"], again["importance"])


def test_processes_do_not_change_the_result_and_progress_is_told():
    parts, told = sample(lambda z: z @ np.ones((3, 4)) + z[:, :1] ** 2), []
    parallel = dci(*parts, n_jobs=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    np.testing.assert_array_equal(parallel["importance"], dci(*parts, n_jobs=1)["importance"])


CODES, FACTORS, CODES_TEST, FACTORS_TEST = sample(lambda z: z, seed=0)
NAN = np.where(np.arange(3) == 1, np.nan, CODES)


@pytest.mark.parametrize(
    "parts, names",
    [
        ((NAN, FACTORS, CODES_TEST, FACTORS_TEST), "codes_train"),
        ((CODES, FACTORS, CODES_TEST[:-1], FACTORS_TEST), "codes_test"),
        ((CODES, FACTORS, CODES_TEST[:, :2], FACTORS_TEST), "test"),
        ((CODES, FACTORS, CODES_TEST, FACTORS_TEST[:, :2]), "test"),
        ((CODES[:, :1], FACTORS, CODES_TEST, FACTORS_TEST), "codes_train"),
        ((CODES, FACTORS[:, 0], CODES_TEST, FACTORS_TEST), "factors_train"),
        ((CODES, FACTORS[:, :1], CODES_TEST, FACTORS_TEST), "factors_train"),
        ((CODES, FACTORS + 0.5, CODES_TEST, FACTORS_TEST), "factors_train"),
        ((CODES, FACTORS * [1, 0, 1], CODES_TEST, FACTORS_TEST), "factors_train: factor 1 is constant"),
        ((CODES, FACTORS, CODES_TEST[:0], FACTORS_TEST[:0]), "factors_test"),
    ],
)
def test_bad_input(parts, names):
    with pytest.raises(InputError, match=f"^{names}") as error:
        dci(*parts, n_jobs=1)
    assert "\n" not in str(error.value)


def test_bad_n_jobs():
    with pytest.raises(InputError, match="^n_jobs"):
        dci(CODES, FACTORS, CODES_TEST, FACTORS_TEST, n_jobs=0)


@settings(max_examples=2)
@given(st.permutations(range(4)), st.lists(st.integers(-3, 9), min_size=4, max_size=4))
def test_invariant_to_permuted_and_rescaled_dimensions(order, powers):
    """Scale by powers of two to the bit; an order of the dimensions breaks ties among trees otherwise."""
    x, y, x_test, y_test = sample(lambda z: z @ np.random.RandomState(2).uniform(-1, 1, (3, 4)), n=90, seed=1)
    plain = dci(x, y, x_test, y_test, n_jobs=1)
    scaled = dci(x * np.exp2(powers), y, x_test * np.exp2(powers), y_test, n_jobs=1)
    np.testing.assert_array_equal(scaled["importance"], plain["importance"])
    moved = dci(x[:, order], y, x_test[:, order], y_test, n_jobs=1)
    assert moved["disentanglement"] == pytest.approx(plain["disentanglement"], abs=0.02)
    np.testing.assert_allclose(moved["importance"], plain["importance"][order], atol=0.1)


def test_quick_is_near_and_never_mistaken_for_the_exact_one():
    arrays = np.load(GOLDEN / "metrics.npz")
    told = []
    for name in ("identity", "mixed"):
        parts = [arrays[f"{name}:{part}"] for part in ARRAYS]
        quick = dci_quick(*parts, n_jobs=1, progress=lambda done, total: told.append(done))
        exact = json.loads((GOLDEN / "metrics.json").read_text())[name]["dci"]
        assert not quick.keys() & {"disentanglement", "completeness", "importance", *exact}
        assert quick["quick_disentanglement"] == pytest.approx(exact["disentanglement"][0], abs=0.15)
    assert told == [1, 2, 3, 4] * 2
    fewer = dci_quick(*parts, rows=300, n_jobs=1)
    np.testing.assert_array_equal(
        fewer["quick_importance"], dci_quick(parts[0][:300], parts[1][:300], *parts[2:], n_jobs=1)["quick_importance"]
    )


def test_fewer_samples_than_classes():
    factors = np.c_[FACTORS[:20], np.arange(20)]
    with pytest.raises(InputError, match="^factors_train: factor 3 has 20 values in 20 samples"):
        dci(CODES[:20], factors, CODES[:20], factors)
