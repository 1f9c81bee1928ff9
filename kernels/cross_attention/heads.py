"""The per-head route: softmax(q k^T / sqrt(d) + bias) v for one head at a time, between ordinary projections.

Serves every number of channels. Where a head's tokens fit on the chip the softmax is taken whole; the `tiled` kernels
take more of them in turn (docs/math.md). The forward keeps the logarithm of each row's sum (B, H, L); the backward has
one kernel that owns queries and one that owns tokens of a head and sums over the queries in order.
"""

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._gate import GateCase, gate_signature
from .._second import refuse_second
from .parts import aligned_rows, load_rows, on_device, operand, place, store_rows
from .plan import FEW_TOKENS, HEADS_TILES, MAX_TOKENS, HeadsTile, heads_tile, is_tiled, pad

# Not specialised, so that the code of a tile is one, the gate's: the figures of the channels alone are.
GENERAL = ("L", "N", "H", "stride_kb8", "stride_kn8", "stride_bias_b", "stride_bias_h")


@triton.jit
def _logits(q, k, o_n, N, p_bias, scale):
    """q k^T scale + bias, -inf from N on."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if p_bias is not None:
        s += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    return tl.where((o_n < N)[None, :], s, -float("inf"))


@triton.jit(do_not_specialize=GENERAL)
def cross_attention_heads_fwd_kernel(
    p_q, p_k, p_v, p_bias, p_o, p_lse, p_maps,
    L, N, H, D8, scale, stride_kb8, stride_kn8, stride_bias_b, stride_bias_h,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_L queries of one head."""
    DTYPE: tl.constexpr = p_k.dtype.element_ty
    D = D8 * 8  # said in this way, the compiler knows that rows are aligned
    i_bh, o_l = place(L, BLOCK_L)
    i_b, i_h = i_bh // H, i_bh % H
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    if p_bias is not None:
        p_bias += i_b * stride_bias_b + i_h * stride_bias_h

    i_kv = i_b * stride_kb8 * 8 + i_h * D
    q = operand(load_rows(p_q + (i_b * L * H + i_h) * D, o_l, o_d, H * D, L, D), DTYPE)
    k = operand(load_rows(p_k + i_kv, o_n, o_d, stride_kn8 * 8, N, D), DTYPE)
    s = _logits(q, k, o_n, N, p_bias, scale)
    top = tl.max(s, 1)
    masked = top == -float("inf")
    e = tl.exp(s - tl.where(masked, 0.0, top)[:, None])
    z = tl.where(masked, 1.0, tl.sum(e, 1))
    p = e / z[:, None]
    if p_maps is not None:
        store_rows(p_maps + i_bh * L * N, p, o_l, o_n, N, L, N)
    v = operand(load_rows(p_v + i_kv, o_n, o_d, stride_kn8 * 8, N, D), DTYPE)
    o = tl.dot(operand(p, DTYPE), v, input_precision="ieee")
    store_rows(p_o + (i_b * L * H + i_h) * D, o, o_l, o_d, H * D, L, D)
    lse = tl.where(masked, float("inf"), top + tl.log(z))  # exp(s - inf) = 0: a masked row attends to nothing
    tl.store(p_lse + i_bh * L + o_l, lse, mask=o_l < L)


