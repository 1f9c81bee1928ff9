"""Linear layers and convolutions whose gradients of biases are taken by `column_sum`.

PyTorch's own sum over rows is slow on a GPU for matrices as small as those of a training step. Gradients of weights
that have a sink (`encdiff.ops._beside`) go there. Nothing else differs from `F.linear` and `F.conv2d`, and where
neither is asked for it is they that run.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops._beside import Sink, sinks_of
from encdiff.ops._dispatch import is_transformed
from encdiff.ops._projection import adds, projection_triton
from encdiff.ops._triton import autocast_dtype, has_gradient
from encdiff.ops._types import check_floating, mixed
from encdiff.ops.column_sum import bias_gradient, column_sum_native, is_fused

Pair = tuple[int, int]


class Ways(NamedTuple):
    """Where the gradients of weight and bias go, all that are asked for or none; whether the kernel sums the bias's."""

    weight: Sink | None
    bias: Sink | None
    fused: bool

    @classmethod
    def of_bias(cls, x: Tensor, bias: Tensor) -> "Ways":
        """Of a bias alone, added to features x; with the kernel wherever a gradient is asked for."""
        sinks = sinks_of(x, bias) if bias.requires_grad else None
        return cls(None, sinks[0] if sinks else None, _sums(x, bias, "triton"))

    def aside(self, *inputs: Tensor | None) -> AbstractContextManager:
        sink = self.weight or self.bias
        return nullcontext() if sink is None else sink.beside.aside(*inputs)

    def product(self, rows: Tensor, x: Tensor) -> Tensor | None:
        """dW = dy^T x, or None where it went into its sink."""
        if self.weight is None:
            return rows.mT @ x
        self.weight.put(lambda into: torch.mm(rows.mT, x, out=into), lambda into: into.addmm_(rows.mT, x))
        return None

    def sum(self, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The gradient of a bias, or None where it went into its sink."""
        total = bias_gradient if self.fused else column_sum_native
        if self.bias is None:
            return total(rows, dtype)
        self.bias.put(lambda into: total(rows, dtype, into), lambda into: into.add_(total(rows, dtype)))
        return None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, ways: Ways) -> Tensor:
        wanted = ctx.needs_input_grad
        ctx.save_for_backward(x if wanted[1] else None, weight if wanted[0] else None)
        ctx.bias_dtype, ctx.ways = None if bias is None else bias.dtype, ways
        if residual is None:
            return F.linear(x, weight, bias)
        return projection_triton(x, weight, bias, residual=residual)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dx = dy W; dW = dy^T x; db = the sum of dy over the rows."""
        (x, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad
        rows = matrix(dy)
        with ctx.ways.aside(rows, x):
            dw = ctx.ways.product(rows, matrix(x)) if wanted[1] else None
            db = ctx.ways.sum(rows, ctx.bias_dtype) if wanted[2] else None
        dx = (rows @ weight).view(*dy.shape[:-1], weight.shape[1]) if wanted[0] else None
        return dx, dw, db, dy if wanted[3] else None, None


def matrix(x: Tensor) -> Tensor:
    """(..., C) -> (M, C), a view where the strides allow one."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, strides: tuple[Pair, Pair], ways: Ways):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype, ctx.strides, ctx.ways = None if bias is None else bias.dtype, strides, ways
        return F.conv2d(x, weight, bias, *strides)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (dx_wanted, dw_wanted, db_wanted) = ctx.saved_tensors, ctx.needs_input_grad[:3]

        def gradients(*of: bool) -> list[Tensor | None]:
            if not any(of):
                return [None, None, None]
            return torch.ops.aten.convolution_backward(
                dy, x, weight, [len(weight)], *ctx.strides, (1, 1), False, (0, 0), 1, of
            )

        ways, rows = ctx.ways, _rows(dy) if db_wanted and ctx.ways.fused else None
        if ways.weight is None:
            dx, dw, db = gradients(dx_wanted, dw_wanted, db_wanted and rows is None)
            return dx, dw, ways.sum(rows, ctx.bias_dtype) if rows is not None else db, None, None
        with ways.aside(dy, x):
            if dw_wanted:
                ways.weight.take(gradients(False, True, False)[1])
            if db_wanted:
                ways.sum(matrix(dy.permute(0, 2, 3, 1)) if rows is None else rows, ctx.bias_dtype)
        return gradients(dx_wanted, False, False)[0], None, None, None, None


def _rows(dy: Tensor) -> Tensor | None:
    """(B, C, H, W) with channels innermost, also a part of wider ones, as a view (B H W, C); None: it is not so."""
    features = dy.permute(0, 2, 3, 1)
    *sizes, C = features.shape
    axes = [(size, stride) for size, stride in zip(sizes, features.stride(), strict=False) if size > 1]
    together = all(outer == size * inner for (_, outer), (size, inner) in pairwise(axes))
    return matrix(features) if together and (C == 1 or dy.stride(1) == 1) else None


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """x W^T + b [+ residual], as `F.linear`, under autocast too.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,) or None.
        residual: (..., O), added last; with gradients on a GPU by the kernel of `projection`.
        impl: of the bias's gradient, see `column_sum`; "triton" where it is the kernel's to take.

    Returns:
        (..., O).

    Raises:
        InputError: tensors of different types outside autocast, or not of floating point; a residual of another shape.
    """
    _check_types(x, weight, bias)
    _check_residual(x, weight, residual)
    ways = _ways(x, weight, bias, impl)
    if residual is not None and has_gradient(x, weight, bias, residual) and adds(x, weight, bias, residual):
        return _Linear.apply(x, weight, bias, residual, ways)
    if ways.weight is None and not ways.fused:
        y = F.linear(x, weight, bias)
    else:
        y = _Linear.apply(*_cast(x, weight, bias), None, ways)
    return y if residual is None else residual + y


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int | Pair = 1, padding: int | Pair = 0,
    *, impl: str | None = None,
) -> Tensor:  # fmt: skip
    """A convolution, as `F.conv2d`, under autocast too.

    Args:
        x: (B, I, H, W) in any memory format; the kernel serves for an upstream gradient that is channels-last.
        weight: (O, I, h, w).
        bias: (O,) or None.
        stride, padding: of both sides, or of each.
        impl: of the bias's gradient, see `column_sum`.

    Returns:
        (B, O, H', W').

    Raises:
        InputError: x that is not (B, I, H, W), tensors of different types outside autocast, or not of floating point.
    """
    if x.ndim != 4:
        raise InputError(f"x is {tuple(x.shape)}, must be (B, I, H, W)")
    _check_types(x, weight, bias)
    ways = _ways(x, weight, bias, impl)
    if ways.weight is None and not ways.fused:
        return F.conv2d(x, weight, bias, stride, padding)
    return _Conv2d.apply(*_cast(x, weight, bias), (_pair(stride), _pair(padding)), ways)


def _check_types(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating(x=x, weight=weight, bias=bias)
    if different := mixed(x, weight, bias):
        raise InputError(f"x, weight and bias have {different[0]}, must be of one type")


def _check_residual(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if residual is None:
        return
    check_floating(residual=residual)
    if (shape := (*x.shape[:-1], len(weight))) != tuple(residual.shape):
        raise InputError(f"residual is {tuple(residual.shape)}, must be {shape} for x {tuple(x.shape)}")


def _pair(n: int | Pair) -> Pair:
    down, right = (n, n) if isinstance(n, int) else n
    return down, right


def _sums(x: Tensor, bias: Tensor | None, impl: str | None) -> bool:
    """Whether a gradient of the bias is asked for and is the kernel's; a compiler fuses these sums itself."""
    if bias is None or torch.compiler.is_compiling() or not (torch.is_grad_enabled() and bias.requires_grad):
        return False
    return not is_transformed(x, bias) and is_fused(x, impl)


def _ways(x: Tensor, weight: Tensor, bias: Tensor | None, impl: str | None) -> Ways:
    learning = (weight,) if bias is None or not bias.requires_grad else (weight, bias)
    to_weight, to_bias = (*(sinks_of(x, *learning) or ()), None, None)[:2]
    return Ways(to_weight, to_bias, _sums(x, bias, impl))


def _cast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """As autocast would, where it is on; here, so that autograd sees it."""
    tensors, dtype = (x, *others), autocast_dtype(x)
    if dtype is None:
        return tensors
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
