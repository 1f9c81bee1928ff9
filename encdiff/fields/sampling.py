"""Fields that agree with what was measured: denoisers wrapped so, for any solver of `diffusion.solvers`."""

from collections.abc import Callable

import torch
from torch import Tensor

from encdiff.diffusion import solvers
from encdiff.diffusion.edm import Network
from encdiff.diffusion.loop import run
from encdiff.errors import InputError
from encdiff.ops.philox import normal

SOLVERS: dict[str, Callable] = {
    "heun": solvers.heun_stages, "euler": solvers.euler_stages, "dpm-solver++": solvers.dpm_solver_pp_stages,
    "unipc": solvers.unipc_stages,
}  # fmt: skip
SAMPLER, STEPS = "dpm-solver++", 10
SIGMA_MAX = 80.0
SIGMA_MIN = 0.05  # EDM's 0.002 leaves grain on smooth fields; error and CRPS are worse (docs/results/fields)
HEUN_STEPS = 6


def imposed(denoise: Network, values: Tensor, known: Tensor) -> Network:
    """The denoiser with known pixels re-imposed on what it is given and on what it gives.

    values (B, C, H, W), known of that shape, boolean. A solver's x, begun with them, then keeps them: their slope is 0.
    """

    def wrapped(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(known, values, denoise(torch.where(known, values, x), sigma))

    return wrapped


def guided(denoise: Network, values: Tensor, mask: Tensor, noise: Tensor, sigma_data: float = 0.5) -> Network:
    """An unconditional denoiser D drawn towards measurements: D(x) + sigma^2 grad log p(values | x).

    values, mask (1 where measured) and noise (the measurements' standard deviation), all (B, C, H, W). p(values | x) is
    Gaussian around D(x), of variance noise^2 + sigma^2 s^2 / (sigma^2 + s^2) with s = sigma_data: exact for white data
    (arXiv 2204.03458, section 3.1; the weights of ΠGDM, Song et al., ICLR 2023).
    """

    def wrapped(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = denoise(x, sigma)
            s2 = (sigma**2).view(-1, 1, 1, 1)
            variance = noise**2 + s2 * sigma_data**2 / (s2 + sigma_data**2)
            error = (mask * (x0 - values) ** 2 / (2 * variance)).sum()
            (gradient,) = torch.autograd.grad(error, x)
        return x0.detach() - s2 * gradient

    return wrapped


def sample(
    denoise: Network,
    shape: tuple[int, ...],
    *,
    values: Tensor | None = None,
    known: Tensor | None = None,
    sampler: str = SAMPLER,
    steps: int = STEPS,
    sigma_min: float = SIGMA_MIN,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Fields x0 of a shape (B, C, H, W), float32, from a denoiser (x, sigma (B,)) -> x0, along EDM's path.

    Where `known` is true they are `values`, to the bit. The noise to begin with is keyed by seed and sample_ids (B,),
    so that a sample is the same in any batch; the last call denoises what is at `sigma_min`. Raises InputError for an
    unknown sampler, and for fewer steps than it can do with.
    """
    if sampler not in SOLVERS:
        raise InputError(f"sampler is {sampler!r}, must be one of {', '.join(SOLVERS)}")
    ids = torch.arange(shape[0], device=device) if sample_ids is None else sample_ids
    x = SIGMA_MAX * normal(shape, seed, ids)
    if sampler == "heun" and steps < HEUN_STEPS:  # its second call, so far from the first, would blow up
        raise InputError(f"steps is {steps}, must be at least {HEUN_STEPS} for heun; the other samplers take fewer")
    path = solvers.edm_path(steps, sigma_min, SIGMA_MAX)
    stages = SOLVERS[sampler](path, "x0")
    if values is None or known is None:
        return run(denoise, x, stages)
    return torch.where(known, values, run(imposed(denoise, values, known), torch.where(known, values, x), stages))
