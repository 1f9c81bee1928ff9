"""Spatial queries attend to a short list of concept tokens: y = x + Wo Attn(LN(x) Wq, S Wk, S Wv) + bo."""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from encdiff.errors import InputError
from encdiff.kernels.cross_attention.plan import (
    FEW_TOKENS,
    MAX_TOKENS,
    SHORT,
    can_fold,
    choose_route,
    head_width_limit,
    heads_tile,
    is_tiled,
)
from encdiff.ops import _self_check
from encdiff.ops._attention import (
    bias_kind,
    check_weights,
    exact,
    fill_heads,
    kernel_bias,
    layer_norm,
    merge_heads,
    native_attention,
    native_doubts,
    native_reasons,
    product_dtype,
    products_out,
    project_out,
    softmax,
    split_heads,
    stock_attention,
    stock_layer_norm,
    stock_project_out,
    triton_reasons,
    with_maps,
)
from encdiff.ops._dispatch import Implementation, Op, always
from encdiff.ops._triton import NAMES, has_gradient, interpreted
from encdiff.ops._types import check_floating, mixed
from encdiff.ops.cross_attention_folded import (
    Folded,
    check_options,
    cross_attention_folded_triton,
    failed_folded,
    fold_by_head,
)
from encdiff.ops.linear import linear


def cross_attention_reference(
    x, context, w_q, w_k, w_v, w_o, b_o=None, *,
    heads, norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False, token_bias=None, maps=None, projected=None,
):  # fmt: skip
    """The formula in float32, whatever the storage type; see `cross_attention`."""
    with exact(x) as dtype:
        h = stock_layer_norm(x.to(dtype), norm_weight, norm_bias, norm_eps)
        w_q, *tokens = (t.to(dtype) for t in (w_q, *(projected or (context, w_k, w_v))))
        k, v = tokens if projected else (tokens[0] @ w.T for w in tokens[1:])
        q, k, v = (split_heads(t, heads) for t in (h @ w_q.T, k, v))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        p = softmax(logits, token_bias)
        y = stock_project_out(merge_heads(p @ v), w_o, b_o, x if residual else None).to(x.dtype)
    return with_maps(y, p, maps)


def _between_projections(what, attention):
    """The op with `attention(q, k, v, heads[, token_bias])` between separate projections."""

    def run(
        x, context, w_q, w_k, w_v, w_o, b_o=None, *,
        heads, norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False, token_bias=None, maps=None,
        projected=None,
    ):  # fmt: skip
        h, x = layer_norm(x, norm_weight, norm_bias, norm_eps)
        bias = () if token_bias is None else (token_bias,)
        a = attention(F.linear(h, w_q), *(projected or _project(context, w_k, w_v)), heads, *bias)
        return project_out(a, w_o, b_o, x if residual else None)

    run.__name__ = f"cross_attention_{attention.__name__}"
    run.__doc__ = f"{what} between separate projections."
    return run


def _sdpa_reasons(x, context, *weights, maps=None, projected=None, **_) -> list[str]:
    reasons = _mixed(x, context, *weights[:3], projected=projected)
    if maps is not None:
        reasons.append("does not return attention maps")
    if x.shape[0] == 0 or x.shape[1] == 0:
        reasons.append("needs at least one query")
    return reasons


def _mixed(x, context, w_q, w_k, w_v, *, projected) -> list[str]:
    return mixed(x, w_q, *(projected or (context, w_k, w_v)))


