"""The sum over samples, or programs, of what each of them found for some vectors: parameters of a norm, biases."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=("p_rows", "p_dw", "p_db", "p_dx_bias", "B", "C"))
def group_norm_bwd_kernel_sum(
    p_rows, p_dw, p_db, p_dx_bias, B, C, VECTORS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """The sum of p_rows (B, 2 or 3, C) over the batch, in the same order each time; each vector has its programs."""
    tiles = tl.cdiv(C, BLOCK_C)
    vector = tl.program_id(0) // tiles
    o_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for i_b in range(0, B, BLOCK_B):
        o_b = i_b + tl.arange(0, BLOCK_B)
        m = (o_b < B)[:, None] & (o_c < C)[None, :]
        o = (VECTORS * o_b + vector).to(tl.int64)[:, None] * C + o_c[None, :]
        total += tl.sum(tl.load(p_rows + o, mask=m, other=0.0), 0)
    if vector == 0:
        tl.store(p_dw + o_c, total.to(p_dw.dtype.element_ty), mask=o_c < C)
    elif vector == 1:
        tl.store(p_db + o_c, total.to(p_db.dtype.element_ty), mask=o_c < C)
    else:
        tl.store(p_dx_bias + o_c, total.to(p_dx_bias.dtype.element_ty), mask=o_c < C)


SUM = {"BLOCK_B": 128, "BLOCK_C": 32}  # a program reads 128 bytes of each row, those of the paper's batch at once
SUM_WARPS = 8


def sum_rows(rows: Tensor, *sums: Tensor) -> None:
    """The sum of rows (B, 2 or 3, C) in float32 over B, always in the same order, into as many (C,) of any type."""
    batch, vectors, C = rows.shape
    blocks = vectors * triton.cdiv(C, SUM["BLOCK_C"])
    with torch.cuda.device_of(rows):
        group_norm_bwd_kernel_sum[blocks,](
            rows, sums[0], sums[1], sums[-1], batch, C, VECTORS=vectors, **SUM, num_warps=SUM_WARPS
        )
