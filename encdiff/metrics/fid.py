"""FID, the Frechet Inception distance (Heusel et al. 2017, arXiv 1706.08500)."""

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from encdiff.errors import InputError

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity publishes it, converted from TensorFlow

LARGEST = 2.0**250  # of a feature: its fourth power is a double
Features = Callable[[np.ndarray], np.ndarray]


def fid(images: Iterable[np.ndarray], reference: Iterable[np.ndarray], features: Features) -> float:
    """Squared Frechet distance of two image collections' features, fitted by Gaussians: 0 is equal, no upper bound.

    images, reference: batches uint8 (b, H, W, 3), at least two images each; 10,000 images in the published protocol,
    and scores of other numbers do not compare. features: `inception_features()`, or any uint8 (b, H, W, 3) ->
    floats (b, d). Raises InputError for other batches and too few images.
    """
    return frechet_distance(*(_all_features(name, batches, features) for name, batches in
                              (("images", images), ("reference", reference))))  # fmt: skip


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features (n, d) and (m, d), in float64."""
    for name, part in (("a", a), ("b", b)):
        if part.ndim != 2 or len(part) < 2 or not np.isfinite(part).all() or part.shape[1] != np.shape(a)[1]:
            raise InputError(f"features {name} are {part.shape}; they must be finite (n, d), n >= 2, one d for both")
    a, b = a.astype(np.float64), b.astype(np.float64)
    if (most := max(abs(a).max(), abs(b).max())) > LARGEST:
        raise InputError(f"features reach {most:.3g}; they must lie within {LARGEST:.3g}, to be squared")
    cov_a, cov_b = (np.atleast_2d(np.cov(part, rowvar=False)) for part in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    # S_a S_b has the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is symmetric
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    distance = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0))


def inception_features(weights: str | Path | None = None, device: str | torch.device = "cpu") -> Features:
    """The 2048 features of torch-fidelity's Inception v3, the network of the published scores, on weights from disk.

    weights: the file, by default `weights-inception-2015-12-05-6726825d.pth` in torch's hub folder
    (`$TORCH_HOME/hub/checkpoints`); nothing is downloaded, and no code in the file is run. Raises InputError when the
    package or the file is missing, or the file holds something else.
    """
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION)
    if not path.is_file():
        raise InputError(f"FID weights: no file {path}; it must be torch-fidelity's {INCEPTION}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise InputError(f"FID needs the package torch-fidelity (pip install torch-fidelity): {error}") from None
    buffer = io.BytesIO()  # the package unpickles what it is given, so it is given tensors read safely
    try:
        torch.save(torch.load(path, map_location="cpu", weights_only=True), buffer)
        buffer.seek(0)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=buffer)
    except Exception as error:  # by kind of damage: UnpicklingError, RuntimeError, TypeError, ...
        raise InputError(f"FID weights: {path} must be torch-fidelity's {INCEPTION} ({type(error).__name__})") from None
    network = network.to(device)

    @torch.no_grad()
    def features(images: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(images).permute(0, 3, 1, 2).to(device))[0].cpu().numpy()

    return features


def _all_features(name: str, batches: Iterable[np.ndarray], features: Features) -> np.ndarray:
    parts = []
    for batch in batches:
        if not isinstance(batch, np.ndarray) or batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[3] != 3:
            raise InputError(f"{name} holds {getattr(batch, 'shape', type(batch))}; batches must be uint8 (b, H, W, 3)")
        parts.append(features(batch))
    if sum(map(len, parts)) < 2:
        raise InputError(f"{name} holds {sum(map(len, parts))} images; a distribution needs at least two")
    return np.concatenate(parts)
