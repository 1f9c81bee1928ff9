"""A matrix product with LayerNorm before it, GEGLU or a sum behind it: one launch. The contract is `ops.projection`'s.

A program makes one tile of the result, in float32 until it is written. With NORM it holds whole rows, normalises them
and multiplies once; else it goes along the rows. With GATED it multiplies by two blocks of the weight.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gate import GateCase, gate_signature
from .cross_attention.parts import operand

WIDTHS = (64, 128, 256)  # of rows that are normalised: columns of a tile
ROWS, COLUMNS, DEPTH = 64, 64, 64
STEP = 16  # sizes are multiples of it, so that 16 bytes move at a time and the code depends on the tile alone
GENERAL = ("p_b", "p_norm_w", "p_norm_b", "M")


@triton.jit
def _column(p, o, m):
    return tl.load(p + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _normalised(x, p_norm_w, p_norm_b, o_k, m_k, K, eps):
    """LayerNorm of whole rows, in their own type."""
    f = x.to(tl.float32)
    mean = tl.sum(f, 1) / K
    d = tl.where(m_k[None, :], f - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(d * d, 1) / K + eps)
    w, b = _column(p_norm_w, o_k, m_k), _column(p_norm_b, o_k, m_k)
    return (d * rstd[:, None] * w[None, :] + b[None, :]).to(x.dtype)


@triton.jit(do_not_specialize=GENERAL)
def projection_kernel(
    p_x, p_w, p_b, p_norm_w, p_norm_b, p_skip, p_y, M, N, K, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    start = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M
    o_m, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    o_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = start + o_m < M, o_n < N
    p_x += start * K
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_k in range(0, BLOCK_K if NORM else K, BLOCK_K):
        m_k = i_k + o_k < K
        x = tl.load(p_x + o_m[:, None] * K + (i_k + o_k)[None, :], m_m[:, None] & m_k[None, :], other=0.0)
        if NORM:
            x = _normalised(x, p_norm_w, p_norm_b, o_k, m_k, K, eps)
        x = operand(x, p_x.dtype.element_ty)
        o_w, m_w = o_n[None, :] * K + (i_k + o_k)[:, None], m_n[None, :] & m_k[:, None]
        y = tl.dot(x, operand(tl.load(p_w + o_w, m_w, other=0.0), p_w.dtype.element_ty), y, input_precision="ieee")
        if GATED:
            w = operand(tl.load(p_w + N * K + o_w, m_w, other=0.0), p_w.dtype.element_ty)
            g = tl.dot(x, w, g, input_precision="ieee")
    if HAS_BIAS:
        y += _column(p_b, o_n, m_n)[None, :]
    if GATED:
        if HAS_BIAS:
            g += _column(p_b, N + o_n, m_n)[None, :]
        y *= g * (0.5 * (1 + tl.erf(g * 0.7071067811865476)))
    o_y, m_y = o_m[:, None] * N + o_n[None, :], m_m[:, None] & m_n[None, :]
    if HAS_SKIP:
        y += tl.load(p_skip + start * N + o_y, m_y, other=0.0).to(tl.float32)
    tl.store(p_y + start * N + o_y, y.to(p_y.dtype.element_ty), m_y)


class Tile(NamedTuple):
    """Rows and columns of one program, how much of a row it takes at a time, whether that is normalised."""

    rows: int
    columns: int
    depth: int
    norm: bool

    @classmethod
    def of(cls, K: int, norm: bool) -> "Tile":
        return cls(ROWS, COLUMNS, next(w for w in WIDTHS if w >= K) if norm else DEPTH, norm)

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": 8 if self.norm and self.depth == WIDTHS[-1] else 4, "num_stages": 1 if self.norm else 3}

    def constexprs(self, gated: bool, bias: bool, skip: bool) -> dict:
        blocks = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth, "NORM": self.norm}
        return blocks | {"GATED": gated, "HAS_BIAS": bias, "HAS_SKIP": skip}


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _output(x: Tensor, weight: Tensor, gated: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight) // (1 + gated)))


@torch.library.custom_op("encdiff::projection", mutates_args=())
def projection(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    gated: bool, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """x (..., K), weight (N or 2N, K), residual (..., N) -> (..., N)."""
    y = _output(x, weight, gated)
    (M, K), N, norm = (x.shape[:-1].numel(), x.shape[-1]), y.shape[-1], norm_weight is not None
    if y.numel():
        tile, others = Tile.of(K, norm), (bias, norm_weight, norm_bias)
        x, weight = _aligned(x), _aligned(weight)
        columns = [weight if t is None else t.contiguous() for t in others]
        skip = x if residual is None else _aligned(residual)
        with torch.cuda.device_of(x):
            projection_kernel[triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),](
                x, weight, *columns, skip, y, M, N, K, eps,
                **tile.constexprs(gated, bias is not None, residual is not None), **tile.options,
            )  # fmt: skip
    return y


@projection.register_fake
def _(x, weight, bias, norm_weight, norm_bias, eps, gated, residual):
    return _output(x, weight, gated)


def gate_cases() -> Iterator[GateCase]:
    """Every tile, in what a U-Net asks of it."""
    for kind in ("bf16", "fp16"):
        for width in WIDTHS:
            yield _case(kind, Tile.of(width, True), gated=True, bias=True, skip=False)
            yield _case(kind, Tile.of(width, True), gated=False, bias=False, skip=False)
        yield _case(kind, Tile.of(DEPTH, False), gated=False, bias=True, skip=True)


def _case(kind: str, tile: Tile, **flags: bool) -> GateCase:
    blocks = tile.constexprs(**flags)
    types = {n: f"*{kind}" for n in projection_kernel.arg_names if n.startswith("p_")}
    types |= {n: f"*{kind}:1" for n in GENERAL if n.startswith("p_")} | {"N": "i32:16", "K": "i32:16", "eps": "fp32"}
    said = " ".join(name for name, flag in (("norm", tile.norm), *flags.items()) if flag)
    name = f"projection_kernel {kind} {tile.rows}x{tile.columns}x{tile.depth} {said}"
    return GateCase(name, projection_kernel, gate_signature(projection_kernel, types, blocks), blocks, **tile.options)
