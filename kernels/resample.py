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
GENERAL = ("cells", "H", "W", "C", "pitch", "pitch_other")  # what the kernels do not specialise


@triton.jit
def _cells(cells, H, W, C, pitch, ALIGNED: tl.constexpr):
    """Of a tile: positions of its cells in the small and in the large map (H, W), channels, what there is of each cell.

    pitch: elements from one position of the input to the next, C or more.
    """
    if ALIGNED:  # said in this way, the compiler knows that positions are aligned
        C = C // VECTOR * VECTOR
        pitch = pitch // VECTOR * VECTOR
    tiles = tl.cdiv(C, BLOCK_C)
    o = tl.program_id(0) // tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = (tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m = (o < cells)[:, None] & (o_c < C)
    rows, columns = tl.cdiv(H, 2), tl.cdiv(W, 2)
    i, j, i_b = o // columns % rows, o % columns, (o // columns // rows).to(tl.int64)
    right, below = (2 * j + 1 < W)[:, None], (2 * i + 1 < H)[:, None]
    small = ((i_b * (H // 2) + i) * (W // 2) + j)[:, None]
    large = ((i_b * H + 2 * i) * W + 2 * j)[:, None]
    return small, large, o_c, m, m & right, m & below, C.to(tl.int64), pitch.to(tl.int64)


@triton.jit
def _load(p, m):
    return tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _down(p_x, p_y, cells, H, W, C, pitch, scale, ALIGNED: tl.constexpr):
    small, large, o_c, _, right, below, C, pitch = _cells(cells, H, W, C, pitch, ALIGNED)
    m = right & below
    p_x += large * pitch + o_c
    p_below = p_x + W * pitch
    total = (_load(p_x, m) + _load(p_x + pitch, m)) + (_load(p_below, m) + _load(p_below + pitch, m))
    tl.store(p_y + small * C + o_c, (total * scale).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _up(p_x, p_y, cells, H, W, C, pitch, scale, ALIGNED: tl.constexpr):
    small, large, o_c, m, right, below, C, pitch = _cells(cells, H, W, C, pitch, ALIGNED)
    y = (_load(p_x + small * pitch + o_c, right & below) * scale).to(p_y.dtype.element_ty)
    p_y += large * C + o_c
    tl.store(p_y, y, mask=m)
    tl.store(p_y + C, y, mask=right)
    tl.store(p_y + W * C, y, mask=below)
    tl.store(p_y + W * C + C, y, mask=right & below)


@triton.jit(do_not_specialize=GENERAL)
def resample_down_kernel(
    p_x, p_other, p_y, p_y_other, cells, H, W, C, pitch, pitch_other, scale, ALIGNED: tl.constexpr
):  # fmt: skip
    if tl.program_id(1) == 0:
        _down(p_x, p_y, cells, H, W, C, pitch, scale, ALIGNED)
    else:
        _down(p_other, p_y_other, cells, H, W, C, pitch_other, scale, ALIGNED)


@triton.jit(do_not_specialize=GENERAL)
def resample_up_kernel(
    p_x, p_other, p_y, p_y_other, cells, H, W, C, pitch, pitch_other, scale, ALIGNED: tl.constexpr
):  # fmt: skip
    if tl.program_id(1) == 0:
        _up(p_x, p_y, cells, H, W, C, pitch, scale, ALIGNED)
    else:
        _up(p_other, p_y_other, cells, H, W, C, pitch_other, scale, ALIGNED)


def _pitched(x: Tensor) -> tuple[Tensor, int]:
    """x and its pitch: channels of wider features, such as the gradient of a part of a concatenation, or a copy."""
    (_, C, H, W), pitch = x.shape, x.stride(3)
    whole = x.stride() == (H * W * pitch, 1, W * pitch, pitch) and pitch % VECTOR.value == 0
    if whole and x.data_ptr() % 16 == 0:
        return x, pitch
    x = x.contiguous(memory_format=torch.channels_last)
    return x.clone() if x.data_ptr() % 16 else x, C


def _launch(kernel, maps: Sequence[Tensor], outputs: Sequence[Tensor], large: Tensor, scale: float) -> None:
    (B, C, H, W), pitched = large.shape, [_pitched(x) for x in maps]
    cells = B * triton.cdiv(H, 2) * triton.cdiv(W, 2)
    if cells:
        grid = triton.cdiv(cells, BLOCK_P.value) * triton.cdiv(C, BLOCK_C.value), len(maps)
        (x, pitch), (other, pitch_other) = pitched[0], pitched[-1]
        with torch.cuda.device_of(x):
            kernel[grid](
                x, other, outputs[0], outputs[-1], cells, H, W, C, pitch, pitch_other, scale,
                ALIGNED=C % VECTOR.value == 0,
            )  # fmt: skip


def _outputs(maps: Sequence[Tensor], height: int, width: int) -> list[Tensor]:
    shape, x = (*maps[0].shape[:2], height, width), maps[0]
    return [torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last) for _ in maps]


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
