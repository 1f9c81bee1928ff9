"""Fast samplers for any noise path: Euler, Heun, DPM-Solver++(2M), UniPC.

A path is a list of levels x = a x0 + s e, from noise to data. Each sampler fills a list of stages, rows of coefficients
for `ops.noise.step`, and `loop.run` runs them: a new sampler is a table. Symbols: r = s'/s from a level to the next,
lambda = log(a/s), h = lambda' - lambda, phi = a' - r a, which is -a' expm1(-h) and holds where s' is 0 too.
"""

import math
from typing import NamedTuple, Unpack

import torch

from encdiff.diffusion.loop import Denoise, Options, Stage, run
from encdiff.diffusion.schedules import karras_sigmas, shifted
from encdiff.errors import InputError

PREDICTIONS = ("epsilon", "v", "x0", "flow")


class Path(NamedTuple):
    """n levels to call the model at, and the one the last step ends at: `time` has n numbers, `a` and `s` n + 1.

    `scale` is the factor k of the coordinates x / k in which the path is straight for Heun: a, or 1 for a flow.
    """

    time: list[float]
    a: list[float]
    s: list[float]
    scale: list[float]


def vp_path(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> Path:
    """The path of a DDPM schedule at descending `timesteps` (steps,), ending at the data.

    Between whole timesteps the ratio s/a is interpolated, as k-diffusion does.
    """
    t, last = timesteps.double().cpu(), len(alphas_cumprod) - 1
    if t.ndim != 1 or len(t) == 0 or not ((t >= 0) & (t <= last)).all() or not (t.diff() < 0).all():
        raise InputError(f"timesteps {tuple(t.shape)} must descend within 0 to {last}")
    return _vp(_ratio_at(alphas_cumprod, t), t)


def vp_levels(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The factors a of the data and s of the noise at any timesteps (B,), as `vp_path` has them: float64 (B, 2)."""
    t, last = timesteps.double().cpu(), len(alphas_cumprod) - 1
    if not ((t >= 0) & (t <= last)).all():
        raise InputError(f"timesteps span {t.min():g} to {t.max():g}, must lie in 0 to {last}")
    return torch.stack(_levels(_ratio_at(alphas_cumprod, t)), 1)


def vp_karras_path(alphas_cumprod: torch.Tensor, steps: int, rho: float = 7.0, whole: bool = True) -> Path:
    """As `vp_path`, at EDM's spacing of s/a between the schedule's ends; timesteps rounded, if `whole`."""
    ratio = _ratio(alphas_cumprod)
    levels = karras_sigmas(steps, ratio[0].item(), ratio[-1].item(), rho)
    log, log_levels = ratio.log(), levels.log()
    low = (torch.searchsorted(log, log_levels, right=True) - 1).clamp(0, len(log) - 2)
    weight = ((log_levels - log[low]) / (log[low + 1] - log[low])).clamp(0, 1)
    return _vp(levels, (low + weight).round() if whole else low + weight)


def edm_path(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Path:
    """EDM's path x = x0 + sigma e; time is sigma. Begin with x = sigma_max times noise (nearly)."""
    sigma = karras_sigmas(steps, sigma_min, sigma_max, rho).tolist()
    ones = [1.0] * (steps + 1)
    return Path(sigma, ones, [*sigma, 0.0], ones)


def flow_path(steps: int, num_timesteps: int = 1000, shift: float = 1.0) -> Path:
    """The straight path x = (1 - s) x0 + s e of `schedules.flow_table`; time is s T, as in SD3's pipeline."""
    if steps < 1:
        raise InputError(f"steps is {steps}, must be at least 1")
    least = shifted(torch.tensor(1 / num_timesteps, dtype=torch.float64), shift).item()
    s = shifted(torch.linspace(1, least, steps, dtype=torch.float64), shift)
    time = (s * num_timesteps).tolist()
    return Path(time, [*(1 - s).tolist(), 1.0], [*s.tolist(), 0.0], [1.0] * (steps + 1))


def euler(
    denoise: Denoise,
    x: torch.Tensor,
    path: Path,
    *,
    prediction: str = "epsilon",
    **options: Unpack[Options],
) -> torch.Tensor:
    """Euler in the coordinates x/a, which is DDIM with eta 0; for a flow, plain Euler.

    `denoise(x (B, ...), t (B,)) -> output` of x's shape; t is int64 if every time of the path is whole, else float32.
    x is at the path's first level; `prediction` is `epsilon`, `v`, `x0` or `flow`. Options: `clip`, `quantile`,
    `guidance` and `callback` as `loop.Options` says. Returns x0 of x's shape and dtype; runs without gradients.
    """
    return run(denoise, x, euler_stages(path, prediction), **options)


def euler_stages(path: Path, prediction: str) -> list[Stage]:
    """What `euler` runs."""
    to_x0 = _to_x0(path, prediction)
    return [Stage(t, (*to_x0[i], *_first_order(path, i), 0.0)) for i, t in enumerate(path.time)]


def heun(
    denoise: Denoise,
    x: torch.Tensor,
    path: Path,
    *,
    prediction: str = "epsilon",
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
    **options: Unpack[Options],
) -> torch.Tensor:
    """Heun's second order: two calls of the model per step, one at the last; arguments as `euler`.

    On `edm_path` with `prediction="x0"` it is EDM's algorithm 1, and with `churn` its stochastic algorithm 2: each step
    from a sigma in `churn_range` first adds noise up to sigma (1 + min(churn / steps, sqrt(2) - 1)), `churn_noise`
    times as much as that takes. `seed` and `sample_ids` key it.
    """
    return run(denoise, x, heun_stages(path, prediction, churn, churn_range, churn_noise), **options)


def heun_stages(
    path: Path,
    prediction: str,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
) -> list[Stage]:
    """What `heun` runs."""
    steps, k = len(path.time), path.scale
    if 0 in k:
        raise InputError("a level of the path is pure noise, without a slope for Heun; use another solver")
    sigma, a = ([level / scale for level, scale in zip(levels, k, strict=True)] for levels in (path.s, path.a))
    if any(abs(level - 1) > 1e-12 for level in a) and any(scale != 1 for scale in k):
        raise InputError("path.scale must be path.a or all ones")
    if churn and (any(level != 1 for level in path.a) or not churn > 0):
        raise InputError(f"churn is {churn}, must be positive, on a path x = x0 + s e, or 0")
    to_x0, stages, gamma = _to_x0(path, prediction), [], min(churn / steps, math.sqrt(2) - 1)
    for i, t in enumerate(path.time):
        s, first = sigma[i], to_x0[i]
        if gamma and churn_range[0] <= s <= churn_range[1]:
            t = s = sigma[i] * (1 + gamma)
            first = _to_x0_at(1.0, s, prediction)
            stages.append(Stage(None, (0.0, 0.0, 0.0, 1.0, churn_noise * math.sqrt(s * s - sigma[i] ** 2))))
        h = sigma[i + 1] - s
        # d = (x/k - x0)/sigma is the slope; a first Euler step, then the mean of the slopes at both ends
        stages.append(Stage(t, (*first, -h / s * k[i + 1], (1 + h / s) * k[i + 1] / k[i], 0.0)))
        if i + 1 < steps:
            begin, end = h / (2 * s), h / (2 * sigma[i + 1])
            past = ((1 + begin) * k[i + 1] / k[i], -begin * k[i + 1])
            stages.append(Stage(path.time[i + 1], (*to_x0[i + 1], -end * k[i + 1], end, 0.0, *past), ("x", "x0")))
    return stages


def dpm_solver_pp(
    denoise: Denoise,
    x: torch.Tensor,
    path: Path,
    *,
    prediction: str = "epsilon",
    **options: Unpack[Options],
) -> torch.Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), the last step of first order. Arguments as `euler`."""
    return run(denoise, x, dpm_solver_pp_stages(path, prediction), **options)


def dpm_solver_pp_stages(path: Path, prediction: str) -> list[Stage]:
    """What `dpm_solver_pp` runs."""
    to_x0, stages, n = _to_x0(path, prediction), [], len(path.time)
    for i, t in enumerate(path.time):
        phi, r = _first_order(path, i)
        if 0 < i < n - 1:
            half = phi * _step(path, i) / (2 * _step(path, i - 1))
            stages.append(Stage(t, (*to_x0[i], phi + half, r, 0.0, -half), ("x0",)))
        else:
            stages.append(Stage(t, (*to_x0[i], phi, r, 0.0)))
    return stages


def unipc(
    denoise: Denoise,
    x: torch.Tensor,
    path: Path,
    *,
    prediction: str = "epsilon",
    **options: Unpack[Options],
) -> torch.Tensor:
    """UniPC of order 2 in its B2 form (arXiv 2302.04867), predicting x0, its last step of order 1; as `euler`.

    From the second call on, a stage first corrects x with the new output, then another, without a call, predicts.
    """
    return run(denoise, x, unipc_stages(path, prediction), **options)


def unipc_stages(path: Path, prediction: str) -> list[Stage]:
    """What `unipc` runs."""
    to_x0, stages, n = _to_x0(path, prediction), [], len(path.time)
    for i, t in enumerate(path.time):
        phi, r = _first_order(path, i)
        half = phi * _step(path, i) / (2 * _step(path, i - 1)) if 0 < i < n - 1 else 0.0
        if i == 0:
            stages.append(Stage(t, (*to_x0[0], phi, r, 0.0)))
            continue
        stages.append(_unipc_corrector(path, i, t, to_x0[i]))
        past = ((-half,), ("older x0",)) if half else ((), ())
        stages.append(Stage(None, (0.0, 1.0, phi + half, r, 0.0, *past[0]), past[1]))
    return stages


def _unipc_corrector(path: Path, i: int, time: float, to_x0: tuple[float, float]) -> Stage:
    phi, r = _first_order(path, i - 1)
    if i == 1:
        return Stage(time, (*to_x0, phi / 2, 0.0, 0.0, r, phi / 2), ("x", "x0"))
    h = _step(path, i - 1)
    ratio = -_step(path, i - 2) / h  # of the level before the last, in steps of h
    phi_1 = math.expm1(-h)
    b1 = (phi_1 / -h - 1) / phi_1
    b2 = 2 * ((phi_1 / -h - 1) / -h - 0.5) / phi_1
    older = (b2 - b1) / (ratio - 1)  # from older + newer = b1, ratio older + newer = b2
    newer = b1 - older
    past = (r, phi * (1 - newer - older / ratio), phi * older / ratio)
    return Stage(time, (*to_x0, phi * newer, 0.0, 0.0, *past), ("x", "x0", "older x0"))


def _first_order(path: Path, i: int) -> tuple[float, float]:
    """phi and r from level i to the next: x' = phi x0 + r x."""
    r = path.s[i + 1] / path.s[i]
    return path.a[i + 1] - r * path.a[i], r


def _step(path: Path, i: int) -> float:
    """h from level i to the next; from pure noise it is infinite, and the solver's next step of first order."""
    if path.a[i] == 0:
        return math.inf
    return math.log(path.a[i + 1] / path.s[i + 1]) - math.log(path.a[i] / path.s[i])


def _to_x0(path: Path, prediction: str) -> list[tuple[float, float]]:
    """c0, c1 of each level, with x0 = c0 x + c1 output."""
    return [_to_x0_at(a, s, prediction) for a, s in list(zip(path.a, path.s, strict=True))[: len(path.time)]]


def _to_x0_at(a: float, s: float, prediction: str) -> tuple[float, float]:
    if prediction not in PREDICTIONS:
        raise InputError(f"prediction is {prediction!r}, must be one of {', '.join(PREDICTIONS)}")
    if prediction == "epsilon":
        if a == 0:
            raise InputError("a level of the path is pure noise; predict v, x0 or flow instead")
        return 1 / a, -s / a
    if prediction == "v":  # v = a e - s x0
        return a / (a * a + s * s), -s / (a * a + s * s)
    if prediction == "flow":  # e - x0
        return 1 / (a + s), -s / (a + s)
    return 0.0, 1.0


def _ratio(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """s/a of every timestep, float64 (T,) on the CPU."""
    alpha_bar = alphas_cumprod.double()
    return ((1 - alpha_bar) / alpha_bar).sqrt().cpu()


def _ratio_at(alphas_cumprod: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    ratio = _ratio(alphas_cumprod)
    below = t.floor().long()
    above = (below + 1).clamp(max=len(ratio) - 1)
    # at a whole timestep no neighbour counts: the last of a schedule with zero terminal SNR has an infinite ratio
    between = torch.lerp(ratio[below], ratio[above], t - below)
    return torch.where(t == below, ratio[below], between)


def _levels(ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a and s of their ratio."""
    a = (1 + ratio**2).rsqrt()
    return a, torch.where(ratio.isinf(), 1.0, ratio * a)


def _vp(ratio: torch.Tensor, timesteps: torch.Tensor) -> Path:
    a, s = _levels(ratio)
    return Path(timesteps.tolist(), [*a.tolist(), 1.0], [*s.tolist(), 0.0], [*a.tolist(), 1.0])
