"""The gate of a feed-forward layer: (h, g) = the halves of x; y = h GELU(g)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops import _self_check
from encdiff.ops._attention import exact
from encdiff.ops._dispatch import Implementation, Op, always
from encdiff.ops._triton import FUSED_TYPES, NAMES, has_gradient, interpreted, unavailable
from encdiff.ops._types import check_floating


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
    reasons = unavailable(x)
    if x.dtype not in FUSED_TYPES:
        reasons.append(f"x is {x.dtype}, not float32, bfloat16 or float16")
    return reasons or _self_check.reasons("geglu", x, _variant, x, gradients=has_gradient(x))


def _variant(x) -> tuple:
    from encdiff.kernels.geglu import BLOCKS

    N = x.shape[-1] // 2
    block = next((b for b in BLOCKS if b >= N), BLOCKS[-1])
    return NAMES[x.dtype], block - 1 if N % 16 else block


_op = Op(
    "geglu",
    [
        Implementation("triton", geglu_triton, _triton_reasons, interpreted),
        Implementation("native", geglu_native, always, composite=True),
        Implementation("reference", geglu_reference, always, composite=True),
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
    check_floating(x=x)
    return _op(x, impl=impl)
