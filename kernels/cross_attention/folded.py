"""The folded route: LayerNorm, logits, softmax, output, bias and residual in one pass over x, for up to 256 channels.

The token side comes folded into the channel space, per head h and token n (docs/math.md):

    keys A[h,n] = Wq_h^T k_hn / sqrt(d)  (C,)      values W[h,n] = Wo_h v_hn  (C,)
    P_h = softmax over n of LN(x) A_h^T            y = [x +] sum over h of P_h W_h + bo

so head width is gone and the softmax is taken over groups of columns, one for each head. GROUP heads are handled at a
time, each padded to BLOCK_N columns. The backward recomputes P: one kernel owns some heads of a sample and sums over
the queries, one owns queries and sums over the heads. Nothing is summed in an order that could change.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._gate import GateCase, gate_signature
from .._rows import add_up
from .._second import refuse_second
from ..column_sum import column_sum
from .parts import (
    aligned_rows,
    load_channels,
    load_rows,
    normalise,
    on_device,
    operand,
    over_tokens,
    place,
    softmax_by_head,
    standardise,
    store_rows,
)
from .plan import FOLDED_TILES, FOLDED_TOKENS, SPILLS, pad

# Not specialised, so that the code of a tile is one, the gate's: the figures of the channels alone are.
GENERAL = ("L", "N", "H", "stride_xb8", "stride_xl8", "stride_kb8", "stride_kh8", "stride_bias_b", "stride_bias_h")


@triton.jit
def _load_tokens(p, o_kv, m_j, o_c, C):
    """Rows of one sample's folded keys or values that begin at o_kv."""
    return tl.load(p + o_kv[:, None] + o_c[None, :], mask=m_j[:, None] & (o_c < C)[None, :], other=0.0)


