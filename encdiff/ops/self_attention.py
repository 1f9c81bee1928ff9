"""Spatial features attend to each other: y = x + Wo Attn(LN(x) Wq, LN(x) Wk, LN(x) Wv) + bo."""

import torch.nn.functional as F
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops._dispatch import Implementation, Op, always
from encdiff.ops.cross_attention import exact, layer_norm, merge_heads, project_out, split_heads


def self_attention_reference(
    x, w_q, w_k, w_v, w_o, b_o=None, *, heads, norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False
):
    """The formula in float32, whatever the storage type; see `self_attention`."""
    with exact(x) as dtype:
        h = layer_norm(x.to(dtype), norm_weight, norm_bias, norm_eps)
        q, k, v = (split_heads(h @ w.to(dtype).T, heads) for w in (w_q, w_k, w_v))
        p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return project_out(merge_heads(p @ v), w_o, b_o, x if residual else None).to(x.dtype)


def self_attention_sdpa(
    x, w_q, w_k, w_v, w_o, b_o=None, *, heads, norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False
):
    """The stock fused attention between separate projections."""
    h = layer_norm(x, norm_weight, norm_bias, norm_eps)
    q, k, v = (split_heads(F.linear(h, w), heads) for w in (w_q, w_k, w_v))
    return project_out(merge_heads(F.scaled_dot_product_attention(q, k, v)), w_o, b_o, x if residual else None)


def _sdpa_reasons(x, *weights, **options) -> list[str]:
    return ["needs at least one query"] if x.shape[0] == 0 or x.shape[1] == 0 else []


_op = Op(
    "self_attention",
    [
        Implementation("sdpa", self_attention_sdpa, _sdpa_reasons),
        Implementation("reference", self_attention_reference, always),
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
        InputError: shapes that do not fit, or a forced implementation that cannot serve.
    """
    if x.ndim != 3:
        raise InputError(f"x is {tuple(x.shape)}, must be (B, L, C)")
    inner = w_q.shape[0]
    if heads < 1 or inner % heads:
        raise InputError(f"heads {heads} must divide the {inner} rows of w_q")
    for name, w, shape in zip(
        ("w_q", "w_k", "w_v", "w_o"),
        (w_q, w_k, w_v, w_o),
        [(inner, x.shape[2])] * 3 + [(x.shape[2], inner)],
        strict=True,
    ):
        if tuple(w.shape) != shape:
            raise InputError(f"{name} is {tuple(w.shape)}, must be {shape} for x {tuple(x.shape)}")
    return _op(
        x, w_q, w_k, w_v, w_o, b_o, heads=heads, norm_weight=norm_weight, norm_bias=norm_bias,
        norm_eps=norm_eps, residual=residual, impl=impl,
    )  # fmt: skip
