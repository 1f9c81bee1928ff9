"""Spatial queries attend to a short list of concept tokens: y = x + Wo Attn(LN(x) Wq, S Wk, S Wv) + bo."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops._dispatch import Implementation, Op, always


def cross_attention_reference(
    x, context, w_q, w_k, w_v, w_o, b_o=None, *,
    heads, norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False, token_bias=None, maps=None,
):  # fmt: skip
    """The formula in float32, whatever the storage type; see `cross_attention`."""
    with exact(x) as dtype:
        h = layer_norm(x.to(dtype), norm_weight, norm_bias, norm_eps)
        q, k, v = (
            split_heads(s.to(dtype) @ w.to(dtype).T, heads) for s, w in ((h, w_q), (context, w_k), (context, w_v))
        )
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if token_bias is None:
            p = logits.softmax(-1)
        else:  # a row whose tokens are all masked attends to nothing, rather than NaN
            logits = logits + per_head(token_bias).to(dtype)
            masked = logits.isneginf().all(-1, keepdim=True)
            p = logits.masked_fill(masked, 0.0).softmax(-1).masked_fill(masked, 0.0)
        y = project_out(merge_heads(p @ v), w_o, b_o, x if residual else None).to(x.dtype)
    if maps is None:
        return y
    return y, (p if maps == "head" else p.mean(1)).to(x.dtype)


def cross_attention_sdpa(
    x, context, w_q, w_k, w_v, w_o, b_o=None, *,
    heads, norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False, token_bias=None, maps=None,
):  # fmt: skip
    """The stock fused attention between separate projections; cannot return maps."""
    h = layer_norm(x, norm_weight, norm_bias, norm_eps)
    q, k, v = (split_heads(F.linear(s, w), heads) for s, w in ((h, w_q), (context, w_k), (context, w_v)))
    a = F.scaled_dot_product_attention(q, k, v)
    return project_out(merge_heads(a), w_o, b_o, x if residual else None)


def _sdpa_reasons(x, context, *weights, maps=None, token_bias=None, **_) -> list[str]:
    reasons = []
    if maps is not None:
        reasons.append("does not return attention maps")
    if token_bias is not None:
        reasons.append("a fully masked row is not defined")
    if x.shape[0] == 0 or x.shape[1] == 0:
        reasons.append("needs at least one query")
    return reasons


_op = Op(
    "cross_attention",
    [
        Implementation("sdpa", cross_attention_sdpa, _sdpa_reasons),
        Implementation("reference", cross_attention_reference, always),
    ],
)


def cross_attention(
    x: Tensor,
    context: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    b_o: Tensor | None = None,
    *,
    heads: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    residual: bool = False,
    token_bias: Tensor | None = None,
    maps: Literal["head", "mean"] | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-attention from B x L queries to N concept tokens, with its projections, LayerNorm and residual.

        y = [x +] softmax(LN(x) Wq^T (S Wk^T)^T / sqrt(d) + token_bias) (S Wv^T) Wo^T + bo

    Args:
        x: queries (B, L, C); any strides, L and B may be 0.
        context: tokens S (B, N, D).
        w_q: (heads*d, C); w_k, w_v: (heads*d, D); w_o: (C, heads*d); b_o: (C,) or None.
        heads: number of heads; divides the rows of w_q.
        norm_weight, norm_bias: (C,) of a LayerNorm over C before the queries; both None: no LayerNorm.
        residual: add x to the result.
        token_bias: added to the logits of each token, (B, N) or (B, heads, N): -inf masks a concept, log 2 doubles its
            odds. A row whose tokens are all masked attends to nothing.
        maps: also return the attention, "head" (B, heads, L, N) or "mean" over heads (B, L, N).
        impl: force an implementation (`encdiff.explain` lists them); None chooses.

    Returns:
        y (B, L, C) in x's dtype; with `maps`, the pair (y, maps).

    Raises:
        InputError: shapes, devices or dtypes that do not fit, or a forced implementation that cannot serve.

    Source: arXiv 2402.09712, section 3.2; attention as in arXiv 2112.10752, eq. 5.
    """
    _check(x, context, w_q, w_k, w_v, w_o, heads, token_bias, maps)
    return _op(
        x, context, w_q, w_k, w_v, w_o, b_o, heads=heads, norm_weight=norm_weight, norm_bias=norm_bias,
        norm_eps=norm_eps, residual=residual, token_bias=token_bias, maps=maps, impl=impl,
    )  # fmt: skip


def _check(x, context, w_q, w_k, w_v, w_o, heads, token_bias, maps) -> None:
    if x.ndim != 3 or context.ndim != 3 or x.shape[0] != context.shape[0]:
        raise InputError(f"x {tuple(x.shape)} and context {tuple(context.shape)} must be (B, L, C) and (B, N, D)")
    if context.device != x.device:
        raise InputError(f"context is on {context.device}, must be on x's device {x.device}")
    inner = w_q.shape[0]
    if heads < 1 or inner % heads:
        raise InputError(f"heads {heads} must divide the {inner} rows of w_q")
    (channels, width), tokens = (x.shape[2], context.shape[2]), context.shape[1]
    expected = {"w_q": (inner, channels), "w_k": (inner, width), "w_v": (inner, width), "w_o": (channels, inner)}
    for (name, shape), w in zip(expected.items(), (w_q, w_k, w_v, w_o), strict=True):
        if tuple(w.shape) != shape:
            raise InputError(
                f"{name} is {tuple(w.shape)}, must be {shape} for x {tuple(x.shape)}, context width {width}"
            )
    if token_bias is not None and tuple(token_bias.shape) not in ((x.shape[0], tokens), (x.shape[0], heads, tokens)):
        raise InputError(f"token_bias is {tuple(token_bias.shape)}, must be (B, N) or (B, heads, N) with N = {tokens}")
    if maps not in (None, "head", "mean"):
        raise InputError(f"maps is {maps!r}, must be None, 'head' or 'mean'")


@contextmanager
def exact(x: Tensor) -> Iterator[torch.dtype]:
    """Switch autocast off and give the dtype a reference computes in: float32, or float64 for gradient checks."""
    with torch.autocast(x.device.type, enabled=False):
        yield torch.float64 if x.dtype == torch.float64 else torch.float32


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else F.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), bias.to(x.dtype), eps)


def split_heads(s: Tensor, heads: int) -> Tensor:
    return rearrange(s, "b n (h d) -> b h n d", h=heads)


def merge_heads(s: Tensor) -> Tensor:
    return rearrange(s, "b h n d -> b n (h d)")


def per_head(token_bias: Tensor) -> Tensor:
    """(B, N) or (B, heads, N) -> (B, 1 or heads, 1, N), to be added to logits (B, heads, L, N)."""
    return token_bias[:, None, None] if token_bias.ndim == 2 else token_bias[:, :, None]


def project_out(a: Tensor, w_o: Tensor, b_o: Tensor | None, residual: Tensor | None) -> Tensor:
    """a Wo^T + bo [+ residual]."""
    y = F.linear(a, w_o.to(a.dtype), None if b_o is None else b_o.to(a.dtype))
    return y if residual is None else residual + y
