"""Sampling latents under concept tokens: by name or by a scheduler, tokens folded once, the gate of cross-attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from encdiff.diffusion import loop, menu, schedulers, schedules
from encdiff.diffusion.gate import Gate, as_tgate
from encdiff.diffusion.menu import SAMPLERS as SAMPLERS
from encdiff.diffusion.schedulers import Sampler, Scheduler
from encdiff.errors import InputError
from encdiff.models.attention import begin_sampling, projecting_pays
from encdiff.models.config import EncDiffConfig
from encdiff.models.core import EncDiffCore

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}  # what diffusers calls them
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def sample_latents(
    model: EncDiffCore,
    tokens: Tensor,
    x_T: Tensor,
    *,
    sampler: Sampler = "dpm-solver++",
    steps: int = 20,
    eta: float = 0.0,
    gate: Gate = None,
    guidance: float = 1.0,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    token_bias: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents x0 (B, c, h, w) from noise x_T and tokens (B, N, d); see `EncDiff.sample` for the options."""
    guided = _check_guidance(guidance, model.config.token_dropout)
    if isinstance(sampler, str):
        stages = menu.stages(sampler, model.schedule, steps, prediction=model.config.prediction, eta=eta)
        calls = sum(stage.time is not None for stage in stages)
    else:
        sampler = _prepared(sampler, steps, model, x_T)
        calls = len(sampler.timesteps)
    tgate = as_tgate(gate)
    if tgate is not None:
        tgate.check(calls)
    if guided:  # the second half without concepts, as `token_dropout` trained it
        tokens = torch.cat([tokens, torch.zeros_like(tokens)])
        token_bias = None if token_bias is None else token_bias.repeat(2, 1)
    done, sampling = 0, begin_sampling(tokens, model.unet.attending)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        nonlocal done
        done += 1
        sampling.evaluation = done - 1
        if tgate is not None:
            sampling.gate, sampling.self_gate = tgate.cross(done), tgate.own(done)
        doubled = (x_t.repeat(2, 1, 1, 1), t.repeat(2)) if guided else (x_t, t)
        output = model.denoise(*doubled, tokens, token_bias, sampling=sampling)
        output = output.to(x_t.dtype)  # x stays exact, and `step` is one kernel
        if progress:
            progress(done, calls)
        if not guided:
            return output
        own, without = output.chunk(2)
        return own, without

    if isinstance(sampler, str):
        if model.unet.concept_embed is None and projecting_pays(tokens):
            sampling.times = model.unet.project(loop.times(stages, x_T.device))
        if not any(stage.row[4] for stage in stages):  # a drawn number belongs to its place in the contiguous layout
            x_T = x_T.contiguous(memory_format=torch.channels_last)
        scale = guidance if guided else None
        return loop.run(denoise, x_T, stages, seed=seed, sample_ids=sample_ids, guidance=scale).contiguous()

    def mixed(x_t: Tensor, t: Tensor) -> Tensor:
        output = denoise(x_t, t)
        return output if isinstance(output, Tensor) else output[1] + guidance * (output[0] - output[1])

    return schedulers.run(mixed, x_T, sampler, eta=eta, seed=seed)


def _check_guidance(guidance: float, token_dropout: float) -> bool:
    """Whether samples are guided."""
    if not isinstance(guidance, int | float) or not 0 <= guidance <= 1000:
        raise InputError(f"guidance is {guidance!r}, must be a number from 0 to 1000; 1 is without")
    if guidance != 1 and not token_dropout:
        raise InputError(
            f"guidance is {guidance:g}, must be 1: the model was trained with token_dropout 0, never without concepts"
        )
    return guidance != 1


def scheduler_config(config: EncDiffConfig) -> dict[str, Any]:
    """What `from_config` of a scheduler of diffusers needs to know of a model: its schedule and its prediction."""
    if config.prediction not in PREDICTION_TYPES:
        raise InputError("prediction is 'flow', which has no schedule of DDPM; sample by a name such as 'euler'")
    found: dict[str, Any] = {
        "num_train_timesteps": config.num_timesteps,
        "prediction_type": PREDICTION_TYPES[config.prediction],
        "clip_sample": False,  # or DDIM and DDPM clip latents to [-1, 1]
    }
    ends, name = (config.beta_start, config.beta_end), schedules.PUBLISHED.get(config.schedule, config.schedule)
    if name in BETA_SCHEDULES:
        return found | {"beta_schedule": BETA_SCHEDULES[name], "beta_start": ends[0], "beta_end": ends[1]}
    return found | {"trained_betas": schedules.make_betas(name, config.num_timesteps, *ends).tolist()}


def _prepared(scheduler: Scheduler, steps: int, model: EncDiffCore, x_T: Tensor) -> Scheduler:
    """A copy, set to so many steps; InputError unless it fits what the model was trained for."""
    scheduler_config(model.config)  # refuses a flow, before a remedy that it has not
    copied, name = schedulers.prepare(scheduler, steps, x_T.device), type(scheduler).__name__
    config, betas = getattr(scheduler, "config", {}), getattr(scheduler, "alphas_cumprod", None)
    remedy = f"{name}.from_config(model.scheduler_config) has them"
    if betas is None:
        raise InputError(f"sampler is a {name}, without alphas_cumprod; must be a scheduler of a DDPM schedule")
    for key in ("prediction_type", "num_train_timesteps"):
        wanted = scheduler_config(model.config)[key]
        if config.get(key, wanted) != wanted:
            raise InputError(f"sampler has {key} {config[key]!r}, must have the model's {wanted!r}: {remedy}")
    if betas.shape != model.schedule.shape or not betas.cpu().double().allclose(model.schedule, rtol=1e-3):
        raise InputError(f"sampler has other betas than the model, must have the model's: {remedy}")
    if (last := float(max(copied.timesteps))) > (T := len(betas)) - 1:
        raise InputError(f"steps is {steps}, takes {name} to timestep {last:g}, past the schedule's 0 to {T - 1}")
    return copied
