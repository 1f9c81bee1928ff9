"""GroupNorm, scale and shift, SiLU: one launch forward, two backward. The contract is that of `encdiff.ops.group_norm`.

Features are (B, L, C), channels innermost. One program normalises K groups of one sample: BLOCK_C columns, BLOCK_D for
each group. Where the L positions fit one tile (SINGLE) it stays in registers, otherwise it is read again: twice more
forward, once more backward. The variance is centred: the mean comes first. A bias of x (HAS_X_BIAS) is a number of a
column: it moves the mean that the column is compared with, and costs no operation on an element.

WIDTH is the channels of a group where they are compiled in. A power of two fills its columns, then a thread moves
VECTOR elements at a time; three quarters of one leave gaps, then 2 or 4. 0: any number, element by element.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gate import GateCase, gate_signature
from ._group_norm_tile import Tile, gate_tiles
from ._rows import gate_cases as sums_gate_cases
from ._rows import sum_rows
from ._second import refuse_second
from ._with_input import with_input

VECTOR = tl.constexpr(4)  # neighbours of one thread; of 8, each column's figures take more registers than there are
# What the kernels do not specialise: all but the pointers to features, which `_aligned` sees to. So the code depends on
# the block sizes alone and gate_cases lists all of it.
GENERAL = ("p_mean", "p_rstd", "p_w", "p_b", "p_scale", "p_shift", "p_dscale", "p_dshift", "p_x_bias")
GENERAL += ("p_rows", "p_dw", "p_db", "p_dx_bias", "B", "L", "C", "G", "stride_scale", "stride_shift", "stride_skip")


@triton.jit
def _columns(i_t, C, G, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr):
    """Group and channel of every column, the first column of each group, and which of them there are."""
    o_j = tl.arange(0, BLOCK_C)
    o_g, o_d = i_t * (BLOCK_C // BLOCK_D) + o_j // BLOCK_D, o_j % BLOCK_D
    if WIDTH == BLOCK_D:
        o_c = i_t * BLOCK_C + o_j  # said in this way, the compiler knows that neighbours are neighbours
        m = o_c < C
    else:
        D = WIDTH if WIDTH > 0 else C // G
        o_c = o_g * D + o_d
        m = (o_g < G) & (o_d < D)
    return o_g, o_c, m & (o_d == 0), m


@triton.jit
def _over_groups(v, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """Each column gets the sum over its group's."""
    K: tl.constexpr = BLOCK_C // BLOCK_D
    s = tl.sum(tl.reshape(v, (K, BLOCK_D)), 1)
    return tl.reshape(tl.broadcast_to(s[:, None], (K, BLOCK_D)), (BLOCK_C,))


