"""Noise schedules: betas, cumulative alphas, sampling timesteps; all in float64.

Our names are those most libraries use; the published EncDiff code (and latent-diffusion) says "linear" for what is
linear in sqrt(beta), so its names carry the prefix `ldm:`.
"""

import math
from collections.abc import Callable

import torch

from encdiff.errors import InputError

SCHEDULES = ("scaled_linear", "linear", "sqrt", "cosine", "sigmoid", "laplace")
SPACINGS = ("leading", "trailing", "linspace", "inner")
PUBLISHED = {"ldm:linear": "scaled_linear", "ldm:sqrt_linear": "linear", "ldm:sqrt": "sqrt", "ldm:cosine": "cosine"}


def make_betas(
    name: str, num_timesteps: int = 1000, beta_start: float = 0.0015, beta_end: float = 0.0155
) -> torch.Tensor:
    """The variances beta_t of the forward steps, t = 0 .. T-1.

    `name`: `scaled_linear` (linear in sqrt(beta); EncDiff's own), `linear`, `sqrt` (square root of `linear`), `cosine`
    (arXiv 2102.09672 eq. 17), `sigmoid` (between `beta_start` and `beta_end`), `laplace` (arXiv 2407.03297 in the form
    of diffusers), or a published name of `PUBLISHED`; `cosine` and `laplace` ignore `beta_start` and `beta_end`.
    Returns float64 (T,) on the CPU. Raises InputError for an unknown name, T < 1, and unless
    0 < beta_start <= beta_end < 1.
    """
    kind = PUBLISHED.get(name, name)
    if kind not in SCHEDULES:
        raise InputError(f"schedule is {name!r}, must be one of {', '.join((*SCHEDULES, *PUBLISHED))}")
    if num_timesteps < 1:
        raise InputError(f"num_timesteps is {num_timesteps}, must be at least 1")
    if kind in ("cosine", "laplace"):
        return _from_alpha_bar(_cosine if kind == "cosine" else _laplace, num_timesteps)
    if not 0 < beta_start <= beta_end < 1:
        raise InputError(f"beta_start, beta_end are {beta_start}, {beta_end}, must be 0 < beta_start <= beta_end < 1")
    if kind == "scaled_linear":
        return _linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps) ** 2
    if kind == "sigmoid":
        return torch.sigmoid(_linspace(-6, 6, num_timesteps)) * (beta_end - beta_start) + beta_start
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


def spaced_timesteps(steps: int, num_timesteps: int, spacing: str = "leading", offset: int = 0) -> torch.Tensor:
    """Timesteps to sample at, descending: float64 (steps,) (arXiv 2305.08891, table 2).

    - `leading`: i floor(T/steps) + offset, diffusers' default for DDIM with `offset` its `steps_offset`;
    - `trailing`: round(T - i T/steps) - 1, begins at T - 1: what a schedule of zero terminal SNR needs;
    - `linspace`: from T - 1 to 0, both included, not rounded: k-diffusion's, for Euler and Heun;
    - `inner`: steps + 1 such points, rounded, without 0: for DPM-Solver++ and UniPC, whose last step goes to the data.
      All T steps leave no room to be without 0.
    """
    if spacing not in SPACINGS:
        raise InputError(f"spacing is {spacing!r}, must be one of {', '.join(SPACINGS)}")
    if steps != int(steps) or not 1 <= steps <= num_timesteps:
        raise InputError(f"steps is {steps}, must be a whole number from 1 to {num_timesteps} (the schedule's length)")
    i, T = torch.arange(steps, dtype=torch.float64), num_timesteps
    if spacing == "leading":
        t = (i * (T // steps) + offset).flip(0)
    elif spacing == "trailing":
        t = (T - i * (T / steps)).round() - 1
    elif spacing == "linspace":
        t = _linspace(T - 1, 0, steps)
    else:
        t = i.flip(0) if steps == T else _linspace(0, T - 1, steps + 1).round().flip(0)[:-1]
    if not (t[-1] >= 0 and t[0] < T):
        raise InputError(f"offset is {offset}, takes timesteps past 0 to {T - 1}")
    return t


def zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Betas whose last alpha_bar is 0, the first one kept (arXiv 2305.08891, algorithm 1): (T,) -> float64 (T,).

    The last beta is 1. At alpha_bar 0 the noise says nothing of the data: predict v or x0, and space `trailing`.
    """
    root = alphas_cumprod(betas).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def flow_table(num_timesteps: int = 1000, shift: float = 1.0) -> torch.Tensor:
    """The factors of data and noise of a straight flow, x_t = (1 - s) x0 + s noise: float64 (T, 2), for `ops.q_sample`.

    s = (t + 1)/T, moved towards the noise by `shift` > 1: shift s / (1 + (shift - 1) s) (arXiv 2403.03206, eq. 23).
    """
    s = shifted((torch.arange(num_timesteps, dtype=torch.float64) + 1) / num_timesteps, shift)
    return torch.stack([1 - s, s], 1)


def shifted(s: torch.Tensor, shift: float) -> torch.Tensor:
    """SD3's shift of a flow's time towards the noise."""
    if not shift > 0:
        raise InputError(f"shift is {shift}, must be positive")
    return shift * s / (1 + (shift - 1) * s)


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> torch.Tensor:
    """EDM's noise levels (arXiv 2206.00364, eq. 5), descending: float64 (steps,)."""
    if not (steps >= 1 and 0 < sigma_min <= sigma_max and rho > 0):
        raise InputError(
            f"steps, sigma_min, sigma_max, rho are {steps}, {sigma_min}, {sigma_max}, {rho}; must be at least 1, "
            "0 < sigma_min <= sigma_max, positive"
        )
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _linspace(high, low, steps) ** rho


def _linspace(start: float, end: float, num: int) -> torch.Tensor:
    return torch.linspace(start, end, num, dtype=torch.float64)


def _from_alpha_bar(function: Callable[[torch.Tensor], torch.Tensor], num_timesteps: int) -> torch.Tensor:
    f = function(torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps)
    alpha_bar = f / f[0]
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, 0.999)


def _cosine(t: torch.Tensor, s: float = 0.008) -> torch.Tensor:
    return torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2


def _laplace(t: torch.Tensor) -> torch.Tensor:
    log_snr = -0.5 * torch.where(t <= 0.5, 1.0, -1.0) * (1 - 2 * (0.5 - t).abs() + 1e-6).log()
    return torch.sigmoid(log_snr).sqrt()
