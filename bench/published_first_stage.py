"""The published form of the VQ first stage: GroupNorm, swish written out, attention by batched products."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from encdiff.models import EncDiffConfig


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def normalize(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.conv1 = normalize(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = normalize(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(swish(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = normalize(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h, (height, channels) = self.norm(x), (x.shape[2], x.shape[1])
        q, k, v = (rearrange(layer(h), "b c h w -> b c (h w)") for layer in (self.q, self.k, self.v))
        weights = torch.bmm(q.permute(0, 2, 1), k) * channels**-0.5
        out = torch.bmm(v, weights.softmax(dim=2).permute(0, 2, 1))
        return x + self.proj_out(rearrange(out, "b c (h w) -> b c h w", h=height))


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.attn_1 = ResnetBlock(channels, channels), AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Sampler(nn.Module):
    """Halves by a strided convolution padded right and below, or doubles by nearest and a convolution."""

    def __init__(self, channels: int, down: bool):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if down else nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    def __init__(self, c_in: int, c_out: int, depth: int, sample: str | None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_out if i else c_in, c_out) for i in range(depth))
        self.sample = sample
        if sample:
            setattr(self, sample, Sampler(c_out, sample == "downsample"))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return getattr(self, self.sample)(x) if self.sample else x


class Encoder(nn.Module):
    def __init__(self, widths: list[int], depth: int, channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        pairs = list(zip([widths[0], *widths], widths, strict=False))
        samples = ["downsample"] * (len(widths) - 1) + [None]
        self.down = nn.ModuleList(Level(i, o, depth, s) for (i, o), s in zip(pairs, samples, strict=True))
        self.mid, self.norm_out = Middle(widths[-1]), normalize(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(swish(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, widths: list[int], depth: int, channels: int):
        super().__init__()
        self.conv_in, self.mid = nn.Conv2d(channels, widths[-1], 3, padding=1), Middle(widths[-1])
        inputs = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            Level(inputs[i], widths[i], depth + 1, "upsample" if i else None) for i in range(len(widths))
        )
        self.norm_out, self.conv_out = normalize(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(swish(self.norm_out(x)))


class Quantizer(nn.Module):
    def __init__(self, codes: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)

    def forward(self, z: Tensor) -> Tensor:
        rows, codes = rearrange(z, "b c h w -> b h w c"), self.embedding.weight
        flat = rows.reshape(-1, rows.shape[-1])
        distances = (flat**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * torch.einsum("nc,kc->nk", flat, codes)
        return rearrange(self.embedding(distances.argmin(1)).view(rows.shape), "b h w c -> b c h w").contiguous()


class FirstStage(nn.Module):
    """Images (B, 3, S, S) to latents (B, 3, S/f, S/f) before quantisation, and latents, quantised, back."""

    channels = 3

    def __init__(self, config: EncDiffConfig):
        super().__init__()
        widths, c = [config.vq_width * m for m in config.vq_multipliers], self.channels
        self.encoder = Encoder(widths, config.vq_depth, c)
        self.decoder = Decoder(widths, config.vq_depth, c)
        self.quantize = Quantizer(config.vq_codes, c)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)

    def encode(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self.quantize(z)))
