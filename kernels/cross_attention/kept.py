"""Sampling with projected keys and values kept: from LayerNorm to residual in one pass, no gradient.

Where channels are many and queries few, folded keys and values are most of what a kernel reads: (H*N, C) each for a
sample, against (N, C) of the projected ones and two weights that all samples share. GROUP heads are handled at a time:

    q = LN(x) Wq_g^T    P = softmax by head of q K_g^T / sqrt(d)    y += (P V_g) Wo_g^T

K_g holds the tokens of one head after the other, each zero outside its head's channels, so that no head is taken apart.
A tile takes the queries of S samples where one has fewer than fill it: then the tokens of the S samples lie side by
side, and a query attends to its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._gate import GateCase, gate_signature
from .parts import (
    aligned_rows,
    load_channels,
    normalise,
    on_device,
    operand,
    over_tokens,
    softmax_by_head,
)
from .plan import KEPT_TILES, SPILLS, pad, samples_of_tile

# Not specialised, so that the code of a tile is one, the gate's: the figures of the channels alone are.
GENERAL = ("B", "L", "N", "H", "S", "stride_xb8", "stride_xl8", "stride_bias_b", "stride_bias_h")


@triton.jit(do_not_specialize=GENERAL)
def cross_attention_kept_kernel(
    p_x, p_k, p_v, p_wq, p_wo, p_bo, p_gamma, p_beta, p_bias, p_y, p_maps,
    B, L, N, C8, H, D8, S, scale, eps,
    stride_xb8, stride_xl8, stride_bias_b, stride_bias_h,
    RESIDUAL: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_L queries of one sample, or all queries of S samples."""
    DTYPE: tl.constexpr = p_k.dtype.element_ty
    C, D = C8 * 8, D8 * 8  # said in this way, the compiler knows that rows are aligned
    tiles, rows = tl.cdiv(L, BLOCK_L), tl.minimum(L, BLOCK_L)
    i_b = (tl.program_id(0) // tiles).to(tl.int64) * S
    o_s = tl.arange(0, BLOCK_L) // rows  # the sample of a query, counted from the tile's first
    o_l = tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L) % rows
    m_l = (o_s < S) & (i_b + o_s < B) & (o_l < L)
    o_c = tl.arange(0, BLOCK_C)
    m_lc = m_l[:, None] & (o_c < C)[None, :]
    o_col = tl.arange(0, GROUP * BLOCK_N)
    o_n = o_col % BLOCK_N  # a token, counted from the first sample's first
    m_n = (o_n < S * N) & (i_b * N + o_n < B * N)
    o_d = tl.arange(0, GROUP * BLOCK_D)
    own_head = (o_col // BLOCK_N)[:, None] == (o_d // BLOCK_D)[None, :]
    own_sample = o_s[:, None] == (o_n // N)[None, :]

    p_x += ((i_b + o_s) * stride_xb8 + o_l.to(tl.int64) * stride_xl8)[:, None] * 8 + o_c[None, :]
    h = operand(normalise(tl.load(p_x, mask=m_lc, other=0.0).to(tl.float32), o_c, p_gamma, p_beta, C, eps), DTYPE)
    y = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    if MAPS == "mean":
        mean = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    for i_g in range(0, H, GROUP):
        i_h, i_hd = i_g + o_col // BLOCK_N, i_g + o_d // BLOCK_D
        o_w = i_hd * D + o_d % BLOCK_D  # a row of the weights, a channel of keys and values
        m_d = (o_d % BLOCK_D < D) & (i_hd < H)
        o_wc, m_wc = o_w[:, None] * C + o_c[None, :], m_d[:, None] & (o_c < C)[None, :]
        o_kv = (i_b * N + o_n)[:, None] * (H * D) + o_w[None, :]
        m_kv = m_n[:, None] & m_d[None, :] & own_head

        w_q = operand(tl.load(p_wq + o_wc, mask=m_wc, other=0.0), DTYPE)
        q = tl.dot(h, tl.trans(w_q), input_precision="ieee")
        k = operand(tl.load(p_k + o_kv, mask=m_kv, other=0.0), DTYPE)
        s = tl.dot(operand(q, DTYPE), tl.trans(k), input_precision="ieee") * scale
        m_s = own_sample & (m_n & (i_h < H))[None, :]
        if p_bias is not None:
            o_bias = (i_b + o_n // N) * stride_bias_b + i_h * stride_bias_h + o_n % N
            s += tl.load(p_bias + o_bias, mask=m_n & (i_h < H), other=0.0).to(tl.float32)[None, :]
        p = softmax_by_head(tl.where(m_s, s, -float("inf")), GROUP, BLOCK_N)
        if MAPS == "head":
            o_map = (((i_b + o_s)[:, None] * H + i_h[None, :]) * L + o_l[:, None]) * N + (o_n % N)[None, :]
            tl.store(p_maps + o_map, p.to(p_maps.dtype.element_ty), mask=m_l[:, None] & m_s)
        if MAPS == "mean":
            mean += tl.sum(over_tokens(p, GROUP, BLOCK_N), 1)
        v = operand(tl.load(p_v + o_kv, mask=m_kv, other=0.0), DTYPE)
        a = tl.dot(operand(p, DTYPE), v, input_precision="ieee")
        w_o = operand(tl.load(p_wo + o_wc, mask=m_wc, other=0.0), DTYPE)
        y = tl.dot(operand(a, DTYPE), w_o, y, input_precision="ieee")
    y += load_channels(p_bo, o_c, C, 0.0)[None, :]
    if RESIDUAL:  # read again rather than held in registers through the loop
        y += tl.load(p_x, mask=m_lc, other=0.0).to(tl.float32)
    o_y = ((i_b + o_s) * L + o_l)[:, None]
    tl.store(p_y + o_y * C + o_c[None, :], y.to(p_y.dtype.element_ty), mask=m_lc)
    if MAPS == "mean":
        o_j = tl.arange(0, BLOCK_N)
        m_j = m_l[:, None] & (o_s[:, None] == (o_j // N)[None, :])
        tl.store(p_maps + o_y * N + (o_j % N)[None, :], (mean / H).to(p_maps.dtype.element_ty), mask=m_j)


@torch.library.custom_op("encdiff::cross_attention_kept", mutates_args=())
def cross_attention_kept(
    x: Tensor, keys: Tensor, values: Tensor, w_q: Tensor, w_o: Tensor, heads: int, b_o: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, bias: Tensor | None, eps: float, residual: bool, maps: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (B,L,C), any strides; keys and values (B,N,H*d), w_q and w_o (H*d,C), contiguous; bias (B,H,N), last stride 1.

    Returns y contiguous and maps: "none" (empty), "head" (B,H,L,N) or "mean" (B,L,N). No gradient.
    """
    y, p = _outputs(x, keys, heads, maps)
    if y.numel():
        x = aligned_rows(x)
        (B, L, C), N, D = x.shape, keys.shape[1], keys.shape[2] // heads
        blocks = _blocks(C, D)
        S = samples_of_tile(L, N, blocks["BLOCK_L"], blocks["BLOCK_N"])
        strides = x.stride(0) // 8, x.stride(1) // 8, *((0, 0) if bias is None else bias.stride()[:2])
        grid = (triton.cdiv(B, S) * triton.cdiv(L, blocks["BLOCK_L"]),)
        with on_device(x):
            cross_attention_kept_kernel[grid](
                x, keys, values, w_q, w_o, b_o, gamma, beta, bias, y, None if maps == "none" else p,
                B, L, N, C // 8, heads, D // 8, S, D**-0.5, eps, *strides, RESIDUAL=residual, MAPS=maps, **blocks,
            )  # fmt: skip
    return y, p


def _blocks(C: int, D: int) -> dict[str, int]:
    BLOCK_C, BLOCK_D = pad(C, 128), pad(D, 16)
    return {"BLOCK_C": BLOCK_C, "BLOCK_D": BLOCK_D} | KEPT_TILES[BLOCK_C, BLOCK_D]._asdict()


def _outputs(x, keys, heads, maps):
    (B, L, _), N = x.shape, keys.shape[1]
    shape = {"none": (0,), "head": (B, heads, L, N), "mean": (B, L, N)}[maps]
    return x.new_empty(x.shape), x.new_empty(shape)


@cross_attention_kept.register_fake
def _(x, keys, values, w_q, w_o, heads, b_o, gamma, beta, bias, eps, residual, maps):
    return _outputs(x, keys, heads, maps)


def gate_cases():
    """Every tile as the paper's layers call it, and with every option at once and x in float32, as under autocast."""
    kernel = cross_attention_kept_kernel
    for BLOCK_C, BLOCK_D in KEPT_TILES:
        for options in (False, True):
            dtype = "fp16" if options else "bf16"
            fixed = _blocks(BLOCK_C, BLOCK_D) | {"RESIDUAL": True, "MAPS": "mean" if options else "none"}
            num_warps, num_stages = fixed.pop("num_warps"), fixed.pop("num_stages")
            types = dict.fromkeys((n for n in kernel.arg_names if n.startswith("p_")), "*fp32")
            types |= dict.fromkeys(("p_k", "p_v", "p_wq", "p_wo"), f"*{dtype}") | {"scale": "fp32", "eps": "fp32"}
            if not options:
                types |= dict.fromkeys(("p_x", "p_y"), f"*{dtype}")
                fixed |= {"p_bias": None, "p_maps": None, "stride_bias_b": 0, "stride_bias_h": 0}
            yield GateCase(
                f"cross_attention kept {dtype} C<={BLOCK_C} d<={BLOCK_D}{' options' * options}", kernel,
                gate_signature(kernel, types, fixed), fixed, num_warps, num_stages,
                spills=SPILLS,
            )  # fmt: skip
