"""Self-attention of narrow heads: one launch forward, one backward.

The contract is that of `encdiff.ops.self_attention`, which projects: queries, keys and values come as one matrix
(B, L, 3*H*d). Forward, a program owns BLOCK_L queries of one head and goes through the keys, BLOCK_N at a time.
Backward, it owns keys and goes through the queries, with logits transposed, as dk and dv take them. It takes a logit's
exponential once, for dq, dk and dv: dk and dv stay in registers, dq is written tile by tile, and alone asks for a
transposition on the way to its product. Where a head's keys are more than one program's, each leaves its share of dq in
float32, to be summed in order (docs/math.md).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gate import GateCase, gate_signature
from ._second import refuse_second
from .cross_attention.parts import LOG2E, aligned_rows, on_device, operand


@triton.jit
def _place(L, H, BLOCK_L: tl.constexpr):
    """Sample and tile as one number, sample, head, queries. Neighbours are heads: they share lines of the cache."""
    i_h, i_bt = tl.program_id(0) % H, tl.program_id(0) // H
    tiles = tl.cdiv(L, BLOCK_L)
    return i_bt.to(tl.int64), (i_bt // tiles).to(tl.int64), i_h, i_bt % tiles * BLOCK_L + tl.arange(0, BLOCK_L)


@triton.jit
def _inside(o_l, L, D, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr):
    """Which elements of rows o_l there are; WHOLE: no row is beyond L."""
    m = (tl.arange(0, BLOCK_D) < D)[None, :]
    return m if WHOLE else m & (o_l < L)[:, None]


@triton.jit
def _load(p, o_l, stride_l, L, D, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr = False):
    """Rows o_l of a head, zero outside L x D, as the operand of a product."""
    o_d = tl.arange(0, BLOCK_D)
    m = _inside(o_l, L, D, BLOCK_D, WHOLE)
    b = tl.load(p + o_l.to(tl.int64)[:, None] * stride_l + o_d[None, :], mask=m, other=0.0)
    return operand(b, p.dtype.element_ty)


@triton.jit
def _store(p, b, o_l, stride_l, L, D, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr = False):
    o = o_l.to(tl.int64)[:, None] * stride_l + tl.arange(0, BLOCK_D)[None, :]
    tl.store(p + o, b.to(p.dtype.element_ty), mask=_inside(o_l, L, D, BLOCK_D, WHOLE))


@triton.jit
def _logits(q, k, o_n, L, scale):
    """log2(e) q k^T scale, -inf from L on."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
    return tl.where((o_n < L)[None, :], s, -float("inf"))


