"""The samplers with a network of your own: points on a ring of eight blobs, where the right answer is known.

    python examples/own_sampler.py

A small network learns to see through the noise that was added to points of the plane, then three samplers turn noise
into points. Each line says how many points lie in a blob (within three of its standard deviations: 98.9 % of true ones)
and which share the rarest of the eight blobs has (12.5 % if all are equal). DPM-Solver++ with 20 calls of the network
should do nearly what DDPM does with 1,000. Look at `ring.png`. Any network `denoise(x_t, t)` on tensors of any shape
will do, for images too; its `prediction` may be the noise ("epsilon"), the data ("x0") or, as here, v.
"""

import math

import matplotlib
import torch
from torch import Tensor, nn

from encdiff.diffusion.losses import diffusion_loss
from encdiff.diffusion.samplers import ddim, ddpm
from encdiff.diffusion.schedules import alphas_cumprod, ddim_timesteps, make_betas
from encdiff.diffusion.solvers import dpm_solver_pp, vp_path
from encdiff.ops import q_sample

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLOB = 0.1  # standard deviation of a blob; the ring has radius 1
ANGLES = torch.arange(8) * (math.pi / 4)
CENTRES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def draw(n: int) -> Tensor:
    return CENTRES[torch.randint(8, (n,))] + BLOB * torch.randn(n, 2)


class Denoiser(nn.Module):
    """The prediction v (B, 2) for points x_t (B, 2) at timesteps t (B,) of 0..999."""

    def __init__(self, width: int = 128):
        super().__init__()
        hidden = [layer for n in (2 + 1 + 16, width, width) for layer in (nn.Linear(n, width), nn.ReLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        phase = (x_t[..., None] * math.pi * 2.0 ** torch.arange(-1, 3)).flatten(1)  # so that blobs can be sharp
        return self.layers(torch.cat([x_t, t[:, None] / 1000, phase.sin(), phase.cos()], 1))


torch.manual_seed(0)
steps, model, alpha_bar = 2000, Denoiser(), alphas_cumprod(make_betas("cosine"))
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for _ in range(steps):
    x0, t = draw(512), torch.randint(1000, (512,))
    x_t, target = q_sample(x0, torch.randn_like(x0), t, alpha_bar, "v")
    loss = diffusion_loss(model(x_t, t), target, "mse")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step(), rate.step()

x_T, path = torch.randn(2000, 2), vp_path(alpha_bar, ddim_timesteps(20, 1000).flip(0))
points = {
    "true": draw(2000),
    "DDPM, 1000 calls": ddpm(model, x_T, alpha_bar, prediction="v", seed=0),
    "DDIM, 50 calls": ddim(model, x_T, alpha_bar, steps=50, prediction="v"),
    "DPM-Solver++, 20 calls": dpm_solver_pp(model, x_T, path, prediction="v"),
}
figure, panels = plt.subplots(1, len(points), figsize=(12, 3), sharex=True, sharey=True)
for panel, (name, x) in zip(panels, points.items(), strict=True):
    distance, nearest = torch.cdist(x, CENTRES).min(1)
    within, rarest = (distance < 3 * BLOB).float().mean(), nearest.bincount(minlength=8).min() / len(x)
    print(f"{name:24} in a blob {within:6.1%}   rarest blob {rarest:5.1%}")
    panel.scatter(*x.T, s=1)
    panel.set(title=name, aspect="equal")
figure.savefig("ring.png")
