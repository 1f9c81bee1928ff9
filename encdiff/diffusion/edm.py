"""Training and preconditioning of EDM (arXiv 2206.00364, table 1): x = x0 + sigma e, and a network of unit variances.

Sampling is `solvers.heun(edm_denoiser(network), x, solvers.edm_path(steps), prediction="x0")`.
"""

from collections.abc import Callable

import torch

from encdiff.diffusion.losses import diffusion_loss
from encdiff.errors import InputError
from encdiff.ops.noise import q_sample
from encdiff.ops.philox import normal

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # as `loop.Denoise`, but never a pair


def edm_sigmas(
    seed: int, sample_ids: torch.Tensor, draw: int | torch.Tensor = 0, *, mean: float = -1.2, std: float = 1.2
) -> torch.Tensor:
    """A training noise level per sample, log(sigma) normal with P_mean and P_std: float32 (B,).

    Keyed as `ops.timesteps`, whose place it takes, so it is independent of the noise of the same draw.
    """
    if not std > 0:
        raise InputError(f"std is {std}, must be positive")
    return (mean + std * normal((len(sample_ids), 1), seed, sample_ids, draw, stream=1)[:, 0]).exp()


def edm_preconditioning(
    sigma: torch.Tensor, sigma_data: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """c_skip, c_out, c_in and c_noise of D(x) = c_skip x + c_out F(c_in x, c_noise), each of sigma's shape."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data * total.rsqrt(), total.rsqrt(), sigma.log() / 4


def edm_weight(sigma: torch.Tensor, sigma_data: float = 0.5) -> torch.Tensor:
    """The weight of |D - x0|^2, 1 / c_out^2: at initialisation every noise level counts the same."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def edm_denoiser(network: Network, sigma_data: float = 0.5) -> Network:
    """D(x (B, ...), sigma (B,)) -> x0 of x's shape, from F = network(c_in x, c_noise (B,)); sigma > 0."""

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        c_skip, c_out, c_in, c_noise = edm_preconditioning(sigma, sigma_data)
        c_skip, c_out, c_in = (c.view(-1, *[1] * (x.ndim - 1)) for c in (c_skip, c_out, c_in))
        return c_skip * x + c_out * network(c_in * x, c_noise)

    return denoise


def edm_loss(
    network: Network,
    x0: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor | None = None,
    *,
    sigma_data: float = 0.5,
    seed: int | None = None,
    sample_ids: torch.Tensor | None = None,
    draw: int | torch.Tensor = 0,
) -> torch.Tensor:
    """mean of edm_weight(sigma) |D(x0 + sigma noise, sigma) - x0|^2 (eq. 2), a scalar.

    x0 (B, ...) floating, its values of standard deviation `sigma_data`; sigma (B,) as from `edm_sigmas`; noise of x0's
    shape, or keyed as in `ops.q_sample`. Raises InputError as that does.
    """
    levels = torch.stack([torch.ones_like(sigma), sigma], 1)
    each = torch.arange(len(sigma), device=sigma.device)
    x, _ = q_sample(x0, noise, each, levels, "x0", seed=seed, sample_ids=sample_ids, draw=draw)
    guess = edm_denoiser(network, sigma_data)(x, sigma)
    return diffusion_loss(guess, x0, "mse", edm_weight(sigma, sigma_data))
