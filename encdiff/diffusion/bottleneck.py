"""The time-varying information bottleneck of diffusion (EncDiff, arXiv 2402.09712, section 3.3, figure 2b)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from encdiff.diffusion.schedules import alphas_cumprod, make_betas
from encdiff.errors import InputError
from encdiff.files.temporaries import atomic_path

PAPER = ("ldm:cosine", "ldm:linear", "ldm:sqrt_linear", "ldm:sqrt")  # the schedules of its figure


def bottleneck(alphas_cumprod: torch.Tensor, data_variance: float = 1.0) -> torch.Tensor:
    """KL(q(x_{t-1} | x_t, x_0) || N(0, I)) in nats a dimension, its mean over x_0 and x_t, at t = 1 .. T - 1.

    The posterior of DDPM (arXiv 2006.11239, eqs. 6 and 7) is N(c_0 x_0 + c_t x_t, s^2) with
    s^2 = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t), so a dimension of mean zero and variance `data_variance` has
    KL = (s^2 + alpha_bar_{t-1} data_variance + c_t^2 (1 - alpha_bar_t) - 1 - log s^2) / 2.
    Times the latent's number of dimensions it is the capacity, in nats, that AnnealVAE (arXiv 1804.03599) would set at
    that step. t = 0 is left out: there s = 0.

    alphas_cumprod: (T,), T >= 2, falling, in (0, 1) but for a last 0. Returns float64 (T - 1,). Raises InputError.
    """
    alpha_bar = alphas_cumprod.to("cpu", torch.float64)
    inside = alpha_bar.ndim == 1 and len(alpha_bar) > 1 and alpha_bar[0] < 1 and alpha_bar[-1] >= 0
    if not inside or not (alpha_bar.diff() < 0).all():
        raise InputError(f"alphas_cumprod {tuple(alpha_bar.shape)} must be (T,), T >= 2, falling, in [0, 1)")
    if not data_variance > 0:
        raise InputError(f"data_variance is {data_variance}, must be positive")
    previous, current = alpha_bar[:-1], alpha_bar[1:]
    alpha = current / previous
    s2 = (1 - alpha) * (1 - previous) / (1 - current)
    c_t = alpha.sqrt() * (1 - previous) / (1 - current)
    return (s2 + previous * data_variance + c_t**2 * (1 - current) - 1 - s2.log()) / 2


def channel_capacity(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """What x_t can say of x_0, log(1 + SNR) / 2 nats a dimension: float64 (T,), falling.

    The mutual information of x_0 ~ N(0, 1) and x_t, of which no other x_0 of that variance has more (Shannon 1948). In
    the order of sampling it rises from nearly nothing, as AnnealVAE's capacity does over training. Of an image, whose
    dimensions depend on one another, the sum over dimensions is an upper bound, and a wide one.
    """
    return -(-alphas_cumprod.to("cpu", torch.float64)).log1p() / 2


def bottleneck_curves(
    schedules: Sequence[str] = PAPER, num_timesteps: int = 1000, **options: float
) -> dict[str, torch.Tensor]:
    """`bottleneck` of each schedule that `make_betas` knows by name, `options` its beta_start and beta_end."""
    return {name: bottleneck(alphas_cumprod(make_betas(name, num_timesteps, **options))) for name in schedules}


def plot_bottleneck(curves: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Save a PNG of named curves (T - 1,) over the timestep, from t = 1, on a logarithmic scale."""
    from matplotlib.figure import Figure

    if not curves:
        raise InputError("curves is empty, must hold at least one")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), curve.tolist(), label=name)
    axes.set_yscale("log")
    axes.set_xlabel("timestep")
    axes.set_ylabel("KL to the prior (nats a dimension)")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
