"""The training objective: regression losses, weights by signal-to-noise ratio."""

import torch

from encdiff.errors import InputError
from encdiff.ops.noise import check_prediction, compute_dtype

LOSSES = ("l1", "mse")


def diffusion_loss(
    prediction: torch.Tensor, target: torch.Tensor, kind: str = "l1", weight: torch.Tensor | None = None
) -> torch.Tensor:
    """mean over the batch of weight_b * mean |prediction_b - target_b| (`l1`) or its square (`mse`).

    prediction, target (B, ...) floating, one shape; weight (B,) or None for ones (not normalised).
    Returns a scalar, float32 (float64 for float64 predictions). Raises InputError for other shapes,
    an empty prediction or an unknown kind.
    """
    if kind not in LOSSES:
        raise InputError(f"loss kind is {kind!r}, must be one of {', '.join(LOSSES)}")
    if prediction.shape != target.shape:
        raise InputError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have one shape")
    if prediction.numel() == 0:
        raise InputError(f"prediction {tuple(prediction.shape)} is empty, its mean is not defined")
    if weight is not None and weight.shape != prediction.shape[:1]:
        raise InputError(f"weight {tuple(weight.shape)} must be ({len(prediction)},), one per sample of prediction")
    dtype = compute_dtype(prediction)
    difference = prediction.to(dtype) - target.to(dtype)
    error = difference.abs() if kind == "l1" else difference.square()
    return error.mean() if weight is None else (error.reshape(len(error), -1).mean(1) * weight.to(dtype)).mean()


def snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio alpha_bar / (1 - alpha_bar), any shape, in float64."""
    alpha_bar = alphas_cumprod.double()
    return alpha_bar / (1 - alpha_bar)


def min_snr_weight(snr: torch.Tensor, prediction: str, gamma: float = 5.0) -> torch.Tensor:
    """Min-SNR weights (arXiv 2303.09556) for the squared error of `prediction`, of snr's shape.

    min(snr, gamma) on x0 is min(snr, gamma) / snr on epsilon and min(snr, gamma) / (snr + 1) on v.
    Raises InputError for an unknown prediction or gamma <= 0.
    """
    check_prediction(prediction)
    if not gamma > 0:
        raise InputError(f"gamma is {gamma}, must be positive")
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)  # defined at snr 0 too
    weight = snr.clamp(max=gamma)
    return weight / (snr + 1) if prediction == "v" else weight


def p2_weight(snr: torch.Tensor, prediction: str, gamma: float = 1.0, k: float = 1.0) -> torch.Tensor:
    """P2 weights (arXiv 2204.00227, eq. 8) for the squared error of `prediction`, of snr's shape.

    1 / (k + snr)^gamma on epsilon, so snr times that on x0 and snr / (snr + 1) times that on v: the same error of x0
    weighs the same. Raises InputError for an unknown prediction, gamma < 0 or k <= 0.
    """
    check_prediction(prediction)
    if not (gamma >= 0 and k > 0):
        raise InputError(f"gamma, k are {gamma}, {k}, must be at least 0, positive")
    weight = (k + snr) ** -gamma
    return {"epsilon": weight, "x0": snr * weight, "v": snr / (snr + 1) * weight}[prediction]