@triton.jit
def _load(p, i_l, o_c, m_c, L, C, BLOCK_L: tl.constexpr):
    """The tile from position i_l in float32, zero outside."""
    o_l = i_l + tl.arange(0, BLOCK_L)
    return tl.load(p + o_l[:, None] * C + o_c[None, :], (o_l < L)[:, None] & m_c[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(p, tile, i_l, o_c, m_c, L, C, BLOCK_L: tl.constexpr):
    o_l = i_l + tl.arange(0, BLOCK_L)
    mask = (o_l < L)[:, None] & m_c[None, :]
    tl.store(p + o_l[:, None] * C + o_c[None, :], tile.to(p.dtype.element_ty), mask)


@triton.jit
def _column(p, o, m):
    return tl.load(p + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _affine(p_w, p_b, p_scale, p_shift, o_c, m_c, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """(w, b, 1 + scale, shift) of each column."""
    w, b = _column(p_w, o_c, m_c), _column(p_b, o_c, m_c)
    scale, shift = tl.full(w.shape, 1.0, tl.float32), tl.zeros(w.shape, tl.float32)
    if HAS_SCALE:
        scale += _column(p_scale, o_c, m_c)
    if HAS_SHIFT:
        shift += _column(p_shift, o_c, m_c)
    return w, b, scale, shift


@triton.jit(do_not_specialize=GENERAL)
def group_norm_fwd_kernel(
    p_x, p_w, p_b, p_scale, p_shift, p_x_bias, p_y, p_mean, p_rstd, L, C, G, stride_scale, stride_shift, eps,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, SINGLE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr, HAS_X_BIAS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(G, BLOCK_C // BLOCK_D)
    i_b, i_t = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    n = (L * (C // G)).to(tl.float32)
    if WIDTH > 0:
        C = C // VECTOR * VECTOR  # said in this way, the compiler knows that rows are aligned
    o_g, o_c, m_g, m_c = _columns(i_t, C, G, BLOCK_C, BLOCK_D, WIDTH)
    p_x += i_b * L * C
    p_y += i_b * L * C
    x = _load(p_x, 0, o_c, m_c, L, C, BLOCK_L)
    total = tl.sum(x, 0)
    if not SINGLE:
        for i_l in range(BLOCK_L, L, BLOCK_L):
            total += tl.sum(_load(p_x, i_l, o_c, m_c, L, C, BLOCK_L), 0)
    if HAS_X_BIAS:
        x_bias = _column(p_x_bias, o_c, m_c)
        total += L * x_bias
    mean = _over_groups(total, BLOCK_C, BLOCK_D) / n
    tl.store(p_mean + i_b * G + o_g, mean, mask=m_g)
    centre = mean
    if HAS_X_BIAS:
        centre -= x_bias
    total = tl.zeros((BLOCK_C,), tl.float32)
    for i_l in range(0, BLOCK_L if SINGLE else L, BLOCK_L):
        if not SINGLE:
            x = _load(p_x, i_l, o_c, m_c, L, C, BLOCK_L)
        m = (i_l + tl.arange(0, BLOCK_L) < L)[:, None] & m_c[None, :]
        d = tl.where(m, x - centre[None, :], 0.0)
        total += tl.sum(d * d, 0)
    rstd = 1 / tl.sqrt(_over_groups(total, BLOCK_C, BLOCK_D) / n + eps)
    tl.store(p_rstd + i_b * G + o_g, rstd, mask=m_g)
    w, b, scale, shift = _affine(
        p_w, p_b, p_scale + i_b * stride_scale, p_shift + i_b * stride_shift, o_c, m_c, HAS_SCALE, HAS_SHIFT
    )
    gain, offset = rstd * w * scale, b * scale + shift
    for i_l in range(0, BLOCK_L if SINGLE else L, BLOCK_L):
        if not SINGLE:
            x = _load(p_x, i_l, o_c, m_c, L, C, BLOCK_L)
        u = (x - centre[None, :]) * gain[None, :] + offset[None, :]
        if SILU:
            u = u / (1 + tl.exp(-u))
        _store(p_y, u, i_l, o_c, m_c, L, C, BLOCK_L)


@triton.jit
def _normalised(p_dy, p_x, i_l, mean, rstd, gain, offset, o_c, m_c, L, C, BLOCK_L: tl.constexpr, SILU: tl.constexpr):
    """((x - mean) rstd, the gradient of what goes into SiLU)."""
    x_hat = (_load(p_x, i_l, o_c, m_c, L, C, BLOCK_L) - mean[None, :]) * rstd[None, :]
    du = _load(p_dy, i_l, o_c, m_c, L, C, BLOCK_L)
    if SILU:
        u = x_hat * gain[None, :] + offset[None, :]
        s = 1 / (1 + tl.exp(-u))
        du *= s * (1 + u * (1 - s))
    return x_hat, du


@triton.jit(do_not_specialize=GENERAL)
def group_norm_bwd_kernel(
    p_dy, p_x, p_mean, p_rstd, p_w, p_b, p_scale, p_shift, p_x_bias, p_skip, p_dx, p_dscale, p_dshift, p_rows,
    L, C, G, stride_scale, stride_shift, stride_skip,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, SINGLE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr, HAS_X_BIAS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """p_rows (B, 2 or 3, C) takes each sample's share of the gradients of weight, bias and x_bias.

    p_skip is added to dx.
    """
    tiles = tl.cdiv(G, BLOCK_C // BLOCK_D)
    i_b, i_t = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    n = (L * (C // G)).to(tl.float32)
    if WIDTH > 0:
        C = C // VECTOR * VECTOR  # said in this way, the compiler knows that rows are aligned
    o_g, o_c, _, m_c = _columns(i_t, C, G, BLOCK_C, BLOCK_D, WIDTH)
    p_x += i_b * L * C
    p_dy += i_b * L * C
    p_dx += i_b * L * C
    if WIDTH > 0:
        stride_skip = stride_skip // VECTOR * VECTOR
    p_skip += i_b * L * stride_skip
    p_scale += i_b * stride_scale
    p_shift += i_b * stride_shift
    w, b, scale, shift = _affine(p_w, p_b, p_scale, p_shift, o_c, m_c, HAS_SCALE, HAS_SHIFT)
    mean, rstd = _column(p_mean + i_b * G, o_g, m_c), _column(p_rstd + i_b * G, o_g, m_c)
    if HAS_X_BIAS:
        mean -= _column(p_x_bias, o_c, m_c)
    gain, offset = w * scale, b * scale + shift
    x_hat, du = _normalised(p_dy, p_x, 0, mean, rstd, gain, offset, o_c, m_c, L, C, BLOCK_L, SILU)
    sum_du, sum_xdu = tl.sum(du, 0), tl.sum(du * x_hat, 0)
    if not SINGLE:
        for i_l in range(BLOCK_L, L, BLOCK_L):
            x_hat, du = _normalised(p_dy, p_x, i_l, mean, rstd, gain, offset, o_c, m_c, L, C, BLOCK_L, SILU)
            sum_du += tl.sum(du, 0)
            sum_xdu += tl.sum(du * x_hat, 0)
    mean_d = _over_groups(sum_du * gain, BLOCK_C, BLOCK_D) / n
    mean_xd = _over_groups(sum_xdu * gain, BLOCK_C, BLOCK_D) / n
    if HAS_X_BIAS:
        sum_dx = tl.zeros((BLOCK_C,), tl.float32)
    for i_l in range(0, BLOCK_L if SINGLE else L, BLOCK_L):
        if not SINGLE:
            x_hat, du = _normalised(p_dy, p_x, i_l, mean, rstd, gain, offset, o_c, m_c, L, C, BLOCK_L, SILU)
        dx = rstd[None, :] * (du * gain[None, :] - mean_d[None, :] - x_hat * mean_xd[None, :])
        if HAS_X_BIAS:
            sum_dx += tl.sum(tl.where((i_l + tl.arange(0, BLOCK_L) < L)[:, None], dx, 0.0), 0)
        if HAS_SKIP:
            dx += _load(p_skip, i_l, o_c, m_c, L, stride_skip, BLOCK_L)
        _store(p_dx, dx, i_l, o_c, m_c, L, C, BLOCK_L)
    w, b, scale, _ = _affine(p_w, p_b, p_scale, p_shift, o_c, m_c, HAS_SCALE, HAS_SHIFT)  # again: registers are dear
    if HAS_SCALE:
        tl.store(p_dscale + i_b * C + o_c, (w * sum_xdu + b * sum_du).to(p_dscale.dtype.element_ty), mask=m_c)
    if HAS_SHIFT:
        tl.store(p_dshift + i_b * C + o_c, sum_du.to(p_dshift.dtype.element_ty), mask=m_c)
    p_rows += i_b * (3 if HAS_X_BIAS else 2) * C
    tl.store(p_rows + o_c, sum_xdu * scale, mask=m_c)
    tl.store(p_rows + C + o_c, sum_du * scale, mask=m_c)
    if HAS_X_BIAS:
        tl.store(p_rows + 2 * C + o_c, sum_dx, mask=m_c)


def _row(t: Tensor | None, other: Tensor) -> tuple[Tensor, int]:
    """A (B, C) tensor with C contiguous and its row stride; without one, anything to point at."""
    if t is None:
        return other, 0
    t = t if t.stride(1) == 1 else t.contiguous()
    return t, t.stride(0)


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _vector(t: Tensor | None, other: Tensor) -> Tensor:
    """A (C,) tensor; without one, anything to point at."""
    return (other if t is None else t).contiguous()


def _launch_forward(x, weight, bias, scale, shift, x_bias, groups, eps, silu) -> tuple[Tensor, Tensor, Tensor]:
    (batch, L, C), x = x.shape, _aligned(x)
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(batch, groups, dtype=torch.float32) for _ in range(2))
    if x.numel():
        tile = Tile.of(L, C, groups)
        (s, stride_s), (t, stride_t) = _row(scale, weight), _row(shift, weight)
        with torch.cuda.device_of(x):
            group_norm_fwd_kernel[batch * tile.programs(groups),](
                x, weight.contiguous(), bias.contiguous(), s, t, _vector(x_bias, weight), y, mean, rstd,
                L, C, groups, stride_s, stride_t, eps,
                **tile.constexprs(scale is not None, shift is not None, silu, x_bias is not None),
                num_warps=tile.num_warps, num_stages=1,
            )  # fmt: skip
    return y, mean, rstd


def _skip(t: Tensor | None, x: Tensor) -> tuple[Tensor, int]:
    """What is added to dx and the stride of its positions: columns of wider rows as they are, or a copy."""
    if t is None:
        return x, 0
    stride = t.stride(1)
    whole = t.stride() == (t.shape[1] * stride, stride, 1) and stride % 8 == 0 and t.data_ptr() % 16 == 0
    if whole and t.dtype == x.dtype:
        return t, stride
    return _aligned(t.to(x.dtype)), t.shape[2]  # not its stride, which says nothing where there is one position


def _launch_backward(dy, x, mean, rstd, weight, bias, scale, shift, x_bias, groups, silu, skip) -> tuple[Tensor, ...]:
    """See `group_norm_backward`."""
    (batch, L, C), x, dy = x.shape, _aligned(x), _aligned(dy)
    dx, rows, dscale, dshift = _gradients(x, scale, shift, x_bias)
    if x.numel():
        tile = Tile.of(L, C, groups)
        (s, stride_s), (t, stride_t) = _row(scale, weight), _row(shift, weight)
        added, stride_added = _skip(skip, x)
        with torch.cuda.device_of(x):
            group_norm_bwd_kernel[batch * tile.programs(groups),](
                dy, x, mean, rstd, weight.contiguous(), bias.contiguous(), s, t, _vector(x_bias, weight), added,
                dx, dscale, dshift, rows, L, C, groups, stride_s, stride_t, stride_added,
                **tile.constexprs(scale is not None, shift is not None, silu, x_bias is not None),
                HAS_SKIP=skip is not None, num_warps=tile.num_warps, num_stages=1,
            )  # fmt: skip
    else:
        for t in (rows, dscale, dshift):
            t.zero_()
    return dx, rows, dscale, dshift


def _gradients(x: Tensor, scale: Tensor | None, shift: Tensor | None, x_bias: Tensor | None) -> tuple[Tensor, ...]:
    batch, _, C = x.shape
    rows = x.new_empty(batch, 2 if x_bias is None else 3, C, dtype=torch.float32)
    return x.new_empty(x.shape), rows, _like(scale, x), _like(shift, x)


def _like(t: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if t is None else t.new_empty(t.shape)


@torch.library.custom_op("encdiff::group_norm", mutates_args=())
def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, x_bias: Tensor | None,
    groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x (B, L, C), weight, bias, x_bias (C,), scale, shift (B, C) -> y (B, L, C), mean and 1/deviation (B, groups)."""
    return _launch_forward(x, weight, bias, scale, shift, x_bias, groups, eps, silu)


@group_norm.register_fake
def _(x, weight, bias, scale, shift, x_bias, groups, eps, silu):
    moments = [x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2)]
    return x.new_empty(x.shape), *moments


@torch.library.custom_op("encdiff::group_norm_backward", mutates_args=())
def group_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, x_bias: Tensor | None, groups: int, silu: bool, skip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of x; (B, 2 or 3, C), each sample's share of those of weight, bias and x_bias; of scale and shift.

    Empty for a scale or shift that is not given. skip (B, L, C), any strides: a gradient of x that is at hand, added.
    """
    return _launch_backward(dy, x, mean, rstd, weight, bias, scale, shift, x_bias, groups, silu, skip)


@group_norm_backward.register_fake
def _(dy, x, mean, rstd, weight, bias, scale, shift, x_bias, groups, silu, skip=None):
    return _gradients(x, scale, shift, x_bias)


def _setup_context(ctx, inputs, output) -> None:
    x, *parameters, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(x, *output[1:], *parameters)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for mean and rstd would be launches that nobody reads


def _autograd(ctx, dy, *_, skip=None, sums=sum_rows):
    if dy is None:
        return (skip, *(None,) * 8)
    saved = ctx.saved_tensors  # asked for once: activation checkpointing gives it no second time
    weight, bias, scale, shift, x_bias = saved[3:]
    dx, rows, dscale, dshift = group_norm_backward(dy, *saved, ctx.groups, ctx.silu, skip)
    dweight, dbias, *dx_bias = sums(rows, [t for t in (weight, bias, x_bias) if t is not None])
    given = None if scale is None else dscale, None if shift is None else dshift
    return dx, dweight, dbias, *given, dx_bias[0] if dx_bias else None, None, None, None


group_norm.register_autograd(_autograd, setup_context=_setup_context)
refuse_second(group_norm_backward)

GroupNormAndInput = with_input(group_norm, _setup_context, _autograd)


def gate_cases() -> Iterator[GateCase]:
    """`gate_tiles` with the longest code, all options on; those of the paper's narrowest group in float32 too.

    Backward either with a gradient to add or with a bias of x.
    """
    tiles = list(gate_tiles())
    for kernel in (group_norm_fwd_kernel, group_norm_bwd_kernel):
        last = ("x_bias",) if kernel is group_norm_fwd_kernel else ("x_bias", "skip")
        for tile in tiles:
            for option in last:
                yield _case(kernel, tile, "bf16", "scale", "shift", "silu", option)
        for L in (64, 256, 257):
            for option in last:
                yield _case(kernel, Tile.of(L, 64, 32), "fp32", "scale", "shift", "silu", option)
        yield _case(kernel, Tile.of(256, 64, 32), "fp32")
    yield from sums_gate_cases()


def _case(kernel, tile: Tile, kind: str, *options: str) -> GateCase:
    constexprs = tile.constexprs(*(name in options for name in ("scale", "shift", "silu", "x_bias")))
    if kernel is group_norm_bwd_kernel:
        constexprs["HAS_SKIP"] = "skip" in options
    own = {"p_mean", "p_rstd", "p_rows"}
    types = {n: f"*{'fp32' if n in own else kind}" for n in kernel.arg_names if n.startswith("p_")} | {"eps": "fp32"}
    types |= {n: f"{types[n]}:1" for n in types if n in GENERAL}
    name = f"{kernel.__name__} {kind} {tile.rows}x{tile.columns}/{tile.group} of {tile.width or 'any'}"
    name += f"{' once' if tile.single else ''} {options[-1] if options else 'plain'}"
    return GateCase(
        name, kernel, gate_signature(kernel, types, constexprs), constexprs, tile.num_warps, 1, tensor_cores=False,
        spills=16 if tile.rows > 64 and kernel is group_norm_bwd_kernel else 0,
    )  # fmt: skip
