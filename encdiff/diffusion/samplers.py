"""Samplers as plain functions: each fills a coefficient table for all its timesteps, then one short loop runs it.

Symbols: alpha_bar_t of DDPM (arXiv 2006.11239) throughout; DDIM (arXiv 2010.02502) writes it alpha_t. A table's row is
(c0 .. c4) of `ops.noise.step`: x0 = c0 x_t + c1 output; x_prev = c2 x0 + c3 x_t + c4 noise. c0 and c1 turn the model's
prediction into x0, so one loop serves epsilon, v and x0. Rows follow the timesteps in ascending order.
"""

from collections.abc import Callable

import torch

from encdiff.diffusion.schedules import ddim_timesteps, ddpm_timesteps
from encdiff.errors import InputError
from encdiff.ops.noise import check_prediction, compute_dtype, step

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Callback = Callable[[int, int, torch.Tensor, torch.Tensor], None]


def ddim(
    denoise: Denoise,
    x_T: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    *,
    steps: int = 50,
    eta: float = 0.0,
    prediction: str = "epsilon",
    clip: float | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    sample_ids: torch.Tensor | None = None,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Sample with DDIM (eq. 12) at the published timesteps; eta 0 is deterministic, eta 1 has DDPM's variance.

    `denoise(x_t (B, ...), t (B,) int64) -> output` of x_t's shape, the `prediction`: `epsilon`, `v` or `x0`.
    x_T (B, ...) floating, standard normal; alphas_cumprod (T,). `clip` bounds every x0 to [-clip, clip], and the noise
    direction follows from the bounded x0. `generator` draws the noise of eta > 0, on its own device; or a `seed` keys
    it: step i adds `ops.normal(x_T.shape, seed, sample_ids, i + 1)`, so a sample is the same in any batch, and draw 0
    is free for x_T.
    `callback(i, t, x_t, x0)` is called at step i = 0, 1, .. with x_t before the step and the x0 predicted from it.
    Returns x0 of x_T's shape, dtype and device; runs without gradients. As in the published code the last step goes to
    alpha_bar_0, not 1. Raises InputError for steps outside 1..T, eta out of range or an unknown prediction.
    """
    timesteps = ddim_timesteps(steps, len(alphas_cumprod))
    table = ddim_coefficients(alphas_cumprod, timesteps, eta, prediction)
    return _run(denoise, x_T, timesteps.flip(0), table.flip(0), clip, callback, generator, seed, sample_ids)


def ddim_invert(
    denoise: Denoise,
    x0: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    *,
    steps: int = 50,
    prediction: str = "epsilon",
    callback: Callback | None = None,
) -> torch.Tensor:
    """The x_T that `ddim` (eta 0, no clip) takes to x0, up to the discretisation; arguments as there.

    A step from alpha_bar_prev up to alpha_bar_t is the DDIM step with the two exchanged, its output taken at t.
    """
    timesteps = ddim_timesteps(steps, len(alphas_cumprod))
    sigma, alpha, alpha_prev = ddim_rows(alphas_cumprod, timesteps)
    table = _ddim_table(sigma, alpha_prev, alpha, prediction)
    return _run(denoise, x0, timesteps, table, None, callback)


def ddpm(
    denoise: Denoise,
    x_T: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    *,
    steps: int | None = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    sample_ids: torch.Tensor | None = None,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Ancestral sampling with DDPM (eqs. 6 and 7, the smaller variance); arguments and result as for `ddim`.

    `steps` None takes all T; fewer are spread evenly, beta taken between neighbours. The last step returns the mean.
    """
    num_timesteps = len(alphas_cumprod)
    timesteps = ddpm_timesteps(num_timesteps if steps is None else steps, num_timesteps)
    table = ddpm_coefficients(alphas_cumprod, timesteps, prediction)
    return _run(denoise, x_T, timesteps.flip(0), table.flip(0), clip, callback, generator, seed, sample_ids)


def ddim_rows(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, eta: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sigma, alpha_bar and the preceding alpha_bar of each step, float64 (steps,); before the first is alpha_bar_0."""
    alpha_bar = _float64(alphas_cumprod)
    alpha = alpha_bar[timesteps]
    alpha_prev = torch.cat([alpha_bar[:1], alpha[:-1]])
    sigma = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).sqrt()  # DDIM eq. 16
    if not ((sigma >= 0) & (sigma**2 <= 1 - alpha_prev)).all():
        raise InputError(f"eta is {eta}, must lie in 0 to 1, or so near that sigma^2 <= 1 - alpha_bar")
    return sigma, alpha, alpha_prev


def ddim_coefficients(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, eta: float = 0.0, prediction: str = "epsilon"
) -> torch.Tensor:
    """DDIM's table: alphas_cumprod (T,), ascending int64 timesteps (steps,) -> float64 (steps, 5) on the CPU."""
    return _ddim_table(*ddim_rows(alphas_cumprod, timesteps, eta), prediction)


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


@torch.no_grad()
def _run(
    denoise: Denoise,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    table: torch.Tensor,
    clip: float | None,
    callback: Callback | None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    sample_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    if generator is not None and seed is not None:
        raise InputError("generator and seed are both given, must be one of them: either draws the noise")
    dtype = compute_dtype(x)
    if not table.to(dtype).isfinite().all():
        raise InputError("alphas_cumprod comes too near 0 to turn this prediction into x0; predict v or x0 instead")
    only_x0 = torch.cat([table[:, :2], table.new_tensor([1, 0, 0]).expand(len(table), 3)], 1).to(x.device, dtype)
    noisy, times = (table[:, 4] > 0).tolist(), timesteps.tolist()
    table, timesteps = table.to(x.device, dtype), timesteps.to(x.device)
    for i, t in enumerate(times):
        output = denoise(x, timesteps[i].expand(len(x)))
        if callback is not None:
            callback(i, t, x, step(x, output, only_x0[i].expand(len(x), 5), clip=clip))
        row, key = table[i].expand(len(x), 5), {}
        if noisy[i] and seed is not None:
            key = {"seed": seed, "sample_ids": sample_ids, "draw": i + 1}
        noise = _randn_like(x, generator) if noisy[i] and seed is None else None
        x = step(x, output, row, noise, clip, **key)
    return x


def _randn_like(x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=compute_dtype(x)).to(x.device)
