"""The MLP bank: one launch forward, two backward. The contract is that of `encdiff.ops.mlp_bank`.

Three layers M -> F -> H -> D, or two, M -> H -> D, then F = 0 and the input takes the place of the first hidden layer.
The hidden layer before the tokens goes through the chip in chunks of BLOCK_H, so H has no limit; M, F and D stay on the
chip whole. Nothing but the inputs is kept for the backward pass.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gate import GateCase, gate_signature
from ._second import refuse_second

# Widths are padded to these: what the registers hold. The kernels specialise no argument, so the code depends on the
# block sizes alone and gate_cases lists all of it. Units that pad are masked: their weight 0 times inf would be NaN.
BLOCKS = {"M": (16,), "F": (0, 64, 128), "D": (16, 64)}
BLOCK_SUM = 256  # elements that one program of the reduction sums
PROGRAMS = 256  # about two for each multiprocessor of a large card; the backward splits the batch to reach them
# 16-bit operands reach the tensor cores in the forward pass only: there, chained products keep whole tiles in every
# warp's registers, of which the backward pass has none to spare. It multiplies in float32.
DOTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # it can round to bfloat16, not multiply it


@triton.jit
def _expm1(a):
    """exp(a) - 1 for a <= 0 without cancellation: Taylor to a^8 above -1/2, 1e-8 off there."""
    series = 1 + a / 8
    series = 1 + a / 7 * series
    series = 1 + a / 6 * series
    series = 1 + a / 5 * series
    series = 1 + a / 4 * series
    series = 1 + a / 3 * series
    series = 1 + a / 2 * series
    return tl.where(a > -0.5, a * series, tl.exp(a) - 1)


@triton.jit
def _activate(a, ACTIVATION: tl.constexpr):
    if ACTIVATION == "elu":
        h = tl.where(a > 0, a, _expm1(a))
    elif ACTIVATION == "silu":
        h = a / (1 + tl.exp(-a))
    elif ACTIVATION == "gelu":
        h = 0.5 * a * (1 + tl.erf(a * 0.7071067811865476))
    else:
        h = tl.where(a < 0, 0.0, a)  # in this order a NaN stays one
    return h


@triton.jit
def _slope(a, ACTIVATION: tl.constexpr):
    """The activation's derivative; 0 for ReLU at 0 and 1 for ELU at 0, as in PyTorch."""
    if ACTIVATION == "elu":
        s = tl.where(a > 0, 1.0, tl.exp(a))
    elif ACTIVATION == "silu":
        p = 1 / (1 + tl.exp(-a))
        s = p * (1 + a * (1 - p))
    elif ACTIVATION == "gelu":
        s = 0.5 * (1 + tl.erf(a * 0.7071067811865476)) + a * 0.3989422804014327 * tl.exp(-0.5 * a * a)
    else:
        s = tl.where(a <= 0, 0.0, 1.0)
    return s