def _native_reasons(x, context, w_q, *weights, heads, maps=None, token_bias=None, projected=None, **_) -> list[str]:
    reasons = native_reasons(x, w_q.shape[0] // heads) + _mixed(x, context, w_q, *weights[:2], projected=projected)
    if maps is not None:
        reasons.append("does not return attention maps")
    if token_bias is not None:
        reasons.append("takes no token bias")
    return reasons


def _native_doubts(x, context, w_q, *weights, heads, **_) -> list[str]:
    """It pays for Stable Diffusion's heads of 40, too (bench/stable_diffusion.py)."""
    return native_doubts(w_q.shape[0] // heads, 40)


def cross_attention_transposed(
    x, context, w_q, w_k, w_v, w_o, b_o=None, *,
    heads, norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False, token_bias=None, maps=None, projected=None,
):  # fmt: skip
    """Queries as the last axis: no copy to split or merge heads, products unpadded, softmax in vectors of queries.

    Some samples at a time, so that what lies between x and y stays in a core's cache.
    """
    with exact(x) as dtype:
        s, w_q, w_k, w_v, w_o = (t.to(dtype) for t in (context, w_q, w_k, w_v, w_o))
        scale = (w_q.shape[0] // heads) ** -0.5
        k, v = (F.linear(s, w_k * scale), w_v @ s.mT) if projected is None else _scaled(projected, scale, dtype)
        k, v = split_heads(k, heads), v.unflatten(1, (heads, -1))  # (B, H, N, d), (B, H, d, N)

        def attend(x, k, v, token_bias=None):
            h, _ = layer_norm(x.to(dtype), norm_weight, norm_bias, norm_eps)
            q = torch.bmm(w_q.expand(len(x), -1, -1), h.mT).unflatten(1, (heads, -1))  # (B, H, d, L)
            p = softmax(k @ q, token_bias, dim=-2)  # (B, H, N, L)
            a = (v @ p).flatten(1, 2)  # (B, H*d, L)
            y = products_out(a.mT, w_o.T.expand(len(x), -1, -1), b_o, x if residual else None).to(x.dtype)
            return with_maps(y, p, maps, mT=True)

        inputs = [t for t in (x, k, v, token_bias) if t is not None]
        if torch.compiler.is_compiling() or len(x) <= _together(k, x.shape[1]):  # a graph holds no loop over a batch
            return attend(*inputs)
        parts = [attend(*part) for part in zip(*(t.split(_together(k, x.shape[1])) for t in inputs), strict=True)]
    return torch.cat(parts) if maps is None else tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _project(context: Tensor, w_k: Tensor, w_v: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(context, w_k), F.linear(context, w_v)


def _scaled(projected: tuple[Tensor, Tensor], scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scaled keys (B, N, H*d), and values (B, H*d, N)."""
    k, v = projected
    return k.to(dtype) * scale, v.to(dtype).mT


def _together(k: Tensor, queries: int) -> int:
    """How many samples have a mebibyte of logits, for k (B, H, N, d)."""
    return max(1, 2**18 // max(1, k.shape[1] * k.shape[2] * queries))


def cross_attention_triton(
    x, context, w_q, w_k, w_v, w_o, b_o=None, *,
    heads, norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False, token_bias=None, maps=None, projected=None,
):  # fmt: skip
    """The kernels of `encdiff.kernels.cross_attention`, on the route that their cost model chooses."""
    dtype = product_dtype(x)
    options = dict(norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=norm_eps, residual=residual)
    options |= dict(token_bias=token_bias, maps=maps)
    gradients = has_gradient(x, context, w_q, w_k, w_v, w_o, b_o, norm_weight, norm_bias, token_bias, *projected or ())
    route, _ = _route(x, context, w_q, heads, b_o, norm_weight, residual, token_bias, maps, gradients)
    k, v = projected or _project(*(t.to(dtype) for t in (context, w_k, w_v)))
    k, v, w_q, w_o = (t.to(dtype) for t in (k, v, w_q, w_o))
    if route == "folded":
        folded = Folded(*(t.transpose(0, 1) for t in fold_by_head(k, v, w_q, w_o, heads)))
        return cross_attention_folded_triton(x, folded, b_o, **options)
    return _by_heads(x, k, v, w_q, w_o, b_o, heads=heads, **options)


def _route(
    x, context, w_q, heads, b_o, norm_weight, residual, token_bias, maps, gradients
) -> tuple[str, list[str]]:  # fmt: skip
    """The route that is predicted to be the fastest of those whose kernels are right on x's card; or why none is."""
    tokens, width, size = context.shape[1], w_q.shape[0] // heads, product_dtype(x).itemsize
    preferred, against = choose_route(*x.shape[1:], tokens, heads, size), []
    if preferred == "folded":
        against = failed_folded(x, b_o, norm_weight, token_bias, residual, maps, gradients)
        if not against:
            return "folded", []
    if width > head_width_limit(size):
        return "heads", against
    checked = x, x.shape[1], tokens, width, bias_kind(token_bias), maps is not None
    return "heads", _self_check.reasons("cross_attention_heads", x, _heads_variant, *checked, gradients=gradients)


def _heads_variant(x, queries, tokens, width, *flags) -> tuple:
    """With one number of tokens for all that take the same kernels."""
    width, dtype = -(-width // 8) * 8, product_dtype(x)
    few, tiled = tokens <= FEW_TOKENS, is_tiled(tokens, width, dtype.itemsize)
    short = few and heads_tile("fwd", queries, tokens, width, dtype.itemsize) == SHORT
    return NAMES[dtype], width, 20 if few else 150 if tiled else 100, short, *flags


def _by_heads(x, k, v, w_q, w_o, b_o, *, heads, norm_weight, norm_bias, norm_eps, residual, token_bias, maps):
    """Ordinary projections around the attention in Triton; widths of heads are filled up to multiples of 8."""
    from encdiff.kernels.cross_attention import cross_attention_heads as kernel

    width = w_q.shape[0] // heads
    if width % 8:
        w_q, w_o = fill_heads(w_q, heads, -width % 8), fill_heads(w_o.T, heads, -width % 8).T
        k, v = (F.pad(t.unflatten(-1, (heads, -1)), (0, -width % 8)).flatten(-2) for t in (k, v))
    h, x = layer_norm(x, norm_weight, norm_bias, norm_eps)
    q, bias = linear(h.to(k.dtype), w_q).contiguous(), kernel_bias(token_bias, heads)
    a, _, p = kernel(q, k, v, bias, heads, width**-0.5, maps is not None)
    y = project_out(a, w_o, b_o, x if residual else None).to(x.dtype)
    return with_maps(y, p, maps)


def _triton_reasons(
    x, context, w_q, w_k, w_v, w_o, b_o=None, *,
    heads, norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False, token_bias=None, maps=None, projected=None,
) -> list[str]:  # fmt: skip
    tensors = context, w_q, w_k, w_v, w_o, b_o, norm_weight, norm_bias, token_bias, *(projected or ())
    reasons = triton_reasons(x, maps, *tensors)
    tokens, width, dtype = context.shape[1], w_q.shape[0] // heads, product_dtype(x)
    limit = head_width_limit(dtype.itemsize)
    if not 1 <= tokens <= MAX_TOKENS:
        reasons.append(f"{tokens} tokens must be 1 to {MAX_TOKENS}")
    if width > limit and not can_fold(x.shape[2], tokens, dtype.itemsize):
        reasons.append(f"head width {width} must be at most {limit} in {dtype}")
    gradients = has_gradient(x, *tensors)
    return reasons or _route(x, context, w_q, heads, b_o, norm_weight, residual, token_bias, maps, gradients)[1]


def _triton_doubts(x, context, w_q, *weights, heads, token_bias=None, maps=None, **_) -> list[str]:
    """Of heads as wide as Stable Diffusion's (docs/results/h200/run4/prompts.json)."""
    stock = x.is_cuda and w_q.shape[0] // heads > 32 and token_bias is None and maps is None
    return interpreted(x) + ["heads are wider than 32, where PyTorch's fused attention is mostly faster"] * stock


def _transposed_doubts(x, context, w_q, *weights, heads, **_) -> list[str]:
    """It is faster on a CPU where queries are many and heads narrow (bench/bench_cross_attention.py)."""
    width = w_q.shape[0] // heads
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and product_dtype(x) == torch.float32
    if fits and width <= 16 and 2 * x.shape[1] >= x.shape[2]:
        return []
    return ["pays on a CPU in float32, for heads up to 16 wide and at least half as many queries as channels"]


_op = Op(
    "cross_attention",
    [
        Implementation("triton", cross_attention_triton, _triton_reasons, _triton_doubts),
        Implementation(
            "native", _between_projections("The CPU's own attention", native_attention), _native_reasons, _native_doubts
        ),
        Implementation("transposed", cross_attention_transposed, always, _transposed_doubts, composite=True),
        Implementation("sdpa", _between_projections("PyTorch's fused attention", stock_attention), _sdpa_reasons),
        Implementation("reference", cross_attention_reference, always, composite=True),
    ],
)


@overload
def cross_attention(
    x: Tensor, context: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, b_o: Tensor | None = ..., *,
    heads: int, norm_weight: Tensor | None = ..., norm_bias: Tensor | None = ..., norm_eps: float = ...,
    residual: bool = ..., token_bias: Tensor | None = ..., maps: None = ...,
    projected: tuple[Tensor, Tensor] | None = ..., impl: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def cross_attention(
    x: Tensor, context: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, b_o: Tensor | None = ..., *,
    heads: int, norm_weight: Tensor | None = ..., norm_bias: Tensor | None = ..., norm_eps: float = ...,
    residual: bool = ..., token_bias: Tensor | None = ..., maps: Literal["head", "mean"],
    projected: tuple[Tensor, Tensor] | None = ..., impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


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
    projected: tuple[Tensor, Tensor] | None = None,
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
        projected: S Wk^T and S Wv^T (B, N, heads*d) where they are at hand, any strides; w_k and w_v are then not read.
        impl: force an implementation (`encdiff.explain` lists them); None chooses.

    Returns:
        y (B, L, C) in x's dtype; with `maps`, the pair (y, maps).

    Raises:
        InputError: shapes, devices or dtypes that do not fit, or a forced implementation that cannot serve.

    Source: arXiv 2402.09712, section 3.2; attention as in arXiv 2112.10752, eq. 5.
    """
    check_floating(context=context, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o, b_o=b_o)
    check_floating(**{f"projected[{i}]": t for i, t in enumerate(projected or ())})
    _check(x, context, w_q, w_k, w_v, w_o, heads)
    for t in projected or ():
        if tuple(t.shape) != (*context.shape[:2], len(w_q)):
            raise InputError(f"projected is {tuple(t.shape)}, must be {(*context.shape[:2], len(w_q))}")
    check_options(x, heads, context.shape[1], norm_weight, norm_bias, token_bias, maps)
    return _op(
        x, context, w_q, w_k, w_v, w_o, b_o, heads=heads, norm_weight=norm_weight, norm_bias=norm_bias,
        norm_eps=norm_eps, residual=residual, token_bias=token_bias, maps=maps, projected=projected, impl=impl,
    )  # fmt: skip


def _check(x, context, w_q, w_k, w_v, w_o, heads) -> None:
    if x.ndim != 3 or context.ndim != 3 or x.shape[0] != context.shape[0]:
        raise InputError(f"x {tuple(x.shape)} and context {tuple(context.shape)} must be (B, L, C) and (B, N, D)")
    if context.device != x.device:
        raise InputError(f"context is on {context.device}, must be on x's device {x.device}")
    check_weights(x, heads, w_q, w_k, w_v, w_o, context.shape[2])
