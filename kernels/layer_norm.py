"""LayerNorm over the last axis: one launch forward, two backward. The contract is that of `encdiff.ops.layer_norm`.

A program takes a tile of whole rows, so that narrow rows do not waste it; the tile stays in registers between its one
read and its one write. Backward a bounded number of programs go from tile to tile, each adds up its share of the
gradients of weight and bias, and a second launch sums the shares (`_rows`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gate import GateCase, gate_signature
from ._rows import sum_rows
from ._second import refuse_second

BLOCKS = (16, 64, 128, 256, 512, 1024, 4096)  # columns of a program: all of a row
VECTOR = tl.constexpr(8)  # neighbours of one thread: 16 bytes of bfloat16
TILE_FORWARD, WARPS_FORWARD = 2048, 4  # elements of one program: two 16-byte loads of bfloat16 for each thread
TILE_BACKWARD, WARPS_BACKWARD = 4096, 8
PROGRAMS = 256  # backward, at most: two on each multiprocessor of an H100; more would be more shares to sum
# Not specialised: `_aligned` sees to the pointers. So the code depends on the block sizes alone and gate_cases lists
# all of it.
GENERAL = ("M", "C")


@triton.jit
def _tile(i_t, M, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The first row of a tile, and in it: offsets of the features, rows, which of both there are."""
    start = tl.full((), BLOCK_R, tl.int64) * i_t
    o_r, o_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    m_r = start + o_r < M
    return start, o_r[:, None] * C + o_c[None, :], o_r, m_r[:, None] & (o_c < C)[None, :], m_r


@triton.jit
def _parameter(p, C, BLOCK_C: tl.constexpr):
    o_c = tl.arange(0, BLOCK_C)
    return tl.load(p + o_c, mask=o_c < C, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=GENERAL)
def layer_norm_fwd_kernel(
    p_x, p_w, p_b, p_y, p_mean, p_rstd, M, C, eps, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr
):
    n = C.to(tl.float32)
    if ALIGNED:
        C = C // VECTOR * VECTOR  # said in this way, the compiler knows that rows are aligned
    start, o, o_r, m, m_r = _tile(tl.program_id(0), M, C, BLOCK_R, BLOCK_C)
    x = tl.load(p_x + start * C + o, mask=m, other=0.0).to(tl.float32)
    w, b = _parameter(p_w, C, BLOCK_C), _parameter(p_b, C, BLOCK_C)
    mean = tl.sum(x, 1) / n
    d = tl.where(m, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(d * d, 1) / n + eps)
    y = d * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(p_y + start * C + o, y.to(p_y.dtype.element_ty), mask=m)
    tl.store(p_mean + start + o_r, mean, mask=m_r)
    tl.store(p_rstd + start + o_r, rstd, mask=m_r)