@triton.jit
def _attend(h, k, i_h, o_n, m_j, p_bias, stride_bias_h, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """P of GROUP heads (rows, GROUP*BLOCK_N): zero outside N, and on a row whose tokens are all masked."""
    s = tl.dot(h, tl.trans(k), input_precision="ieee")
    if p_bias is not None:
        s += tl.load(p_bias + i_h * stride_bias_h + o_n, mask=m_j, other=0.0).to(tl.float32)[None, :]
    return softmax_by_head(tl.where(m_j[None, :], s, -float("inf")), GROUP, BLOCK_N)


@triton.jit
def _softmax_gradient(p, dp, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """dlogits = P (dP - sum over the head's tokens of P dP)."""
    delta = tl.sum(over_tokens(p * dp, GROUP, BLOCK_N), 2)
    ds = over_tokens(p, GROUP, BLOCK_N) * (over_tokens(dp, GROUP, BLOCK_N) - delta[:, :, None])
    return tl.reshape(ds, (p.shape[0], GROUP * BLOCK_N))


@triton.jit(do_not_specialize=GENERAL)
def cross_attention_folded_fwd_kernel(
    p_x, p_k, p_v, p_bo, p_gamma, p_beta, p_bias, p_y, p_maps,
    L, N, C8, H, eps,
    stride_xb8, stride_xl8, stride_kb8, stride_kh8, stride_bias_b, stride_bias_h,
    RESIDUAL: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_L queries of one sample."""
    DTYPE: tl.constexpr = p_k.dtype.element_ty
    C = C8 * 8  # said in this way, the compiler knows that rows are aligned
    i_b, o_l = place(L, BLOCK_L)
    o_c = tl.arange(0, BLOCK_C)
    o_col = tl.arange(0, GROUP * BLOCK_N)
    o_n = o_col % BLOCK_N
    p_k += i_b * stride_kb8 * 8
    p_v += i_b * stride_kb8 * 8
    if p_bias is not None:
        p_bias += i_b * stride_bias_b

    x = load_rows(p_x + i_b * stride_xb8 * 8, o_l, o_c, stride_xl8 * 8, L, C)
    h = operand(normalise(x, o_c, p_gamma, p_beta, C, eps), DTYPE)
    y = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    if MAPS == "mean":
        mean = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    for i_g in range(0, H, GROUP):
        i_h = i_g + o_col // BLOCK_N
        m_j = (o_n < N) & (i_h < H)
        o_kv = i_h.to(tl.int64) * stride_kh8 * 8 + o_n * C
        k = operand(_load_tokens(p_k, o_kv, m_j, o_c, C), DTYPE)
        p = _attend(h, k, i_h, o_n, m_j, p_bias, stride_bias_h, GROUP, BLOCK_N)
        if MAPS == "head":
            o_map = ((i_b * H + i_h[None, :]) * L + o_l[:, None]) * N + o_n[None, :]
            tl.store(p_maps + o_map, p.to(p_maps.dtype.element_ty), mask=(o_l < L)[:, None] & m_j[None, :])
        if MAPS == "mean":
            mean += tl.sum(over_tokens(p, GROUP, BLOCK_N), 1)
        v = operand(_load_tokens(p_v, o_kv, m_j, o_c, C), DTYPE)
        y = tl.dot(operand(p, DTYPE), v, y, input_precision="ieee")
    y += load_channels(p_bo, o_c, C, 0.0)[None, :]
    if RESIDUAL:  # read again rather than held in registers through the loop
        y += load_rows(p_x + i_b * stride_xb8 * 8, o_l, o_c, stride_xl8 * 8, L, C)
    store_rows(p_y + i_b * L * C, y, o_l, o_c, C, L, C)
    if MAPS == "mean":
        store_rows(p_maps + i_b * L * N, mean / H, o_l, tl.arange(0, BLOCK_N), N, L, N)


@triton.jit(do_not_specialize=GENERAL)
def cross_attention_folded_bwd_kernel_dkv(
    p_x, p_k, p_v, p_gamma, p_beta, p_bias, p_dy, p_dk, p_dv, p_dbias,
    L, N, C8, H, eps,
    stride_xb8, stride_xl8, stride_kb8, stride_kh8, stride_bias_b, stride_bias_h,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: GROUP heads of one sample, all queries in turn: dA = dlogits^T LN(x), dW = P^T dy."""
    DTYPE: tl.constexpr = p_k.dtype.element_ty
    C = C8 * 8  # said in this way, the compiler knows that rows are aligned
    groups = tl.cdiv(H, GROUP)
    i_b = (tl.program_id(0) // groups).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    o_col = tl.arange(0, GROUP * BLOCK_N)
    o_n = o_col % BLOCK_N
    i_h = tl.program_id(0) % groups * GROUP + o_col // BLOCK_N
    m_j = (o_n < N) & (i_h < H)
    o_kv = i_b * stride_kb8 * 8 + i_h.to(tl.int64) * stride_kh8 * 8 + o_n * C
    p_x += i_b * stride_xb8 * 8
    p_dy += i_b * L * C
    if p_bias is not None:
        p_bias += i_b * stride_bias_b

    k = operand(_load_tokens(p_k, o_kv, m_j, o_c, C), DTYPE)
    v = operand(_load_tokens(p_v, o_kv, m_j, o_c, C), DTYPE)
    dk = tl.zeros((GROUP * BLOCK_N, BLOCK_C), tl.float32)
    dv = tl.zeros((GROUP * BLOCK_N, BLOCK_C), tl.float32)
    dbias = tl.zeros((GROUP * BLOCK_N,), tl.float32)
    for i_l in range(0, L, BLOCK_L):
        o_l = i_l + tl.arange(0, BLOCK_L)
        x = load_rows(p_x, o_l, o_c, stride_xl8 * 8, L, C)
        h = operand(normalise(x, o_c, p_gamma, p_beta, C, eps), DTYPE)
        dy = operand(load_rows(p_dy, o_l, o_c, C, L, C), DTYPE)  # 0 from L on: so is dlogits
        p = _attend(h, k, i_h, o_n, m_j, p_bias, stride_bias_h, GROUP, BLOCK_N)
        dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
        dv = tl.dot(tl.trans(operand(p, DTYPE)), dy, dv, input_precision="ieee")
        ds = _softmax_gradient(p, dp, GROUP, BLOCK_N)
        dk = tl.dot(tl.trans(operand(ds, DTYPE)), h, dk, input_precision="ieee")
        if p_dbias is not None:
            dbias += tl.sum(ds, 0)
    o_out = o_kv[:, None] + o_c[None, :]
    m_out = m_j[:, None] & (o_c < C)[None, :]
    tl.store(p_dk + o_out, dk.to(p_dk.dtype.element_ty), mask=m_out)
    tl.store(p_dv + o_out, dv.to(p_dv.dtype.element_ty), mask=m_out)
    if p_dbias is not None:
        tl.store(p_dbias + (i_b * H + i_h) * N + o_n, dbias, mask=m_j)


@triton.jit(do_not_specialize=GENERAL)
def cross_attention_folded_bwd_kernel_dx(
    p_x, p_k, p_v, p_gamma, p_beta, p_bias, p_dy, p_dx, p_parts,
    L, N, C8, H, eps,
    stride_xb8, stride_xl8, stride_kb8, stride_kh8, stride_bias_b, stride_bias_h,
    RESIDUAL: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_L queries of one sample, all heads in turn: dx, and its part of dgamma and dbeta."""
    DTYPE: tl.constexpr = p_k.dtype.element_ty
    C = C8 * 8  # said in this way, the compiler knows that rows are aligned
    i_b, o_l = place(L, BLOCK_L)
    o_c = tl.arange(0, BLOCK_C)
    o_col = tl.arange(0, GROUP * BLOCK_N)
    o_n = o_col % BLOCK_N
    p_k += i_b * stride_kb8 * 8
    p_v += i_b * stride_kb8 * 8
    if p_bias is not None:
        p_bias += i_b * stride_bias_b

    p_x += i_b * stride_xb8 * 8
    p_dy += i_b * L * C
    x = load_rows(p_x, o_l, o_c, stride_xl8 * 8, L, C)
    h = operand(normalise(x, o_c, p_gamma, p_beta, C, eps), DTYPE)
    dy = operand(load_rows(p_dy, o_l, o_c, C, L, C), DTYPE)
    dh = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    o_h, step = o_col // BLOCK_N, tl.full((), 8 * GROUP, tl.int64) * stride_kh8
    for i_g in range(0, H, GROUP):
        m_j = (o_n < N) & (i_g + o_h < H)
        o_kv = o_h.to(tl.int64) * stride_kh8 * 8 + o_n * C
        k = operand(_load_tokens(p_k, o_kv, m_j, o_c, C), DTYPE)
        v = operand(_load_tokens(p_v, o_kv, m_j, o_c, C), DTYPE)
        p = _attend(h, k, o_h, o_n, m_j, p_bias, stride_bias_h, GROUP, BLOCK_N)
        ds = _softmax_gradient(p, tl.dot(dy, tl.trans(v), input_precision="ieee"), GROUP, BLOCK_N)
        dh = tl.dot(operand(ds, DTYPE), k, dh, input_precision="ieee")
        p_k += step  # pointers move: offsets from the first head would take more registers than there are
        p_v += step
        if p_bias is not None:
            p_bias += stride_bias_h * GROUP
    dx = dh
    if p_gamma is not None:  # read again rather than held in registers through the loop
        x = load_rows(p_x, o_l, o_c, stride_xl8 * 8, L, C)
        x, r = standardise(x, o_c, C, eps)
        o_part = tl.program_id(0).to(tl.int64) * 2 * C + o_c
        tl.store(p_parts + o_part, tl.sum(dh * x, 0), mask=o_c < C)
        tl.store(p_parts + o_part + C, tl.sum(dh, 0), mask=o_c < C)
        g = dh * load_channels(p_gamma, o_c, C, 1.0)[None, :]
        dx = r[:, None] * (g - (tl.sum(g, 1) / C)[:, None] - x * (tl.sum(g * x, 1) / C)[:, None])
    if RESIDUAL:
        dx += load_rows(p_dy, o_l, o_c, C, L, C)
    store_rows(p_dx + i_b * L * C, dx, o_l, o_c, C, L, C)


def _arguments(x: Tensor, k: Tensor, bias: Tensor | None, eps: float, kernel: str) -> tuple[tuple, dict]:
    """The sizes every kernel takes, and its tile."""
    (_, L, C), (_, H, N, _) = x.shape, k.shape
    strides = (t.stride(i) // 8 for t in (x, k) for i in (0, 1))
    strides = *strides, *((0, 0) if bias is None else bias.stride()[:2])
    BLOCK_C = pad(C, 64)
    tile = FOLDED_TILES[kernel, k.element_size() == 2, BLOCK_C]
    blocks = {"BLOCK_L": tile.BLOCK_L, "BLOCK_C": BLOCK_C, "BLOCK_N": FOLDED_TOKENS, "GROUP": tile.GROUP}
    return (L, N, C // 8, H, eps, *strides), blocks | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


@torch.library.custom_op("encdiff::cross_attention_folded", mutates_args=())
def cross_attention_folded(
    x: Tensor, keys: Tensor, values: Tensor, b_o: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    bias: Tensor | None, eps: float, residual: bool, maps: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (B,L,C), any strides; keys and values (B,H,N,C) of `whole_heads`; bias (B,H,N), last stride 1 -> y, maps.

    y is contiguous; maps: "none" (empty), "head" (B,H,L,N) or "mean" (B,L,N).
    """
    y, p = _outputs(x, keys, maps)
    if y.numel():
        x = aligned_rows(x)
        sizes, blocks = _arguments(x, keys, bias, eps, "fwd")
        grid = (x.shape[0] * triton.cdiv(x.shape[1], blocks["BLOCK_L"]),)
        with on_device(x):
            cross_attention_folded_fwd_kernel[grid](
                x, keys, values, b_o, gamma, beta, bias, y, None if maps == "none" else p,
                *sizes, RESIDUAL=residual, MAPS=maps, **blocks,
            )  # fmt: skip
    return y, p


def whole_heads(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(B,H,N,C) as they are where (N,C) are contiguous and B and H have the same strides in both, else copies."""
    B, H, N, C = keys.shape
    whole = keys.stride() in ((N * C, B * N * C, C, 1), (H * N * C, N * C, C, 1))  # either of B and H outermost
    whole = whole and keys.stride() == values.stride()
    return (keys, values) if whole else (keys.contiguous(), values.contiguous())


def _outputs(x, keys, maps):
    (B, L, _), (_, H, N, _) = x.shape, keys.shape
    shape = {"none": (0,), "head": (B, H, L, N), "mean": (B, L, N)}[maps]
    return x.new_empty(x.shape), x.new_empty(shape)


@cross_attention_folded.register_fake
def _(x, keys, values, b_o, gamma, beta, bias, eps, residual, maps):
    return _outputs(x, keys, maps)


@torch.library.custom_op("encdiff::cross_attention_folded_bwd", mutates_args=())
def cross_attention_folded_bwd(
    x: Tensor, keys: Tensor, values: Tensor, gamma: Tensor | None, beta: Tensor | None, bias: Tensor | None,
    dy: Tensor, eps: float, residual: bool, bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx; dkeys, dvalues in the strides of these; dgamma, dbeta (C,) or empty; dbias (B,H,N), float32, or empty."""
    outputs = _gradients(x, keys, values, gamma, bias_gradient)
    dx, dk, dv, dgamma, dbeta, dbias = outputs
    if not x.numel():  # no query reads the tokens
        for gradient in outputs:
            gradient.zero_()
        return outputs
    x, dy = aligned_rows(x), dy.contiguous()
    with on_device(x):
        sizes, blocks = _arguments(x, keys, bias, eps, "dkv")
        shared = x, keys, values, gamma, beta, bias
        grid = (x.shape[0] * triton.cdiv(keys.shape[1], blocks["GROUP"]),)
        p_dbias = dbias if bias_gradient else None
        rounded = dy.to(keys.dtype)  # as its products take it; in float32 it would cost registers
        cross_attention_folded_bwd_kernel_dkv[grid](*shared, rounded, dk, dv, p_dbias, *sizes, **blocks)
        sizes, blocks = _arguments(x, keys, bias, eps, "dx")
        programs = x.shape[0] * triton.cdiv(x.shape[1], blocks["BLOCK_L"])
        parts = None if gamma is None else x.new_empty((programs, 2, x.shape[2]), dtype=torch.float32)
        cross_attention_folded_bwd_kernel_dx[programs,](*shared, dy, dx, parts, *sizes, RESIDUAL=residual, **blocks)
        if parts is not None:
            add_up(parts, dgamma, dbeta)
    return dx, dk, dv, dgamma, dbeta, dbias


def _gradients(x, keys, values, gamma, bias_gradient):
    affine = [x.new_empty(0) if gamma is None else gamma.new_empty(gamma.shape) for _ in range(2)]
    dbias = x.new_empty(keys.shape[:3] if bias_gradient else (0,), dtype=torch.float32)
    return x.new_empty(x.shape), torch.empty_like(keys), torch.empty_like(values), *affine, dbias


@cross_attention_folded_bwd.register_fake
def _(x, keys, values, gamma, beta, bias, dy, eps, residual, bias_gradient):
    return _gradients(x, keys, values, gamma, bias_gradient)


def _setup(ctx, inputs, output):
    x, keys, values, b_o, gamma, beta, bias, ctx.eps, ctx.residual, _ = inputs
    ctx.save_for_backward(x, keys, values, gamma, beta, bias)
    ctx.bo_dtype = None if b_o is None else b_o.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for the maps would be a launch that nobody reads


def _backward(ctx, dy, dmaps):
    if dy is None:
        return (None,) * 10
    x, keys, values, gamma, beta, bias = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dx, dk, dv, dgamma, dbeta, dbias = cross_attention_folded_bwd(
        x, keys, values, gamma, beta, bias, dy, ctx.eps, ctx.residual, wanted[6]
    )
    db_o = column_sum(dy.flatten(0, 1), ctx.bo_dtype) if wanted[3] else None
    dgamma, dbeta = (None, None) if gamma is None else (dgamma, dbeta.to(beta.dtype))
    return dx, dk, dv, db_o, dgamma, dbeta, dbias.to(bias.dtype) if wanted[6] else None, None, None, None


cross_attention_folded.register_autograd(_backward, setup_context=_setup)
refuse_second(cross_attention_folded_bwd)


def gate_cases():
    """Every tile as the paper's layers call it, and with every option at once and x in float32, as under autocast."""
    kernels = {
        "fwd": cross_attention_folded_fwd_kernel,
        "dkv": cross_attention_folded_bwd_kernel_dkv,
        "dx": cross_attention_folded_bwd_kernel_dx,
    }
    for (name, half, BLOCK_C), tile in FOLDED_TILES.items():
        for options in (False, True):
            dtype = ("fp16" if options else "bf16") if half else "fp32"  # both, without compiling everything twice
            kernel = kernels[name]
            fixed = {"RESIDUAL": True, "MAPS": "mean" if options else "none"}
            fixed |= {"BLOCK_L": tile.BLOCK_L, "BLOCK_C": BLOCK_C, "BLOCK_N": FOLDED_TOKENS, "GROUP": tile.GROUP}
            types = {n: "*fp32" for n in kernel.arg_names if n.startswith("p_")}
            types |= dict.fromkeys(_TOKEN_SIDE if options else _TOKEN_SIDE + _QUERY_SIDE, f"*{dtype}")
            types |= {"eps": "fp32"} | ({"p_dy": f"*{dtype}"} if name == "dkv" else {})
            if not options:
                fixed |= {"p_bias": None, "p_dbias": None, "p_maps": None, "stride_bias_b": 0, "stride_bias_h": 0}
            fixed = {n: value for n, value in fixed.items() if n in kernel.arg_names}
            yield GateCase(
                f"cross_attention folded {name} {dtype} C<={BLOCK_C}{' options' * options}", kernel,
                gate_signature(kernel, types, fixed), fixed, tile.num_warps, tile.num_stages, half,
                SPILLS if half and BLOCK_C < 256 else 0,
            )  # fmt: skip


_TOKEN_SIDE = ("p_k", "p_v", "p_dk", "p_dv")
_QUERY_SIDE = ("p_x", "p_y", "p_dy", "p_dx", "p_maps")
