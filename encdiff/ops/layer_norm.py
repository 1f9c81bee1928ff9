"""LayerNorm over the channels of each position: y = (x - mean) / deviation * weight + bias."""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops import _self_check
from encdiff.ops._dispatch import Implementation, Op, always
from encdiff.ops._norms import beside_or_with_input
from encdiff.ops._triton import FUSED_TYPES, NAMES, has_gradient, interpreted, unavailable
from encdiff.ops._types import check_floating

FUSED_CHANNELS = 4096  # the last of BLOCKS in kernels/layer_norm.py


def layer_norm_reference(x, weight, bias, eps=1e-5):
    """The formula in float32, whatever the storage type; see `layer_norm`. Autocast lowers none of it."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = x.to(dtype)
    d = h - h.mean(-1, keepdim=True)
    rstd = (d.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (d * rstd * weight.to(dtype) + bias.to(dtype)).to(x.dtype)


def layer_norm_native(x, weight, bias, eps=1e-5):
    """PyTorch's own, in the wider type: parameters are not rounded to half-precision features."""
    stored, dtype = x.dtype, torch.promote_types(x.dtype, weight.dtype)
    # PyTorch takes these two types together on a CPU alone, and then without a copy
    if not (x.device.type == "cpu" and x.itemsize == 2 and weight.dtype == bias.dtype == torch.float32):
        x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps).to(stored)


def layer_norm_triton(x, weight, bias, eps=1e-5, with_input=False):
    """One kernel forward, two backward; `with_input`: the pair (y, x), whose gradients add up in the kernel."""
    from encdiff.kernels.layer_norm import LayerNormAndInput, layer_norm

    fused = beside_or_with_input(x, (weight, bias), with_input, LayerNormAndInput, layer_norm)
    outputs = fused(x, weight, bias, eps)
    return tuple(outputs[:2]) if with_input else outputs[0]


def _triton_reasons(x, weight, bias, eps=1e-5, with_input=False) -> list[str]:
    reasons = unavailable(x)
    for name, t in {"x": x, "weight": weight, "bias": bias}.items():
        if t.dtype not in FUSED_TYPES:
            reasons.append(f"{name} is {t.dtype}, not float32, bfloat16 or float16")
    if x.shape[-1] > FUSED_CHANNELS:
        reasons.append(f"x has {x.shape[-1]} channels, at most {FUSED_CHANNELS}")
    gradients = has_gradient(x, weight, bias)
    return reasons or _self_check.reasons("layer_norm", x, _variant, x, weight, with_input, gradients=gradients)


def _variant(x, weight, with_input) -> tuple:
    from encdiff.kernels.layer_norm import BLOCKS

    C = len(weight)
    return NAMES[x.dtype], NAMES[weight.dtype], next(b for b in BLOCKS if b >= C), C % 8 == 0, with_input


def _triton_doubts(x, *_, **__) -> list[str]:
    if torch.compiler.is_compiling():
        return ["under torch.compile, which fuses PyTorch's own with its neighbours"]
    return interpreted(x)


_op = Op(
    "layer_norm",
    [
        Implementation("triton", layer_norm_triton, _triton_reasons, _triton_doubts),
        Implementation("native", layer_norm_native, always, composite=True),
        Implementation("reference", layer_norm_reference, always, composite=True),
    ],
)


def fuses(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether an op that begins with a LayerNorm should take the fused one: the choice of `layer_norm`, and no error
    where one is forced that serves that op and not this part of it.
    """
    return _op.fuses(x, weight, bias, with_input=has_gradient(x))


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = ...,
    *,
    with_input: Literal[False] = ...,
    impl: str | None = ...,
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *, with_input: Literal[True], impl: str | None = ...
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, with_input: bool = False, impl: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the channels of each position to mean 0 and variance 1, then scale and shift them.

    Args:
        x: (..., C), any strides.
        weight, bias: (C,), of x's type or another.
        eps: added to the variance.
        with_input: return (y, x): where a residual goes on from that x, its gradient is added without a launch.
        impl: force an implementation (`encdiff.explain` lists them); None chooses.

    Returns:
        y (..., C) in x's dtype.

    Raises:
        InputError: shapes that do not fit, other devices, or a forced implementation that cannot serve.

    Source: arXiv 1607.06450, eq. 4.
    """
    if x.ndim == 0 or not x.is_floating_point():
        raise InputError(f"x is {tuple(x.shape)} of {x.dtype}, must be (..., C) of floating point")
    check_floating(x=x, weight=weight, bias=bias)
    for name, t in {"weight": weight, "bias": bias}.items():
        if tuple(t.shape) != (x.shape[-1],):
            raise InputError(f"{name} is {tuple(t.shape)}, must be {(x.shape[-1],)} for x {tuple(x.shape)}")
        if t.device != x.device:
            raise InputError(f"{name} is on {t.device}, must be on x's device {x.device}")
    if not with_input:
        return _op(x, weight, bias, eps, impl=impl)
    fused = has_gradient(x) and _op.choose(x, weight, bias, eps, with_input=True, impl=impl).name == "triton"
    return _op(x, weight, bias, eps, with_input=True, impl=impl) if fused else (_op(x, weight, bias, eps, impl=impl), x)