@triton.jit(do_not_specialize=GENERAL)
def layer_norm_bwd_kernel(
    p_dy, p_x, p_mean, p_rstd, p_w, p_skip, p_dx, p_shares, M, C,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """dx, with p_skip added, and in p_shares (P, 2, C) each of P programs' part of the gradients of weight and bias."""
    n = C.to(tl.float32)
    if ALIGNED:
        C = C // VECTOR * VECTOR  # said in this way, the compiler knows that rows are aligned
    w = _parameter(p_w, C, BLOCK_C)
    dw, db = tl.zeros((BLOCK_R, BLOCK_C), tl.float32), tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i_t in range(tl.program_id(0), tl.cdiv(M, BLOCK_R), tl.num_programs(0)):
        start, o, o_r, m, m_r = _tile(i_t, M, C, BLOCK_R, BLOCK_C)
        x = tl.load(p_x + start * C + o, mask=m, other=0.0).to(tl.float32)
        dy = tl.load(p_dy + start * C + o, mask=m, other=0.0).to(tl.float32)
        mean = tl.load(p_mean + start + o_r, mask=m_r, other=0.0)
        rstd = tl.load(p_rstd + start + o_r, mask=m_r, other=0.0)
        x_hat = (x - mean[:, None]) * rstd[:, None]
        g = dy * w[None, :]  # zero outside, as dy is
        mean_g, mean_xg = tl.sum(g, 1) / n, tl.sum(g * x_hat, 1) / n
        dx = rstd[:, None] * (g - mean_g[:, None] - x_hat * mean_xg[:, None])
        if HAS_SKIP:
            dx += tl.load(p_skip + start * C + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_dx + start * C + o, dx.to(p_dx.dtype.element_ty), mask=m)
        dw += dy * x_hat
        db += dy
    o_c = tl.arange(0, BLOCK_C)
    p_shares += tl.program_id(0) * 2 * C
    tl.store(p_shares + o_c, tl.sum(dw, 0), mask=o_c < C)
    tl.store(p_shares + C + o_c, tl.sum(db, 0), mask=o_c < C)


class Tile(NamedTuple):
    """Rows and columns of one program; whether 16 bytes of a row move at a time."""

    rows: int
    columns: int
    aligned: bool

    @classmethod
    def of(cls, C: int, size: int) -> "Tile":
        columns = next(b for b in BLOCKS if b >= C)
        return cls(max(1, size // columns), columns, C % VECTOR.value == 0)

    def constexprs(self) -> dict:
        return {"BLOCK_R": self.rows, "BLOCK_C": self.columns, "ALIGNED": self.aligned}


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, C = x.shape[:-1].numel(), x.shape[-1]
    y, (mean, rstd) = x.new_empty(x.shape), _moments(x)
    if x.numel():
        tile = Tile.of(C, TILE_FORWARD)
        with torch.cuda.device_of(x):
            layer_norm_fwd_kernel[triton.cdiv(rows, tile.rows),](
                _aligned(x), _aligned(weight), _aligned(bias), y, mean, rstd, rows, C, eps,
                **tile.constexprs(), num_warps=WARPS_FORWARD, num_stages=1,
            )  # fmt: skip
    return y, mean, rstd


def _launch_backward(dy, x, mean, rstd, weight, skip) -> tuple[Tensor, Tensor]:
    """See `layer_norm_backward`."""
    dx, shares = _gradients(x)
    if x.numel() == 0:
        return dx, shares.zero_()
    rows, C = x.shape[:-1].numel(), x.shape[-1]
    tile = Tile.of(C, TILE_BACKWARD)
    with torch.cuda.device_of(x):
        layer_norm_bwd_kernel[len(shares),](
            _aligned(dy), _aligned(x), mean, rstd, _aligned(weight), _aligned(dy if skip is None else skip), dx, shares,
            rows, C, **tile.constexprs(), HAS_SKIP=skip is not None, num_warps=WARPS_BACKWARD, num_stages=1,
        )  # fmt: skip
    return dx, shares


def _gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, C = x.shape[:-1].numel(), x.shape[-1]
    programs = max(1, min(PROGRAMS, triton.cdiv(rows, Tile.of(C, TILE_BACKWARD).rows)))
    return x.new_empty(x.shape), x.new_empty(programs, 2, C, dtype=torch.float32)


def _moments(x: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2)]


@torch.library.custom_op("encdiff::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., C), weight and bias (C,) -> y (..., C) in x's dtype, mean and 1/deviation (...) in float32."""
    return _launch_forward(x, weight, bias, eps)


@layer_norm.register_fake
def _(x, weight, bias, eps):
    return x.new_empty(x.shape), *_moments(x)


@torch.library.custom_op("encdiff::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, skip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and (P, 2, C) in float32 shares of those of weight and bias.

    skip, of x's shape: a gradient of x that is at hand, added.
    """
    return _launch_backward(dy, x, mean, rstd, weight, skip)


@layer_norm_backward.register_fake
def _(dy, x, mean, rstd, weight, skip=None):
    return _gradients(x)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, *output[1:], weight, bias)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for mean and rstd would be launches that nobody reads


def _autograd(ctx, dy, *_, skip=None, sums=sum_rows):
    if dy is None:
        return skip, None, None, None
    *saved, bias = ctx.saved_tensors  # asked for once: activation checkpointing gives it no second time
    dx, shares = layer_norm_backward(dy, *saved, skip)
    return dx, *sums(shares, [saved[-1], bias]), None


layer_norm.register_autograd(_autograd, setup_context=_setup_context)
refuse_second(layer_norm_backward)


class LayerNormAndInput(torch.autograd.Function):
    """`layer_norm`'s y, and x once more: as `GroupNormAndInput`."""

    @staticmethod
    def forward(ctx, sums, *inputs):
        ctx.sums, (y, mean, rstd) = sums, layer_norm(*inputs)
        _setup_context(ctx, inputs, (y, mean, rstd))
        return y, inputs[0].view_as(inputs[0]), mean, rstd

    @staticmethod
    def backward(ctx, dy, skip, *_):
        return None, *_autograd(ctx, dy, skip=skip, sums=ctx.sums)


def gate_cases() -> Iterator[GateCase]:
    """Tiles of the paper's widths, of the widest and of one not aligned, in bfloat16 and in float32.

    Of the widest, which takes most registers, bfloat16 with float32 parameters too.
    """
    tiles = {layer_norm_fwd_kernel: TILE_FORWARD, layer_norm_bwd_kernel: TILE_BACKWARD}
    for kernel, size in tiles.items():
        for columns in (64, 128, 256, BLOCKS[-1], 255):
            for kind in ("bf16", "fp32"):
                yield _case(kernel, Tile.of(columns, size), kind, kind)
        yield _case(kernel, Tile.of(BLOCKS[-1], size), "bf16", "fp32")


def _case(kernel, tile: Tile, kind: str, parameters: str) -> GateCase:
    constexprs = tile.constexprs() | ({"HAS_SKIP": True} if kernel is layer_norm_bwd_kernel else {})
    own = {"p_mean": "fp32", "p_rstd": "fp32", "p_shares": "fp32", "p_w": parameters, "p_b": parameters}
    types = {n: f"*{own.get(n, kind)}" for n in kernel.arg_names if n.startswith("p_")} | {"eps": "fp32"}
    name = f"{kernel.__name__} {kind}, {parameters} {tile.rows}x{tile.columns}{' aligned' if tile.aligned else ''}"
    warps = WARPS_FORWARD if kernel is layer_norm_fwd_kernel else WARPS_BACKWARD
    signature = gate_signature(kernel, types, constexprs)
    narrow = kernel is layer_norm_bwd_kernel and kind == "fp32" and tile.columns == 64
    spills = 8 if narrow else 0  # on sm_100
    return GateCase(name, kernel, signature, constexprs, warps, 1, tensor_cores=False, spills=spills)
