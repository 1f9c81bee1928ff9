"""GEGLU's elementwise part: one launch forward, one backward. The contract is that of `encdiff.ops.geglu`.

Memory-bound: forward the two halves are read once and the result is written once, backward three are read and two
written; the derivative is computed anew from the input, so nothing else is kept.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gate import GateCase, gate_signature
from ._second import refuse_second

BLOCKS = (64, 256, 1024)  # columns of one program
TILE = 2048  # its elements: two 16-byte loads of bfloat16 for each thread and half


@triton.jit
def _tile(rows, N, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets into h (g lies N behind) and into y, and which of them there are."""
    blocks = tl.cdiv(N, BLOCK_C)
    o_r = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m = (o_r < rows)[:, None] & (o_c < N)[None, :]
    return o_r[:, None] * (2 * N) + o_c[None, :], o_r[:, None] * N + o_c[None, :], m


@triton.jit
def _normal_cdf(g):
    return 0.5 * (1 + tl.erf(g * 0.7071067811865476))


@triton.jit(do_not_specialize=["rows"])
def geglu_fwd_kernel(p_x, p_y, rows, N, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    o_x, o_y, m = _tile(rows, N, BLOCK_R, BLOCK_C)
    h = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
    g = tl.load(p_x + N + o_x, mask=m, other=0.0).to(tl.float32)
    tl.store(p_y + o_y, (h * (g * _normal_cdf(g))).to(p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows"])
def geglu_bwd_kernel(p_dy, p_x, p_dx, rows, N, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """dh = dy GELU(g); dg = dy h (Phi(g) + g phi(g))."""
    o_x, o_y, m = _tile(rows, N, BLOCK_R, BLOCK_C)
    h = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
    g = tl.load(p_x + N + o_x, mask=m, other=0.0).to(tl.float32)
    dy = tl.load(p_dy + o_y, mask=m, other=0.0).to(tl.float32)
    cdf = _normal_cdf(g)
    slope = cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    tl.store(p_dx + o_x, (dy * (g * cdf)).to(p_dx.dtype.element_ty), mask=m)
    tl.store(p_dx + N + o_x, (dy * h * slope).to(p_dx.dtype.element_ty), mask=m)


def _launch(kernel, *tensors: Tensor, rows: int, columns: int) -> None:
    block = next((b for b in BLOCKS if b >= columns), BLOCKS[-1])
    grid = (triton.cdiv(rows, TILE // block) * triton.cdiv(columns, block),)
    if rows and columns:
        with torch.cuda.device_of(tensors[0]):
            kernel[grid](*tensors, rows, columns, BLOCK_R=TILE // block, BLOCK_C=block)


def _output(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("encdiff::geglu", mutates_args=())
def geglu(x: Tensor) -> Tensor:
    """x (..., 2N) -> (..., N)."""
    y = _output(x)
    _launch(geglu_fwd_kernel, x.contiguous(), y, rows=x.shape[:-1].numel(), columns=y.shape[-1])
    return y


@geglu.register_fake
def _(x):
    return _output(x)


@torch.library.custom_op("encdiff::geglu_backward", mutates_args=())
def geglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    dx = x.new_empty(x.shape)
    rows, columns = x.shape[:-1].numel(), x.shape[-1] // 2
    _launch(geglu_bwd_kernel, dy.contiguous(), x.contiguous(), dx, rows=rows, columns=columns)
    return dx


@geglu_backward.register_fake
def _(dy, x):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):
    return geglu_backward(dy, *ctx.saved_tensors)


geglu.register_autograd(_autograd, setup_context=_setup_context)
refuse_second(geglu_backward)


def gate_cases() -> Iterator[GateCase]:
    """Every tile, with columns a multiple of 16 and not."""
    for kernel in (geglu_fwd_kernel, geglu_bwd_kernel):
        for block in BLOCKS:
            for kind in ("bf16", "fp32"):
                for columns in ("i32:16", "i32"):
                    yield _case(kernel, kind, block, columns)


def _case(kernel, kind: str, block: int, columns: str) -> GateCase:
    blocks = {"BLOCK_R": TILE // block, "BLOCK_C": block}
    types = {n: f"*{kind}" for n in kernel.arg_names if n.startswith("p_")} | {"N": columns}
    name = f"{kernel.__name__} {kind} {TILE // block}x{block}{' aligned' if ':' in columns else ''}"
    return GateCase(name, kernel, gate_signature(kernel, types, blocks), blocks, num_stages=3, tensor_cores=False)
