"""What the attention ops share: the arithmetic of a reference, LayerNorm, heads, the way out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from encdiff.errors import InputError
from encdiff.kernels._second import refusal
from encdiff.ops import _native
from encdiff.ops._triton import NAMES, autocast_dtype, autocast_off, has_gradient, unavailable
from encdiff.ops.layer_norm import fuses, layer_norm_triton
from encdiff.ops.linear import linear

NATIVE_WIDTH = 64  # csrc/attention.h: kMaxWidth


@contextmanager
def exact(x: Tensor) -> Iterator[torch.dtype]:
    """Switch autocast off and give the dtype a reference computes in: float32, or float64 for gradient checks."""
    with autocast_off(x):
        yield torch.float64 if x.dtype == torch.float64 else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """The type a fused op takes its products in: autocast's where it is on, else x's."""
    return autocast_dtype(x) or x.dtype


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The norm in x's dtype, and the x that a residual is to go on from: `ops.layer_norm(..., with_input=True)`.

    Computed in the wider of x's and the weights', which are not rounded to a half-precision x. By the fused kernel
    where `ops.layer_norm` would choose it; as a part of another op it is not recorded.
    """
    if weight is None or bias is None or not fuses(x, weight, bias):
        return stock_layer_norm(x, weight, bias, eps), x
    if not has_gradient(x):
        return layer_norm_triton(x, weight, bias, eps), x
    return layer_norm_triton(x, weight, bias, eps, with_input=True)


def stock_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The same by PyTorch alone, for references."""
    if weight is None or bias is None:  # both, or neither
        return x
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return F.layer_norm(x.to(dtype), (x.shape[-1],), weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


def softmax(logits: Tensor, token_bias: Tensor | None, dim: int = -1) -> Tensor:
    """Over the tokens, axis `dim` of (B, heads, L, N) or (B, heads, N, L), after adding the bias (B, [heads,] N).

    A row whose tokens are all masked attends to nothing, rather than NaN.
    """
    if token_bias is None:
        return logits.softmax(dim)
    token_bias = token_bias if token_bias.ndim == 3 else token_bias[:, None]
    logits = logits + token_bias.to(logits.dtype).unsqueeze(2 if dim == -1 else 3)
    masked = logits.isneginf().all(dim, keepdim=True)
    return logits.masked_fill(masked, 0.0).softmax(dim).masked_fill(masked, 0.0)


def split_heads(s: Tensor, heads: int) -> Tensor:
    return rearrange(s, "b n (h d) -> b h n d", h=heads)


def fill_heads(w: Tensor, heads: int, zeros: int) -> Tensor:
    """(heads*d, ...) -> (heads*(d + zeros), ...)."""
    return w if zeros == 0 else F.pad(w.unflatten(0, (heads, -1)), (0, 0, 0, zeros)).flatten(0, 1)


def merge_heads(s: Tensor) -> Tensor:
    return rearrange(s, "b h n d -> b n (h d)")


def project_out(a: Tensor, w_o: Tensor, b_o: Tensor | None, residual: Tensor | None) -> Tensor:
    """a Wo^T + bo [+ residual]."""
    return linear(a, w_o.to(a.dtype), None if b_o is None else b_o.to(a.dtype), residual=residual)


def stock_project_out(a: Tensor, w_o: Tensor, b_o: Tensor | None, residual: Tensor | None) -> Tensor:
    """The same by PyTorch alone, for references."""
    y = F.linear(a, w_o.to(a.dtype), None if b_o is None else b_o.to(a.dtype))
    return y if residual is None else residual + y


def products_out(a: Tensor, w: Tensor, b_o: Tensor | None, residual: Tensor | None) -> Tensor:
    """a w + bo [+ residual] for a (B, L, K) in any layout and w (B, K, C): the sum is where the product begins."""
    start = b_o if residual is None else residual if b_o is None else residual + b_o
    return torch.bmm(a, w) if start is None else torch.baddbmm(start.to(a.dtype), a, w)


class _Once(torch.autograd.Function):
    """A tensor as it is, whose gradient has no derivative."""

    @staticmethod
    def forward(ctx, t: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Refused.apply(gradient) if torch.is_grad_enabled() else gradient


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    backward = staticmethod(refusal("the gradient of scaled_dot_product_attention"))


def stock_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, token_bias: Tensor | None = None) -> Tensor:
    """PyTorch's fused attention of (B, L, heads*d) over (B, N, heads*d), with a bias (B, [heads,] N)."""
    q, k, v = (split_heads(t, heads) for t in (q, k, v))
    mask, nothing = (None, None) if token_bias is None else _stock_mask(token_bias, q.dtype)
    if not torch.compiler.is_compiling():
        q, k, v = (_Once.apply(t) if has_gradient(t) else t for t in (q, k, v))
        mask = _Once.apply(mask) if has_gradient(mask) else mask
    a = F.scaled_dot_product_attention(q, k, v, mask)
    return merge_heads(a if nothing is None else a.masked_fill(nothing, 0.0))