@triton.jit
def _load(p, o_i, o_j, stride_i, stride_j, I, J):  # noqa: E741
    """The block (o_i, o_j) of a matrix I x J in float32, zero outside."""
    m = (o_i < I)[:, None] & (o_j < J)[None, :]
    return tl.load(p + o_i[:, None] * stride_i + o_j[None, :] * stride_j, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _store(p, b, o_i, o_j, stride_i, I, J):  # noqa: E741
    m = (o_i < I)[:, None] & (o_j < J)[None, :]
    tl.store(p + o_i[:, None] * stride_i + o_j[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def _product(a, b, DOT: tl.constexpr):
    """a b with operands of the type DOT, summed in float32."""
    a, b = a.to(DOT), b.to(DOT)
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit(do_not_specialize=range(17))
def mlp_bank_fwd_kernel(
    p_x, p_w0, p_b0, p_w1, p_b1, p_w2, p_b2, p_y, M, F, H, D, B, N, stride_xb, stride_xn, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program: one concept, BLOCK_B rows of the batch."""
    i_n = (tl.program_id(0) % N).to(tl.int64)
    o_b = (tl.program_id(0) // N).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    h = _load(p_x + i_n * stride_xn, o_b, o_m, stride_xb, stride_xm, B, M)
    E = F if BLOCK_F > 0 else M  # inputs of the layer that goes in chunks
    o_e = tl.arange(0, BLOCK_F if BLOCK_F > 0 else BLOCK_M)
    if BLOCK_F > 0:
        b_w0 = _load(p_w0 + i_n * F * M, o_e, o_m, M, 1, F, M)
        b_b0 = tl.load(p_b0 + i_n * F + o_e, mask=o_e < F, other=0.0).to(tl.float32)
        h = tl.where((o_e < F)[None, :], _activate(_product(h, tl.trans(b_w0), DOT) + b_b0[None, :], ACTIVATION), 0.0)
    b_b2 = tl.load(p_b2 + i_n * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    y = tl.zeros((BLOCK_B, BLOCK_D), tl.float32) + b_b2[None, :]
    for i_h in range(0, H, BLOCK_H):
        o_h = i_h + tl.arange(0, BLOCK_H)
        b_w1 = _load(p_w1 + i_n * H * E, o_h, o_e, E, 1, H, E)
        b_b1 = tl.load(p_b1 + i_n * H + o_h, mask=o_h < H, other=0.0).to(tl.float32)
        b_w2 = _load(p_w2 + i_n * D * H, o_d, o_h, H, 1, D, H)
        h1 = tl.where((o_h < H)[None, :], _activate(_product(h, tl.trans(b_w1), DOT) + b_b1[None, :], ACTIVATION), 0.0)
        y += _product(h1, tl.trans(b_w2), DOT)
    _store(p_y + i_n * D, y, o_b, o_d, N.to(tl.int64) * D, B, D)


@triton.jit(do_not_specialize=range(24))
def mlp_bank_bwd_kernel(
    p_dy, p_x, p_w0, p_b0, p_w1, p_b1, p_w2, p_b2, p_dx, p_chunked, p_owned, M, F, H, D, B, N, SPLITS,
    stride_dyb, stride_dyn, stride_dyd, stride_xb, stride_xn, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One program: one concept, one chunk of hidden units, every SPLITS-th tile of the batch.

    It owns the gradients of its units' weights up to the sum over the splits (p_owned, one row each: W1, b1, W2, b2).
    Those of the first layer and of x are its share of a sum over the chunks too (p_chunked: W0, b0; p_dx).
    """
    CHUNKS = tl.cdiv(H, BLOCK_H)
    i_n = (tl.program_id(0) % N).to(tl.int64)
    i_h = tl.program_id(0) // N % CHUNKS
    i_s = tl.program_id(0) // (N * CHUNKS)
    E = F if BLOCK_F > 0 else M
    BLOCK_E: tl.constexpr = BLOCK_F if BLOCK_F > 0 else BLOCK_M
    o_m, o_e, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_D)
    o_h = i_h * BLOCK_H + tl.arange(0, BLOCK_H)
    dw1, db1 = tl.zeros((BLOCK_H, BLOCK_E), tl.float32), tl.zeros((BLOCK_H,), tl.float32)
    dw2, db2 = tl.zeros((BLOCK_D, BLOCK_H), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    if BLOCK_F > 0:
        dw0, db0 = tl.zeros((BLOCK_E, BLOCK_M), tl.float32), tl.zeros((BLOCK_E,), tl.float32)
    p_dx += (i_h.to(tl.int64) * B * N + i_n) * M
    for i_t in range(i_s, tl.cdiv(B, BLOCK_B), SPLITS):
        o_b = i_t * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
        x = _load(p_x + i_n * stride_xn, o_b, o_m, stride_xb, stride_xm, B, M)
        dy = _load(p_dy + i_n * stride_dyn, o_b, o_d, stride_dyb, stride_dyd, B, D)
        b_w1 = _load(p_w1 + i_n * H * E, o_h, o_e, E, 1, H, E)
        b_b1 = tl.load(p_b1 + i_n * H + o_h, mask=o_h < H, other=0.0).to(tl.float32)
        b_w2 = _load(p_w2 + i_n * D * H, o_d, o_h, H, 1, D, H)
        h = x
        if BLOCK_F > 0:
            b_w0 = _load(p_w0 + i_n * F * M, o_e, o_m, M, 1, F, M)
            b_b0 = tl.load(p_b0 + i_n * F + o_e, mask=o_e < F, other=0.0).to(tl.float32)
            a0 = tl.where((o_e < F)[None, :], _product(x, tl.trans(b_w0), tl.float32), 0.0) + b_b0[None, :]
            h = _activate(a0, ACTIVATION)
        a1 = tl.where((o_h < H)[None, :], _product(h, tl.trans(b_w1), tl.float32), 0.0) + b_b1[None, :]
        db2 += tl.sum(dy, 0)
        da1 = _product(dy, b_w2, tl.float32) * _slope(a1, ACTIVATION)
        dw2 += _product(tl.trans(dy), _activate(a1, ACTIVATION), tl.float32)
        dw1 += _product(tl.trans(da1), h, tl.float32)
        db1 += tl.sum(da1, 0)
        dx = _product(da1, b_w1, tl.float32)
        if BLOCK_F > 0:
            da0 = dx * _slope(a0, ACTIVATION)
            dw0 += _product(tl.trans(da0), x, tl.float32)
            db0 += tl.sum(da0, 0)
            dx = _product(da0, b_w0, tl.float32)
        _store(p_dx, dx, o_b, o_m, N.to(tl.int64) * M, B, M)
    p_owned += i_s.to(tl.int64) * N * (H * E + H + D * H + D)
    _store(p_owned + i_n * H * E, dw1, o_h, o_e, E, H, E)
    p_owned += N * H * E
    tl.store(p_owned + i_n * H + o_h, db1, mask=o_h < H)
    p_owned += N * H
    _store(p_owned + i_n * D * H, dw2, o_d, o_h, H, D, H)
    p_owned += N * D * H
    if i_h == 0:
        tl.store(p_owned + i_n * D + o_d, db2, mask=o_d < D)
    if BLOCK_F > 0:
        p_chunked += (i_s * CHUNKS + i_h).to(tl.int64) * N * (F * M + F)
        _store(p_chunked + i_n * F * M, dw0, o_e, o_m, M, F, M)
        tl.store(p_chunked + N * F * M + i_n * F + o_e, db0, mask=o_e < F)


@triton.jit
def _sum_rows(p_rows, p_out, i_block, size, rows, BLOCK: tl.constexpr):
    """out = rows (rows, size) summed, BLOCK columns; always in the same order."""
    o = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, rows, 16):
        o_i = (i + tl.arange(0, 16)).to(tl.int64)
        total += tl.sum(_load(p_rows, o_i, o, size, 1, rows, size), 0)
    tl.store(p_out + o, total.to(p_out.dtype.element_ty), mask=o < size)


@triton.jit(do_not_specialize=range(11))
def mlp_bank_bwd_kernel_sum(
    p_x, p_chunked, p_owned, p_dx, p_dw, size_x, rows_x, size_chunked, rows_chunked, size_owned, rows_owned,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The second half of the reductions: dx, then the first layer's gradients and the others' into one flat p_dw."""
    i = tl.program_id(0)
    first, second = tl.cdiv(size_x, BLOCK), tl.cdiv(size_x, BLOCK) + tl.cdiv(size_chunked, BLOCK)
    if i < first:
        _sum_rows(p_x, p_dx, i, size_x, rows_x, BLOCK)
    elif i < second:
        _sum_rows(p_chunked, p_dw, i - first, size_chunked, rows_chunked, BLOCK)
    else:
        _sum_rows(p_owned, p_dw + size_chunked, i - second, size_owned, rows_owned, BLOCK)


class Tile(NamedTuple):
    """Rows of the batch and hidden units that one program handles at a time."""

    rows: int
    units: int
    num_warps: int


class Bank(NamedTuple):
    """Widths of the layers (F = 0: two of them) and the configuration that follows from them."""

    M: int
    F: int
    H: int
    D: int

    @classmethod
    def of(cls, weights: list[Tensor]) -> "Bank":
        widths = [weights[0].shape[2], *(w.shape[1] for w in weights)]
        return cls(widths[0], 0 if len(weights) == 2 else widths[1], *widths[-2:])

    @property
    def forward_tile(self) -> Tile:
        return Tile(32, 32, 4)

    @property
    def backward_tile(self) -> Tile:
        return Tile(16, 16, 8 if self.F else 4)

    @property
    def chunks(self) -> int:
        """Programs of the backward pass among which the hidden units of one concept are divided."""
        return triton.cdiv(self.H, self.backward_tile.units)

    def splits(self, batch: int, concepts: int) -> int:
        """Programs among which the batch is divided: enough for PROGRAMS in all, at most one for each tile."""
        tiles = triton.cdiv(batch, self.backward_tile.rows)
        return max(1, min(tiles, triton.cdiv(PROGRAMS, concepts * self.chunks)))

    @property
    def chunked(self) -> int:
        """Parameters of one concept whose gradient is a sum over the chunks: those of the first of three layers."""
        return self.F * self.M + self.F

    @property
    def owned(self) -> int:
        return self.H * (self.F or self.M) + self.H + self.D * self.H + self.D

    def constexprs(self, tile: Tile, activation: str) -> dict:
        blocks = {f"BLOCK_{name}": min(s for s in sizes if s >= getattr(self, name)) for name, sizes in BLOCKS.items()}
        return blocks | {"BLOCK_B": tile.rows, "BLOCK_H": tile.units, "ACTIVATION": activation}


def dot_type(*tensors: Tensor) -> tl.dtype:
    """Forward products have 16-bit operands only where everything is stored so; their sums are float32 either way."""
    kinds = {t.dtype for t in tensors}
    return DOTS[kinds.pop()] if len(kinds) == 1 else tl.float32


def _parameters(weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """[w0, b0, w1, b1, w2, b2] as the kernels read them; with two layers w0 and b0 stay unread."""
    pairs = list(zip(weights, biases, strict=True))
    return [t.contiguous() for pair in (pairs[:1] + pairs)[-3:] for t in pair]


def _launch_forward(scalars: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str) -> Tensor:
    (batch, concepts, _), bank = scalars.shape, Bank.of(weights)
    y, tile = scalars.new_empty(batch, concepts, bank.D), bank.forward_tile
    if batch:
        grid = (concepts * triton.cdiv(batch, tile.rows),)
        with torch.cuda.device_of(scalars):
            mlp_bank_fwd_kernel[grid](
                scalars, *_parameters(weights, biases), y, *bank, batch, concepts, *scalars.stride(),
                **bank.constexprs(tile, activation), DOT=dot_type(scalars, *weights, *biases),
                num_warps=tile.num_warps, num_stages=1,
            )  # fmt: skip
    return y


def _launch_backward(dy, scalars, weights, biases, activation) -> tuple[Tensor, Tensor]:
    """(dscalars, every parameter's gradient in one flat tensor: w0, b0, w1, ...)."""
    (batch, concepts, inputs), bank = scalars.shape, Bank.of(weights)
    dscalars, tile = scalars.new_empty(scalars.shape), bank.backward_tile
    flat = weights[0].new_empty(concepts * (bank.chunked + bank.owned))
    if not batch:
        return dscalars, flat.zero_()
    splits = bank.splits(batch, concepts)
    shapes = [  # what the first kernel leaves to the second: so many rows, to be summed, of so many elements
        (bank.chunks, batch * concepts * inputs),
        (splits * bank.chunks, concepts * bank.chunked),
        (splits, concepts * bank.owned),
    ]
    parts = [torch.empty(shape, dtype=torch.float32, device=scalars.device) for shape in shapes]
    with torch.cuda.device_of(scalars):
        mlp_bank_bwd_kernel[concepts * bank.chunks * splits,](
            dy, scalars, *_parameters(weights, biases), *parts, *bank, batch, concepts, splits, *dy.stride(),
            *scalars.stride(), **bank.constexprs(tile, activation), num_warps=tile.num_warps, num_stages=1,
        )  # fmt: skip
        blocks = sum(triton.cdiv(size, BLOCK_SUM) for _, size in shapes)
        sizes = [n for rows, size in shapes for n in (size, rows)]
        mlp_bank_bwd_kernel_sum[blocks,](*parts, dscalars, flat, *sizes, BLOCK=BLOCK_SUM)
    return dscalars, flat


@torch.library.custom_op("encdiff::mlp_bank", mutates_args=())
def mlp_bank(scalars: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str) -> Tensor:
    """Scalars (B, N, M), weights (N, out, in) of two or three layers, biases (N, out) -> tokens (B, N, D)."""
    return _launch_forward(scalars, weights, biases, activation)


@mlp_bank.register_fake
def _(scalars, weights, biases, activation):
    return scalars.new_empty(*scalars.shape[:2], weights[-1].shape[1])


@torch.library.custom_op("encdiff::mlp_bank_backward", mutates_args=())
def mlp_bank_backward(
    dy: Tensor, scalars: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str
) -> tuple[Tensor, Tensor]:
    return _launch_backward(dy, scalars, weights, biases, activation)


@mlp_bank_backward.register_fake
def _(dy, scalars, weights, biases, activation):
    size = sum(t.numel() for t in (*weights, *biases))
    return scalars.new_empty(scalars.shape), weights[0].new_empty(size)


def _setup_context(ctx, inputs, output) -> None:
    scalars, weights, biases, ctx.activation = inputs
    ctx.save_for_backward(scalars, *weights, *biases)


def _autograd(ctx, dy):
    scalars, *parameters = ctx.saved_tensors
    weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
    dscalars, flat = mlp_bank_backward(dy, scalars, weights, biases, ctx.activation)
    pairs = [t for pair in zip(weights, biases, strict=True) for t in pair]
    gradients = [g.view(t.shape) for g, t in zip(flat.split([t.numel() for t in pairs]), pairs, strict=True)]
    return dscalars, gradients[::2], gradients[1::2], None


mlp_bank.register_autograd(_autograd, setup_context=_setup_context)
refuse_second(mlp_bank_backward)


def gate_cases() -> Iterator[GateCase]:
    """Every choice of block sizes, with the activation of the longest code; the others for the paper's bank."""
    paper = Bank(1, 64, 128, 16)
    banks = [Bank(16, f, 128, d) for f in BLOCKS["F"] for d in BLOCKS["D"]]
    for bank in banks:
        yield _forward_case(bank, "gelu", "fp32")
        yield _forward_case(bank, "gelu", "bf16")
        yield _backward_case(bank, "gelu", "fp32")
        yield _backward_case(bank, "gelu", "bf16")
    yield _forward_case(paper, "elu", "fp16")
    yield _backward_case(paper, "elu", "fp16")
    for activation in ("elu", "silu", "relu"):
        yield _backward_case(paper, activation, "fp32")
    for kind in ("fp32", "bf16", "fp16"):
        kinds = dict(zip(mlp_bank_bwd_kernel_sum.arg_names, ["*fp32:1"] * 3 + [f"*{kind}:1"] * 2, strict=False))
        signature = gate_signature(mlp_bank_bwd_kernel_sum, kinds, {"BLOCK": BLOCK_SUM})
        name = f"mlp_bank_bwd_kernel_sum {kind}"
        yield GateCase(name, mlp_bank_bwd_kernel_sum, signature, {"BLOCK": BLOCK_SUM}, tensor_cores=False)


def _forward_case(bank: Bank, activation: str, kind: str) -> GateCase:
    dot = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[kind]
    constexprs = bank.constexprs(bank.forward_tile, activation) | {"DOT": dot}
    return _case(mlp_bank_fwd_kernel, bank, bank.forward_tile, constexprs, kind, kind != "fp32")


def _backward_case(bank: Bank, activation: str, kind: str) -> GateCase:
    constexprs = bank.constexprs(bank.backward_tile, activation)
    return _case(mlp_bank_bwd_kernel, bank, bank.backward_tile, constexprs, kind, False)


def _case(kernel, bank: Bank, tile: Tile, constexprs: dict, kind: str, tensor_cores: bool) -> GateCase:
    partial = {"p_dx", "p_chunked", "p_owned"}
    types = {n: "*fp32:1" if n in partial else f"*{kind}:1" for n in kernel.arg_names if n.startswith("p_")}
    signature = gate_signature(kernel, types, constexprs)
    name = f"{kernel.__name__} {kind} {'-'.join(map(str, bank))} {constexprs['ACTIVATION']}"
    return GateCase(name, kernel, signature, constexprs, tile.num_warps, 1, tensor_cores)
