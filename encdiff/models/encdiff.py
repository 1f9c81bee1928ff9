"""EncDiff: an image encoder, an MLP bank and a diffusion U-Net that cross-attends to the concept tokens."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import ModelHubMixin
from torch import Tensor

from encdiff import ops
from encdiff.checkpoint import (
    atomic_path,
    build_fitting,
    load_model,
    load_state,
    locate,
    read_published,
    save_model,
    write_published,
)
from encdiff.diffusion import losses, samplers, schedules
from encdiff.errors import InputError
from encdiff.models.attention import Sampling
from encdiff.models.autoencoder import SpaceToDepth, VQAutoencoder
from encdiff.models.card import CARD
from encdiff.models.config import EncDiffConfig
from encdiff.models.edits import Edits, Progress
from encdiff.models.encoder import ImageEncoder
from encdiff.models.mode import evaluating
from encdiff.models.sample import sample_latents
from encdiff.models.tokens import MLPBank
from encdiff.models.unet import UNet
from encdiff.ops._triton import autocast_off


class EncDiff(
    Edits,
    nn.Module,
    ModelHubMixin,
    library_name="encdiff",
    tags=["disentanglement", "diffusion"],
    license="mit",
    paper_url="https://arxiv.org/abs/2402.09712",
    model_card_template=CARD,
):
    """The whole model. Images are float (B, 3, S, S) in [-1, 1], S the configuration's image size.

    The names in its state dict are those of the published checkpoints. Methods that show images (`reconstruct`, `swap`,
    `traverse`, `sample`, `attention_maps`) run in eval mode without gradients; `encode`, `tokens`, `denoise` and `loss`
    run in the mode the model is in, with gradients. Calling the model is `loss`.

    Source: arXiv 2402.09712.
    """

    def __init__(self, config: EncDiffConfig | None = None):
        super().__init__()
        self.config = c = config or EncDiffConfig()
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
        self.first_stage_model = first_stage.requires_grad_(False)
        with torch.device("cpu"):  # checked by value, also where the parameters are made on "meta"
            betas = schedules.make_betas(c.schedule, c.num_timesteps, c.beta_start, c.beta_end)
            self.alphas_cumprod = schedules.alphas_cumprod(betas)
        self.schedule = self.alphas_cumprod  # stays on the host, where samplers make their tables

    def _apply(self, fn, recurse: bool = True) -> "EncDiff":
        """Moves `alphas_cumprod` with the parameters, but leaves it float64 where they become half."""
        super()._apply(fn, recurse)
        device = next(self.parameters()).device
        if device.type != "meta":
            self.alphas_cumprod = self.alphas_cumprod.to(device)
        return self

    @property
    def unet(self) -> UNet:
        return self.model["diffusion_model"]

    @property
    def encoder(self) -> ImageEncoder:
        return self.cond_stage_model["encoder"]

    @property
    def bank(self) -> MLPBank:
        return self.cond_stage_model["net"]

    @property
    def first_stage(self) -> nn.Module:
        return self.first_stage_model

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one latent."""
        side = self.config.image_size // self.config.downsampling
        return self.first_stage.latent_channels, side, side

    # ---- the method

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> scalars (B, N); (B, N, m) where the configuration makes a concept a vector."""
        images = self._check_images(images)
        if self.training and self.config.normalize_scalars and len(images) == 1:
            raise InputError("images: 1 in training mode, where normalize_scalars needs at least 2; call model.eval()")
        return self.encoder(images).unflatten(1, self.config.code_shape)

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
    ) -> Tensor:
        """Noisy latents (B, c, h, w), timesteps (B,), tokens (B, N, d) -> the configured prediction (B, c, h, w).

        See `UNet.forward` for token_bias, maps and sampling.
        """
        return self.unet(x_t.to(tokens.dtype), t, tokens, token_bias, maps, sampling)

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
        as in `ops.normal`, and the weights are 1. Without a seed torch's global generator gives one.
        """
        images = self._check_images(images)
        tokens = self.tokens(self.encode(images))
        if x0 is None:
            x0 = self.to_latents(images)
        if seed is None and (t is None or noise is None):
            seed = torch.randint(2**63 - 1, ()).item()
        if sample_ids is None:
            sample_ids = torch.arange(len(x0), device=x0.device)
        if t is None:
            t = ops.timesteps(self.config.num_timesteps, seed, sample_ids, draw)
        x_t, target = ops.q_sample(
            x0, noise, t, self.alphas_cumprod, self.config.prediction, seed=seed, sample_ids=sample_ids, draw=draw
        )
        return losses.diffusion_loss(self.denoise(x_t, t, tokens), target, self.config.loss, weight)

    forward = loss  # what calls the model, such as DistributedDataParallel and DataParallel, trains it

    # ---- what people do with it; swap, traverse and reconstruct in `Edits`

    def sample(
        self,
        scalars: Tensor,
        *,
        x_T: Tensor | None = None,
        sampler: str = "dpm-solver++",
        steps: int = 20,
        eta: float = 0.0,
        gate: int | None = None,
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
        inverts; eta belongs to it. From evaluation `gate` of the U-Net on, the cross-attentions repeat what they gave
        there (T-GATE, arXiv 2404.02747): less work, and not exact.
        """
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
                    eta=eta, gate=gate, seed=seed, sample_ids=sample_ids, token_bias=token_bias, progress=progress,
                )
            )  # fmt: skip

    def invert(self, images: Tensor, steps: int = 50) -> Tensor:
        """The x_T from which `sampler="ddim"` in as many steps comes back to these images by their own concepts."""
        with evaluating(self):
            tokens = self.tokens(self._codes(images))
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
            key = {"seed": seed, "sample_ids": torch.zeros(len(x0), dtype=torch.int64, device=x0.device)}
            for step in schedules.ddim_timesteps(steps, self.config.num_timesteps).tolist():
                t = torch.full((len(x0),), step, device=x0.device)
                x_t, _ = ops.q_sample(x0, None, t, self.alphas_cumprod, **key, draw=step)
                maps: list[Tensor] = []
                self.denoise(x_t, t, tokens, maps=maps)
                for m in maps:
                    m = rearrange(m, "b h w n -> b n h w")
                    total = total + F.interpolate(m, self.config.image_size, mode="bilinear", align_corners=False)
                count += len(maps)
            return total / count

    # ---- files

    @classmethod
    def from_preset(cls, name: str) -> "EncDiff":
        """A new, untrained model of a named configuration; see `PRESETS`."""
        return cls(EncDiffConfig.from_preset(name))

    @classmethod
    def load_published(
        cls, path: str | Path, preset: str | EncDiffConfig = "shapes3d", *, ema: bool = True
    ) -> "EncDiff":
        """Read a checkpoint of the published code, without running any code that it names.

        Args:
            path: a `.ckpt` of Lightning or of `torch.save`.
            preset: the configuration it was trained with, by name or in full.
            ema: take the averaged U-Net rather than the trained one.

        Raises:
            InputError: not such a file, or tensors missing, unexpected or of another shape (listed).
        """
        config = EncDiffConfig.from_preset(preset) if isinstance(preset, str) else preset
        state, scaling_factor = read_published(path, ema)
        config = replace(config, scaling_factor=scaling_factor)
        model = build_fitting(lambda: cls(config), {k: tuple(v.shape) for k, v in state.items()}, path)
        load_state(model, state, path)
        return model.eval()

    def save_published(self, path: str | Path) -> None:
        """Write a checkpoint in the published code's layout, which it reads if it knows the configuration.

        A model holds one U-Net: it becomes both the trained and the averaged copy.
        """
        write_published(path, self.state_dict(), self.config.scaling_factor)

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **hub
    ) -> str | None:
        """Write `model.safetensors`, `config.json` and a model card to a folder, each whole or not at all.

        With `push_to_hub`, also upload it as `repo_id` (default: the folder's name); `hub` is for `push_to_hub`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(folder, self.state_dict(), asdict(self.config))
        hub.pop("config", None)  # the base class passes it; ours is part of the model
        card = self.generate_model_card(**{"config": self.config} | (hub.pop("model_card_kwargs", None) or {}))
        with atomic_path(folder / "README.md") as temporary:
            temporary.write_text(str(card) + "\n", "utf-8")
        return self.push_to_hub(repo_id or folder.name, **hub) if push_to_hub else None

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | torch.device = "cpu", **hub) -> "EncDiff":
        """Read a model, in eval mode.

        Args:
            name: a folder that `save_pretrained` wrote, `room64` or `quickstart`, which come with the package, or the
                name of a model on the Hub.
            device: where to put it.
            hub: for a model on the Hub: revision, cache_dir, force_download, token, local_files_only.

        Raises:
            InputError: no such folder or model, a file missing or truncated, or tensors of another configuration.
        """
        config_path, weights_path = (locate(name, file, hub) for file in ("config.json", "model.safetensors"))
        model = load_model(lambda values: cls(EncDiffConfig.from_dict(values, config_path)), config_path, weights_path)
        return model.to(device).eval()

    # ---- checks

    def _codes(self, images: Tensor) -> Tensor:
        with evaluating(self):
            self._check_images(images, values=True)
            return self.encode(images)

    def _check_images(self, images: Tensor, values: bool = False) -> Tensor:
        """The images in the model's dtype; `values` also reads them on a GPU, which stalls it."""
        size = self.config.image_size
        if not isinstance(images, Tensor):
            raise InputError(f"images are {type(images).__name__}, must be a torch.Tensor; see encdiff.data.to_float")
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise InputError(f"images are {tuple(images.shape)}, must be (B, 3, {size}, {size})")
        if not images.is_floating_point():
            raise InputError(f"images are {images.dtype}, must be floating point in [-1, 1]; see encdiff.data.to_float")
        if (values or images.device.type == "cpu") and images.numel() and not torch.compiler.is_compiling():
            low, high = images.aminmax()
            if not (low >= -1.001 and high <= 1.001):  # false for NaN
                raise InputError(f"images span {low:.4g} to {high:.4g}, must lie in [-1, 1] without NaN")
        return images.to(self.encoder[0].weight.dtype)
