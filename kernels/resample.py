"""Half and twice the resolution of channels-last features. The contract is that of `encdiff.ops.resample`.

A cell is 2x2 positions of the large map and one of the small. The small map gets `scale` times the sum of a cell, or
every position of a cell `scale` times that of the small map: each is the transpose of the other, and so its backward.
What is left of odd sizes belongs to no whole cell: it is not read, and gets 0. One launch serves one or two tensors.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gate import GateCase, gate_signature

# cells and channels of one program: 16 bytes of bfloat16 for each thread and position, and enough programs for a GPU at
# the smallest maps of a U-Net
BLOCK_P, BLOCK_C = tl.constexpr(16), tl.constexpr(64)
VECTOR = tl.constexpr(8)  # neighbours of one thread
GENERAL = ("cells", "H", "W", "C")  # what the kernels do not specialise


@triton.jit
def _cells(cells, H, W, C, ALIGNED: tl.constexpr):
    """Offsets of a tile's cells in the small and in the large map (H, W), what there is of each, and the way on."""
    if ALIGNED:
        C = C // VECTOR * VECTOR  # said in this way, the compiler knows that positions are aligned
    tiles = tl.cdiv(C, BLOCK_C)
    o = tl.program_id(0) // tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = (tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m = (o < cells)[:, None] & (o_c < C)
    C = C.to(tl.int64)
    rows, columns = tl.cdiv(H, 2), tl.cdiv(W, 2)
    i, j, i_b = o // columns % rows, o % columns, (o // columns // rows).to(tl.int64)
    below, right = (2 * i + 1 < H)[:, None], (2 * j + 1 < W)[:, None]
    small = ((i_b * (H // 2) + i) * (W // 2) + j)[:, None] * C + o_c
    large = ((i_b * H + 2 * i) * W + 2 * j)[:, None] * C + o_c
    return small, large, m, m & right, m & below, C


@triton.jit
def _down(p_x, p_y, cells, H, W, C, scale, ALIGNED: tl.constexpr):
    small, large, _, right, below, C = _cells(cells, H, W, C, ALIGNED)
    m = right & below
    p_x += large
    above = tl.load(p_x, mask=m, other=0.0).to(tl.float32) + tl.load(p_x + C, mask=m, other=0.0).to(tl.float32)
    p_x += W * C
    total = above + (
        tl.load(p_x, mask=m, other=0.0).to(tl.float32) + tl.load(p_x + C, mask=m, other=0.0).to(tl.float32)
    )
    tl.store(p_y + small, (total * scale).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _up(p_x, p_y, cells, H, W, C, scale, ALIGNED: tl.constexpr):
    small, large, m, right, below, C = _cells(cells, H, W, C, ALIGNED)
    x = tl.load(p_x + small, mask=right & below, other=0.0).to(tl.float32)
    y = (x * scale).to(p_y.dtype.element_ty)
    p_y += large
    tl.store(p_y, y, mask=m)
    tl.store(p_y + C, y, mask=right)
    p_y += W * C
    tl.store(p_y, y, mask=below)
    tl.store(p_y + C, y, mask=right & below)


@triton.jit(do_not_specialize=GENERAL)
def resample_down_kernel(p_x, p_other, p_y, p_y_other, cells, H, W, C, scale, ALIGNED: tl.constexpr):
    if tl.program_id(1) == 0:
        _down(p_x, p_y, cells, H, W, C, scale, ALIGNED)
    else:
        _down(p_other, p_y_other, cells, H, W, C, scale, ALIGNED)


@triton.jit(do_not_specialize=GENERAL)
def resample_up_kernel(p_x, p_other, p_y, p_y_other, cells, H, W, C, scale, ALIGNED: tl.constexpr):
    if tl.program_id(1) == 0:
        _up(p_x, p_y, cells, H, W, C, scale, ALIGNED)
    else:
        _up(p_other, p_y_other, cells, H, W, C, scale, ALIGNED)


def _aligned(x: Tensor) -> Tensor:
    """Channels-last, from a multiple of 16 bytes on."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x.clone() if x.data_ptr() % 16 else x


def _launch(kernel, maps: Sequence[Tensor], outputs: Sequence[Tensor], large: Tensor, scale: float) -> None:
    (B, C, H, W), x, y = large.shape, [_aligned(x) for x in maps], outputs
    cells = B * triton.cdiv(H, 2) * triton.cdiv(W, 2)
    if cells:
        grid = triton.cdiv(cells, BLOCK_P.value) * triton.cdiv(C, BLOCK_C.value), len(x)
        with torch.cuda.device_of(x[0]):
            kernel[grid](x[0], x[-1], y[0], y[-1], cells, H, W, C, scale, ALIGNED=C % VECTOR.value == 0)


def _outputs(maps: Sequence[Tensor], height: int, width: int) -> list[Tensor]:
    shape, like = (*maps[0].shape[:2], height, width), {"dtype": maps[0].dtype, "device": maps[0].device}
    return [torch.empty(shape, **like, memory_format=torch.channels_last) for _ in maps]


@torch.library.custom_op("encdiff::resample_down", mutates_args=())
def resample_down(maps: Sequence[Tensor], scale: float) -> list[Tensor]:
    """One or two (B, C, H, W) of one type -> (B, C, H // 2, W // 2): `scale` times the sum of each cell."""
    H, W = maps[0].shape[2:]
    outputs = _outputs(maps, H // 2, W // 2)
    _launch(resample_down_kernel, maps, outputs, maps[0], scale)
    return outputs


@resample_down.register_fake
def _(maps, scale):
    return _outputs(maps, maps[0].shape[2] // 2, maps[0].shape[3] // 2)


@torch.library.custom_op("encdiff::resample_up", mutates_args=())
def resample_up(maps: Sequence[Tensor], height: int, width: int, scale: float) -> list[Tensor]:
    """One or two (B, C, height // 2, width // 2) of one type -> (B, C, height, width): every position of a cell."""
    outputs = _outputs(maps, height, width)
    _launch(resample_up_kernel, maps, outputs, outputs[0], scale)
    return outputs


@resample_up.register_fake
def _(maps, height, width, scale):
    return _outputs(maps, height, width)


def _setup_down(ctx, inputs, output) -> None:
    maps, ctx.scale = inputs
    ctx.size = maps[0].shape[2:]


def _down_autograd(ctx, gradients):
    return resample_up(gradients, *ctx.size, ctx.scale), None


def _setup_up(ctx, inputs, output) -> None:
    ctx.scale = inputs[-1]


def _up_autograd(ctx, gradients):
    return resample_down(gradients, ctx.scale), None, None, None


resample_down.register_autograd(_down_autograd, setup_context=_setup_down)
resample_up.register_autograd(_up_autograd, setup_context=_setup_up)


def gate_cases() -> Iterator[GateCase]:
    """Both kernels in every type, channels a multiple of 8 and not."""
    for kernel in (resample_down_kernel, resample_up_kernel):
        for kind in ("bf16", "fp16", "fp32"):
            for aligned in (True, False):
                types = {n: f"*{kind}" for n in kernel.arg_names if n.startswith("p_")} | {"scale": "fp32"}
                constexprs = {"ALIGNED": aligned}
                name = f"{kernel.__name__} {kind}{' aligned' if aligned else ''}"
                signature = gate_signature(kernel, types, constexprs)
                yield GateCase(name, kernel, signature, constexprs, num_stages=3, tensor_cores=False)
