"""DDPM and DDIM as plain functions: each fills a coefficient table for all its timesteps, then `loop.run` runs it.

Symbols: alpha_bar_t of DDPM (arXiv 2006.11239) throughout; DDIM (arXiv 2010.02502) writes it alpha_t. A table's row is
(c0 .. c4) of `ops.noise.step`: x0 = c0 x_t + c1 output; x_prev = c2 x0 + c3 x_t + c4 noise. c0 and c1 turn the model's
prediction into x0, so one loop serves epsilon, v and x0. Rows follow the timesteps in ascending order.
"""

from typing import Unpack

import torch

from encdiff.diffusion.loop import Denoise, Options, Stage, run
from encdiff.diffusion.schedules import ddim_timesteps, ddpm_timesteps
from encdiff.errors import InputError
from encdiff.ops.noise import check_prediction


def ddim(
    denoise: Denoise,
    x_T: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    *,
    steps: int = 50,
    eta: float = 0.0,
    prediction: str = "epsilon",
    **options: Unpack[Options],
) -> torch.Tensor:
    """Sample with DDIM (eq. 12) at the published timesteps; eta 0 is deterministic, eta 1 has DDPM's variance.

    `denoise(x_t (B, ...), t (B,) int64) -> output` of x_t's shape, the `prediction`: `epsilon`, `v` or `x0`.
    x_T (B, ...) floating, standard normal; alphas_cumprod (T,). Options: `clip` (the noise direction follows from the
    bounded x0), `quantile`, `guidance`, `seed`, `sample_ids` and `callback` as `loop.Options` says.
    Returns x0 of x_T's shape, dtype and device; runs without gradients. As in the published code the last step goes to
    alpha_bar_0, not 1. Raises InputError for steps outside 1..T, eta out of range or an unknown prediction.
    """
    timesteps = ddim_timesteps(steps, len(alphas_cumprod))
    return run(denoise, x_T, ddim_stages(alphas_cumprod, timesteps, eta, prediction), **options)


def ddim_invert(
    denoise: Denoise,
    x0: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    *,
    steps: int = 50,
    prediction: str = "epsilon",
    **options: Unpack[Options],
) -> torch.Tensor:
    """The x_T that `ddim` (eta 0, no clip) takes to x0, up to the discretisation; arguments as there.

    A step from alpha_bar_prev up to alpha_bar_t is the DDIM step with the two exchanged, its output taken at t.
    """
    timesteps = ddim_timesteps(steps, len(alphas_cumprod))
    sigma, alpha, alpha_prev = ddim_rows(alphas_cumprod, timesteps)
    return run(denoise, x0, _stages(timesteps, _ddim_table(sigma, alpha_prev, alpha, prediction)), **options)


def ddpm(
    denoise: Denoise,
    x_T: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    *,
    steps: int | None = None,
    prediction: str = "epsilon",
    **options: Unpack[Options],
) -> torch.Tensor:
    """Ancestral sampling with DDPM (eqs. 6 and 7, the smaller variance); arguments and result as for `ddim`.

    `steps` None takes all T; fewer are spread evenly, beta taken between neighbours. The last step returns the mean.
    """
    num_timesteps = len(alphas_cumprod)
    timesteps = ddpm_timesteps(num_timesteps if steps is None else steps, num_timesteps)
    return run(denoise, x_T, ddpm_stages(alphas_cumprod, timesteps, prediction), **options)


def ddim_stages(
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    eta: float = 0.0,
    prediction: str = "epsilon",
    final: float | None = None,
) -> list[Stage]:
    """What `ddim` runs at ascending int64 timesteps (steps,); `final` is the alpha_bar it ends at, None alpha_bar_0."""
    table = ddim_coefficients(alphas_cumprod, timesteps, eta, prediction, final)
    return _stages(timesteps.flip(0), table.flip(0))


def keep_direction(stages: list[Stage], alphas_cumprod: torch.Tensor) -> list[Stage]:
    """`ddim_stages`, but the noise direction is that of the model's output where x0 is bounded, as in diffusers."""
    kept, alpha_bar = [], _float64(alphas_cumprod)
    for time, (c0, c1, c2, c3, c4), _ in stages:
        signal = c3 * alpha_bar[int(time or 0)].sqrt().item()  # c2 x0 has it subtracted; here c0 x_t + c1 output is x0
        kept.append(Stage(time, (c0, c1, c2 + signal, c3 - signal * c0, c4, -signal * c1), ("output",)))
    return kept


