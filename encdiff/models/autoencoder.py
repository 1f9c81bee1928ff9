"""First stages: between images (B,3,H,W) in [-1,1] and the latents on which diffusion runs.

`VQAutoencoder` is the learnt one of the paper (VQ regularised, from latent diffusion, arXiv 2112.10752, with the
quantiser of van den Oord et al., arXiv 1711.00937); `SpaceToDepth` has no parameters. `FirstStage` is what both share.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from encdiff import ops
from encdiff.checked import Checked, Codes, Depth, Multiple, Width
from encdiff.errors import InputError
from encdiff.files.checkpoint import load_model, save_model
from encdiff.ops._dispatch import is_transformed
from encdiff.ops._triton import autocast_off

SEARCH_ROWS = 8192  # latent positions compared with the codebook at a time: 64 MiB of distances for 2048 codes


class FirstStage(Protocol):
    """What a model needs of a first stage."""

    downsampling: int  # image pixels per latent position, along each side
    latent_channels: int

    def encode(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1], sides a multiple of `downsampling`, to the latent (B,c,H/f,W/f)."""

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B,c,h,w) to images (B,3,h*f,w*f), not clipped to [-1,1]."""


class SpaceToDepth(nn.Module):
    """Moves each `patch` x `patch` block of pixels into channels: a first stage without parameters, exact both ways."""

    def __init__(self, patch: int):
        super().__init__()
        if patch < 1:
            raise InputError(f"patch: {patch}; it must be at least 1")
        self.downsampling = patch
        self.latent_channels = 3 * patch**2

    def encode(self, images: Tensor) -> Tensor:
        _check_images(images, self.downsampling)
        return rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=self.downsampling, q=self.downsampling)

    def decode(self, z: Tensor) -> Tensor:
        _check_latent(z, self.latent_channels)
        return rearrange(z, "b (c p q) h w -> b c (h p) (w q)", p=self.downsampling, q=self.downsampling)


@dataclass(frozen=True)
class VQConfig(Checked):
    """What the `config.json` of a `VQAutoencoder` holds."""

    width: Width = 32
    multipliers: tuple[Multiple, ...] = (1, 2, 4)
    depth: Depth = 2
    latent_channels: Width = 3
    codebook_size: Codes = 2048


class VQAutoencoder(nn.Module):
    """The published VQ autoencoder; its state dict has the names and shapes of `first_stage_model.*` in a checkpoint.

    Level i of `multipliers` has `width * multipliers[i]` channels (a multiple of 32, for the group norms) and `depth`
    residual blocks, one more on the way up; between levels the resolution halves. Attention only at the lowest level.
    Diffusion runs on the latent before quantisation, so `encode` does not quantise and `decode` does.

    Raises:
        InputError: an argument is out of range, or images or latents have another shape than documented.
    """

    def __init__(
        self,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2, 4),
        depth: int = 2,
        latent_channels: int = 3,
        codebook_size: int = 2048,
    ):
        super().__init__()
        widths = [width * m for m in multipliers]
        if not widths or any(w < 1 or w % 32 for w in widths):
            raise InputError(f"width, multipliers: {width}, {tuple(multipliers)}; the products must be multiples of 32")
        if min(depth, latent_channels, codebook_size) < 1:
            raise InputError(
                f"depth, latent_channels, codebook_size: {depth}, {latent_channels}, {codebook_size}; each must be >= 1"
            )
        self.config: dict[str, Any] = {
            "width": width,
            "multipliers": list(multipliers),
            "depth": depth,
            "latent_channels": latent_channels,
            "codebook_size": codebook_size,
        }
        self.downsampling = 2 ** (len(widths) - 1)
        self.latent_channels = latent_channels
        self.encoder = Encoder(widths, depth, latent_channels)
        self.decoder = Decoder(widths, depth, latent_channels)
        self.quantize = VectorQuantizer(codebook_size, latent_channels)
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1] to the latent (B,c,H/f,W/f) before quantisation."""
        _check_images(images, self.downsampling)
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B,c,h,w), replaced by its nearest codes, to images (B,3,h*f,w*f), not clipped.

        A decoder in a narrower type than z rounds the codes, not the search for them; images are in z's type.
        """
        _check_latent(z, self.latent_channels)
        z_q = self.post_quant_conv(self.quantize.replace(z))
        return self.decoder(z_q.to(self.decoder.conv_in.weight.dtype)).to(z.dtype)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B,3,H,W) to (reconstruction (B,3,H,W), code indices (B,h,w) int64, codebook loss ())."""
        z_q, indices, codebook_loss = self.quantize(self.encode(images))
        return self.decoder(self.post_quant_conv(z_q)), indices, codebook_loss

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, each replaced in one piece."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(folder, self.state_dict(), self.config)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VQAutoencoder:
        """Read what `save_pretrained` wrote, on the CPU, in eval mode.

        Raises:
            InputError: a file is missing, damaged, or of another configuration.
        """
        config, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        if not (config.is_file() and weights.is_file()):
            raise InputError(f"{folder}: must be a folder with config.json and model.safetensors")
        source = f"{config}: not the configuration of a first stage"
        return load_model(lambda values: cls(**asdict(VQConfig.from_dict(values, source))), config, weights).eval()


