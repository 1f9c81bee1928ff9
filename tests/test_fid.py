import sys
import types

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from encdiff.errors import InputError
from encdiff.metrics.fid import INCEPTION, fid, frechet_distance, inception_features


def standard(n, d, seed):
    """(n, d) with mean exactly 0 and covariance exactly the identity."""
    z = np.random.RandomState(seed).standard_normal((n, d))
    z -= z.mean(axis=0)
    return z @ np.linalg.inv(np.linalg.cholesky(np.cov(z, rowvar=False))).T


def test_frechet_distance_of_known_gaussians():
    a, b = standard(100, 4, 0), standard(70, 4, 1)
    assert frechet_distance(a, b) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b + np.array([3, 0, 4, 0])) == pytest.approx(25)
    assert frechet_distance(a, b * [1, 2, 3, 1]) == pytest.approx(0 + 1 + 4 + 0)  # sum of (1 - s)^2
    assert frechet_distance(a[:, :1], a[:, :1] * 2) == pytest.approx(1)


def test_frechet_distance_by_the_matrix_root():
    rng = np.random.default_rng()
    a, b = rng.standard_normal((50, 5)) @ rng.standard_normal((5, 5)), rng.standard_normal((60, 5)) + 1
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * np.real(sqrtm(s @ t)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a[:4], a[:4]) == pytest.approx(0, abs=1e-6), "fewer rows than features"


def test_fid_takes_batches():
    images = np.random.default_rng().integers(0, 256, (12, 4, 4, 3), np.uint8)
    features = lambda batch: batch.mean(axis=(1, 2))  # noqa: E731
    whole = fid([images[:6]], [images[6:]], features)
    assert whole == pytest.approx(frechet_distance(features(images[:6]), features(images[6:])))
    assert fid([images[:2], images[2:6]], iter([images[6:7], images[7:]]), features) == pytest.approx(whole)
    with pytest.raises(InputError, match="^images holds .*uint8"):
        fid([images / 255], [images], features)
    with pytest.raises(InputError, match="^reference holds 1 images"):
        fid([images], [images[:1]], features)
    with pytest.raises(InputError, match=r"^features reach 1e\+200; they must lie within"):
        frechet_distance(np.eye(3) * 1e200, np.eye(3))
    with pytest.raises(InputError, match="^features b are"):
        frechet_distance(np.zeros((3, 2)), np.zeros((3, 4)))


@pytest.fixture
def package(monkeypatch):
    """A stand-in for torch-fidelity: its features are the mean colours times its one weight."""
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")

    class FeatureExtractorInceptionV3(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path):
            super().__init__()
            assert features_list == ["2048"]
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            return (x.float().mean(dim=(2, 3)) * self.weight,)

    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_inception_reads_weights_from_disk(package, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / INCEPTION
    path.parent.mkdir(parents=True)
    torch.save({"weight": torch.tensor(2.0)}, path)
    images = np.full((2, 5, 5, 3), 30, np.uint8)
    for features in (inception_features(), inception_features(path)):
        np.testing.assert_array_equal(features(images), np.full((2, 3), 60.0))


class Malice:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize(
    "content", [{"other": torch.zeros(1)}, {"weight": Malice()}, "text"], ids=["names", "code", "text"]
)
def test_other_files_are_refused_unrun(package, tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(InputError, match=f"^FID weights: .*weights.pth must be torch-fidelity's {INCEPTION}") as error:
        inception_features(path)
    assert "\n" not in str(error.value)


def test_what_is_absent_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match=f"^FID weights: no file .*{INCEPTION}"):
        inception_features()
    (tmp_path / "weights.pth").touch()
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match="pip install torch-fidelity") as error:
        inception_features(tmp_path / "weights.pth")
    assert "\n" not in str(error.value)
