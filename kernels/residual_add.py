"""x + h + a bias of each column: one launch. The contract is that of `encdiff.ops.residual_add`.

Memory-bound: two are read once and one is written. The backward pass has no kernel: the upstream gradient is that of x
and of h, and its `column_sum` that of the bias.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gate import GateCase, gate_signature

TILE = {"BLOCK_R": 32, "BLOCK_C": 64}  # two 16-byte loads of bfloat16 for each thread and input; widths are 64 k


@triton.jit(do_not_specialize=["rows"])
def residual_add_kernel(p_x, p_h, p_bias, p_y, rows, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    blocks = tl.cdiv(C, BLOCK_C)
    o_r = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    o, m = o_r[:, None] * C + o_c[None, :], (o_r < rows)[:, None] & (o_c < C)[None, :]
    x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    h = tl.load(p_h + o, mask=m, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    tl.store(p_y + o, (x + (h + bias[None, :])).to(p_y.dtype.element_ty), mask=m)


@torch.library.custom_op("encdiff::residual_add", mutates_args=())
def residual_add(x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    """x and h (..., C) of one type, bias (C,) -> (..., C)."""
    x, h, y = x.contiguous(), h.contiguous(), x.new_empty(x.shape)
    rows, C = x.shape[:-1].numel(), x.shape[-1]
    if x.numel():
        grid = (triton.cdiv(rows, TILE["BLOCK_R"]) * triton.cdiv(C, TILE["BLOCK_C"]),)
        with torch.cuda.device_of(x):
            residual_add_kernel[grid](x, h, bias.contiguous(), y, rows, C, **TILE)
    return y


@residual_add.register_fake
def _(x, h, bias):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.bias_dtype = inputs[2].dtype


def _autograd(ctx, dy):
    db = dy.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return dy, dy, db


residual_add.register_autograd(_autograd, setup_context=_setup_context)


def gate_cases() -> Iterator[GateCase]:
    """Columns a multiple of 16 and not."""
    for kind in ("bf16", "fp32"):
        for columns in ("i32:16", "i32"):
            types = {n: f"*{kind}" for n in residual_add_kernel.arg_names if n.startswith("p_")} | {"C": columns}
            signature = gate_signature(residual_add_kernel, types, TILE)
            name = f"residual_add_kernel {kind}{' aligned' if ':' in columns else ''}"
            yield GateCase(name, residual_add_kernel, signature, TILE, num_stages=3, tensor_cores=False)
