"""Cross-attention whose token side was computed before: fold once per image, attend at every sampler step.

With q = LN(x) Wq^T and the keys k, values v of head h (docs/math.md):

    logits = q_h k_h^T / sqrt(d) = LN(x) A_h^T     A_h = k_h Wq_h / sqrt(d)   (N, C)
    sum over h of P_h v_h Wo_h^T = sum P_h W_h     W_h = v_h Wo_h^T           (N, C)
"""

from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from encdiff.errors import InputError
from encdiff.kernels._second import refuse_second
from encdiff.kernels.cross_attention.plan import FOLDED_CHANNELS, FOLDED_TOKENS, can_fold
from encdiff.ops import _self_check
from encdiff.ops._attention import (
    bias_kind,
    check_norm,
    exact,
    kernel_bias,
    product_dtype,
    products_out,
    softmax,
    stock_layer_norm,
    triton_reasons,
    with_maps,
)
from encdiff.ops._dispatch import Implementation, Op, always
from encdiff.ops._triton import NAMES, has_gradient, interpreted
from encdiff.ops._types import check_floating
from encdiff.ops.column_sum import failed_sum


class Folded(NamedTuple):
    """The tokens of every sample, taken into the channel space: keys A and values W, both (B, heads, N, C)."""

    keys: Tensor
    values: Tensor


def fold(context: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, *, heads: int) -> Folded:
    """Everything of `cross_attention` that depends on the tokens alone, as two matrices for each head.

    Arguments as there. Exact, differentiable.
    """
    return fold_projected(F.linear(context, w_k), F.linear(context, w_v), w_q, w_o, heads=heads)


def fold_projected(k: Tensor, v: Tensor, w_q: Tensor, w_o: Tensor, *, heads: int) -> Folded:
    """`fold` of keys and values (B, N, heads*d) that are at hand, in any strides."""
    width = k.shape[-1] // heads
    return Folded(_fold_heads(k, w_q * width**-0.5, heads), _fold_heads(v, w_o.T, heads))


def _fold_heads(t: Tensor, w: Tensor, heads: int) -> Tensor:
    """t (B, N, heads*d) and w (heads*d, C) -> (B, heads, N, C), contiguous.

    One product for each head and all samples: the weights are not repeated for each of them, and their gradient is a
    product, too, with no sum over samples after it.
    """
    s = t.flatten(0, 1).unflatten(1, (heads, -1)).transpose(0, 1)  # (H, B*N, d)
    folded = torch.bmm(s, w.unflatten(0, (heads, -1)))
    return folded.unflatten(1, t.shape[:2]).transpose(0, 1).contiguous()