def _stock_mask(token_bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The bias as a mask (B, heads or 1, 1, N) in the type of the queries, and what attends to nothing (..., 1, 1).

    PyTorch does not define a row that is masked throughout: it gets no mask. Such rows are the bias's alone, whatever
    the queries. What is finite stays so: the lowest float32, a common mask, is -inf in bfloat16.
    """
    bias = (token_bias if token_bias.ndim == 3 else token_bias[:, None])[:, :, None]
    masked = bias.isneginf()
    nothing = masked.all(-1, keepdim=True)
    lowest = max(torch.finfo(dtype).min, torch.finfo(bias.dtype).min)
    bias = torch.where(masked, bias, bias.clamp(min=lowest))
    return bias.masked_fill(nothing, 0.0).to(dtype), nothing


def native_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The same without a bias by csrc/attention_cpu.cpp; float32 inside."""
    return torch.ops.encdiff_native.attention(q, k, v, heads)[0]


def native_reasons(x: Tensor, width: int) -> list[str]:
    """Why `native_attention` cannot serve for x (B, L, C) with heads so wide."""
    if x.device.type != "cpu":
        return [f"x is on {x.device.type}"]
    reasons, dtype = [], product_dtype(x)
    if dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"products are in {dtype}, not float32 or bfloat16")
    if not 1 <= width <= NATIVE_WIDTH:
        reasons.append(f"heads are {width} wide, at most {NATIVE_WIDTH}")
    if x.numel() == 0:
        reasons.append("x is empty")
    return reasons or _native.reasons(x)


def native_doubts(width: int, most: int = 32) -> list[str]:
    return [f"heads are {width} wide; it pays up to {most}"] if width > most else []


def triton_reasons(x: Tensor, maps: str | None, *tensors) -> list[str]:
    """Why no kernel of attention can serve, whatever the route."""
    reasons = unavailable(x)
    if product_dtype(x) not in NAMES or x.dtype not in NAMES:
        reasons.append(f"x is {x.dtype}")
    if maps is not None and has_gradient(x, *tensors):
        reasons.append("attention maps have no gradient there")
    return reasons


def with_maps(y: Tensor, p: Tensor, maps: str | None, mT: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """y, or with `maps` the pair of it and p (B, heads, L, N) by head or in the mean; mT: p has its queries last."""
    if maps is None:
        return y
    p = p if maps == "head" else p.mean(1)
    return y, (p.mT if mT else p).to(y.dtype)


def bias_kind(token_bias: Tensor | None) -> str:
    """What a kernel's code depends on."""
    return "none" if token_bias is None else "learnt" if has_gradient(token_bias) else "given"


def check_weights(x: Tensor, heads: int, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, width: int | None) -> None:
    """Raise InputError unless the weights fit x (B, L, C), `heads` and tokens so wide; None: the tokens are x's."""
    inner, channels = w_q.shape[0], x.shape[2]
    if heads < 1 or inner % heads:
        raise InputError(f"heads {heads} must divide the {inner} rows of w_q")
    of_tokens = inner, channels if width is None else width
    expected = {"w_q": (inner, channels), "w_k": of_tokens, "w_v": of_tokens, "w_o": (channels, inner)}
    for (name, shape), w in zip(expected.items(), (w_q, w_k, w_v, w_o), strict=True):
        if tuple(w.shape) != shape:
            tokens = "" if width is None else f", context width {width}"
            raise InputError(f"{name} is {tuple(w.shape)}, must be {shape} for x {tuple(x.shape)}{tokens}")


def check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise InputError unless both belong to a LayerNorm over the channels of x (..., C), or neither is given."""
    for name, t in (("norm_weight", weight), ("norm_bias", bias)):
        if (t is None) != (weight is None and bias is None) or (t is not None and tuple(t.shape) != (x.shape[-1],)):
            shape = None if t is None else tuple(t.shape)
            raise InputError(f"{name} is {shape}, must be ({x.shape[-1]},), or None as the other one")


def kernel_bias(token_bias: Tensor | None, heads: int) -> Tensor | None:
    """(B, N) or (B, heads, N) -> (B, heads, N) with the last stride 1, as the kernels read it; often a view."""
    if token_bias is None:
        return None
    token_bias = token_bias if token_bias.stride(-1) == 1 else token_bias.contiguous()
    return token_bias if token_bias.ndim == 3 else token_bias[:, None].expand(-1, heads, -1)
