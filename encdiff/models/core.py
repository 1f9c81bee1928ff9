"""What EncDiff is: an image encoder, an MLP bank and a diffusion U-Net that cross-attends to the concept tokens."""

from collections.abc import Callable
from typing import Self, cast

import torch
import torch.nn as nn
from torch import Tensor

from encdiff import ops
from encdiff.diffusion import losses, schedules
from encdiff.distributed.processes import processes
from encdiff.errors import InputError
from encdiff.models.attention import Sampling
from encdiff.models.autoencoder import SpaceToDepth, VQAutoencoder
from encdiff.models.config import EncDiffConfig
from encdiff.models.edits import ConceptModel
from encdiff.models.encoder import ImageEncoder
from encdiff.models.tokens import MLPBank
from encdiff.models.unet import UNet
from encdiff.objectives.anchors import Anchors
from encdiff.objectives.dropout import SkipDropout, drop_tokens
from encdiff.objectives.keys import Key
from encdiff.objectives.mutual_information import normal_discrepancy
from encdiff.objectives.orthogonality import orthogonality
from encdiff.ops._triton import autocast_off

LEAST_NOISE = 0.05  # of a flow: below it, x0 is not told from the small difference to x_t (arXiv 2511.13720)


class EncDiffCore(ConceptModel):
    """The network and its loss: what training needs. People use `EncDiff`."""

    def __init__(self, config: EncDiffConfig | None = None):
        super().__init__()
        self.config = c = config or EncDiffConfig()
        first_stage: VQAutoencoder | SpaceToDepth
        if c.first_stage == "vq":
            first_stage = VQAutoencoder(c.vq_width, c.vq_multipliers, c.vq_depth, codebook_size=c.vq_codes)
        else:
            first_stage = SpaceToDepth(c.patch)
        self.model = nn.ModuleDict({
            "diffusion_model": UNet(
                first_stage.latent_channels, c.token_width, c.width, c.multipliers, c.depth, c.attention_levels,
                c.heads, c.transformer_depth, c.self_attention, c.feedforward, c.scale_shift, c.resample, c.groups,
                c.concepts if c.conditioning == "adagn" else 0,
            ),
        })  # fmt: skip
        self.cond_stage_model = nn.ModuleDict({
            "encoder": ImageEncoder(c.image_size, c.concepts * c.concept_width, c.encoder_width, c.normalize_scalars),
            "net": MLPBank(
                c.concepts, c.token_width, c.bank_widths, c.bank_activation, c.concept_width, c.bank_shared, c.bank_gain
            ),
        })  # fmt: skip
        if c.anchors:
            self.cond_stage_model["anchors"] = Anchors(c.concepts, c.anchors)
        self.first_stage_model = first_stage.requires_grad_(False)
        with torch.device("cpu"):  # checked by value, also where the parameters are made on "meta"
            if c.prediction == "flow":  # then (T, 2), the factors of data and noise
                self.alphas_cumprod = schedules.flow_table(c.num_timesteps)
            else:
                betas = schedules.make_betas(c.schedule, c.num_timesteps, c.beta_start, c.beta_end)
                self.alphas_cumprod = schedules.alphas_cumprod(betas)
        self.schedule = self.alphas_cumprod  # stays on the host, where samplers make their tables

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves `alphas_cumprod` with the parameters, but leaves it float64 where they become half."""
        super()._apply(fn, recurse)
        device = next(self.parameters()).device
        if device.type != "meta":
            self.alphas_cumprod = self.alphas_cumprod.to(device)
        return self

    @property
    def unet(self) -> UNet:
        return cast(UNet, self.model["diffusion_model"])

    @property
    def encoder(self) -> ImageEncoder:
        return cast(ImageEncoder, self.cond_stage_model["encoder"])

    @property
    def bank(self) -> MLPBank:
        return cast(MLPBank, self.cond_stage_model["net"])

    @property
    def anchors(self) -> Anchors | None:
        """What draws scalars to groups, where the configuration has `anchors`."""
        return cast(Anchors, self.cond_stage_model["anchors"]) if self.config.anchors else None

    @property
    def first_stage(self) -> VQAutoencoder | SpaceToDepth:
        return self.first_stage_model

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one latent."""
        side = self.config.image_size // self.config.downsampling
        return self.first_stage.latent_channels, side, side

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> scalars (B, N); (B, N, m) where the configuration makes a concept a vector.

        With anchors as these draw them, but not while the model trains.
        """
        images = self._check_images(images)
        if self.training and self.config.normalize_scalars and len(images) * processes().size == 1:
            raise InputError("images: 1 in training mode, where normalize_scalars needs at least 2; call model.eval()")
        scalars = self.encoder(images).unflatten(1, self.config.code_shape)
        return scalars if self.anchors is None or self.training else self.anchors(scalars)

    def tokens(self, scalars: Tensor) -> Tensor:
        """Scalars (B, N), or as `encode` gives them -> concept tokens (B, N, d)."""
        if scalars.shape[1:] != self.config.code_shape:
            sizes = ", ".join(map(str, self.config.code_shape))
            raise InputError(f"scalars are {tuple(scalars.shape)}, must be (B, {sizes})")
        return self.bank(scalars)

    def denoise(
        self,
        x_t: Tensor,
        t: Tensor,
        tokens: Tensor,
        token_bias: Tensor | None = None,
        maps: list[Tensor] | None = None,
        sampling: Sampling | None = None,
        drop: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Tensor:
        """Noisy latents (B, c, h, w), timesteps (B,), tokens (B, N, d) -> the configured prediction (B, c, h, w).

        See `UNet.forward` for token_bias, maps, sampling and drop.
        """
        output = self.unet(x_t.to(tokens.dtype), t, tokens, token_bias, maps, sampling, drop)
        if self.config.flow_output == "velocity":
            return output
        s = ((t.float() + 1) / self.config.num_timesteps).clamp(min=LEAST_NOISE)
        return (x_t - output) / s[:, None, None, None]

    def to_latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> latents (B, c, h, w) as the diffusion sees them; the first stage learns nothing."""
        with torch.no_grad(), autocast_off(images):  # also the target's precision
            return self.first_stage.encode(images) * self.config.scaling_factor

    def to_images(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) -> images (B, 3, S, S), clipped to [-1, 1]."""
        with torch.no_grad(), autocast_off(latents):
            return self.first_stage.decode(latents / self.config.scaling_factor).clamp(-1, 1)

    def loss(
        self,
        images: Tensor,
        *,
        x0: Tensor | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        weight: Tensor | None = None,
        seed: int | None = None,
        sample_ids: Tensor | None = None,
        draw: int | Tensor = 0,
    ) -> Tensor:
        """The training loss, a scalar: noise the latents, predict from them and the image's own concepts, compare.

        x0 (B, c, h, w), the images' latents, t (B,) int64, noise (B, c, h, w) and the per-sample weight (B,) can be
        given; else the first stage encodes, t is uniform, the noise normal, both keyed by (seed, sample_ids (B,), draw)
        as in `ops.normal`, and the weights are 1. Without a seed torch's global generator gives one. What else the
        configuration's objective asks for (`encdiff.objectives`) is added, and dropped while the model trains.
        """
        c, images = self.config, self._check_images(images)
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ())) if t is None or noise is None or c.draws else 0
        if sample_ids is None:
            sample_ids = torch.arange(len(images), device=images.device)
        key = Key(seed, sample_ids, draw)
        scalars = self.encode(images)
        if self.anchors is not None and self.training:
            scalars = self.anchors(scalars, key)
        tokens = self.tokens(scalars)
        if c.token_dropout and self.training:
            tokens = drop_tokens(tokens, c.token_dropout, key)
        if x0 is None:
            x0 = self.to_latents(images)
        if t is None:
            t = ops.timesteps(self.config.num_timesteps, seed, sample_ids, draw)
        x_t, target = ops.q_sample(
            x0, noise, t, self.alphas_cumprod, c.prediction, seed=seed, sample_ids=sample_ids, draw=draw
        )
        predicted = self.denoise(x_t, t, tokens, drop=self._drop(key))
        loss = losses.diffusion_loss(predicted, target, c.loss, weight)
        if c.mutual_information:
            loss = loss + c.mutual_information * normal_discrepancy(scalars)
        if c.orthogonality:

            def predict(rows: Tensor, others: Tensor) -> Tensor:
                drop = self._drop(key._replace(sample_ids=key.sample_ids[rows]))  # the same of the same images
                return self.denoise(x_t[rows], t[rows], others, drop=drop)

            loss = loss + c.orthogonality * orthogonality(predict, predicted, tokens, key)
        return loss

    def _drop(self, key: Key) -> SkipDropout | None:
        return SkipDropout(self.config.skip_dropout, key) if self.config.skip_dropout and self.training else None

    forward = loss  # what calls the model, such as DistributedDataParallel, trains it