def ddpm_stages(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, prediction: str = "epsilon") -> list[Stage]:
    """What `ddpm` runs at ascending int64 timesteps (steps,)."""
    return _stages(timesteps.flip(0), ddpm_coefficients(alphas_cumprod, timesteps, prediction).flip(0))


def _stages(timesteps: torch.Tensor, table: torch.Tensor) -> list[Stage]:
    return [Stage(t, tuple(row)) for t, row in zip(timesteps.tolist(), table.tolist(), strict=True)]


def flow_invert(
    denoise: Denoise, x0: torch.Tensor, num_timesteps: int, *, steps: int = 50, **options: Unpack[Options]
) -> torch.Tensor:
    """The x_T that Euler's steps along a flow take to x0, up to the discretisation: x' = x + (s' - s) v, at v of s'.

    `denoise` predicts flow; its times are those of `schedules.flow_table`. Raises InputError for steps outside 1..T.
    """
    if not isinstance(steps, int) or not 1 <= steps <= num_timesteps:
        raise InputError(f"steps is {steps}, must be a whole number from 1 to {num_timesteps} (the schedule's length)")
    levels = [i / steps for i in range(steps + 1)]
    stages = [Stage(s * num_timesteps - 1, (0.0, 1.0, 1 / steps, 1.0, 0.0)) for s in levels[1:]]
    return run(denoise, x0, stages, **options)


def ddim_rows(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, eta: float = 0.0, final: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sigma, alpha_bar and the preceding alpha_bar of each step, float64 (steps,); before the first is alpha_bar_0.

    Or `final`, where it is given.
    """
    alpha_bar = _float64(alphas_cumprod)
    alpha = alpha_bar[timesteps]
    alpha_prev = torch.cat([alpha_bar[:1] if final is None else alpha.new_tensor([final]), alpha[:-1]])
    sigma = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).sqrt()  # DDIM eq. 16
    if not ((sigma >= 0) & (sigma**2 <= 1 - alpha_prev)).all():
        raise InputError(f"eta is {eta}, must lie in 0 to 1, or so near that sigma^2 <= 1 - alpha_bar")
    return sigma, alpha, alpha_prev


def ddim_coefficients(
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    eta: float = 0.0,
    prediction: str = "epsilon",
    final: float | None = None,
) -> torch.Tensor:
    """DDIM's table: alphas_cumprod (T,), ascending int64 timesteps (steps,) -> float64 (steps, 5) on the CPU."""
    return _ddim_table(*ddim_rows(alphas_cumprod, timesteps, eta, final), prediction)


def ddpm_coefficients(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, prediction: str = "epsilon"
) -> torch.Tensor:
    """DDPM's table: alphas_cumprod (T,), ascending int64 timesteps (steps,) -> float64 (steps, 5) on the CPU."""
    alpha_bar = _float64(alphas_cumprod)[timesteps]
    alpha_bar_prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    c2 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)  # eq. 7, mean
    c3 = alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta  # eq. 7
    return torch.stack([*_to_x0(alpha_bar, prediction), c2, c3, variance.sqrt()], 1)


def _ddim_table(sigma: torch.Tensor, alpha: torch.Tensor, alpha_prev: torch.Tensor, prediction: str) -> torch.Tensor:
    # eq. 12: x_prev = sqrt(alpha_prev) x0 + sqrt(1 - alpha_prev - sigma^2) e + sigma noise
    #         with e = (x_t - sqrt(alpha) x0) / sqrt(1 - alpha)
    c3 = ((1 - alpha_prev - sigma**2) / (1 - alpha)).sqrt()
    c2 = alpha_prev.sqrt() - c3 * alpha.sqrt()
    return torch.stack([*_to_x0(alpha, prediction), c2, c3, sigma], 1)


def _to_x0(alpha_bar: torch.Tensor, prediction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """c0, c1 with x0 = c0 x_t + c1 output."""
    check_prediction(prediction)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction == "epsilon":
        return 1 / signal, -sigma / signal
    if prediction == "v":
        return signal, -sigma
    return torch.zeros_like(signal), torch.ones_like(signal)


def _float64(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    alpha_bar = alphas_cumprod.to("cpu", torch.float64)
    if alpha_bar.ndim != 1 or not ((alpha_bar >= 0) & (alpha_bar < 1)).all():
        raise InputError(f"alphas_cumprod {tuple(alpha_bar.shape)} must be one-dimensional, every one in [0, 1)")
    return alpha_bar
