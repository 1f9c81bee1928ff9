"""What an EncDiff draws: images from scalars, the noise an image began with, where it attends."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from encdiff import ops
from encdiff.diffusion import samplers, schedules
from encdiff.diffusion.gate import Gate
from encdiff.diffusion.schedulers import Sampler
from encdiff.errors import InputError
from encdiff.models.core import EncDiffCore
from encdiff.models.edits import Progress
from encdiff.models.mode import evaluating
from encdiff.models.sample import sample_latents, scheduler_config


class EncDiffSampling(EncDiffCore):
    """Every method runs in eval mode without gradients."""

    def sample(
        self,
        scalars: Tensor,
        *,
        x_T: Tensor | None = None,
        sampler: Sampler = "dpm-solver++",
        steps: int = 20,
        eta: float = 0.0,
        gate: Gate = None,
        guidance: float = 1.0,
        seed: int = 0,
        sample_ids: Tensor | None = None,
        token_bias: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Images (B, 3, S, S) from scalars (B, N).

        Every image gets one and the same noise, drawn from `seed`, so that images differ by their concepts alone; pass
        sample_ids (B,) int64 for noise of their own, or x_T (B, c, h, w) for other starts. token_bias (B, N) emphasises
        or (-inf) erases concepts.
        `sampler` is one of `models.sample.SAMPLERS`: "ddim" with 200 steps is what the paper shows, and what `invert`
        inverts; eta belongs to it. Or it is a scheduler of diffusers, made by `from_config(model.scheduler_config)`,
        which is not changed; what noise it adds comes from a `torch.Generator` of `seed`, so that an image then depends
        on its batch. From evaluation `gate` of the U-Net on, the cross-attentions repeat what they gave there; a
        `TGate` spares self-attentions before it, too (arXiv 2404.02747): less work, and not exact. `guidance` w other
        than 1 goes w times as far from a prediction without concepts as the concepts do (arXiv 2207.12598), which
        takes a model trained with token_dropout, and twice the time.
        """
        if not isinstance(scalars, Tensor):
            raise InputError(f"scalars are {type(scalars).__name__}, must be a torch.Tensor (B, N); encode gives them")
        with evaluating(self):
            tokens = self.tokens(scalars).to(next(self.unet.parameters()).dtype)
            shape = (len(scalars), *self.latent_shape)
            if sample_ids is None:
                sample_ids = torch.zeros(len(scalars), dtype=torch.int64, device=scalars.device)
            if x_T is None:
                x_T = ops.normal(shape, seed, sample_ids)
            if tuple(x_T.shape) != shape:
                raise InputError(f"x_T is {tuple(x_T.shape)}, must be {shape}")
            return self.to_images(
                sample_latents(
                    self, tokens, x_T.to(scalars.device, torch.float32).contiguous(), sampler=sampler, steps=steps,
                    eta=eta, gate=gate, guidance=guidance, seed=seed, sample_ids=sample_ids, token_bias=token_bias,
                    progress=progress,
                )
            )  # fmt: skip

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """What `from_config` of a scheduler of diffusers needs of this model: its schedule and its prediction."""
        return scheduler_config(self.config)

    @property
    def inverts_by(self) -> str:  # type: ignore[override]  # a model's own
        """The sampler that comes back from what `invert` gives: "ddim", of a flow "euler"."""
        return "euler" if self.config.prediction == "flow" else "ddim"

    def invert(self, images: Tensor, steps: int = 50) -> Tensor:
        """The x_T from which the sampler `inverts_by` in as many steps leads to these images by their own concepts."""
        with evaluating(self):
            tokens = self.tokens(self._codes(images))
            if self.config.prediction == "flow":
                return samplers.flow_invert(
                    lambda x_t, t: self.denoise(x_t, t, tokens), self.to_latents(images), self.config.num_timesteps,
                    steps=steps,
                )  # fmt: skip
            return samplers.ddim_invert(
                lambda x_t, t: self.denoise(x_t, t, tokens), self.to_latents(images), self.alphas_cumprod,
                steps=steps, prediction=self.config.prediction,
            )  # fmt: skip

    def attention_maps(self, images: Tensor, steps: int = 10, seed: int = 0) -> Tensor:
        """Where the U-Net attends to each concept: (B, N, S, S), over N a distribution at every pixel.

        Averaged over heads, over layers (each resized to the image) and over `steps` noise levels of the image itself.
        """
        if steps < 1:
            raise InputError(f"steps is {steps}, must be at least 1")
        with evaluating(self):
            tokens = self.tokens(self._codes(images))
            x0 = self.to_latents(images)
            total, count = torch.zeros((), device=x0.device), 0
            first = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)  # one and the same noise for all
            for step in schedules.ddim_timesteps(steps, self.config.num_timesteps).tolist():
                t = torch.full((len(x0),), step, device=x0.device)
                x_t, _ = ops.q_sample(x0, None, t, self.alphas_cumprod, seed=seed, sample_ids=first, draw=step)
                maps: list[Tensor] = []
                self.denoise(x_t, t, tokens, maps=maps)
                for m in maps:
                    m = rearrange(m, "b h w n -> b n h w")
                    total = total + F.interpolate(m, self.config.image_size, mode="bilinear", align_corners=False)
                count += len(maps)
            return total / count
