"""The denoising U-Net, conditioned on the timestep and on concept tokens."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from encdiff import ops
from encdiff.errors import InputError
from encdiff.models.attention import (
    Conditioning,
    Sampling,
    SpatialTransformer,
    TransformerBlock,
    normalise,
    pointwise,
    project_tokens,
)
from encdiff.models.layers import Conv2d, Linear, channels_last, is_stock, part, zero_init
from encdiff.ops._dispatch import carried
from encdiff.ops.group_norm import norm_takes_bias
from encdiff.ops.residual_add import sum_takes_bias


class UNet(nn.Module):
    """The guided-diffusion / latent-diffusion U-Net with a spatial transformer at chosen levels and in the middle.

    Args:
        channels: of the latent, in and out.
        context_width: D, the width of a concept token; None: nothing cross-attends, whatever the tokens.
        width: base channels; level i has width * multipliers[i].
        multipliers: one per level, from the highest resolution down; each further level halves the resolution.
        depth: residual blocks per level on the way down; one more on the way up.
        attention_levels: levels with a spatial transformer after every residual block.
        heads: of every attention; divides every attending level's channels.
        transformer_depth: blocks per spatial transformer.
        self_attention: whether a block attends to its own features before the tokens.
        feedforward: how many times wider than its block a feed-forward layer is.
        scale_shift: the timestep scales and shifts the normalised features; otherwise it is added before the norm.
        resample: "residual" (a residual block with pooling or nearest upsampling inside) or "conv".
        groups: of every GroupNorm; divides every channel count.
        adagn_tokens: N where the concepts condition as the timestep does (AdaGN) and nothing cross-attends: their
            tokens side by side, through a linear layer, are added to its embedding. 0: cross-attention, the paper's.
        out_channels: where they are others than those that come in.

    Parameter names are those of the published checkpoints (without prefix).

    Source: arXiv 2105.05233, 2112.10752.
    """

    def __init__(
        self,
        channels: int = 3,
        context_width: int | None = 16,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        depth: int = 2,
        attention_levels: Sequence[int] = (0, 1, 2),
        heads: int = 8,
        transformer_depth: int = 1,
        self_attention: bool = True,
        feedforward: int = 4,
        scale_shift: bool = True,
        resample: str = "residual",
        groups: int = 32,
        adagn_tokens: int = 0,
        out_channels: int | None = None,
    ):
        super().__init__()
        _check(width, multipliers, attention_levels, heads, resample, groups)
        self.width = width
        self.checkpoint_activations = False  # in training: keep each stage's input only, and compute it anew
        emb = 4 * width
        self.time_embed = nn.Sequential(Linear(width, emb), nn.SiLU(), Linear(emb, emb))
        self.concept_embed = Linear(adagn_tokens * (context_width or 0), emb) if adagn_tokens else None
        context = None if adagn_tokens else context_width

        def res(c_in: int, c_out: int, sample: str | None = None) -> ResBlock:
            return ResBlock(c_in, c_out, emb, scale_shift, groups, sample)

        def attend(c: int) -> SpatialTransformer:
            return SpatialTransformer(c, context, heads, transformer_depth, groups, self_attention, feedforward)

        def resampled(c: int, kind: str) -> nn.Module:
            return res(c, c, kind) if resample == "residual" else Resample(c, kind)

        c = width
        self.input_blocks = nn.ModuleList([Stage(Conv2d(channels, c, 3, padding=1))])
        skips = [c]
        for level, multiplier in enumerate(multipliers):
            for _ in range(depth):
                layers: list[nn.Module] = [res(c, width * multiplier)]
                c = width * multiplier
                if level in attention_levels:
                    layers.append(attend(c))
                self.input_blocks.append(Stage(*layers))
                skips.append(c)
            if level < len(multipliers) - 1:
                self.input_blocks.append(Stage(resampled(c, "down")))
                skips.append(c)

        self.middle_block = Stage(res(c, c), attend(c), res(c, c))

        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for i in range(depth + 1):
                layers = [res(c + skips.pop(), width * multiplier)]
                c = width * multiplier
                if level in attention_levels:
                    layers.append(attend(c))
                if level > 0 and i == depth:
                    layers.append(resampled(c, "up"))
                self.output_blocks.append(Stage(*layers))

        self.out = nn.Sequential(
            nn.GroupNorm(groups, c), nn.SiLU(), zero_init(Conv2d(c, out_channels or channels, 3, padding=1))
        )
        # plain lists, not modules of a second name
        self.res_blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        self.attending = [module for module in self.modules() if isinstance(module, TransformerBlock)]
        for i, res_block in enumerate(self.res_blocks):
            res_block.place = i
        for i, transformer in enumerate(self.attending):
            transformer.place = i
        channels_last(self)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        tokens: Tensor,
        token_bias: Tensor | None = None,
        maps: list[Tensor] | None = None,
        sampling: Sampling | None = None,
        drop: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Tensor:
        """Predict from x_t (B, C, H, W), timesteps t (B,) and concept tokens (B, N, D); returns (B, C, H, W).

        token_bias (B, N) is added to every attention logit of a token; a list given as `maps` receives the attention
        of every layer, averaged over heads, as (B, h, w, N). Raises InputError for either where nothing cross-attends.
        `sampling` is what `begin_sampling` gave for these tokens; `drop` takes what each skip connection carries, and
        its place (`objectives.dropout`).
        """
        if self.concept_embed is not None and not (token_bias is None and maps is None):
            raise InputError("conditioning is 'adagn': there is no attention to concepts to bias or to show")
        cond = Conditioning(tokens, token_bias, maps, sampling=sampling)
        cond = cond._replace(projected=project_tokens(cond, self.attending))
        emb = self._times(t, tokens, sampling)
        h, skips = x, []
        for stage in self.input_blocks:
            h = self._apply_stage(stage, h, emb, cond)
            skips.append(h)
        h = self._apply_stage(self.middle_block, h, emb, cond)
        for place, stage in enumerate(self.output_blocks):
            skip = skips.pop() if drop is None else drop(skips.pop(), place)
            h = self._apply_stage(stage, torch.cat([h, skip], dim=1), emb, cond)
        return self.out[-1](normalise(h, part(self.out, 0, nn.GroupNorm), silu=True))

    def project(self, t: Tensor, tokens: Tensor | None = None) -> list[tuple[Tensor, ...]]:
        """What every residual block makes of timesteps (S,), and under AdaGN of tokens (S, N, D): `project_times`."""
        emb = self.time_embed(timestep_embedding(t, self.width).to(part(self.time_embed, 0, nn.Linear).weight.dtype))
        if self.concept_embed is not None and tokens is not None:
            emb = emb + self.concept_embed(tokens.flatten(1))
        return project_times(emb, self.res_blocks)

    @property
    def stages(self) -> list[nn.Module]:
        """Its parts in the order in which they compute."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def read_ahead(self) -> list[nn.Parameter]:
        """Parameters of stages that are read before these compute: the projections of all stages are one product."""
        linears = [module for block in self.res_blocks for module in block.emb_layers]
        linears += [
            linear
            for block in self.attending
            if block.cross_attention
            for linear in (block.attn2.to_k, block.attn2.to_v)
        ]
        return [parameter for linear in linears for parameter in linear.parameters()]

    def _times(self, t: Tensor, tokens: Tensor, sampling: Sampling | None) -> list[tuple[Tensor, ...]]:
        if sampling is None or sampling.times is None:
            return self.project(t, tokens)
        return [tuple(row[sampling.evaluation].expand(len(t), -1) for row in rows) for rows in sampling.times]

    def _apply_stage(self, stage: nn.Module, *inputs) -> Tensor:
        if self.checkpoint_activations and self.training:
            again = stage if torch.compiler.is_compiling() else carried(stage)
            return checkpoint(again, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
        return stage(*inputs)


def unet_of(model: Any) -> nn.Module:
    """The U-Net: itself, or that of an `EncDiff`, of a pipeline of diffusers or of latent-diffusion code's model."""
    unet = getattr(model, "unet", None) or getattr(getattr(model, "model", None), "diffusion_model", model)
    if not isinstance(unet, nn.Module):
        raise InputError(f"unet is a {type(model).__name__}, must be a U-Net, or a model or pipeline that has one")
    return unet


class Stage(nn.Sequential):
    """Layers in order, each given what it takes: residual blocks the timestep, transformers the concepts."""

    def forward(  # type: ignore[override]  # more than one input
        self, h: Tensor, emb: list[tuple[Tensor, ...]], cond: Conditioning
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb[layer.place])
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, cond)
            else:
                h = layer(h)
        return h


