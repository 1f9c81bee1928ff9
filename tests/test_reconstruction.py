import sys

import numpy as np
import pytest
import torch

from encdiff.errors import InputError
from encdiff.metrics.reconstruction import load_lpips, reconstruction, ssim

IMAGES = np.random.RandomState(0).randint(0, 256, (5, 14, 12, 3)).astype(np.uint8)


def test_equal_images():
    result = reconstruction(IMAGES, IMAGES)
    assert result["mse"] == 0 and result["ssim"] == pytest.approx(1)
    assert result["lpips"] is None and result["undefined"] == "lpips: no weights were given"


def test_flat_images_by_hand():
    """Without structure SSIM compares means alone: (2ab + c1) / (a^2 + b^2 + c1)."""
    a, b = np.full((1, 12, 12, 3), 51, np.uint8), np.full((1, 12, 12, 3), 102, np.uint8)
    result = reconstruction(a, b)
    assert result["mse"] == pytest.approx(0.2**2)
    assert result["ssim"] == pytest.approx((2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4))


def test_ssim_window_by_window():
    rng = np.random.default_rng()
    a, b = rng.random((1, 13, 12, 1)), rng.random((1, 13, 12, 1))
    g = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g) / np.outer(g, g).sum()
    scores = []
    for i in range(3):
        for j in range(2):
            x, y = a[0, i : i + 11, j : j + 11, 0], b[0, i : i + 11, j : j + 11, 0]
            mx, my = (w * x).sum(), (w * y).sum()
            vx, vy, c = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
            scores.append((2 * mx * my + 1e-4) * (2 * c + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(a, b)[0] == pytest.approx(np.mean(scores), abs=1e-12)


def test_means_do_not_depend_on_batches_and_lpips_sees_minus_one_to_one():
    other = np.random.default_rng().integers(0, 256, IMAGES.shape, np.uint8)

    def distance(x, y):
        assert x.shape[1:] == (3, 14, 12) and x.dtype == torch.float32 and -1 <= x.min() and x.max() <= 1
        return (x - y).abs().mean(dim=(1, 2, 3), keepdim=True)

    one = reconstruction(IMAGES, other, lpips=distance, batch_size=2)
    assert one == pytest.approx(reconstruction(IMAGES, other, lpips=distance))
    assert one["mse"] == pytest.approx(np.mean((IMAGES / 255 - other / 255) ** 2))
    assert one["lpips"] == pytest.approx(np.abs(IMAGES / 127.5 - other / 127.5).mean(), rel=1e-5)
    assert one["ssim"] < 0.3 and "undefined" not in one


@pytest.mark.parametrize(
    "images, others, message",
    [
        (IMAGES / 255, IMAGES, "^images is float64"),
        (IMAGES, IMAGES[:3], "^reconstructions is .*shape"),
        (IMAGES[:0], IMAGES[:0], "^images is .*n >= 1"),
        (IMAGES[..., :1], IMAGES, "^images is"),
        (IMAGES[:, :10], IMAGES[:, :10], "^images are .*SSIM needs at least 11"),
    ],
    ids=["floats", "shape", "empty", "grey", "small"],
)
def test_bad_input(images, others, message):
    with pytest.raises(InputError, match=message):
        reconstruction(images, others)


def test_lpips_absent(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(InputError, match="pip install lpips") as error:
        load_lpips(tmp_path / "vgg16.pth")
    assert "\n" not in str(error.value)