class VectorQuantizer(nn.Module):
    """Nearest code, with the straight-through gradient (arXiv 1711.00937, section 3.2)."""

    def __init__(self, codebook_size: int, channels: int, beta: float = 0.25):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, channels)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        self.beta = beta

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latent z (B,c,h,w) to (codes z_q (B,c,h,w), indices (B,h,w) int64, codebook loss ()).

        The gradient of z_q passes to z unchanged. The loss is the paper's eq. 3, averaged over elements: beta weighs
        the commitment of z to its code. (The published latent-diffusion code has beta on the other term by default.)
        """
        indices = self.nearest(z)
        e = self._codes(indices)
        loss = F.mse_loss(e, z.detach()) + self.beta * F.mse_loss(z, e.detach())
        return z + (e - z).detach(), indices, loss

    def replace(self, z: Tensor) -> Tensor:
        """The codes alone, as `forward` gives them."""
        return z + (self._codes(self.nearest(z)) - z).detach()

    def _codes(self, indices: Tensor) -> Tensor:
        return rearrange(self.embedding(indices), "b h w c -> b c h w")

    @torch.no_grad()
    def fit(self, z: Tensor, generator: torch.Generator | None = None) -> None:
        """Set the codes to latents drawn from z (B,c,h,w), each position at most once while they last."""
        rows = rearrange(z, "b c h w -> (b h w) c")
        order = torch.randperm(len(rows), generator=generator)
        self.embedding.weight.copy_(rows[order[torch.arange(len(self.embedding.weight)) % len(rows)]])

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Indices (B,h,w) int64 of the codes nearest to z (B,c,h,w), compared in float32 (autocast or not)."""
        codes = self.embedding.weight.float()
        rows = rearrange(z, "b c h w -> (b h w) c").float()
        with autocast_off(z):
            found = [_nearest_rows(chunk, codes) for chunk in rows.split(SEARCH_ROWS)]
        return torch.cat(found).view(z.shape[0], *z.shape[2:])


def _nearest_rows(rows: Tensor, codes: Tensor) -> Tensor:
    # |z - e|^2 less its constant |z|^2, which would only round small differences between codes away
    return torch.addmm(codes.square().sum(1), rows, codes.T, alpha=-2).argmin(1)


class Encoder(nn.Module):
    """Images (B,3,H,W) to (B,c,H/f,W/f)."""

    def __init__(self, widths: list[int], depth: int, latent_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        inputs = [widths[0], *widths[:-1]]
        last = len(widths) - 1
        self.down = nn.ModuleList(DownLevel(inputs[i], w, depth, i < last) for i, w in enumerate(widths))
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(_normalise(self.mid(h), self.norm_out, silu=True))


class Decoder(nn.Module):
    """Codes (B,c,h,w) to images (B,3,h*f,w*f); `up[0]` is the highest resolution, as in published checkpoints."""

    def __init__(self, widths: list[int], depth: int, latent_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        inputs = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(UpLevel(inputs[i], w, depth + 1, i > 0) for i, w in enumerate(widths))
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z_q: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z_q))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(_normalise(h, self.norm_out, silu=True))


class DownLevel(nn.Module):
    def __init__(self, channels: int, out: int, depth: int, downsample: bool):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(out if i else channels, out) for i in range(depth))
        self.downsample = Downsample(out) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.downsample(x)


class UpLevel(nn.Module):
    def __init__(self, channels: int, out: int, depth: int, upsample: bool):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(out if i else channels, out) for i in range(depth))
        self.upsample = Upsample(out) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(x)


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = _norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_normalise(x, self.norm1, silu=True))
        h = self.conv2(_normalise(h, self.norm2, silu=True))
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """One head over all positions, its width the channels.

    Outside `ops.self_attention`, which has neither biases on queries, keys and values nor a GroupNorm before them.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = _normalise(x, self.norm)
        q, k, v = (rearrange(project(h), "b c h w -> b 1 (h w) c") for project in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)  # scale C^-1/2
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as published


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(ops.resample(x, "up"))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _normalise(x: Tensor, norm: nn.GroupNorm, silu: bool = False) -> Tensor:
    """In the features' own layout: the fused op's is channels-last, and exact float32 is faster without it."""
    if is_transformed(x) or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return F.silu(norm(x)) if silu else norm(x)
    return ops.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=silu)


def _check_images(images: Tensor, factor: int) -> None:
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] % factor or shape[3] % factor or not images.is_floating_point():
        raise InputError(
            f"images: {images.dtype} {shape}; must be floating point (B,3,H,W), H and W multiples of {factor}"
        )


def _check_latent(z: Tensor, channels: int) -> None:
    if z.ndim != 4 or z.shape[1] != channels:
        raise InputError(f"z: shape {tuple(z.shape)}; must be (B,{channels},h,w)")
