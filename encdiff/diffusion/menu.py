"""The samplers by name on a DDPM schedule: where each calls its model, and the stages that `loop` takes."""

import torch

from encdiff.diffusion import samplers, schedules, solvers
from encdiff.diffusion.loop import Stage
from encdiff.errors import InputError

SOLVERS = {
    "dpm-solver++": solvers.dpm_solver_pp_stages, "unipc": solvers.unipc_stages, "euler": solvers.euler_stages,
    "heun": solvers.heun_stages,
}  # fmt: skip
SAMPLERS = (*SOLVERS, "ddim", "ddpm")
MULTISTEP = ("dpm-solver++", "unipc")


def stages(
    sampler: str,
    alphas_cumprod: torch.Tensor,
    steps: int,
    *,
    prediction: str = "epsilon",
    eta: float = 0.0,
    spacing: str | None = None,
    offset: int = 0,
    karras: bool = False,
    final: float | None = None,
    begin: int = 0,
) -> list[Stage]:
    """The stages of a sampler of `SAMPLERS`, from its level `begin` on; every one with a time calls the model.

    Of a flow, `prediction` "flow" and `alphas_cumprod` its table (T, 2) (`schedules.flow_table`), the samplers of
    SOLVERS step evenly from pure noise to the data. `spacing` and `offset` are those of `timesteps`; `karras` takes
    EDM's spacing instead, for a solver; `eta` and `final` (`samplers.ddim_stages`) belong to "ddim". Raises InputError
    for an unknown name, steps outside 1 to T, and options of another sampler.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"sampler is {sampler!r}, must be one of {', '.join(SAMPLERS)}")
    if eta and sampler != "ddim":
        raise InputError(f"eta is {eta}, must be 0 for sampler {sampler!r}: it belongs to 'ddim'")
    if karras and sampler not in SOLVERS:
        raise InputError(f"karras is True, must be False for sampler {sampler!r}: it belongs to {', '.join(SOLVERS)}")
    if prediction == "flow" and alphas_cumprod.ndim == 2:
        return _flow_stages(sampler, len(alphas_cumprod), steps)
    t = timesteps(sampler, steps, len(alphas_cumprod), spacing, offset)
    if sampler in SOLVERS:
        path = solvers.vp_path(alphas_cumprod, t)
        if karras:
            path = solvers.vp_karras_path(alphas_cumprod, steps, whole=sampler in MULTISTEP)
        return SOLVERS[sampler](solvers.Path(*(levels[begin:] for levels in path)), prediction)
    ascending = t[begin:].long().flip(0)
    if sampler == "ddim":
        return samplers.ddim_stages(alphas_cumprod, ascending, eta, prediction, final)
    return samplers.ddpm_stages(alphas_cumprod, ascending, prediction)


def _flow_stages(sampler: str, num_timesteps: int, steps: int) -> list[Stage]:
    if sampler not in SOLVERS:
        known = ", ".join(SOLVERS)
        raise InputError(f"sampler is {sampler!r}, of a DDPM schedule; a model that predicts flow takes {known}")
    if not isinstance(steps, int) or not 1 <= steps <= num_timesteps:
        raise InputError(f"steps is {steps}, must be a whole number from 1 to {num_timesteps} (the schedule's length)")
    s = [1 - i / steps for i in range(steps)]
    time = [level * num_timesteps - 1 for level in s]  # as trained: timestep t is at s = (t + 1) / T
    path = solvers.Path(time, [*(1 - level for level in s), 1.0], [*s, 0.0], [1.0] * (steps + 1))
    return SOLVERS[sampler](path, "flow")


def timesteps(
    sampler: str, steps: int, num_timesteps: int, spacing: str | None = None, offset: int = 0
) -> torch.Tensor:
    """Where a sampler steps, descending: float64 (steps,).

    `spacing` None is the sampler's own: the published one for "ddim", "ddpm" likewise from 0 up, `inner` for the
    multistep solvers, `linspace` for the others (`schedules`). `leading`, `trailing` and `linspace` are what diffusers
    means by them for a class of this kind, and `offset` its steps_offset.
    """
    if spacing is None and sampler in ("ddim", "ddpm"):
        ascending = schedules.ddim_timesteps if sampler == "ddim" else schedules.ddpm_timesteps
        return ascending(steps, num_timesteps).flip(0).double()
    if sampler in MULTISTEP and spacing in (None, "linspace"):
        spacing = "inner"
    if sampler in MULTISTEP and spacing == "leading" and steps < num_timesteps:  # the last step goes to the data
        return schedules.spaced_timesteps(steps + 1, num_timesteps, "leading", offset)[:-1]
    t = schedules.spaced_timesteps(steps, num_timesteps, spacing or "linspace", offset)
    return t if sampler in SOLVERS else t.round()
