"""The gate of a feed-forward layer: (h, g) = the halves of x; y = h GELU(g)."""

import os
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops._attention import exact
from encdiff.ops._dispatch import Implementation, Op, always

_TRITON_INSTALLED = find_spec("triton") is not None


def geglu_reference(x):
    """The formula in float32, whatever the storage type; see `geglu`."""
    with exact(x) as dtype:
        h, g = x.to(dtype).chunk(2, dim=-1)
        return (h * (0.5 * g * (1 + torch.erf(g * 0.5**0.5)))).to(x.dtype)


def geglu_native(x):
    """PyTorch's GELU, then the product, in the storage type."""
    h, g = x.chunk(2, dim=-1)
    return h * F.gelu(g)


def geglu_triton(x):
    """One kernel forward, one backward."""
    from encdiff.kernels.geglu import geglu as fused

    return fused(x)


def _triton_reasons(x) -> list[str]:
    reasons = [] if _TRITON_INSTALLED else ["triton is not installed"]
    if x.is_cuda:
        if torch.cuda.get_device_capability(x.device) < (8, 0):
            reasons.append("the GPU is older than compute capability 8.0")
    elif x.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append(f"x is on {x.device.type}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"x is {x.dtype}, not float32, bfloat16 or float16")
    return reasons


def _triton_doubts(x) -> list[str]:
    return [] if x.is_cuda else ["interpreted on the CPU: slow, for tests"]


_op = Op(
    "geglu",
    [
        Implementation("triton", geglu_triton, _triton_reasons, _triton_doubts),
        Implementation("native", geglu_native, always),
        Implementation("reference", geglu_reference, always),
    ],
)


def geglu(x: Tensor, *, impl: str | None = None) -> Tensor:
    """Gate one half of the features by the other: h GELU(g), GELU with the exact normal distribution function.

    Args:
        x: (..., 2N), h before g, any strides; the result of a linear layer.
        impl: force an implementation (`encdiff.explain` lists them); None chooses.

    Returns:
        y (..., N) in x's dtype.

    Raises:
        InputError: x that has no two halves, or a forced implementation that cannot serve.

    Source: arXiv 2002.05202, eq. 6.
    """
    if x.ndim == 0 or x.shape[-1] % 2 or not x.is_floating_point():
        raise InputError(f"x is {tuple(x.shape)} of {x.dtype}, must be (..., 2N) of floating point")
    return _op(x, impl=impl)
