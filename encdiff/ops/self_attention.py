"""Spatial features attend to each other: y = x + Wo Attn(LN(x) Wq, LN(x) Wk, LN(x) Wv) + bo."""

from functools import cache

import torch.nn.functional as F
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops import _self_check
from encdiff.ops._attention import (
    check_norm,
    check_weights,
    exact,
    fill_heads,
    layer_norm,
    merge_heads,
    native_attention,
    native_doubts,
    native_reasons,
    product_dtype,
    project_out,
    split_heads,
    stock_attention,
    stock_layer_norm,
    stock_project_out,
    triton_reasons,
)
from encdiff.ops._beside import joined
from encdiff.ops._dispatch import Implementation, Op, always
from encdiff.ops._triton import NAMES, has_gradient, interpreted
from encdiff.ops._types import check_floating, mixed
from encdiff.ops.linear import linear
from encdiff.ops.projection import projection_triton, projects

FUSED_POSITIONS, FUSED_WIDTH = 1024, 32  # past them, wider heads above all, the stock kernels are at home


# numbers of positions: one for each choice of tiles, whole and not, that the tables of kernels/self_attention.py make
LENGTHS = (16, 11, 32, 20, 64, 50, 128, 100, 256, 200, 512, 300)


@cache
def representative(positions: int, width: int, size: int) -> int:
    """One number of positions for all that take the same kernels; `size`: bytes of an element, `width`: of a head."""
    from encdiff.kernels.self_attention import choose_tile

    def code(L: int) -> tuple:
        forward, backward = (choose_tile(name, size, width, L) for name in ("fwd", "bwd"))
        rows, columns = backward.BLOCK_L, backward.BLOCK_N
        whole = False if L % rows or L % columns else True  # noqa: SIM211 - a branch gives no symbol
        return (
            forward,
            backward,
            whole,
            1 if L <= rows else 2 if L <= 2 * rows else 3,
        )

    return next((L for L in LENGTHS if code(L) == code(positions)), positions)


def self_attention_reference(
    x, w_q, w_k, w_v, w_o, b_o=None, *, heads, norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False
):
    """The formula in float32, whatever the storage type; see `self_attention`."""
    with exact(x) as dtype:
        h = stock_layer_norm(x.to(dtype), norm_weight, norm_bias, norm_eps)
        q, k, v = (split_heads(h @ w.to(dtype).T, heads) for w in (w_q, w_k, w_v))
        p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return stock_project_out(merge_heads(p @ v), w_o, b_o, x if residual else None).to(x.dtype)


def _between_projections(what, attention):
    """The op with `attention(q, k, v, heads)` between separate projections."""

    def run(x, w_q, w_k, w_v, w_o, b_o=None, *, heads, norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False):
        h, x = layer_norm(x, norm_weight, norm_bias, norm_eps)
        a = attention(*(F.linear(h, w) for w in (w_q, w_k, w_v)), heads)
        return project_out(a, w_o, b_o, x if residual else None)

    run.__name__ = f"self_attention_{attention.__name__}"
    run.__doc__ = f"{what} between separate projections."
    return run


def self_attention_triton(
    x, w_q, w_k, w_v, w_o, b_o=None, *, heads, norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False
):
    """One product for queries, keys and values, one kernel for the attention; widths filled up to multiples of 8."""
    from encdiff.kernels.self_attention import self_attention as fused

    dtype, width = product_dtype(x), w_q.shape[0] // heads
    w_q, w_k, w_v, w_o = (w.to(dtype) for w in (w_q, w_k, w_v, w_o))
    if width % 8:
        w_q, w_k, w_v = (fill_heads(w, heads, -width % 8) for w in (w_q, w_k, w_v))
        w_o = fill_heads(w_o.T, heads, -width % 8).T
    w, norm = joined(x, w_q, w_k, w_v), {"norm_weight": norm_weight, "norm_bias": norm_bias, "norm_eps": norm_eps}
    if projects(x, w, **norm):
        qkv = projection_triton(x, w, **norm)
    else:
        h, x = layer_norm(x, norm_weight, norm_bias, norm_eps)
        qkv = linear(h.to(dtype), w)
    a, _ = fused(qkv, heads, width**-0.5)
    skip = x if residual else None
    if projects(a, w_o, b_o, residual=skip):
        return projection_triton(a, w_o, b_o, residual=skip)
    return project_out(a, w_o, b_o, skip).to(x.dtype)


def _triton_reasons(x, w_q, *weights, heads, **options) -> list[str]:
    reasons = triton_reasons(x, None)
    if x.shape[1] > FUSED_POSITIONS:
        reasons.append(f"{x.shape[1]} positions must be at most {FUSED_POSITIONS}")
    if w_q.shape[0] // heads > FUSED_WIDTH:
        reasons.append(f"head width {w_q.shape[0] // heads} must be at most {FUSED_WIDTH}")
    gradients = has_gradient(x, w_q, *weights, *options.values())
    return reasons or _self_check.reasons("self_attention", x, _variant, x, w_q, heads, gradients=gradients)


def _variant(x, w_q, heads) -> tuple:
    width, dtype = -(-w_q.shape[0] // heads // 8) * 8, product_dtype(x)  # filled up, as the kernel gets it
    return NAMES[dtype], width, representative(x.shape[1], width, dtype.itemsize)


def _native_reasons(x, w_q, *weights, heads, **options) -> list[str]:
    return native_reasons(x, w_q.shape[0] // heads) + mixed(x, w_q, *weights[:2])


def _native_doubts(x, w_q, *weights, heads, **options) -> list[str]:
    return native_doubts(w_q.shape[0] // heads)


def _sdpa_reasons(x, *weights, **options) -> list[str]:
    empty = x.shape[0] == 0 or x.shape[1] == 0
    return ["needs at least one query"] * empty + mixed(x, *weights[:3])


_op = Op(
    "self_attention",
    [
        Implementation(
            "native", _between_projections("The CPU's own attention", native_attention), _native_reasons, _native_doubts
        ),
        Implementation("triton", self_attention_triton, _triton_reasons, interpreted),
        Implementation("sdpa", _between_projections("PyTorch's fused attention", stock_attention), _sdpa_reasons),
        Implementation("reference", self_attention_reference, always, composite=True),
    ],
)


def self_attention(
    x: Tensor,
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
    impl: str | None = None,
) -> Tensor:
    """Self-attention over L spatial positions, with its projections, LayerNorm and residual.

    Args:
        x: (B, L, C), any strides.
        w_q, w_k, w_v: (heads*d, C); w_o: (C, heads*d); b_o: (C,) or None.
        heads: number of heads; divides the rows of w_q.
        norm_weight, norm_bias: (C,) of a LayerNorm over C; both None: no LayerNorm.
        residual: add x to the result.
        impl: force an implementation; None chooses.

    Returns:
        y (B, L, C).

    Raises:
        InputError: shapes or dtypes that do not fit, or a forced implementation that cannot serve.
    """
    check_floating(
        x=x, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o, b_o=b_o, norm_weight=norm_weight, norm_bias=norm_bias
    )  # fmt: skip
    if x.ndim != 3:
        raise InputError(f"x is {tuple(x.shape)}, must be (B, L, C)")
    check_weights(x, heads, w_q, w_k, w_v, w_o, None)
    check_norm(x, norm_weight, norm_bias)
    return _op(
        x, w_q, w_k, w_v, w_o, b_o, heads=heads, norm_weight=norm_weight, norm_bias=norm_bias,
        norm_eps=norm_eps, residual=residual, impl=impl,
    )  # fmt: skip
