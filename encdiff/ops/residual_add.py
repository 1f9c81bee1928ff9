"""The end of a residual block: x + h + bias, h of a convolution that left its bias to this."""

import torch
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops import _self_check
from encdiff.ops._attention import exact
from encdiff.ops._dispatch import Implementation, Op, always, is_transformed
from encdiff.ops._triton import FUSED_TYPES, NAMES, autocast_dtype, has_gradient, interpreted, unavailable
from encdiff.ops._types import check_floating
from encdiff.ops.linear import Ways, matrix


def residual_add_reference(x, h, bias):
    """The formula in float32, whatever the storage type; see `residual_add`."""
    with exact(x) as dtype:
        return (x.to(dtype) + (h.to(dtype) + bias.to(dtype)[:, None, None])).to(x.dtype)


def residual_add_native(x, h, bias):
    """PyTorch's two additions, in the storage type."""
    return (x + (h + bias.to(h.dtype)[:, None, None])).to(x.dtype)


def residual_add_triton(x, h, bias):
    """One kernel; the gradient of the bias as that of a convolution."""
    from encdiff.kernels.residual_add import residual_add as fused

    ways, rows = Ways.of_bias(h, bias), [t.flatten(2).transpose(1, 2) for t in (x, h)]  # (B, H W, C): views
    y = _ResidualAdd.apply(*rows, bias, ways) if ways.fused else fused(*rows, bias)
    return y.transpose(1, 2).unflatten(2, x.shape[2:])


class _ResidualAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, h: Tensor, bias: Tensor, ways: Ways) -> Tensor:
        from encdiff.kernels.residual_add import residual_add as fused

        ctx.bias_dtype, ctx.ways = bias.dtype, ways
        return fused(x, h, bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows = matrix(dy)
        with ctx.ways.aside(rows):
            db = ctx.ways.sum(rows, ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dy, dy, db, None


def _triton_reasons(x, h, bias) -> list[str]:
    reasons = unavailable(x)
    for name, t in {"x": x, "bias": bias}.items():
        if t.dtype not in FUSED_TYPES:
            reasons.append(f"{name} is {t.dtype}, not float32, bfloat16 or float16")
    if h.dtype != x.dtype:
        reasons.append(f"x and h are {x.dtype} and {h.dtype}")
    gradients = has_gradient(x, h, bias)
    return reasons or _self_check.reasons("residual_add", x, _variant, x, bias, gradients=gradients)


def _variant(x, bias) -> tuple:
    return NAMES[x.dtype], NAMES[bias.dtype], 63 if x.shape[1] % 16 else 64


def _triton_doubts(x, h, bias) -> list[str]:
    last = all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, h))
    return interpreted(x) + ([] if last else ["x or h is not channels-last: it would be copied"])


_op = Op(
    "residual_add",
    [
        Implementation("triton", residual_add_triton, _triton_reasons, _triton_doubts),
        Implementation("native", residual_add_native, always, composite=True),
        Implementation("reference", residual_add_reference, always, composite=True),
    ],
)


def residual_add(x: Tensor, h: Tensor, bias: Tensor, *, impl: str | None = None) -> Tensor:
    """x + h + bias.

    Args:
        x, h: (B, C, H, W) in any memory format; the kernel serves for channels-last ones of one type.
        bias: (C,), that of the convolution that made h without it.
        impl: force an implementation (`encdiff.explain` lists them); None chooses.

    Returns:
        y (B, C, H, W) in x's dtype; channels-last where the kernel ran.

    Raises:
        InputError: shapes that do not fit, other devices, or a forced implementation that cannot serve.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise InputError(f"x is {tuple(x.shape)} of {x.dtype}, must be (B, C, H, W) of floating point")
    check_floating(x=x, h=h, bias=bias)
    for name, t, shape in (("h", h, x.shape), ("bias", bias, x.shape[1:2])):
        if t.shape != shape:
            raise InputError(f"{name} is {tuple(t.shape)}, must be {tuple(shape)} for x {tuple(x.shape)}")
        if t.device != x.device:
            raise InputError(f"{name} is on {t.device}, must be on x's device {x.device}")
    return _op(x, h, bias, impl=impl)


def sum_takes_bias(x: Tensor, bias: Tensor) -> bool:
    """Whether `residual_add(x, h, bias)` is the fused kernel's for features h that a convolution is to make.

    Its bias is free there, and costs a launch elsewhere. A compiler fuses it itself.
    """
    if torch.compiler.is_compiling() or is_transformed(x, bias) or autocast_dtype(x) not in (None, x.dtype):
        return False
    return _op.fuses(x, x, bias)
