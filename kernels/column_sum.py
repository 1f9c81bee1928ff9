"""Sums over the rows of a matrix: one launch, or two for many rows. The contract is that of `encdiff.ops.column_sum`.

Memory-bound, but most of these matrices are so small that the time is latency: a program has all loads of a tile, 16
bytes each, in flight at once, adds tile to tile in registers and sums over a tile's rows once, at the end. Up to ONCE
rows one program sums a whole block of columns. Above, each of many programs sums its share of the rows, and a second
launch of the same kernel sums the shares. The sizes alone decide what is added to what, on any GPU.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gate import GateCase, gate_signature

ONCE = 2048  # rows that one program sums; two launches of many programs take longer below
PROGRAMS = 384  # of the first of two launches: three of 512 threads fit each multiprocessor, of which there are 132
COLUMNS = 16  # of a program that sums all rows: 32 bytes of bfloat16, the least that memory gives
THREAD = 16  # elements of a tile for one thread: two loads of 16 bytes of bfloat16, both in flight


@triton.jit(do_not_specialize=["M", "rows"])
def column_sum_kernel(
    p_x, p_y, M, C, stride, rows, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """p_y (shares, C): of p_x (M, C) the sums over each share of so many rows, in the type of p_y.

    EVEN: BLOCK_C divides C. Then no load has a mask (of rows that are not there the last is read and not added): the
    assembler would issue masked loads one after the other's arrival.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    share = tl.program_id(0) // blocks
    o_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    last = tl.minimum(M, (share + 1) * rows)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i_r in range(share * rows, last, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        o = tl.minimum(o_r, last - 1).to(tl.int64)[:, None] * stride + o_c[None, :]
        x = tl.load(p_x + o) if EVEN else tl.load(p_x + o, mask=m_c[None, :], other=0.0)
        total += tl.where((o_r < last)[:, None], x.to(tl.float32), 0.0)
    o_y = share.to(tl.int64) * C + o_c
    tl.store(p_y + o_y, tl.sum(total, 0).to(p_y.dtype.element_ty), mask=m_c)


class Tile(NamedTuple):
    """Rows and columns that one program has in registers at a time."""

    BLOCK_R: int
    BLOCK_C: int

    @property
    def num_warps(self) -> int:
        return self.BLOCK_R * self.BLOCK_C // (32 * THREAD)


SHARES = {True: Tile(512, 16), False: Tile(128, 64)}  # whether there are few columns -> the tile of a share
ALL = tuple(Tile(rows, COLUMNS) for rows in (128, 256, 512, 1024))  # of a program that sums all rows


def shares(M: int, C: int) -> int:
    """How many rows the first of two launches leaves; 1: there is no second."""
    if M <= ONCE:
        return 1
    return triton.cdiv(M, _share(M, C))


def _share(M: int, C: int) -> int:
    """Rows of one share: so many tiles that there are no more than PROGRAMS programs."""
    tile = SHARES[C <= COLUMNS]
    return tile.BLOCK_R * triton.cdiv(triton.cdiv(M, tile.BLOCK_R) * triton.cdiv(C, tile.BLOCK_C), PROGRAMS)


def _all(M: int) -> Tile:
    return next((tile for tile in ALL if tile.BLOCK_R >= M), ALL[-1])


def _launch(x: Tensor, y: Tensor, rows: int, tile: Tile) -> None:
    """y (shares, C) or (C,) of x (M, C)."""
    M, C = x.shape
    grid = (triton.cdiv(M, rows) * triton.cdiv(C, tile.BLOCK_C),)
    blocks = tile._asdict() | {"EVEN": C % tile.BLOCK_C == 0}
    column_sum_kernel[grid](x, y, M, C, x.stride(0), rows, **blocks, num_warps=tile.num_warps)


def _output(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[1], dtype=dtype)


@torch.library.custom_op("encdiff::column_sum", mutates_args=())
def column_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (M, C), any strides -> (C,) of dtype."""
    y = _output(x, dtype)
    _sum(x, y)
    return y


def _sum(x: Tensor, y: Tensor) -> None:
    M, C = x.shape
    if not x.numel():
        y.zero_()
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    with torch.cuda.device_of(x):
        if (parts := shares(M, C)) > 1:
            left = x.new_empty(parts, C, dtype=torch.float32)
            _launch(x, left, _share(M, C), SHARES[C <= COLUMNS])
            x = left
        # more rows than ONCE are left where the columns alone make programs enough
        _launch(x, y, len(x), _all(len(x)) if len(x) <= ONCE else SHARES[False])


@column_sum.register_fake
def _(x, dtype):
    return _output(x, dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, _ = inputs
    ctx.shape, ctx.dtype = x.shape, x.dtype


def _autograd(ctx, dy):
    return dy.to(ctx.dtype).expand(ctx.shape), None


column_sum.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("encdiff::column_sum_into", mutates_args=("y",))
def column_sum_into(x: Tensor, y: Tensor) -> None:
    """x (M, C), any strides, summed into y (C,), contiguous; without gradients."""
    _sum(x, y)


@column_sum_into.register_fake
def _(x, y):
    return None


def gate_cases() -> Iterator[GateCase]:
    """Every tile in bfloat16; of both kinds of program one in the other types, with rows and columns of any number."""
    for tile in dict.fromkeys((*ALL, *SHARES.values())):
        yield _case(tile, "bf16", "bf16", True, True)
    for tile in (ALL[-1], SHARES[False]):
        yield _case(tile, "bf16", "fp32", True, True)
        yield _case(tile, "fp32", "bf16", True, True)
        yield _case(tile, "fp32", "fp32", True, True)
        for kind in ("bf16", "fp32"):
            yield _case(tile, kind, kind, True, False)
            yield _case(tile, kind, kind, False, False)


def _case(tile: Tile, x: str, y: str, even: bool, aligned: bool) -> GateCase:
    types = {"p_x": f"*{x}" if aligned else f"*{x}:1", "p_y": f"*{y}"}
    types |= {"C": "i32:16" if even else "i32", "stride": "i32:16" if aligned else "i32"}
    blocks = tile._asdict() | {"EVEN": even}
    name = f"column_sum_kernel {x} to {y} {tile.BLOCK_R}x{tile.BLOCK_C}{' even' * even}{' aligned' * aligned}"
    signature = gate_signature(column_sum_kernel, types, blocks)
    return GateCase(name, column_sum_kernel, signature, blocks, tile.num_warps, 3, tensor_cores=False)
