"""The sum over samples, or programs, of what each of them found for two vectors: weight and bias of a norm."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=("p_rows", "p_dw", "p_db", "B", "C"))
def group_norm_bwd_kernel_sum(p_rows, p_dw, p_db, B, C, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum of p_rows (B, 2, C) over the batch, always in the same order: half of the programs for p_dw."""
    tiles = tl.cdiv(C, BLOCK_C)
    half = tl.program_id(0) // tiles
    o_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for i_b in range(0, B, BLOCK_B):
        o_b = i_b + tl.arange(0, BLOCK_B)
        m = (o_b < B)[:, None] & (o_c < C)[None, :]
        o = (2 * o_b + half).to(tl.int64)[:, None] * C + o_c[None, :]
        total += tl.sum(tl.load(p_rows + o, mask=m, other=0.0), 0)
    if half == 0:
        tl.store(p_dw + o_c, total.to(p_dw.dtype.element_ty), mask=o_c < C)
    else:
        tl.store(p_db + o_c, total.to(p_db.dtype.element_ty), mask=o_c < C)


SUM = {"BLOCK_B": 128, "BLOCK_C": 32}  # a program reads 128 bytes of each row, those of the paper's batch at once
SUM_WARPS = 8


def sum_halves(rows: Tensor, first: Tensor, second: Tensor) -> None:
    """The sum of rows (B, 2, C) in float32 over B, always in the same order, into two (C,) of any type."""
    batch, _, C = rows.shape
    blocks = 2 * triton.cdiv(C, SUM["BLOCK_C"])
    with torch.cuda.device_of(rows):
        group_norm_bwd_kernel_sum[blocks,](rows, first, second, batch, C, **SUM, num_warps=SUM_WARPS)