@triton.jit(do_not_specialize=("L", "H", "D8", "stride_b8", "stride_l8"))
def self_attention_fwd_kernel(
    p_qkv, p_o, p_lse, L, H, D8, stride_b8, stride_l8, scale,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = p_qkv.dtype.element_ty
    D, stride_l = D8 * 8, stride_l8 * 8  # said in this way, the compiler knows that rows are aligned
    _, i_b, i_h, o_l = _place(L, H, BLOCK_L)
    p_qkv += i_b * stride_b8 * 8 + i_h * D
    q = _load(p_qkv, o_l, stride_l, L, D, BLOCK_D)
    o = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    top, z = tl.full((BLOCK_L,), -float("inf"), tl.float32), tl.zeros((BLOCK_L,), tl.float32)
    for i_n in range(0, L, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        k = _load(p_qkv + H * D, o_n, stride_l, L, D, BLOCK_D)
        v = _load(p_qkv + 2 * H * D, o_n, stride_l, L, D, BLOCK_D)
        s = _logits(q, k, o_n, L, scale)
        higher = tl.maximum(top, tl.max(s, 1))
        rest = tl.exp2(top - higher)
        e = tl.exp2(s - higher[:, None])
        z = z * rest + tl.sum(e, 1)
        o = tl.dot(operand(e, DTYPE), v, o * rest[:, None], input_precision="ieee")
        top = higher
    _store(p_o + (i_b * L * H + i_h) * D, o / z[:, None], o_l, H * D, L, D, BLOCK_D)
    tl.store(p_lse + (i_b * H + i_h) * L + o_l, top + tl.log2(z), mask=o_l < L)


@triton.jit(do_not_specialize=("L", "H", "D8", "stride_b8", "stride_l8", "stride_dq8"))
def self_attention_bwd_kernel(
    p_qkv, p_o, p_do, p_lse, p_dq, p_dkv, L, H, D8, stride_b8, stride_l8, stride_dq8, scale,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """p_dkv: the last two thirds of (B, L, 3*H*d); p_dq: the rest of it, or (B, tiles of keys, L, H*d)."""
    DTYPE: tl.constexpr = p_qkv.dtype.element_ty
    D, stride_l, stride_dq = D8 * 8, stride_l8 * 8, stride_dq8 * 8
    i_bt, i_b, i_h, o_n = _place(L, H, BLOCK_L)
    p_qkv += i_b * stride_b8 * 8 + i_h * D
    p_o += (i_b * L * H + i_h) * D
    p_do += (i_b * L * H + i_h) * D
    p_lse += (i_b * H + i_h) * L
    p_dq += i_bt * L * stride_dq + i_h * D
    k = _load(p_qkv + H * D, o_n, stride_l, L, D, BLOCK_D, WHOLE)
    v = _load(p_qkv + 2 * H * D, o_n, stride_l, L, D, BLOCK_D, WHOLE)
    dk, dv = tl.zeros((BLOCK_L, BLOCK_D), tl.float32), tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    for i_l in range(0, L, BLOCK_N):
        o_l = i_l + tl.arange(0, BLOCK_N)
        q = _load(p_qkv, o_l, stride_l, L, D, BLOCK_D, WHOLE)
        do = _load(p_do, o_l, H * D, L, D, BLOCK_D, WHOLE)
        o = _load(p_o, o_l, H * D, L, D, BLOCK_D, WHOLE)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        lse = tl.load(p_lse + o_l) if WHOLE else tl.load(p_lse + o_l, mask=o_l < L, other=float("inf"))
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
        p = tl.exp2(s - lse[None, :])
        if not WHOLE:
            p = tl.where((o_n < L)[:, None], p, 0.0)
        dv = tl.dot(operand(p, DTYPE), do, dv, input_precision="ieee")
        ds = operand(p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :]), DTYPE)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee")
        _store(p_dq, dq * scale, o_l, stride_dq, L, D, BLOCK_D, WHOLE)
    p_dkv += (i_b * L * 3 * H + i_h) * D
    _store(p_dkv, dk * scale, o_n, 3 * H * D, L, D, BLOCK_D, WHOLE)
    _store(p_dkv + H * D, dv, o_n, 3 * H * D, L, D, BLOCK_D, WHOLE)


class Tile(NamedTuple):
    BLOCK_L: int  # queries of one program, keys of one of the backward
    BLOCK_N: int  # of the others at a time
    num_warps: int
    num_stages: int = 2


SHORT = Tile(16, 16, 1)  # of at most sixteen positions
# (kernel, 16 bit?, head width padded) -> tiles, the one of fewer rows where these are all. Those of the narrower
# backward in 16 bits are of a sweep on an H200 (docs/results/h200/run3/tiles.json): few warps with many logits each, of
# which a thread may spill SPILLS bytes; the others are free of spills on every target
TILES = {
    ("fwd", True, 16): (SHORT, Tile(64, 64, 4), Tile(128, 64, 4)),
    ("fwd", True, 32): (SHORT, Tile(64, 64, 4), Tile(128, 64, 4)),
    ("bwd", True, 16): (SHORT, Tile(64, 16, 1), Tile(128, 32, 2)),
    ("bwd", True, 32): (SHORT, Tile(64, 16, 4), Tile(128, 32, 8)),
    ("fwd", False, 16): (SHORT, Tile(64, 32, 4)),
    ("fwd", False, 32): (SHORT, Tile(64, 16, 4)),
    ("bwd", False, 16): (SHORT, Tile(64, 16, 8)),
    ("bwd", False, 32): (Tile(16, 16, 4), Tile(32, 32, 8)),
}
SPILLS = 160


def choose_tile(name: str, size: int, width: int, positions: int) -> Tile:
    """`size`: bytes of an element; `width`: of a head."""
    tiles = TILES[name, size == 2, pad_width(width)]
    return next((tile for tile in tiles if tile.BLOCK_L >= positions), tiles[-1])


def pad_width(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _arguments(name: str, qkv: Tensor, heads: int) -> tuple[Tile, tuple[int, ...], dict[str, int]]:
    """The tile, the sizes that every kernel takes, and what it is compiled for."""
    width = qkv.shape[2] // (3 * heads)
    tile = choose_tile(name, qkv.element_size(), width, qkv.shape[1])
    sizes = qkv.shape[1], heads, width // 8, qkv.stride(0) // 8, qkv.stride(1) // 8
    compiled = tile._asdict() | {"BLOCK_D": pad_width(width)}
    if name == "bwd":
        compiled["WHOLE"] = not (qkv.shape[1] % tile.BLOCK_L or qkv.shape[1] % tile.BLOCK_N)
    return tile, sizes, compiled


def _outputs(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, positions, columns = qkv.shape
    lse = qkv.new_empty((batch, heads, positions), dtype=torch.float32)
    return qkv.new_empty((batch, positions, columns // 3)), lse


@torch.library.custom_op("encdiff::self_attention", mutates_args=())
def self_attention(qkv: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v of each head: qkv (B, L, 3*H*d) -> (B, L, H*d), and log2 of the sums of exponentials.

    The columns of qkv are q, k, v, in each of them head by head; d a multiple of 8, at most 32.
    """
    (o, lse), qkv = _outputs(qkv, heads), aligned_rows(qkv)
    if o.numel():
        tile, sizes, compiled = _arguments("fwd", qkv, heads)
        grid = (qkv.shape[0] * triton.cdiv(qkv.shape[1], tile.BLOCK_L) * heads,)
        with on_device(qkv):
            self_attention_fwd_kernel[grid](qkv, o, lse, *sizes, scale, **compiled)
    return o, lse


@self_attention.register_fake
def _(qkv, heads, scale):
    return _outputs(qkv, heads)


@torch.library.custom_op("encdiff::self_attention_backward", mutates_args=())
def self_attention_backward(qkv: Tensor, o: Tensor, lse: Tensor, do: Tensor, heads: int, scale: float) -> Tensor:
    """The gradient of qkv, contiguous."""
    dqkv, qkv = qkv.new_empty(qkv.shape), aligned_rows(qkv)
    if not dqkv.numel():
        return dqkv
    (batch, positions, columns), inner = qkv.shape, o.shape[2]
    tile, sizes, compiled = _arguments("bwd", qkv, heads)
    tiles = triton.cdiv(positions, tile.BLOCK_L)
    shares = qkv.new_empty((batch, tiles, positions, inner), dtype=torch.float32) if tiles > 1 else None
    dq, stride = (dqkv, columns // 8) if shares is None else (shares, inner // 8)
    with on_device(qkv):
        self_attention_bwd_kernel[batch * tiles * heads,](
            qkv, o, do.contiguous(), lse, dq, dqkv[..., inner:], *sizes, stride, scale, **compiled
        )
    if tiles == 2:
        torch.add(shares[:, 0], shares[:, 1], out=dqkv[..., :inner])  # one pass
    elif tiles > 2:
        dqkv[..., :inner] = shares.sum(1)
    return dqkv


@self_attention_backward.register_fake
def _(qkv, o, lse, do, heads, scale):
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output) -> None:
    qkv, ctx.heads, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for lse would be a launch that nobody reads


def _backward(ctx, do, dlse):
    if do is None:
        return None, None, None
    return self_attention_backward(*ctx.saved_tensors, do, ctx.heads, ctx.scale), None, None


self_attention.register_autograd(_backward, setup_context=_setup)
refuse_second(self_attention_backward)


def gate_cases() -> Iterator[GateCase]:
    """Every tile; of the backward where it is whole and where not, the last in 16 bits with shares in float32, too."""
    for (name, half, BLOCK_D), tiles in TILES.items():
        kind = "bf16" if half else "fp32"
        for whole in (False, True)[: 1 + (name == "bwd")]:
            for tile in tiles:
                if tile.BLOCK_L == max(t.BLOCK_L for t in tiles[: tiles.index(tile) + 1]):  # else always with shares
                    yield _case(name, kind, BLOCK_D, tile, whole=whole)
            if name == "bwd" and half:
                yield _case(name, kind, BLOCK_D, tiles[-1], "fp32", whole)


def _case(name: str, kind: str, BLOCK_D: int, tile: Tile, share: str = "", whole: bool = False) -> GateCase:
    kernel = {"fwd": self_attention_fwd_kernel, "bwd": self_attention_bwd_kernel}[name]
    blocks = {"BLOCK_L": tile.BLOCK_L, "BLOCK_N": tile.BLOCK_N, "BLOCK_D": BLOCK_D}
    blocks |= {"WHOLE": whole} if name == "bwd" else {}
    types = {n: f"*{kind}" for n in kernel.arg_names if n.startswith("p_")} | {"p_lse": "*fp32", "scale": "fp32"}
    types |= {"p_dq": f"*{share}"} if share else {}
    name = f"{kernel.__name__} {kind} {tile.BLOCK_L}x{tile.BLOCK_N} d<={BLOCK_D}{' shares' * bool(share)}"
    signature = gate_signature(kernel, types, blocks)
    spills = SPILLS if tile == TILES["bwd", True, 16][-1] else 0
    name += " whole" * whole
    return GateCase(name, kernel, signature, blocks, tile.num_warps, tile.num_stages, kind != "fp32", spills)
