"""The sum over samples, or programs, of what each of them found for some vectors: parameters of a norm, biases."""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gate import GateCase, gate_signature
from ._second import refuse_second


@triton.jit(do_not_specialize=("p_rows", "p_0", "p_1", "p_2", "B", "C"))
def rows_sum_kernel(
    p_rows, p_0, p_1, p_2, B, C, VECTORS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr
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
        tl.store(p_0 + o_c, total.to(p_0.dtype.element_ty), mask=o_c < C)
    elif vector == 1:
        tl.store(p_1 + o_c, total.to(p_1.dtype.element_ty), mask=o_c < C)
    else:
        tl.store(p_2 + o_c, total.to(p_2.dtype.element_ty), mask=o_c < C)


SUM = {"BLOCK_B": 128, "BLOCK_C": 32}  # a program reads 128 bytes of each row, those of the paper's batch at once
SUM_WARPS = 8


def add_up(rows: Tensor, *sums: Tensor) -> None:
    """The sum of rows (B, 2 or 3, C) in float32 over B, always in the same order, into as many (C,) of any type."""
    batch, vectors, C = rows.shape
    if not rows.numel():
        for t in sums:
            t.zero_()
        return
    blocks = vectors * triton.cdiv(C, SUM["BLOCK_C"])
    with torch.cuda.device_of(rows):
        rows_sum_kernel[blocks,](
            rows, sums[0], sums[1], sums[-1], batch, C, VECTORS=vectors, **SUM, num_warps=SUM_WARPS
        )


@torch.library.custom_op("encdiff::sum_rows", mutates_args=())
def sum_rows(rows: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The sum of rows (B, 2 or 3, C) in float32 over B, each of the type of one of `like` (C,)."""
    sums = [t.new_empty(t.shape) for t in like]
    add_up(rows, *sums)
    return sums


@sum_rows.register_fake
def _(rows, like):
    return [t.new_empty(t.shape) for t in like]


@torch.library.custom_op("encdiff::sum_rows_into", mutates_args=("sums",))
def sum_rows_into(rows: Tensor, sums: list[Tensor]) -> None:
    """The same, written there; without gradients."""
    add_up(rows, *sums)


@sum_rows_into.register_fake
def _(rows, sums):
    return None


refuse_second(sum_rows)


def gate_cases() -> Iterator[GateCase]:
    for kind, vectors in product(("fp32", "bf16"), (2, 3)):
        types = {"p_rows": "*fp32:1"} | {f"p_{n}": f"*{kind}:1" for n in range(3)}
        blocks = {"VECTORS": vectors} | SUM
        signature = gate_signature(rows_sum_kernel, types, blocks)
        name = f"rows_sum_kernel {kind} of {vectors}"
        yield GateCase(name, rows_sum_kernel, signature, blocks, SUM_WARPS, tensor_cores=False)
