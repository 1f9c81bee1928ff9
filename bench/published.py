"""The published form of EncDiff, written anew from its description: what a user of the published code runs.

Separate projections, attention by einsum with its softmax written out, one module after the other for the bank's MLPs,
GroupNorm in float32, noising and sampling in eager PyTorch, contiguous NCHW throughout; no activation checkpointing.
State-dict names are those of the published checkpoints, so `load_state_dict(EncDiff(config).state_dict())` makes it
the same function as ours: `tests/test_published.py`. `attention="sdpa"` takes the stock fused attention instead.
"""

import copy
import math
from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bench.published_first_stage import FirstStage
from encdiff.diffusion import schedules
from encdiff.models import EncDiffConfig


class GroupNorm32(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class Attention(nn.Module):
    """Queries from x (B, L, C), keys and values from the context (B, N, D), or from x where there is none."""

    def __init__(self, width: int, context_width: int, heads: int, attention: str):
        super().__init__()
        self.heads, self.fused = heads, attention == "sdpa"
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        if self.fused:
            q, k, v = (rearrange(s, "b n (h d) -> b h n d", h=self.heads) for s in (q, k, v))
            return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        q, k, v = (rearrange(s, "b n (h d) -> (b h) n d", h=self.heads) for s in (q, k, v))
        logits = torch.einsum("bid,bjd->bij", q, k) * q.shape[-1] ** -0.5
        out = torch.einsum("bij,bjd->bid", logits.softmax(dim=-1), v)
        return self.to_out(rearrange(out, "(b h) n d -> b n (h d)", h=self.heads))


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int, factor: int):
        super().__init__()
        inner = factor * width
        self.net = nn.Sequential(GEGLU(width, inner), nn.Dropout(0.0), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int, factor: int, attention: str):
        super().__init__()
        self.attn1 = Attention(width, width, heads, attention)
        self.ff = FeedForward(width, factor)
        self.attn2 = Attention(width, context_width, heads, attention)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, context_width: int, heads: int, factor: int, groups: int, attention: str):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = BasicTransformerBlock(channels, context_width, heads, factor, attention)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height = x.shape[2]
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            h = block(h, context)
        return self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=height)) + x


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, emb: int, groups: int, sample: str | None = None):
        super().__init__()
        self.sample = sample
        self.in_layers = nn.Sequential(GroupNorm32(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * c_out))
        last = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.out_layers = nn.Sequential(GroupNorm32(groups, c_out), nn.SiLU(), nn.Dropout(0.0), last)
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[1](self.in_layers[0](x))
        if self.sample is not None:
            h, x = resample(h, self.sample), resample(x, self.sample)
        h = self.in_layers[2](h)
        scale, shift = self.emb_layers(emb).type(h.dtype)[..., None, None].chunk(2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(x) + self.out_layers[1:](h)


def resample(x: Tensor, kind: str) -> Tensor:
    return F.avg_pool2d(x, 2) if kind == "down" else F.interpolate(x, scale_factor=2, mode="nearest")


class Stage(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """x_t (B, c, h, w), timesteps (B,), tokens (B, N, D) -> predicted noise (B, c, h, w)."""

    def __init__(self, config: EncDiffConfig, channels: int, attention: str):
        super().__init__()
        self.width, emb = config.width, 4 * config.width
        groups, last = config.groups, len(config.multipliers) - 1

        def stage(c_in: int, c_out: int, attend: bool, sample: str | None = None) -> Stage:
            layers = [ResBlock(c_in, c_out, emb, groups)]
            if attend:
                options = config.token_width, config.heads, config.feedforward, groups, attention
                layers.append(SpatialTransformer(c_out, *options))
            if sample:
                layers.append(ResBlock(c_out, c_out, emb, groups, sample))
            return Stage(*layers)

        self.time_embed = nn.Sequential(nn.Linear(self.width, emb), nn.SiLU(), nn.Linear(emb, emb))
        c = self.width
        self.input_blocks, skips = nn.ModuleList([Stage(nn.Conv2d(channels, c, 3, padding=1))]), [c]
        for level, multiplier in enumerate(config.multipliers):
            for _ in range(config.depth):
                self.input_blocks.append(stage(c, config.width * multiplier, level in config.attention_levels))
                c = config.width * multiplier
                skips.append(c)
            if level < last:
                self.input_blocks.append(Stage(ResBlock(c, c, emb, groups, "down")))
                skips.append(c)
        self.middle_block = Stage(*stage(c, c, True), ResBlock(c, c, emb, groups))
        self.output_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            for i in range(config.depth + 1):
                out = config.width * config.multipliers[level]
                up = "up" if level and i == config.depth else None
                self.output_blocks.append(stage(c + skips.pop(), out, level in config.attention_levels, up))
                c = out
        self.out = nn.Sequential(GroupNorm32(groups, c), nn.SiLU(), nn.Conv2d(c, channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        emb = self.time_embed(timestep_embedding(t, self.width))
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class EncoderBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        first, second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.convs = nn.Sequential(nn.ReLU(), first, nn.BatchNorm2d(width), nn.ReLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x)


def image_encoder(config: EncDiffConfig) -> nn.Sequential:
    """Images (B, 3, S, S) -> scalars (B, N); every halving but the last but one ends in a ReLU."""
    width, halvings = config.encoder_width, (config.image_size // 4).bit_length() - 1
    layers: list[nn.Module] = []
    for i in range(halvings):
        layers += [nn.Conv2d(width if i else 3, width, 4, 2, 1), nn.BatchNorm2d(width)]
        layers += [nn.ReLU()] if i != halvings - 2 else []
    layers += [EncoderBlock(width), nn.BatchNorm2d(width), nn.ReLU(), EncoderBlock(width)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, config.concepts))


class Bank(nn.ModuleList):
    """One MLP after the other: scalars (B, N) -> tokens (B, N, d)."""

    def __init__(self, config: EncDiffConfig):
        first, second = config.bank_widths
        super().__init__(
            nn.Sequential(
                nn.Linear(1, first), nn.ELU(), nn.Linear(first, second), nn.ELU(), nn.Linear(second, config.token_width)
            )
            for _ in range(config.concepts)
        )

    def forward(self, scalars: Tensor) -> Tensor:
        return torch.stack([mlp(scalars[:, i : i + 1]) for i, mlp in enumerate(self)], dim=1)


class Published(nn.Module):
    """The whole model of one of the paper's configurations: VQ first stage, noise prediction, L1 loss."""

    def __init__(self, config: EncDiffConfig, attention: str = "einsum"):
        super().__init__()
        self.config = config
        self.first_stage_model = FirstStage(config).requires_grad_(False)
        self.model = nn.ModuleDict({"diffusion_model": UNet(config, self.first_stage_model.channels, attention)})
        self.cond_stage_model = nn.ModuleDict({"encoder": image_encoder(config), "net": Bank(config)})
        with torch.device("cpu"):  # also where the parameters are made on "meta"
            betas = schedules.make_betas(config.schedule, config.num_timesteps, config.beta_start, config.beta_end)
            alpha_bar = schedules.alphas_cumprod(betas)
        self.register_buffer("alpha_bar", alpha_bar.float(), persistent=False)
        self.register_buffer("signal", alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - alpha_bar).sqrt().float(), persistent=False)

    @property
    def unet(self) -> UNet:
        return self.model["diffusion_model"]

    @cached_property
    def alphas(self) -> list[float]:
        """`alpha_bar` on the host, where the published sampler has it."""
        return self.alpha_bar.tolist()

    def tokens(self, images: Tensor) -> Tensor:
        return self.cond_stage_model["net"](self.cond_stage_model["encoder"](images))

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        signal, sigma = (table.gather(-1, t).reshape(len(t), 1, 1, 1) for table in (self.signal, self.sigma))
        return signal * x0 + sigma * noise

    def loss(self, images: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            x0 = self.config.scaling_factor * self.first_stage_model.encode(images)
        t = torch.randint(0, self.config.num_timesteps, (len(images),), device=images.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        predicted = self.unet(self.q_sample(x0, t, noise), t, self.tokens(images))
        return (noise - predicted).abs().mean(dim=(1, 2, 3)).mean()

    @torch.no_grad()
    def sample(self, scalars: Tensor, x_T: Tensor, steps: int, eta: float = 0.0, unet=None) -> Tensor:
        """Images from scalars (B, N) by DDIM; `unet` stands in for the model's own, such as a compiled one."""
        unet, tokens, x = unet or self.unet, self.cond_stage_model["net"](scalars), x_T
        timesteps = schedules.ddim_timesteps(steps, self.config.num_timesteps).tolist()
        alphas = self.alphas
        for i in reversed(range(steps)):
            alpha, before = alphas[timesteps[i]], alphas[timesteps[i - 1]] if i else alphas[0]
            sigma = eta * math.sqrt((1 - before) / (1 - alpha) * (1 - alpha / before))
            a, a_prev, s = (torch.full((len(x), 1, 1, 1), value, device=x.device) for value in (alpha, before, sigma))
            e = unet(x, torch.full((len(x),), timesteps[i], device=x.device), tokens)
            x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
            x = a_prev.sqrt() * x0 + (1 - a_prev - s**2).sqrt() * e + s * torch.randn_like(x)
        return self.to_images(x)

    def to_images(self, latents: Tensor) -> Tensor:
        return self.first_stage_model.decode(latents / self.config.scaling_factor).clamp(-1, 1)


class PublishedTraining:
    """The published training step: AdamW, and the U-Net's average tensor by tensor. `fast` makes both fused.

    `capturable`: the optimiser keeps its count on the device, so that a step can be captured in a CUDA graph.
    """

    def __init__(
        self,
        model: Published,
        learning_rate: float,
        loss=None,
        precision: str = "float32",
        fast=False,
        capturable=False,
    ):
        self.model, self.loss, self.fast = model.train(), loss or model.loss, fast
        self.device, self.precision, self.updates = next(model.parameters()).device, precision, 0
        self.average = copy.deepcopy(model.unet).requires_grad_(False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, learning_rate, fused=fast or None, capturable=capturable)

    def advance(self, images: Tensor) -> Tensor:
        """One step on float images (B, 3, S, S); returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.loss(images)
        loss.backward()
        self.optimizer.step()
        self._average()
        return loss.detach()

    @torch.no_grad()
    def _average(self) -> None:
        self.updates += 1
        decay = min(0.9999, (1 + self.updates) / (10 + self.updates))
        pairs = list(zip(self.average.parameters(), self.model.unet.parameters(), strict=True))
        if self.fast:
            torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - decay)
            return
        for average, parameter in pairs:
            average.sub_((1 - decay) * (average - parameter))
