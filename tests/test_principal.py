import numpy as np
import pytest
from sklearn.decomposition import PCA

from encdiff import InputError
from encdiff.metrics.principal import first_components


def project(codes: np.ndarray) -> np.ndarray:
    mean, axis = first_components(codes)
    return ((codes - mean) * axis).sum(-1)


def test_the_same_as_scikit_learn_but_for_the_sign():
    codes = np.random.randn(50, 4, 6) * np.random.rand(4, 6) + np.random.randn(4, 6)
    for concept, ours in enumerate(project(codes).T):
        theirs = PCA(1).fit_transform(codes[:, concept])[:, 0]
        np.testing.assert_allclose(ours, theirs * np.sign(theirs @ ours), atol=1e-9)


def test_a_factor_hidden_in_a_direction_is_found():
    factor, direction = np.random.randn(200), np.array([-3.0, 4.0])
    codes = np.stack([factor[:, None] * direction, np.zeros((200, 2))], axis=1).astype(np.float32) + 7
    found = project(codes)
    np.testing.assert_allclose(found[:, 0], 5 * (factor - factor.mean()), atol=1e-4)  # 4 is greatest: positive
    np.testing.assert_allclose(found[:, 1], 0, atol=1e-6)
    assert first_components(codes)[1].dtype == np.float64


@pytest.mark.parametrize("codes", [np.zeros((3, 2)), np.zeros((1, 2, 2)), np.full((3, 2, 2), np.nan)])
def test_bad_input(codes):
    with pytest.raises(InputError, match=r"codes are \(.*\), must be \(n, N, m\)"):
        first_components(codes)


def test_codes_too_large_to_be_squared():
    with pytest.raises(InputError, match=r"codes reach 1e\+200; they must lie within"):
        first_components(np.full((3, 2, 2), 1e200))
