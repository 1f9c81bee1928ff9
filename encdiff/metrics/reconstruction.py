"""How close reconstructions come: MSE, SSIM (Wang et al. 2004) and LPIPS (Zhang et al. 2018, arXiv 1801.03924)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from encdiff.errors import InputError
from encdiff.files.reading import refuse_special

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

SIGMA, RADIUS = 1.5, 5  # of SSIM's Gaussian window, 11 wide


def reconstruction(
    images: np.ndarray, reconstructions: np.ndarray, *, lpips: Distance | None = None, batch_size: int = 32
) -> dict:
    """Means over images of `mse`, `ssim` and, with the distance that `load_lpips` returns, `lpips`.

    images, reconstructions: uint8 (n, H, W, 3), n >= 1. MSE is of pixels in [0, 1]; SSIM at most 1, equal images; LPIPS
    at least 0. Without a distance `lpips` is None and `undefined` says so. Raises InputError for other arrays, and for
    images smaller than SSIM's window of 11.
    """
    _check(images, reconstructions)
    totals = np.zeros(3)
    for start in range(0, len(images), batch_size):
        x, y = (part[start : start + batch_size] for part in (images, reconstructions))
        a, b = x / 255, y / 255
        totals += ((a - b) ** 2).mean(axis=(1, 2, 3)).sum(), ssim(a, b).sum(), _lpips(lpips, x, y) if lpips else 0
    mse, similarity, distance = (totals / len(images)).tolist()
    scores = {"mse": mse, "ssim": similarity, "lpips": distance if lpips else None}
    return scores if lpips else scores | {"undefined": "lpips: no weights were given"}


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of images in [0, 1], float64 (n, H, W, C): (n,), mean over channels and whole windows.

    Gaussian window of deviation 1.5, K1 = 0.01, K2 = 0.03, variances of the population, as in the paper.
    """
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    var_a, var_b = _window_mean(a * a) - mean_a**2, _window_mean(b * b) - mean_b**2
    covariance = _window_mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.mean(axis=(1, 2, 3))


def _window_mean(x: np.ndarray) -> np.ndarray:
    blurred = gaussian_filter(x, (0, SIGMA, SIGMA, 0), radius=(0, RADIUS, RADIUS, 0))
    return blurred[:, RADIUS:-RADIUS, RADIUS:-RADIUS]


def load_lpips(vgg_weights: str | Path) -> torch.nn.Module:
    """The frozen LPIPS distance, (B,3,H,W) and (B,3,H,W) in [-1,1] to (B,1,1,1), on VGG16 weights read from disk.

    Raises:
        InputError: the optional package `lpips` is not usable, or the file is not torchvision's VGG16.
    """
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise InputError(f"lpips_weights: needs the package lpips (pip install lpips): {error}") from None
    if Path(vgg_weights).exists():
        refuse_special(vgg_weights)
    with torch.random.fork_rng(devices=[]):
        distance = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # pnet_rand: download nothing
    try:
        vgg = torch.load(vgg_weights, map_location="cpu", weights_only=True)
        trunk = distance.net.state_dict()  # "slice2.5.weight" here is "features.5.weight" in torchvision
        distance.net.load_state_dict({name: vgg["features." + name.split(".", 1)[1]] for name in trunk})
    except Exception as error:  # by kind of damage: OSError, UnpicklingError, KeyError, ...
        kind = type(error).__name__
        raise InputError(f"lpips_weights: {vgg_weights}; must be torchvision's vgg16-397923af.pth ({kind})") from error
    return distance.requires_grad_(False)


@torch.no_grad()
def _lpips(distance: Distance, x: np.ndarray, y: np.ndarray) -> float:
    a, b = (torch.from_numpy(part).permute(0, 3, 1, 2).float() / 127.5 - 1 for part in (x, y))
    return float(distance(a, b).sum())


def _check(images: np.ndarray, reconstructions: np.ndarray) -> None:
    for name, part in (("images", images), ("reconstructions", reconstructions)):
        if part.dtype != np.uint8 or part.ndim != 4 or part.shape[3] != 3 or len(part) < 1:
            raise InputError(f"{name} is {part.dtype} {part.shape}; it must be uint8 (n, H, W, 3), n >= 1")
    if images.shape != reconstructions.shape:
        raise InputError(f"reconstructions is {reconstructions.shape}; it must have the images' shape {images.shape}")
    if min(images.shape[1:3]) < 2 * RADIUS + 1:
        raise InputError(f"images are {images.shape[1:3]}; SSIM needs at least {2 * RADIUS + 1} pixels each way")
