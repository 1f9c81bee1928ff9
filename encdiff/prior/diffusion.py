"""A small diffusion over codes: an MLP predicts v, our own noise engine trains it, our own sampler samples it."""

import math
from math import prod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encdiff import ops
from encdiff.diffusion import losses, schedules, solvers
from encdiff.errors import InputError
from encdiff.files.checkpoint import build_fitting, load_state
from encdiff.models.unet import timestep_embedding
from encdiff.prior.base import Prior, Progress, check_whole, flat_codes, standardised

WIDTH, DEPTH = 192, 3  # of the MLP: numbers per layer, residual layers
TIMES = 1000  # noise levels, of the cosine schedule
BATCH, TRAINING, RATE = 256, 2000, 3e-3  # codes per step, steps, the highest learning rate
SAMPLING = 50  # steps
CHUNK = 4096  # codes sampled at once


class Layer(nn.Module):
    """A residual layer of the denoiser, to which the time is added."""

    def __init__(self):
        super().__init__()
        self.norm, self.time = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + self.leave(F.silu(self.enter(self.norm(x)) + self.time(time)))


class Denoiser(nn.Module):
    """Noisy standardised codes (B, D) and timesteps (B,) -> v (B, D); holds the codes' mean and deviation."""

    offset: Tensor
    scale: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.enter, self.time = nn.Linear(size, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.norm, self.leave = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, size)
        self.register_buffer("offset", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        x, time = self.enter(x_t), F.silu(self.time(timestep_embedding(t, WIDTH)))
        for layer in self.layers:
            x = layer(x, time)
        return self.leave(self.norm(x))


class DiffusionPrior(Prior):
    """A diffusion over standardised codes, which `denoiser` takes from noise to a code."""

    kind = "diffusion"

    def __init__(self, denoiser: Denoiser, code_shape: tuple[int, ...], fitted: int):
        super().__init__(code_shape, fitted)
        self.denoiser = denoiser.eval().requires_grad_(False)

    @classmethod
    def fit(cls, codes: Any, steps: int = TRAINING, *, seed: int = 0, progress: Progress | None = None) -> Self:
        """Train on codes (n, N) or (n, N, m), array or tensor, for so many steps; a function of codes and seed.

        `progress(done, total)` follows. Raises InputError for codes that are not finite floats.
        """
        check_whole(steps=(steps, 1, 2**22), seed=(seed, 0, 2**63))
        rows, code_shape = flat_codes(codes)
        standard, offset, scale = standardised(rows)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            denoiser = Denoiser(rows.shape[1])
        denoiser.offset.copy_(offset)
        denoiser.scale.copy_(scale)
        _train(denoiser, standard.float(), steps, seed, progress or (lambda done, total: None))
        return cls(denoiser, code_shape, len(rows))

    @property
    def title(self) -> str:
        return "a small diffusion model of codes"

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.denoiser.state_dict())

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], code_shape: tuple[int, ...], fitted: int, source: str) -> Self:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        denoiser = build_fitting(lambda: Denoiser(prod(code_shape)), shapes, source)
        load_state(denoiser, tensors, source)
        if (denoiser.scale < 0).any():
            raise InputError(f"{source}: scale holds negative numbers; fit and save it again")
        return cls(denoiser, code_shape, fitted)

    @torch.no_grad()
    def _rows(self, sample_ids: Tensor, key: int) -> Tensor:
        path = solvers.vp_path(_alpha_bar(), schedules.spaced_timesteps(SAMPLING, TIMES, "inner"))
        done = []
        for ids in sample_ids.split(CHUNK):
            x_T = ops.normal((len(ids), len(self.denoiser.offset)), key, ids)
            done.append(solvers.dpm_solver_pp(self.denoiser, x_T, path, prediction="v"))
        return self.denoiser.offset + self.denoiser.scale * torch.cat(done)


def _alpha_bar() -> Tensor:
    return schedules.alphas_cumprod(schedules.make_betas("cosine", TIMES))


@torch.enable_grad()
def _train(denoiser: Denoiser, codes: Tensor, steps: int, seed: int, report: Progress) -> None:
    """The key of a row of a batch is its place in the endless stream: it draws the code, its timestep and noise."""
    alpha_bar, batch = _alpha_bar(), min(BATCH, len(codes))
    optimizer = torch.optim.AdamW(denoiser.parameters(), RATE, weight_decay=0.0)
    for step in range(steps):
        places = torch.arange(step * batch, (step + 1) * batch)
        u = ops.uniform((batch, 1), seed, places, 1)[:, 0].double()
        x0 = codes[(u * len(codes)).long()]
        t = ops.timesteps(TIMES, seed, places, kind="stratified")
        x_t, target = ops.q_sample(x0, None, t, alpha_bar, "v", seed=seed, sample_ids=places)
        loss = losses.diffusion_loss(denoiser(x_t, t), target, "mse")
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step + 1, steps)
