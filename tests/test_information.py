import numpy as np
import pytest
from sklearn.metrics import mutual_info_score, roc_auc_score

from encdiff.metrics import information
from encdiff.metrics.information import auroc, discretize, entropy, mutual_information


def test_bins_are_those_of_numpy():
    rng = np.random.default_rng()
    edges = np.linspace(-0.3, 0.9, 21)  # values on the edges themselves, where arithmetic alone goes astray
    codes = np.c_[np.r_[rng.normal(0, 3, 400), np.repeat(1.7, 21)], np.r_[rng.choice(edges, 400), edges]]
    for bins in (20, 7):
        expected = [np.digitize(code, np.histogram(code, bins)[1][:-1]) - 1 for code in codes.T]
        np.testing.assert_array_equal(discretize(codes, bins), np.transpose(expected))


def test_blocks_do_not_matter(monkeypatch):
    codes = np.random.default_rng().standard_normal((100, 3))
    expected = discretize(codes)
    monkeypatch.setattr(information, "BLOCK", 7)
    np.testing.assert_array_equal(discretize(codes), expected)


def test_constant_codes_fill_one_bin():
    assert len(np.unique(discretize(np.full((9, 1), -2.5)))) == 1


@pytest.mark.parametrize("sizes", [(2, 3), (5, 1, 4, 7), (70, 80, 90, 2)], ids=str)
def test_mutual_information_is_that_of_scikit_learn(sizes):
    """The last sizes are too many to count together."""
    rng = np.random.default_rng()
    b = np.stack([rng.integers(0, size, 3000) for size in sizes], axis=1)
    a = np.c_[b[:, 0], rng.integers(0, 20, 3000), b[:, -1] % 2 + b[:, 0]]
    expected = [[mutual_info_score(i, j) for j in b.T] for i in a.T]
    np.testing.assert_allclose(mutual_information(a, b), expected, atol=1e-12)
    np.testing.assert_allclose(entropy(b), [mutual_info_score(j, j) for j in b.T], atol=1e-12)


def test_auroc_is_that_of_scikit_learn():
    rng = np.random.default_rng()
    scores = np.c_[rng.integers(0, 4, 200), rng.standard_normal(200)].astype(float)
    positive = np.c_[rng.random(200) < 0.1, rng.random(200) < 0.7, scores[:, 0] > 1]
    expected = [[roc_auc_score(p, s) for p in positive.T] for s in scores.T]
    np.testing.assert_allclose(auroc(scores, positive), expected, atol=1e-12)
