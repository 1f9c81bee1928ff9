"""Sampling latents under concept tokens: the menu of samplers, the tokens folded once, the gate of cross-attention."""

from collections.abc import Callable

from torch import Tensor

from encdiff.diffusion import samplers, schedules, solvers
from encdiff.diffusion.loop import Options
from encdiff.errors import InputError
from encdiff.models.attention import begin_sampling
from encdiff.models.core import EncDiffCore

SOLVERS = {
    "dpm-solver++": solvers.dpm_solver_pp, "unipc": solvers.unipc, "euler": solvers.euler, "heun": solvers.heun,
}  # fmt: skip
SAMPLERS = (*SOLVERS, "ddim", "ddpm")


def sample_latents(
    model: EncDiffCore,
    tokens: Tensor,
    x_T: Tensor,
    *,
    sampler: str = "dpm-solver++",
    steps: int = 20,
    eta: float = 0.0,
    gate: int | None = None,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    token_bias: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents x0 (B, c, h, w) from noise x_T and tokens (B, N, d); see `EncDiff.sample` for the options."""
    if sampler not in SAMPLERS:
        raise InputError(f"sampler is {sampler!r}, must be one of {', '.join(SAMPLERS)}")
    if eta and sampler != "ddim":
        raise InputError(f"eta is {eta}, must be 0 for sampler {sampler!r}: it belongs to 'ddim'")
    calls = 2 * steps - 1 if sampler == "heun" else steps
    if gate is not None and not 1 <= gate <= calls:
        raise InputError(f"gate is {gate}, must lie in 1 to {calls}, the evaluations of the U-Net")
    done, sampling = 0, begin_sampling(tokens, model.unet.attending)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        nonlocal done
        done += 1
        sampling.gate = "compute" if gate is None or done < gate else "keep" if done == gate else "reuse"
        output = model.denoise(x_t, t, tokens, token_bias, sampling=sampling)
        output = output.to(x_t.dtype)  # x stays exact, and `step` is one kernel
        if progress:
            progress(done, calls)
        return output

    config, alpha_bar = model.config, model.schedule
    kind, key = config.prediction, Options(seed=seed, sample_ids=sample_ids)
    if sampler == "ddim":
        return samplers.ddim(denoise, x_T, alpha_bar, steps=steps, eta=eta, prediction=kind, **key)
    if sampler == "ddpm":
        return samplers.ddpm(denoise, x_T, alpha_bar, steps=steps, prediction=kind, **key)
    spacing = "linspace" if sampler in ("euler", "heun") else "inner"
    path = solvers.vp_path(alpha_bar, schedules.spaced_timesteps(steps, config.num_timesteps, spacing))
    return SOLVERS[sampler](denoise, x_T, path, prediction=kind)
