"""The spatial transformer of the U-Net: self-attention, cross-attention to the concept tokens, GEGLU."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from encdiff import ops
from encdiff.diffusion.gate import Mode
from encdiff.models.layers import Conv2d, Linear, is_stock, part, zero_init
from encdiff.ops._beside import adjoined, give, sink_of
from encdiff.ops._dispatch import is_transformed
from encdiff.ops.cross_attention_folded import Folded, cross_attention_folded, fold, fold_pays
from encdiff.ops.projection import projects


@dataclass
class Sampling:
    """What one sampling keeps from one evaluation of the U-Net to the next, by a block's place in it.

    `times` has what every residual block makes of the timesteps, tensors (evaluations, C), and `evaluation` says which
    row is the next; without it that is computed from the timestep. `gate` says whether every cross-attention is
    computed, or its output kept, too, or what was kept is given again; `self_gate` the same of self-attentions
    (`diffusion.gate.TGate`).
    """

    tokens: Tensor
    folded: dict[int, Folded] = field(default_factory=dict)  # the tokens, where attending to that is faster
    projected: list[tuple[Tensor, Tensor] | None] | None = None  # of `project_tokens`, of the others
    projections: dict[int, tuple[Tensor, ...]] = field(
        default_factory=dict
    )  # of self-attentions, as `adjoined` lays them
    times: list[tuple[Tensor, ...]] | None = None
    evaluation: int = 0
    gate: Mode = "compute"
    self_gate: Mode = "compute"
    outputs: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # by kind of attention and block


class Conditioning(NamedTuple):
    """What every cross-attention of the U-Net is given."""

    tokens: Tensor  # S (B, N, D)
    token_bias: Tensor | None = None  # (B, N), added to the logits
    maps: list[Tensor] | None = None  # collects (B, h, w, N), the attention averaged over heads, layer by layer
    projected: list[tuple[Tensor, Tensor] | None] | None = None  # of `project_tokens`, by a block's place
    sampling: Sampling | None = None  # that this evaluation belongs to

    @property
    def gate(self) -> Mode:
        return "compute" if self.sampling is None else self.sampling.gate

    @property
    def self_gate(self) -> Mode:
        return "compute" if self.sampling is None else self.sampling.self_gate

    def folded(self, place: int) -> Folded | None:
        """What the sampling's tokens became for a block, if they are these."""
        if self.sampling is None or self.sampling.tokens is not self.tokens:
            return None
        return self.sampling.folded.get(place)


class Attention(nn.Module):
    """The weights of one attention; the ops apply them."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(Linear(width, width))

    @property
    def out(self) -> nn.Linear:
        return part(self.to_out, 0, nn.Linear)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.to_q.weight, self.to_k.weight, self.to_v.weight, self.out.weight, self.out.bias


class GEGLU(nn.Module):
    """(h, g) = proj(x); h * GELU(g)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        return ops.geglu(self.proj(x))