class ResBlock(nn.Module):
    """Two normalised convolutions, the timestep between them, and a skip; may halve or double the resolution."""

    def __init__(self, c_in: int, c_out: int, emb: int, scale_shift: bool, groups: int, sample: str | None):
        super().__init__()
        self.scale_shift, self.sample = scale_shift, sample
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, c_in), nn.SiLU(), Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(emb, 2 * c_out if scale_shift else c_out))
        # Identity keeps the place of the published code's dropout, and so the names
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, c_out), nn.SiLU(), nn.Identity(), zero_init(Conv2d(c_out, c_out, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if c_in == c_out else Conv2d(c_in, c_out, 1)
        self.place = 0  # among the residual blocks of a U-Net

    def forward(self, x: Tensor, emb: Tensor | tuple[Tensor, ...]) -> Tensor:
        """x (B, C, H, W) and the embedded timestep (B, E), or what `project_times` made of it for this block."""
        h, x = normalise(x, part(self.in_layers, 0, nn.GroupNorm), silu=True, with_input=True)
        if self.sample is not None:
            h, x = ops.resample(h, self.sample, beside=x)
        e = project_times(emb, [self])[0] if isinstance(emb, Tensor) else emb
        norm = part(self.out_layers, 0, nn.GroupNorm)
        if self.scale_shift:
            scale, shift = e
            h = convolve_normalise(h, self.in_layers[-1], norm, scale=scale, shift=shift, silu=True)
        else:
            h = normalise(self.in_layers[-1](h) + e[0][:, :, None, None], norm, silu=True)
        if isinstance(self.skip_connection, nn.Conv2d):
            x = pointwise(x, self.skip_connection)
        return convolve_add(x, h, self.out_layers[-1])


def convolve_normalise(x: Tensor, conv: nn.Module, norm: nn.GroupNorm, **options: Any) -> Tensor:
    """`normalise` of a convolution of x, whose bias it adds where that saves a launch."""
    affine = norm.weight, norm.bias, norm.num_groups, norm.eps
    if is_stock(conv, Conv2d) and conv.bias is not None and norm_takes_bias(x, *affine, **options):
        return normalise(conv(x, with_bias=False), norm, **options, x_bias=conv.bias)
    return normalise(conv(x), norm, **options)


def convolve_add(x: Tensor, h: Tensor, conv: nn.Module) -> Tensor:
    """x and a convolution of h, added with its bias at once where that saves a launch."""
    if is_stock(conv, Conv2d) and conv.bias is not None and sum_takes_bias(x, conv.bias):
        return ops.residual_add(x, conv(h, with_bias=False), conv.bias)
    return x + conv(h)


def project_times(emb: Tensor, blocks: list[ResBlock]) -> list[tuple[Tensor, ...]]:
    """What every block makes of the embedded timestep (B, E): (scale, shift), each (B, C), or (shift,).

    One product for all blocks, since each alone is too small for a GPU.
    """
    linears = [part(block.emb_layers, 1, nn.Linear) for block in blocks]
    weight, bias = (_join([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
    parts = [1 + block.scale_shift for block in blocks]
    widths = [len(linear.bias) // n for linear, n in zip(linears, parts, strict=True) for _ in range(n)]
    rows = iter(ops.linear(F.silu(emb), weight, bias).split(widths, dim=1))
    return [tuple(next(rows) for _ in range(n)) for n in parts]


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class Resample(nn.Module):
    """Halve the resolution by a strided convolution, or double it: nearest, then a convolution."""

    def __init__(self, channels: int, kind: str):
        super().__init__()
        self.kind, self._layer = kind, "op" if kind == "down" else "conv"  # the published code's names
        self.add_module(self._layer, Conv2d(channels, channels, 3, stride=2 if kind == "down" else 1, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self._layer)(x if self.kind == "down" else ops.resample(x, "up"))


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of t at width/2 frequencies from 1 down to 1/10000: (B,) -> (B, width), float32."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _check(width, multipliers, attention_levels, heads, resample, groups) -> None:
    if resample not in ("residual", "conv"):
        raise InputError(f"resample is {resample!r}, must be 'residual' or 'conv'")
    if width % 2:
        raise InputError(f"width is {width}, must be even")
    if any(level not in range(len(multipliers)) for level in attention_levels):
        raise InputError(f"attention_levels {tuple(attention_levels)} must lie in 0..{len(multipliers) - 1}")
    for level, channels in enumerate(width * m for m in multipliers):
        if channels % groups:
            raise InputError(f"level {level} has {channels} channels, must be a multiple of groups {groups}")
        if (level in attention_levels or level == len(multipliers) - 1) and channels % heads:
            raise InputError(f"level {level} has {channels} channels, must be a multiple of heads {heads}")
