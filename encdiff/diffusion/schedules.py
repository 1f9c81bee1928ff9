"""Noise schedules: betas, cumulative alphas, sampling timesteps; all in float64.

Our names are those most libraries use; the published EncDiff code (and latent-diffusion) says "linear" for what is
linear in sqrt(beta), so its names carry the prefix `ldm:`.
"""

import math

import torch

from encdiff.errors import InputError

SCHEDULES = ("scaled_linear", "linear", "sqrt", "cosine")
PUBLISHED = {"ldm:linear": "scaled_linear", "ldm:sqrt_linear": "linear", "ldm:sqrt": "sqrt", "ldm:cosine": "cosine"}


def make_betas(
    name: str, num_timesteps: int = 1000, beta_start: float = 0.0015, beta_end: float = 0.0155
) -> torch.Tensor:
    """The variances beta_t of the forward steps, t = 0 .. T-1.

    `name`: `scaled_linear` (linear in sqrt(beta); EncDiff's own), `linear`, `sqrt` (square root of `linear`), `cosine`
    (arXiv 2102.09672 eq. 17, which ignores `beta_start` and `beta_end`), or a published name of `PUBLISHED`.
    Returns float64 (T,) on the CPU. Raises InputError for an unknown name, T < 1, and unless
    0 < beta_start <= beta_end < 1.
    """
    kind = PUBLISHED.get(name, name)
    if kind not in SCHEDULES:
        raise InputError(f"schedule is {name!r}, must be one of {', '.join((*SCHEDULES, *PUBLISHED))}")
    if num_timesteps < 1:
        raise InputError(f"num_timesteps is {num_timesteps}, must be at least 1")
    if kind == "cosine":
        return _cosine(num_timesteps)
    if not 0 < beta_start <= beta_end < 1:
        raise InputError(f"beta_start, beta_end are {beta_start}, {beta_end}, must be 0 < beta_start <= beta_end < 1")
    if kind == "scaled_linear":
        return _linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps) ** 2
    betas = _linspace(beta_start, beta_end, num_timesteps)
    return betas.sqrt() if kind == "sqrt" else betas


def alphas_cumprod(betas: torch.Tensor) -> torch.Tensor:
    """alpha_bar_t = prod_{s<=t} (1 - beta_s): betas (T,) -> float64 (T,). Raises InputError unless 0 < beta <= 1."""
    if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
        raise InputError(f"betas of shape {tuple(betas.shape)} must be one-dimensional, every one in (0, 1]")
    return torch.cumprod(1 - betas.double(), 0)


def ddpm_timesteps(steps: int, num_timesteps: int) -> torch.Tensor:
    """Evenly spaced timesteps from 0 up: int64 (steps,), ascending. Raises InputError unless 1 <= steps <= T."""
    if steps != int(steps) or not 1 <= steps <= num_timesteps:
        raise InputError(f"steps is {steps}, must be a whole number from 1 to {num_timesteps} (the schedule's length)")
    return torch.arange(int(steps)) * num_timesteps // int(steps)


def ddim_timesteps(steps: int, num_timesteps: int) -> torch.Tensor:
    """The published DDIM timesteps 1 + i T/steps: int64 (steps,), ascending. Raises InputError unless 1 <= steps <= T.

    Where `steps` does not divide T the published code takes another number of steps and can run past T - 1; this keeps
    the number and spreads it over the whole schedule. All T steps leave no room for the offset and begin at 0.
    """
    return ddpm_timesteps(steps, num_timesteps) + (steps < num_timesteps)


def _linspace(start: float, end: float, num: int) -> torch.Tensor:
    return torch.linspace(start, end, num, dtype=torch.float64)


def _cosine(num_timesteps: int, s: float = 0.008) -> torch.Tensor:
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    alpha_bar = f / f[0]
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, 0.999)
