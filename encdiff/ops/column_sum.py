"""The sum over the rows of a matrix: the gradient of a bias."""

from functools import cache

import torch
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops import _self_check
from encdiff.ops._dispatch import Implementation, Op, always, is_transformed
from encdiff.ops._triton import FUSED_TYPES, NAMES, interpreted, unavailable
from encdiff.ops._types import check_dtype, check_floating


@cache
def representative(rows: int, columns: int) -> tuple[int, int]:
    """One size of matrix for all that take the same kernels: tiles of rows and columns, columns full or not."""
    from encdiff.kernels.column_sum import ALL, COLUMNS, ONCE, SHARES, shares

    if rows > ONCE:
        tile, left = SHARES[columns <= COLUMNS], shares(rows, columns)  # summed by a second launch
        block = tile.BLOCK_C
        full = block if columns % block == 0 else 48 if columns % COLUMNS == 0 else block - 1
        least = 1 if left <= ALL[0].BLOCK_R else ALL[0].BLOCK_R + 1 if left <= ALL[1].BLOCK_R else ALL[1].BLOCK_R + 1
        return max(ONCE + 1, least * tile.BLOCK_R), full
    return next((tile.BLOCK_R for tile in ALL if tile.BLOCK_R >= rows), ONCE), 63 if columns % COLUMNS else 64


def representatives() -> dict[tuple[int, int], None]:
    """All of them."""
    rows = (1, 200, 500, 1000, 2000, 3000, 32768, 200_000)
    return dict.fromkeys(representative(M, C) for M in rows for C in (16, 15, 48, 63, 64))


def column_sum_reference(x, dtype):
    """The sum in float32, or float64 for gradient checks; see `column_sum`."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).sum(0).to(dtype)


def column_sum_native(x, dtype, out=None):
    """PyTorch's sum."""
    total = x.sum(0, dtype=torch.promote_types(x.dtype, dtype))
    return total.to(dtype) if out is None else out.copy_(total)


def column_sum_triton(x, dtype):
    """One kernel, or two for many rows."""
    from encdiff.kernels.column_sum import column_sum as fused

    return fused(x, dtype)


def _triton_reasons(x, dtype) -> list[str]:
    return _type_reasons(x, dtype) or failed_sum(x, dtype, *x.shape)


def _type_reasons(x, dtype) -> list[str]:
    """Those that are not of the number of rows and columns."""
    reasons = unavailable(x)
    for name, given in (("x", x.dtype), ("the sum", dtype)):
        if given not in FUSED_TYPES:
            reasons.append(f"{name} is {given}, not float32, bfloat16 or float16")
    return reasons


def failed_sum(x, dtype, rows: int, columns: int) -> list[str]:
    """Why the kernel cannot sum so many rows of x's type: what its check on x's card has found."""
    if rows >= 2**30:
        return [f"{rows} rows, must be fewer than 2^30"]
    return _self_check.reasons("column_sum", x, _variant, x.dtype, dtype, rows, columns)


def _variant(x, dtype, rows, columns) -> tuple:
    return NAMES[x], NAMES[dtype], *representative(rows, columns)


_op = Op(
    "column_sum",
    [
        Implementation("triton", column_sum_triton, _triton_reasons, interpreted),
        Implementation("native", column_sum_native, always, composite=True),
        Implementation("reference", column_sum_reference, always, composite=True),
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
    check_floating(x=x)
    check_dtype("dtype", dtype or x.dtype)
    return _op(x, dtype or x.dtype, impl=impl)


def is_fused(x: Tensor, impl: str | None = None) -> bool:
    """Whether `column_sum` of rows of x's type, on x's device, is the kernel's; False too where that cannot serve."""
    forced = impl or _op._default()
    if is_transformed(x) or forced not in (None, "triton") or _type_reasons(x, x.dtype):
        return False
    return forced == "triton" or not interpreted(x)


def bias_gradient(rows: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`column_sum`, of which `is_fused` has spoken before the number of rows was known; a part of other ops.

    Not recorded. `out` (C,) of dtype is written, if given.
    """
    if failed_sum(rows, dtype, *rows.shape):
        return column_sum_native(rows, dtype, out)
    if out is None:
        return column_sum_triton(rows, dtype)
    from encdiff.kernels.column_sum import column_sum_into

    column_sum_into(rows, out)
    return out
