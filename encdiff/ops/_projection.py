"""The kernel of a product with what stands around it: for `projection`, and for `linear` with a residual."""

import torch
from torch import Tensor

from encdiff.ops import _self_check
from encdiff.ops._dispatch import forced_here, is_transformed
from encdiff.ops._triton import NAMES, autocast_dtype, interpreted, unavailable

FUSED_TYPES = (torch.bfloat16, torch.float16)
FUSED_WIDTH, STEP = 256, 16  # the last of WIDTHS in kernels/projection.py, and what sizes are multiples of


def projection_triton(
    x, weight, bias=None, *, norm_weight=None, norm_bias=None, norm_eps=1e-5, gated=False, residual=None
):
    """One kernel, without gradients."""
    from encdiff.kernels.projection import projection as fused

    return fused(x, weight, bias, norm_weight, norm_bias, norm_eps, gated, residual)


def kernel_reasons(
    x, weight, bias=None, *, norm_weight=None, norm_bias=None, norm_eps=1e-5, gated=False, residual=None
) -> list[str]:
    """Why the kernel cannot serve; it has no gradients of its own, which is not among them."""
    reasons = unavailable(x)
    tensors = {"x": x, "weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    tensors["residual"] = residual
    if x.dtype not in FUSED_TYPES:
        reasons.append(f"x is {x.dtype}, not bfloat16 or float16")
    given = {n: t for n, t in tensors.items() if t is not None}
    reasons += [f"{n} is {t.dtype}, unlike x" for n, t in given.items() if t.dtype != x.dtype]
    reasons += [f"{n} is on {t.device}, x on {x.device}" for n, t in given.items() if t.device != x.device]
    if autocast_dtype(x) is not None:
        reasons.append("autocast is on")
    sizes = {"x has": x.shape[-1], "y has": len(weight) // (1 + gated)}
    reasons += [f"{what} {n} columns, not a multiple of {STEP}" for what, n in sizes.items() if n % STEP]
    if norm_weight is not None and x.shape[-1] > FUSED_WIDTH:
        reasons.append(f"x has {x.shape[-1]} columns to normalise, at most {FUSED_WIDTH}")
    flags = norm_weight is not None, gated, bias is not None, residual is not None
    return reasons or _self_check.reasons("projection", x, _variant, x, flags)


def adds(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> bool:
    """Whether a linear layer whose gradients are asked for should add its residual by this kernel.

    A compiler would fuse the sum with what follows it.
    """
    if torch.compiler.is_compiling() or is_transformed(x, weight, residual) or forced_here() in ("native", "reference"):
        return False
    return not kernel_reasons(x, weight, bias, residual=residual) and (forced_here() == "triton" or not interpreted(x))


def _variant(x, flags) -> tuple:
    from encdiff.kernels.projection import Tile

    return NAMES[x.dtype], Tile.of(x.shape[-1], flags[0]).depth, *flags
