"""The sum over the rows of a matrix: the gradient of a bias."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops._dispatch import Implementation, Op, always

FUSED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_INSTALLED = find_spec("triton") is not None


def column_sum_reference(x, dtype):
    """The sum in float32, or float64 for gradient checks; see `column_sum`."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).sum(0).to(dtype)


def column_sum_native(x, dtype):
    """PyTorch's sum."""
    return x.sum(0, dtype=torch.promote_types(x.dtype, dtype)).to(dtype)


def column_sum_triton(x, dtype):
    """One kernel, or two for many rows."""
    from encdiff.kernels.column_sum import column_sum as fused

    return fused(x, dtype)


def _triton_reasons(x, dtype) -> list[str]:
    reasons = [] if _TRITON_INSTALLED else ["triton is not installed"]
    if x.is_cuda:
        if torch.cuda.get_device_capability(x.device) < (8, 0):
            reasons.append("the GPU is older than compute capability 8.0")
    elif x.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append(f"x is on {x.device.type}")
    for name, given in (("x", x.dtype), ("the sum", dtype)):
        if given not in FUSED_TYPES:
            reasons.append(f"{name} is {given}, not float32, bfloat16 or float16")
    if len(x) >= 2**30:
        reasons.append("x has 2^30 rows or more")
    return reasons


def _triton_doubts(x, dtype) -> list[str]:
    return [] if x.is_cuda else ["interpreted on the CPU: slow, for tests"]


_op = Op(
    "column_sum",
    [
        Implementation("triton", column_sum_triton, _triton_reasons, _triton_doubts),
        Implementation("native", column_sum_native, always),
        Implementation("reference", column_sum_reference, always),
    ],
)


def column_sum(x: Tensor, dtype: torch.dtype | None = None, *, impl: str | None = None) -> Tensor:
    """Sum the rows of a matrix in float32, on a GPU always in the same order.

    Args:
        x: (M, C) of floating point, any strides; rows that lie apart are read where they are. M or C may be 0.
        dtype: of the result; None: x's.
        impl: force an implementation (`encdiff.explain` lists them); None chooses.

    Returns:
        (C,) in dtype.

    Raises:
        InputError: x that is no matrix of floating point, or a forced implementation that cannot serve.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise InputError(f"x is {tuple(x.shape)} of {x.dtype}, must be (M, C) of floating point")
    return _op(x, dtype or x.dtype, impl=impl)


def is_fused(x: Tensor, impl: str | None = None) -> bool:
    """Whether `column_sum` of rows of x's type, on x's device, is the kernel's; False too where that cannot serve."""
    if _triton_reasons(x, x.dtype):
        return False
    return _op.choose(x, x.dtype, impl=impl).name == "triton"