@torch.library.custom_op("encdiff::fold_by_head", mutates_args=())
def fold_by_head(k: Tensor, v: Tensor, w_q: Tensor, w_o: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """`fold_projected` of one type, as products alone: keys and values (heads, B, N, C), contiguous.

    Neither here nor in its gradients is anything copied to be split or merged by heads, or multiplied by the scale.
    """
    shape, scale = (heads, *k.shape[:2], w_q.shape[1]), (k.shape[-1] // heads) ** -0.5
    keys, values = k.new_empty(shape), k.new_empty(shape)
    _product(keys.flatten(1, 2), _columns(k.flatten(0, 1), heads), _columns(w_q.T, heads).mT, scale)
    _product(values.flatten(1, 2), _columns(v.flatten(0, 1), heads), _columns(w_o, heads).mT)
    return keys, values


@torch.library.custom_op("encdiff::fold_by_head_backward", mutates_args=())
def fold_by_head_backward(
    k: Tensor, v: Tensor, w_q: Tensor, w_o: Tensor, dkeys: Tensor, dvalues: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of k, v, w_q and w_o, each contiguous."""
    dk, dv, dw_q, dw_o = [t.new_empty(t.shape) for t in (k, v, w_q, w_o)]
    scale, (dkeys, dvalues) = (k.shape[-1] // heads) ** -0.5, (t.flatten(1, 2) for t in (dkeys, dvalues))
    _product(_columns(dk.flatten(0, 1), heads), dkeys, _columns(w_q.T, heads), scale)
    _product(_columns(dv.flatten(0, 1), heads), dvalues, _columns(w_o, heads))
    _product(_columns(dw_q.T, heads).mT, _columns(k.flatten(0, 1), heads).mT, dkeys, scale)
    _product(_columns(dw_o, heads), dvalues.mT, _columns(v.flatten(0, 1), heads))
    return dk, dv, dw_q, dw_o


def _columns(t: Tensor, heads: int) -> Tensor:
    """A view of (rows, heads*d) as (heads, rows, d)."""
    return t.unflatten(1, (heads, -1)).transpose(0, 1)


def _product(out: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """out = a b scale, for each head, in place whatever the strides; what was in `out` is not read."""
    out.baddbmm_(a, b, beta=0, alpha=scale)


@fold_by_head.register_fake
def _(k, v, w_q, w_o, heads):
    shape = heads, *k.shape[:2], w_q.shape[1]
    return k.new_empty(shape), k.new_empty(shape)


@fold_by_head_backward.register_fake
def _(k, v, w_q, w_o, dkeys, dvalues, heads):
    return tuple(t.new_empty(t.shape) for t in (k, v, w_q, w_o))


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dkeys, dvalues):
    return *fold_by_head_backward(*ctx.saved_tensors, dkeys, dvalues, ctx.heads), None


fold_by_head.register_autograd(_backward, setup_context=_setup)
refuse_second(fold_by_head_backward)


def fold_pays(context: Tensor, channels: int, heads: int) -> bool:
    """Whether attending to folded tokens is expected to be faster than to the tokens, however many the queries.

    On a GPU where the kernels serve it: one launch in place of six; elsewhere where it saves products.
    """
    tokens, size = context.shape[1], product_dtype(context).itemsize
    return can_fold(channels, tokens, size) if context.is_cuda else heads * tokens <= channels


def cross_attention_folded_reference(
    x, folded, b_o=None, *,
    norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False, token_bias=None, maps=None,
):  # fmt: skip
    """Two products in plain PyTorch, in float32 whatever the storage type; see `cross_attention_folded`."""
    with exact(x) as dtype:
        h = stock_layer_norm(x.to(dtype), norm_weight, norm_bias, norm_eps)
        keys, values = (t.to(dtype).flatten(1, 2) for t in folded)  # (B, H*N, C)
        logits = (keys @ h.mT).unflatten(1, folded.keys.shape[1:3])  # queries last: the softmax runs in vectors of them
        p = softmax(logits, token_bias, dim=-2)
        y = products_out(p.flatten(1, 2).mT, values, b_o, x if residual else None).to(x.dtype)
    return with_maps(y, p, maps, mT=True)


def cross_attention_folded_triton(
    x, folded, b_o=None, *,
    norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False, token_bias=None, maps=None,
):  # fmt: skip
    """One pass over x, LayerNorm to residual."""
    from encdiff.kernels import cross_attention as kernels

    keys, values = kernels.whole_heads(*(t.to(product_dtype(x)) for t in folded))  # autocast's, not x's type
    bias = kernel_bias(token_bias, keys.shape[1])
    y, p = kernels.cross_attention_folded(
        x, keys, values, b_o, norm_weight, norm_bias, bias, norm_eps, residual, maps or "none"
    )
    return y if maps is None else (y, p)


def _triton_reasons(
    x, folded, b_o=None, *,
    norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False, token_bias=None, maps=None,
) -> list[str]:  # fmt: skip
    tensors = *folded, b_o, norm_weight, norm_bias, token_bias
    reasons = triton_reasons(x, maps, *tensors)
    (tokens, channels), size = folded.keys.shape[2:], product_dtype(x).itemsize
    if not can_fold(channels, tokens, size):
        reasons.append(
            f"{channels} channels and {tokens} tokens must be a multiple of 8 up to {FOLDED_CHANNELS.get(size, 0)} "
            f"and 1 to {FOLDED_TOKENS}"
        )
    options = b_o, norm_weight, token_bias, residual, maps
    return reasons or failed_folded(x, *options, gradients=has_gradient(x, *tensors))


def failed_folded(x, b_o, norm_weight, token_bias, residual, maps, gradients: bool) -> list[str]:
    """Why the card of x must not take the folded kernels: what their check has found, and that of the sum in them."""
    options = b_o, norm_weight, token_bias, residual, maps
    against = _self_check.reasons("cross_attention_folded", x, _folded_variant, x, *options, gradients=gradients)
    if gradients and has_gradient(b_o):
        against = against + failed_sum(x, b_o.dtype, x.shape[0] * x.shape[1], x.shape[2])
    return against


def _folded_variant(x, b_o, norm_weight, token_bias, residual, maps) -> tuple:
    parameter = next((t for t in (norm_weight, b_o) if t is not None), x)
    types = NAMES[x.dtype], NAMES[product_dtype(x)], NAMES[parameter.dtype]  # of features, products, parameters
    return *types, x.shape[2], norm_weight is not None, residual, bias_kind(token_bias), maps or "none"


_op = Op(
    "cross_attention_folded",
    [
        Implementation("triton", cross_attention_folded_triton, _triton_reasons, interpreted),
        Implementation("reference", cross_attention_folded_reference, always, composite=True),
    ],
)


@overload
def cross_attention_folded(
    x: Tensor, folded: Folded, b_o: Tensor | None = ..., *, norm_weight: Tensor | None = ...,
    norm_bias: Tensor | None = ..., norm_eps: float = ..., residual: bool = ..., token_bias: Tensor | None = ...,
    maps: None = ..., impl: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def cross_attention_folded(
    x: Tensor, folded: Folded, b_o: Tensor | None = ..., *, norm_weight: Tensor | None = ...,
    norm_bias: Tensor | None = ..., norm_eps: float = ..., residual: bool = ..., token_bias: Tensor | None = ...,
    maps: Literal["head", "mean"], impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def cross_attention_folded(
    x: Tensor,
    folded: Folded,
    b_o: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    residual: bool = False,
    token_bias: Tensor | None = None,
    maps: Literal["head", "mean"] | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cross_attention` with the tokens and their weights folded before, by `fold`.

    The other arguments, the result and its types are those of `cross_attention`; gradients reach the folded tensors.
    Raises InputError for shapes, devices or dtypes that do not fit, or a forced implementation that cannot serve.
    """
    check_floating(b_o=b_o, **{f"folded.{n}": t for n, t in folded._asdict().items()})
    if not _fits(x, folded):
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in folded._asdict().items())
        raise InputError(
            f"folded {shapes} must be the result of fold, for (B, N, D) tokens and weights of C channels, "
            f"and x {tuple(x.shape)} (B, L, C)"
        )
    if folded.keys.device != x.device:
        raise InputError(f"folded is on {folded.keys.device}, must be on x's device {x.device}")
    _, heads, tokens, _ = folded.keys.shape
    check_options(x, heads, tokens, norm_weight, norm_bias, token_bias, maps)
    return _op(
        x, folded, b_o, norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=norm_eps, residual=residual,
        token_bias=token_bias, maps=maps, impl=impl,
    )  # fmt: skip


def _fits(x: Tensor, folded: Folded) -> bool:
    keys, values = folded
    if keys.shape != values.shape or x.ndim != 3 or keys.ndim != 4:
        return False
    return (keys.shape[0], keys.shape[3]) == (x.shape[0], x.shape[2])


def check_options(x, heads, tokens, norm_weight, norm_bias, token_bias, maps) -> None:
    """Raise InputError unless these options of cross-attention fit x."""
    check_floating(x=x, norm_weight=norm_weight, norm_bias=norm_bias, token_bias=token_bias)
    check_norm(x, norm_weight, norm_bias)
    if token_bias is not None and tuple(token_bias.shape) not in ((x.shape[0], tokens), (x.shape[0], heads, tokens)):
        raise InputError(f"token_bias is {tuple(token_bias.shape)}, must be (B, N) or (B, heads, N) with N = {tokens}")
    if maps not in (None, "head", "mean"):
        raise InputError(f"maps is {maps!r}, must be None, 'head' or 'mean'")
