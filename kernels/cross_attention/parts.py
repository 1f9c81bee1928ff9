"""What the kernels of cross-attention share: operands, rows, LayerNorm; and the launch."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def operand(b, DTYPE: tl.constexpr):
    """An operand of a product in the product's type; the interpreter rounds to bfloat16 but cannot multiply it."""
    b = b.to(DTYPE)
    if INTERPRETED:
        b = b.to(tl.float32)
    return b


@triton.jit
def place(n, BLOCK: tl.constexpr):
    """What a program takes: a sample, or a head of one, and BLOCK of its n rows."""
    tiles = tl.cdiv(n, BLOCK)
    return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def load_rows(p, o_l, o_c, stride_l, L, C):
    """Queries o_l of one sample in float32, zero outside L x C."""
    m = (o_l < L)[:, None] & (o_c < C)[None, :]
    return tl.load(p + o_l.to(tl.int64)[:, None] * stride_l + o_c[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def store_rows(p, b, o_l, o_c, stride_l, L, C):
    m = (o_l < L)[:, None] & (o_c < C)[None, :]
    tl.store(p + o_l.to(tl.int64)[:, None] * stride_l + o_c[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def load_channels(p, o_c, C, DEFAULT: tl.constexpr):
    """A vector over the channels in float32, DEFAULT where there is none."""
    if p is None:
        b = tl.full(o_c.shape, DEFAULT, tl.float32)
    else:
        b = tl.load(p + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    return b


@triton.jit
def standardise(x, o_c, C, eps):
    """(x - mean) / sqrt(var + eps) over the channels, zero outside C, and the reciprocal root of each row."""
    centred = tl.where((o_c < C)[None, :], x - (tl.sum(x, 1) / C)[:, None], 0.0)
    r = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * r[:, None], r


@triton.jit
def normalise(x, o_c, p_gamma, p_beta, C, eps):
    if p_gamma is not None:
        x = standardise(x, o_c, C, eps)[0]
        x = x * load_channels(p_gamma, o_c, C, 1.0)[None, :] + load_channels(p_beta, o_c, C, 0.0)[None, :]
    return x


@triton.jit
def over_tokens(b, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows, GROUP*BLOCK_N) -> (rows, GROUP, BLOCK_N)."""
    return tl.reshape(b, (b.shape[0], GROUP, BLOCK_N))


@triton.jit
def softmax_by_head(s, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of logits (rows, GROUP*BLOCK_N), each head's on its own; a head of -inf throughout attends to nothing."""
    rows: tl.constexpr = s.shape[0]
    s = over_tokens(s, GROUP, BLOCK_N)
    top = tl.max(s, 2)
    e = tl.exp2((s - tl.where(top == -float("inf"), 0.0, top)[:, :, None]) * LOG2E)  # cheaper than exp
    z = tl.sum(e, 2)
    return tl.reshape(e * (1.0 / tl.where(z == 0.0, 1.0, z))[:, :, None], (rows, GROUP * BLOCK_N))


def on_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def aligned_rows(x: Tensor) -> Tensor:
    """x itself where its rows are whole and begin at multiples of 8 elements and 16 bytes, else a copy."""
    whole = x.stride(-1) == 1 and not any(stride % 8 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if whole else x.clone(memory_format=torch.contiguous_format)