@triton.jit(do_not_specialize=GENERAL)
def cross_attention_heads_tiled_fwd_kernel(
    p_q, p_k, p_v, p_bias, p_o, p_lse, p_maps,
    L, N, H, D8, scale, stride_kb8, stride_kn8, stride_bias_b, stride_bias_h,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_L queries of one head, its tokens in turn; a second pass over these for the maps."""
    DTYPE: tl.constexpr = p_k.dtype.element_ty
    D = D8 * 8  # said in this way, the compiler knows that rows are aligned
    i_bh, o_l = place(L, BLOCK_L)
    i_b, i_h = i_bh // H, i_bh % H
    o_d = tl.arange(0, BLOCK_D)
    if p_bias is not None:
        p_bias += i_b * stride_bias_b + i_h * stride_bias_h

    i_kv = i_b * stride_kb8 * 8 + i_h * D
    q = operand(load_rows(p_q + (i_b * L * H + i_h) * D, o_l, o_d, H * D, L, D), DTYPE)
    o = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    top, z = tl.full((BLOCK_L,), -float("inf"), tl.float32), tl.zeros((BLOCK_L,), tl.float32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        k = operand(load_rows(p_k + i_kv, o_n, o_d, stride_kn8 * 8, N, D), DTYPE)
        v = operand(load_rows(p_v + i_kv, o_n, o_d, stride_kn8 * 8, N, D), DTYPE)
        s = _logits(q, k, o_n, N, p_bias, scale)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # so far every token may be masked
        rest = tl.exp(top - base)
        e = tl.exp(s - base[:, None])
        z = z * rest + tl.sum(e, 1)
        o = tl.dot(operand(e, DTYPE), v, o * rest[:, None], input_precision="ieee")
        top = higher
    masked = top == -float("inf")
    z = tl.where(masked, 1.0, z)
    store_rows(p_o + (i_b * L * H + i_h) * D, o / z[:, None], o_l, o_d, H * D, L, D)
    lse = tl.where(masked, float("inf"), top + tl.log(z))  # exp(s - inf) = 0: a masked row attends to nothing
    tl.store(p_lse + i_bh * L + o_l, lse, mask=o_l < L)
    if p_maps is not None:
        base = tl.where(masked, 0.0, top)
        for i_n in range(0, N, BLOCK_N):
            o_n = i_n + tl.arange(0, BLOCK_N)
            k = operand(load_rows(p_k + i_kv, o_n, o_d, stride_kn8 * 8, N, D), DTYPE)
            p = tl.exp(_logits(q, k, o_n, N, p_bias, scale) - base[:, None]) / z[:, None]
            store_rows(p_maps + i_bh * L * N, p, o_l, o_n, N, L, N)


@triton.jit(do_not_specialize=GENERAL)
def cross_attention_heads_bwd_kernel_dq(
    p_q, p_k, p_v, p_bias, p_do, p_lse, p_dq, p_delta,
    L, N, H, D8, scale, stride_kb8, stride_kn8, stride_bias_b, stride_bias_h,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_L queries of one head; also delta = sum over the tokens of P dP, which dk needs."""
    DTYPE: tl.constexpr = p_k.dtype.element_ty
    D = D8 * 8  # said in this way, the compiler knows that rows are aligned
    i_bh, o_l = place(L, BLOCK_L)
    i_b, i_h = i_bh // H, i_bh % H
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    if p_bias is not None:
        p_bias += i_b * stride_bias_b + i_h * stride_bias_h

    i_q, i_kv = (i_b * L * H + i_h) * D, i_b * stride_kb8 * 8 + i_h * D
    q = operand(load_rows(p_q + i_q, o_l, o_d, H * D, L, D), DTYPE)
    k = operand(load_rows(p_k + i_kv, o_n, o_d, stride_kn8 * 8, N, D), DTYPE)
    lse = tl.load(p_lse + i_bh * L + o_l, mask=o_l < L, other=float("inf"))
    p = tl.exp(_logits(q, k, o_n, N, p_bias, scale) - lse[:, None])
    do = operand(load_rows(p_do + i_q, o_l, o_d, H * D, L, D), DTYPE)
    v = operand(load_rows(p_v + i_kv, o_n, o_d, stride_kn8 * 8, N, D), DTYPE)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    delta = tl.sum(p * dp, 1)
    ds = p * (dp - delta[:, None])
    dq = tl.dot(operand(ds, DTYPE), k, input_precision="ieee") * scale
    store_rows(p_dq + i_q, dq, o_l, o_d, H * D, L, D)
    tl.store(p_delta + i_bh * L + o_l, delta, mask=o_l < L)


@triton.jit(do_not_specialize=GENERAL)
def cross_attention_heads_tiled_bwd_kernel_dq(
    p_q, p_k, p_v, p_bias, p_do, p_lse, p_dq, p_delta,
    L, N, H, D8, scale, stride_kb8, stride_kn8, stride_bias_b, stride_bias_h,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_L queries of one head, its tokens in turn, twice: delta must be known before dq.

    delta = rowsum(do o) would save the first pass, but o is rounded: where one token has all of the attention, P dP and
    delta cancel, and nothing but that rounding would be left.
    """
    DTYPE: tl.constexpr = p_k.dtype.element_ty
    D = D8 * 8  # said in this way, the compiler knows that rows are aligned
    i_bh, o_l = place(L, BLOCK_L)
    i_b, i_h = i_bh // H, i_bh % H
    o_d = tl.arange(0, BLOCK_D)
    if p_bias is not None:
        p_bias += i_b * stride_bias_b + i_h * stride_bias_h

    i_q, i_kv = (i_b * L * H + i_h) * D, i_b * stride_kb8 * 8 + i_h * D
    q = operand(load_rows(p_q + i_q, o_l, o_d, H * D, L, D), DTYPE)
    do = operand(load_rows(p_do + i_q, o_l, o_d, H * D, L, D), DTYPE)
    lse = tl.load(p_lse + i_bh * L + o_l, mask=o_l < L, other=float("inf"))
    delta = tl.zeros((BLOCK_L,), tl.float32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        k = operand(load_rows(p_k + i_kv, o_n, o_d, stride_kn8 * 8, N, D), DTYPE)
        v = operand(load_rows(p_v + i_kv, o_n, o_d, stride_kn8 * 8, N, D), DTYPE)
        p = tl.exp(_logits(q, k, o_n, N, p_bias, scale) - lse[:, None])
        delta += tl.sum(p * tl.dot(do, tl.trans(v), input_precision="ieee"), 1)
    tl.store(p_delta + i_bh * L + o_l, delta, mask=o_l < L)
    dq = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        k = operand(load_rows(p_k + i_kv, o_n, o_d, stride_kn8 * 8, N, D), DTYPE)
        v = operand(load_rows(p_v + i_kv, o_n, o_d, stride_kn8 * 8, N, D), DTYPE)
        p = tl.exp(_logits(q, k, o_n, N, p_bias, scale) - lse[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(operand(ds, DTYPE), k, dq, input_precision="ieee")
    store_rows(p_dq + i_q, dq * scale, o_l, o_d, H * D, L, D)


@triton.jit(do_not_specialize=GENERAL)
def cross_attention_heads_bwd_kernel_dkv(
    p_q, p_k, p_v, p_bias, p_do, p_lse, p_delta, p_dk, p_dv, p_dbias,
    L, N, H, D8, scale, stride_kb8, stride_kn8, stride_bias_b, stride_bias_h,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N tokens of one head, all queries in turn."""
    DTYPE: tl.constexpr = p_k.dtype.element_ty
    D = D8 * 8  # said in this way, the compiler knows that rows are aligned
    i_bh, o_n = place(N, BLOCK_N)
    i_b, i_h = i_bh // H, i_bh % H
    o_d = tl.arange(0, BLOCK_D)
    if p_bias is not None:
        p_bias += i_b * stride_bias_b + i_h * stride_bias_h

    i_q, i_kv = (i_b * L * H + i_h) * D, i_b * stride_kb8 * 8 + i_h * D
    k = operand(load_rows(p_k + i_kv, o_n, o_d, stride_kn8 * 8, N, D), DTYPE)
    v = operand(load_rows(p_v + i_kv, o_n, o_d, stride_kn8 * 8, N, D), DTYPE)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for i_l in range(0, L, BLOCK_L):
        o_l = i_l + tl.arange(0, BLOCK_L)
        q = operand(load_rows(p_q + i_q, o_l, o_d, H * D, L, D), DTYPE)
        do = operand(load_rows(p_do + i_q, o_l, o_d, H * D, L, D), DTYPE)
        lse = tl.load(p_lse + i_bh * L + o_l, mask=o_l < L, other=float("inf"))
        delta = tl.load(p_delta + i_bh * L + o_l, mask=o_l < L, other=0.0)
        p = tl.exp(_logits(q, k, o_n, N, p_bias, scale) - lse[:, None])
        dv = tl.dot(tl.trans(operand(p, DTYPE)), do, dv, input_precision="ieee")
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dk = tl.dot(tl.trans(operand(ds, DTYPE)), q, dk, input_precision="ieee")
        if p_dbias is not None:
            dbias += tl.sum(ds, 0)
    i_dkv = (i_b * N * H + i_h) * D
    o_dkv = o_n[:, None] * (H * D) + o_d[None, :]  # in 32 bits: fewer registers to hold meanwhile
    m_dkv = (o_n < N)[:, None] & (o_d < D)[None, :]
    tl.store(p_dk + i_dkv + o_dkv, (dk * scale).to(p_dk.dtype.element_ty), mask=m_dkv)
    tl.store(p_dv + i_dkv + o_dkv, dv.to(p_dv.dtype.element_ty), mask=m_dkv)
    if p_dbias is not None:
        tl.store(p_dbias + i_bh * N + o_n, dbias, mask=o_n < N)


def _arguments(q: Tensor, k: Tensor, bias: Tensor | None, heads: int, scale: float, name: str) -> tuple[tuple, dict]:
    """The sizes that every kernel takes, and its tile."""
    L, N, D = q.shape[1], k.shape[1], q.shape[2] // heads
    strides = k.stride(0) // 8, k.stride(1) // 8, *((0, 0) if bias is None else bias.stride()[:2])
    blocks = heads_tile(name, L, N, D, q.element_size())._asdict() | {"BLOCK_D": pad(D, 32)}
    return (L, N, heads, D // 8, scale, *strides), blocks


@torch.library.custom_op("encdiff::cross_attention_heads", mutates_args=())
def cross_attention_heads(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, scale: float, maps: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B,L,H*d) contiguous; k and v (B,N,H*d), any strides; d a multiple of 8; bias (B,H,N), last stride 1, or None.

    Returns o like q, in float32 the log-sum-exp (B,H,L), and P (B,H,L,N) if `maps`, else empty.
    """
    (o, lse, p), (k, v) = _outputs(q, k, heads, maps), _rows(k, v)
    sizes, blocks = _arguments(q, k, bias, heads, scale, "fwd")
    if o.numel():
        grid = (q.shape[0] * heads * triton.cdiv(q.shape[1], blocks["BLOCK_L"]),)
        with on_device(q):
            tiled = is_tiled(k.shape[1], q.shape[2] // heads, q.element_size())
            kernel = cross_attention_heads_tiled_fwd_kernel if tiled else cross_attention_heads_fwd_kernel
            kernel[grid](q, k, v, bias, o, lse, p if maps else None, *sizes, **blocks)
    return o, lse, p


def _rows(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As they are where rows are whole, aligned and a stride apart that is the same in both, else contiguous."""
    k, v = aligned_rows(k), aligned_rows(v)
    return (k, v) if k.stride() == v.stride() else (k.contiguous(), v.contiguous())


def _outputs(q, k, heads, maps):
    B, L = q.shape[:2]
    p = q.new_empty((B, heads, L, k.shape[1]) if maps else (0,))
    return q.new_empty(q.shape), q.new_empty((B, heads, L), dtype=torch.float32), p


@cross_attention_heads.register_fake
def _(q, k, v, bias, heads, scale, maps):
    return _outputs(q, k, heads, maps)


@torch.library.custom_op("encdiff::cross_attention_heads_bwd", mutates_args=())
def cross_attention_heads_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    do: Tensor,
    heads: int,
    scale: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and dbias (B,H,N) in float32 or empty."""
    dq, dk, dv, dbias = _gradients(q, k, v, heads, bias_gradient)
    if not q.numel():  # no query reads the tokens
        return dq, dk.zero_(), dv.zero_(), dbias.zero_()
    do, delta, (k, v) = do.contiguous(), torch.empty_like(lse), _rows(k, v)
    with on_device(q):
        sizes, blocks = _arguments(q, k, bias, heads, scale, "dq")
        grid = (q.shape[0] * heads * triton.cdiv(q.shape[1], blocks["BLOCK_L"]),)
        tiled = is_tiled(k.shape[1], q.shape[2] // heads, q.element_size())
        kernel = cross_attention_heads_tiled_bwd_kernel_dq if tiled else cross_attention_heads_bwd_kernel_dq
        kernel[grid](q, k, v, bias, do, lse, dq, delta, *sizes, **blocks)
        sizes, blocks = _arguments(q, k, bias, heads, scale, "dkv")
        grid = (q.shape[0] * heads * triton.cdiv(k.shape[1], blocks["BLOCK_N"]),)
        p_dbias = dbias if bias_gradient else None
        cross_attention_heads_bwd_kernel_dkv[grid](
            q, k, v, bias, do, lse, delta, dk, dv, p_dbias, *sizes, **blocks
        )  # fmt: skip
    return dq, dk, dv, dbias


def _gradients(q, k, v, heads, bias_gradient):
    shape = (k.shape[0], heads, k.shape[1]) if bias_gradient else (0,)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), q.new_empty(shape, dtype=torch.float32)


@cross_attention_heads_bwd.register_fake
def _(q, k, v, bias, lse, do, heads, scale, bias_gradient):
    return _gradients(q, k, v, heads, bias_gradient)


def _setup(ctx, inputs, output):
    q, k, v, bias, ctx.heads, ctx.scale, _ = inputs
    _, lse, p = output
    ctx.save_for_backward(q, k, v, bias, lse)
    ctx.mark_non_differentiable(lse, p)
    ctx.set_materialize_grads(False)  # zeros for lse and maps would be launches that nobody reads


def _backward(ctx, do, dlse, dmaps):
    if do is None:
        return (None,) * 7
    q, k, v, bias, lse = ctx.saved_tensors
    wanted = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = cross_attention_heads_bwd(q, k, v, bias, lse, do, ctx.heads, ctx.scale, wanted)
    return dq, dk, dv, dbias.to(bias.dtype) if wanted else None, None, None, None


cross_attention_heads.register_autograd(_backward, setup_context=_setup)
refuse_second(cross_attention_heads_bwd)


def gate_cases():
    """Every tile, with token bias and maps."""
    kernels = {
        "fwd": cross_attention_heads_fwd_kernel,
        "tiled fwd": cross_attention_heads_tiled_fwd_kernel,
        "dq": cross_attention_heads_bwd_kernel_dq,
        "tiled dq": cross_attention_heads_tiled_bwd_kernel_dq,
        "dkv": cross_attention_heads_bwd_kernel_dkv,
    }
    found: dict[tuple, None] = {}
    for (name, half, BLOCK_D), tile in HEADS_TILES.items():
        size = 2 if half else 4
        for L, N in product((16, 17), (FEW_TOKENS, tile.BLOCK_N, MAX_TOKENS)):
            tiled = "tiled " * (name != "dkv" and is_tiled(N, BLOCK_D, size))
            found[tiled + name, half, BLOCK_D, heads_tile(name, L, N, BLOCK_D, size)] = None  # each once
    for name, *case in found:
        yield _gate_case(kernels[name], name, *case)


def _gate_case(kernel, name: str, half: bool, BLOCK_D: int, tile: HeadsTile) -> GateCase:
    dtype = "bf16" if half else "fp32"
    types = dict.fromkeys(("p_q", "p_k", "p_v", "p_o", "p_do", "p_dq", "p_dk", "p_dv", "p_maps"), f"*{dtype}")
    types |= dict.fromkeys(("p_bias", "p_lse", "p_delta", "p_dbias"), "*fp32") | {"scale": "fp32"}
    blocks = {"BLOCK_L": tile.BLOCK_L, "BLOCK_N": tile.BLOCK_N, "BLOCK_D": BLOCK_D}
    return GateCase(
        f"cross_attention heads {name} {dtype} L<={tile.BLOCK_L} d<={BLOCK_D} N<={tile.BLOCK_N}", kernel,
        gate_signature(kernel, types, blocks), blocks, tile.num_warps, tile.num_stages, half,
    )  # fmt: skip
