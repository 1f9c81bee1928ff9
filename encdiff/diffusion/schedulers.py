"""Sampling by a scheduler of diffusers, taken by what it does: diffusers itself is not imported.

Ours for its pipelines is `encdiff.interop.scheduler`.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch

from encdiff.errors import InputError


class Scheduler(Protocol):
    """A scheduler of diffusers: `set_timesteps` makes `timesteps`, at each of which `step` takes x further."""

    timesteps: Any

    def set_timesteps(self, *args: Any, **kwargs: Any) -> Any: ...

    def step(self, *args: Any, **kwargs: Any) -> Any: ...


Sampler = str | Scheduler  # a name in `menu.SAMPLERS`, or such


def prepare(scheduler: Scheduler, steps: int, device: torch.device | str = "cpu") -> Scheduler:
    """A copy of the scheduler, set to so many steps on a device: its model is called at each of its `timesteps`.

    The scheduler itself is not changed. Raises InputError for what is none, steps that it refuses, and a `step` that
    needs more than the model's output, t and x.
    """
    name = type(scheduler).__name__
    if lacks := [part for part in ("set_timesteps", "step", "timesteps") if not hasattr(scheduler, part)]:
        raise InputError(f"sampler is a {name}, must be a name or a scheduler of diffusers: it lacks {lacks[0]}")
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps is {steps}, must be a whole number of at least 1")
    try:
        inspect.signature(scheduler.step).bind(None, None, None)
    except TypeError as error:
        raise InputError(f"sampler is a {name}, whose step needs more than output, t and x: {error}") from None
    copied = copy.deepcopy(scheduler)
    try:
        copied.set_timesteps(steps, device=device)
    except (ValueError, ArithmeticError, LookupError, AssertionError) as error:
        raise InputError(f"steps is {steps}, which {name} refuses: {' '.join(str(error).split())}") from error
    return copied


@torch.no_grad()
def run(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    scheduler: Scheduler,
    *,
    eta: float = 0.0,
    seed: int | None = None,
) -> torch.Tensor:
    """Take standard normal noise (B, ...) through a scheduler that `prepare` gave, without gradients.

    `denoise(x (B, ...), t (B,)) -> output` of x's shape is called once at every of its timesteps, with x as the
    scheduler scales it; t is int64 or float32. A stochastic scheduler draws from a `torch.Generator` of `seed` on the
    CPU, without one from torch's own: a sample then depends on its batch. `eta` is for a step that takes one. Returns
    x0 of the noise's shape and dtype.
    """
    takes = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {}
    if eta:
        if "eta" not in takes:
            raise InputError(f"eta is {eta}, must be 0 for {type(scheduler).__name__}, whose step takes none")
        options["eta"] = eta
    if "generator" in takes and seed is not None:
        options["generator"] = torch.Generator().manual_seed(seed)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    keeps_scale = getattr(scheduler, "keeps_scale", False)  # ours: as by a sampler's name
    x = noise if keeps_scale else noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        time = t.to(x.device, torch.float32 if t.is_floating_point() else torch.int64)
        output = denoise(scale(x, t).to(noise.dtype), time.expand(len(x)))
        x = scheduler.step(output, t, x, **options).prev_sample.to(noise.dtype)
    return x