class FeedForward(nn.Module):
    """Linear(GEGLU(x)), `factor` times as wide inside."""

    def __init__(self, width: int, factor: int):
        super().__init__()
        # Identity keeps the place of the published code's dropout, and so the names
        self.net = nn.Sequential(GEGLU(width, factor * width), nn.Identity(), Linear(factor * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def stock_layers(ff: nn.Module) -> tuple[Linear, Linear] | None:
    """The two of a feed-forward layer whose parts are those that it was made of, without hooks; else None.

    Not where an adapter such as LoRA's or a dropout stands in the place of a part.
    """
    if type(ff) is not FeedForward or type(ff.net) is not nn.Sequential:
        return None
    *_, last, first = parts = [ff, ff.net, *ff.net, *ff.net[0].children()]
    kinds = [FeedForward, nn.Sequential, GEGLU, nn.Identity, Linear, Linear]
    return (first, last) if len(parts) == len(kinds) and all(map(is_stock, parts, kinds)) else None


class TransformerBlock(nn.Module):
    """[x += SelfAttn(LN(x));] [x += CrossAttn(LN(x), S);] x += FF(LN(x)); without `context_width` no CrossAttn."""

    def __init__(self, width: int, context_width: int | None, heads: int, self_attention: bool, feedforward: int):
        super().__init__()
        if self_attention:
            self.attn1 = Attention(width, width, heads)
            self.norm1 = nn.LayerNorm(width)
        self.self_attention = self_attention
        self.ff = FeedForward(width, feedforward)
        self.cross_attention = context_width is not None
        if context_width is not None:
            self.attn2 = Attention(width, context_width, heads)
            self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.place = 0  # among the blocks of a U-Net

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        if self.self_attention:
            x = self._gated("self", cond.self_gate, x, cond, self._self_attend)
        if self.cross_attention:
            x = self._gated("cross", cond.gate, x, cond, self._cross_attend)
        return self._feed(x)

    def _feed(self, x: Tensor) -> Tensor:
        """x + FF(LN(x)), in two launches where no gradients are asked for."""
        stock, norm = stock_layers(self.ff), _norm(self.norm3)
        if stock is not None and projects(x, stock[0].weight, stock[0].bias, gated=True, **norm):
            first, last = stock
            h = ops.projection(x, first.weight, first.bias, gated=True, **norm)
            return ops.projection(h, last.weight, last.bias, residual=x)
        h, x = ops.layer_norm(x, self.norm3.weight, self.norm3.bias, self.norm3.eps, with_input=True)
        if stock is None:
            return x + self.ff(h)
        return ops.linear(self.ff.net[0](h), stock[1].weight, stock[1].bias, residual=x)

    def _gated(self, kind: str, mode: Mode, x: Tensor, cond: Conditioning, attend: Callable[..., Tensor]) -> Tensor:
        """x + attention: computed, and kept where asked for, or what was kept."""
        if mode == "compute":
            return attend(x, cond)
        assert cond.sampling is not None, "who gates is sampling"
        if mode == "keep":
            cond.sampling.outputs[kind, self.place] = attend(x, cond, residual=False)
        return x + cond.sampling.outputs[kind, self.place]

    def _self_attend(self, x: Tensor, cond: Conditioning, residual: bool = True) -> Tensor:
        attn, sampling = self.attn1, cond.sampling
        w_q, w_k, w_v, w_o, b_o = attn.weights()
        if sampling is not None and self.place in sampling.projections:
            w_q, w_k, w_v = sampling.projections[self.place]
        return ops.self_attention(x, w_q, w_k, w_v, w_o, b_o, heads=attn.heads, residual=residual, **_norm(self.norm1))

    def _cross_attend(self, x: Tensor, cond: Conditioning, residual: bool = True) -> Tensor:
        maps = None if cond.maps is None else "mean"
        options: dict[str, Any] = dict(residual=residual, token_bias=cond.token_bias, maps=maps, **_norm(self.norm2))
        if (folded := cond.folded(self.place)) is not None:
            y = cross_attention_folded(x, folded, self.attn2.out.bias, **options)
        else:
            options |= {"heads": self.attn2.heads, "projected": cond.projected and cond.projected[self.place]}
            y = ops.cross_attention(x, cond.tokens, *self.attn2.weights(), **options)
        if cond.maps is not None:
            y, attention = y
            cond.maps.append(attention)
        return y


def project_tokens(cond: Conditioning, blocks: list[TransformerBlock]) -> list[tuple[Tensor, Tensor] | None] | None:
    """Keys and values (B, N, heads*d) of every block that asks for them, in one product; None: each makes its own."""
    tokens, kept = cond.tokens, cond.sampling
    if cond.gate == "reuse":
        return None
    if kept is not None and kept.projected is not None and kept.tokens is tokens:
        return kept.projected
    asking = [b for b in blocks if b.cross_attention and cond.folded(b.place) is None]
    if not asking or (kept is None and not projecting_pays(tokens)):
        return None
    weights = [w for block in asking for w in (block.attn2.to_k.weight, block.attn2.to_v.weight)]
    parts = iter(F.linear(tokens, torch.cat(weights)).split([len(w) for w in weights], dim=-1))
    return [(next(parts), next(parts)) if block in asking else None for block in blocks]


def projecting_pays(tokens: Tensor) -> bool:
    """On a GPU: there a product of so few tokens takes as long as its launch."""
    return tokens.is_cuda


def begin_sampling(tokens: Tensor, blocks: list[TransformerBlock]) -> Sampling:
    """The state of a sampling under these tokens (B, N, D), folded once where attending to that is faster."""
    sampling = Sampling(tokens)
    for block in blocks:
        if block.self_attention and projecting_pays(tokens):
            sampling.projections[block.place] = adjoined(*block.attn1.weights()[:3])
        if block.cross_attention:
            *weights, bias = block.attn2.weights()
            if fold_pays(tokens, len(bias), block.attn2.heads):
                sampling.folded[block.place] = fold(tokens, *weights, heads=block.attn2.heads)
    sampling.projected = project_tokens(Conditioning(tokens, sampling=sampling), blocks)
    return sampling


class SpatialTransformer(nn.Module):
    """GroupNorm, 1x1 convolution in, transformer blocks over h*w positions, 1x1 convolution out (zero at first), add.

    Maps (B, C, h, w) to the same shape.
    """

    def __init__(
        self,
        channels: int,
        context_width: int | None,
        heads: int,
        depth: int = 1,
        groups: int = 32,
        self_attention: bool = True,
        feedforward: int = 4,
    ):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_width, heads, self_attention, feedforward) for _ in range(depth)
        )
        self.proj_out = zero_init(Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        height = x.shape[2]
        h, x = normalise(x, self.norm, with_input=True)
        h = rearrange(pointwise(h, self.proj_in), "b c h w -> b (h w) c")
        first_map = 0 if cond.maps is None else len(cond.maps)
        for block in self.transformer_blocks:
            h = block(h, cond)
        if cond.maps is not None:
            cond.maps[first_map:] = [rearrange(m, "b (h w) n -> b h w n", h=height) for m in cond.maps[first_map:]]
        return pointwise(rearrange(h, "b (h w) c -> b c h w", h=height), self.proj_out, residual=x)


def pointwise(x: Tensor, conv: nn.Conv2d, residual: Tensor | None = None) -> Tensor:
    """A 1x1 convolution of (B, C, H, W) [+ residual]; of channels-last features as a product.

    That adds the bias itself, where cuDNN would add it in a pass of its own.
    """
    if is_transformed(x) or not x.is_contiguous(memory_format=torch.channels_last):
        return conv(x) if residual is None else residual + conv(x)
    weight = conv.weight  # as a matrix by a view whose gradient has the weight's own strides: fused AdamW asks for them
    weight = weight.flatten(1) if weight.stride(3) == 1 else weight.permute(0, 2, 3, 1).flatten(1)
    if not torch.compiler.is_compiling() and (sink := sink_of(conv.weight)) is not None:
        give(weight, sink.as_matrix())
    rows = x.flatten(2).transpose(1, 2)
    if residual is None:
        y = ops.linear(rows, weight, conv.bias)
    else:
        y = ops.projection(rows, weight, conv.bias, residual=residual.flatten(2).transpose(1, 2))
    return y.transpose(1, 2).unflatten(2, x.shape[2:])


def normalise(x: Tensor, norm: nn.GroupNorm, **options: Any) -> Tensor:
    """`group_norm` with a module's parameters."""
    return ops.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, **options)


def _norm(norm: nn.LayerNorm) -> dict:
    return {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}
