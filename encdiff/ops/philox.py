"""Keyed random numbers: Philox4x32-10 (Salmon et al. 2011) and Box-Muller.

A number is a function of (seed, sample id, draw, element): the same on every device, in any batch, on any rank and
after any resume. The key is the seed; the counter is (element // 4 as two words, sample id, draw), and its four output
words serve four elements. The top bit of the counter's second word tells the two streams apart: 0 for what belongs to
an element, 1 for what belongs to the sample, its timestep.
"""

import math

import torch

from encdiff.errors import InputError
from encdiff.ops import _native
from encdiff.ops._dispatch import Implementation, Op, always, is_transformed
from encdiff.ops._types import check_dtype, check_floating

WORD = 0xFFFFFFFF
COUNTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # weights too, where they are counts
TIMESTEPS = ("uniform", "logit-normal", "power", "stratified", "importance")


def philox(counter: list[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Philox4x32-10: four int64 tensors and two ints that hold 32-bit words -> four int64 tensors of words."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def _multiply(word: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    # 32 x 32 bits overflow int64: the high half comes from products of 32 x 16 bits, the low half may wrap around
    low16 = word * (factor & 0xFFFF)
    return (word * (factor >> 16) + (low16 >> 16)) >> 16, (word * factor) & WORD


def words(size: int, seed: int, sample_ids: torch.Tensor, draw: int | torch.Tensor, stream: int = 0) -> torch.Tensor:
    """The Philox words of `size` elements per sample: int64 (B, size rounded up to 4)."""
    quads = torch.arange((size + 3) // 4, device=sample_ids.device)
    ids = sample_ids.view(-1, 1)
    if not isinstance(draw, torch.Tensor):  # filled in on the device: a captured CUDA graph cannot copy from the host
        draw = torch.full((), draw, dtype=torch.int64, device=sample_ids.device)
    shape = len(sample_ids), len(quads)
    counter = [quads & WORD, (quads >> 32) | (stream << 31), ids & WORD, draw & WORD]
    counter = [c.expand(shape) for c in counter]
    return torch.stack(philox(counter, (seed & WORD, seed >> 32 & WORD)), -1).flatten(1)


def uniform_reference(shape, seed, sample_ids, draw, dtype=torch.float32, stream=0, out=None):
    """`uniform` in plain PyTorch: the upper 24 bits of each word."""
    size = math.prod(shape[1:])
    u = (words(size, seed, sample_ids, draw, stream)[:, :size] >> 8).float() * 2.0**-24
    return _native.into(out, u.reshape(shape).to(dtype))[0]


def normal_reference(shape, seed, sample_ids, draw, dtype=torch.float32, stream=0, out=None):
    """`normal` in plain PyTorch: Box-Muller, in float64 past the uniforms.

    The first word of a pair gives the radius: u = float32(word) 2^-32 + 2^-33 lies in (0, 1] and keeps all its bits
    near 0, where the tail comes from. The upper 26 bits of the second give the angle, a fraction of the circle.
    """
    size = math.prod(shape[1:])
    a, b = words(size, seed, sample_ids, draw, stream).view(len(sample_ids), -1, 2).unbind(-1)
    radius = (-2 * (a.float() * 2.0**-32 + 2.0**-33).double().log()).sqrt()
    # the nearest quarter turn is taken off first: sin and cos keep their digits beside their zeros
    quarter = (b + 2**29) >> 30
    angle = ((b & ~63) - (quarter << 30)).double() * (math.pi * 2.0**-31)
    s, c = angle.sin(), angle.cos()
    odd, q = (quarter & 1).bool(), quarter & 3
    cosine = torch.where(odd, s, c) * torch.where((q == 1) | (q == 2), -1.0, 1.0)
    sine = torch.where(odd, c, s) * torch.where(q >= 2, -1.0, 1.0)
    z = (radius[..., None] * torch.stack([cosine, sine], -1)).flatten(1)[:, :size]
    return _native.into(out, z.float().reshape(shape).to(dtype))[0]


def _native_random(kind):
    def run(shape, seed, sample_ids, draw, dtype=torch.float32, stream=0, out=None):
        """The same words, in csrc: one pass."""
        return _native.random(kind, shape, seed, sample_ids, draw, dtype, stream, out and out[0])

    return run


def _native_reasons(shape, seed, sample_ids, draw, dtype=torch.float32, stream=0, out=None) -> list[str]:
    if dtype not in _native.DTYPES:
        return [f"dtype is {dtype}"]
    return _native.reasons(sample_ids)


normal_op, uniform_op = (
    Op(
        name,
        [
            Implementation("native", _native_random(name), _native_reasons),
            Implementation("reference", reference, always, composite=True),
        ],
    )
    for name, reference in (("normal", normal_reference), ("uniform", uniform_reference))
)


def normal(
    shape: tuple[int, ...],
    seed: int,
    sample_ids: torch.Tensor,
    draw: int | torch.Tensor = 0,
    *,
    dtype: torch.dtype = torch.float32,
    stream: int = 0,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Standard normal numbers of `shape` (B, ...), each a function of (seed, its sample's id, draw, its index).

    sample_ids (B,) int64, 0 <= id < 2^32, on the device of the result; seed, 0 <= seed < 2^64; draw, the training or
    sampler step, 0 <= draw < 2^32: an int, or an int64 tensor of one element on the same device (a captured CUDA graph
    reads it anew). The index is that of the contiguous layout. |z| < 6.77. CPU and GPU agree to the bit in the integers
    and to 4 ulp in the result. Stream 1 holds the numbers of `timesteps` in place of those of the noise; `out` is a
    tensor of that shape and dtype to write into. Raises InputError for a wrong shape, dtype, device or range; ids and
    draws on a GPU are not read, their lower 32 bits count.
    """
    return _random(normal_op, shape, seed, sample_ids, draw, dtype, stream, out, impl)


def uniform(
    shape: tuple[int, ...],
    seed: int,
    sample_ids: torch.Tensor,
    draw: int | torch.Tensor = 0,
    *,
    dtype: torch.dtype = torch.float32,
    stream: int = 0,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Numbers k 2^-24 in [0, 1), as `normal`; to the bit the same everywhere. Narrower dtypes can round up to 1."""
    return _random(uniform_op, shape, seed, sample_ids, draw, dtype, stream, out, impl)


def _random(op, shape, seed, sample_ids, draw, dtype, stream, out, impl):
    check_key(shape[:1], seed, sample_ids, draw, "shape")
    check_dtype("dtype", dtype)
    if stream not in (0, 1):
        raise InputError(f"stream is {stream}, must be 0 or 1")
    if out is not None and (out.shape != tuple(shape) or out.dtype != dtype or out.device != sample_ids.device):
        raise InputError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}, must be {dtype} {tuple(shape)} on sample_ids' "
            f"{sample_ids.device}"
        )
    return op(tuple(shape), seed, sample_ids, draw, dtype, stream, None if out is None else (out,), impl=impl)


def timesteps(
    num_timesteps: int,
    seed: int,
    sample_ids: torch.Tensor,
    draw: int | torch.Tensor = 0,
    *,
    kind: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
    power: float = 0.5,
    weights: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """A training timestep per sample, int64 (B,), 0 <= t < T, keyed as `normal` and independent of its numbers.

    - `uniform`: floor(T u);
    - `logit-normal`: floor(T sigmoid(mean + std z)), SD3's (arXiv 2403.03206);
    - `power`: floor(T u^power), of density (1/power) s^(1/power - 1) at s = t/T: more noise for power < 1;
    - `stratified`: floor(T (i + u) / B) for the i-th of B: even within each batch, so it depends on the batch;
    - `importance`: t with probability weights[t] / sum(weights), weights (T,) not negative, on the ids' device.

    `uniform` and `stratified` are the same on every device to the bit; the others up to a rounding at a boundary.
    """
    check_key(sample_ids.shape, seed, sample_ids, draw, "sample_ids")
    if kind not in TIMESTEPS:
        raise InputError(f"timestep distribution is {kind!r}, must be one of {', '.join(TIMESTEPS)}")
    if num_timesteps < 1 or not (std > 0 and power > 0):
        raise InputError(
            f"num_timesteps, std, power are {num_timesteps}, {std}, {power}, must be at least 1, positive, positive"
        )
    op = normal_op if kind == "logit-normal" else uniform_op
    u = op((len(sample_ids), 1), seed, sample_ids, draw, stream=1, impl=impl)[:, 0].double()
    if kind == "importance":
        return _importance(u, weights, num_timesteps)
    if kind == "logit-normal":
        u = torch.sigmoid(mean + std * u)
    elif kind == "power":
        u = u**power
    elif kind == "stratified":
        u = (torch.arange(len(u), device=u.device) + u) / max(1, len(u))
    return (num_timesteps * u).long().clamp(max=num_timesteps - 1)  # u can round to 1


def _importance(u: torch.Tensor, weights: torch.Tensor | None, num_timesteps: int) -> torch.Tensor:
    if weights is None or weights.shape != (num_timesteps,) or weights.device != u.device:
        what = "None" if weights is None else f"{tuple(weights.shape)} on {weights.device}"
        raise InputError(f"weights is {what}, must be ({num_timesteps},) on {u.device}, one per timestep")
    if weights.dtype not in COUNTS:
        check_floating(weights=weights)
    if readable(weights) and not ((weights >= 0).all() and 0 < weights.sum() < math.inf):
        raise InputError("weights must be finite, none of them negative, and not all of them zero")
    cdf = weights.double().cumsum(0)
    return torch.searchsorted(cdf, u * cdf[-1], right=True).clamp(max=num_timesteps - 1)  # rounding at the end


def check_key(batch, seed: int, sample_ids: torch.Tensor, draw: int | torch.Tensor, other: str) -> None:
    """Raise InputError unless (seed, sample_ids, draw) can key a batch of shape `batch` = (B,), which is `other`'s."""
    if sample_ids.shape != tuple(batch) or sample_ids.ndim != 1 or sample_ids.dtype != torch.int64:
        raise InputError(
            f"sample_ids is {sample_ids.dtype} {tuple(sample_ids.shape)}, must be int64 {tuple(batch)}, one per sample "
            f"of {other}"
        )
    if not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed}, must lie in 0 to 2^64 - 1")
    if readable(sample_ids) and ((sample_ids < 0) | (sample_ids > WORD)).any():
        raise InputError(f"sample_ids span {sample_ids.min()} to {sample_ids.max()}, must lie in 0 to 2^32 - 1")
    if isinstance(draw, torch.Tensor):
        if draw.numel() != 1 or draw.dtype != torch.int64 or draw.device != sample_ids.device:
            raise InputError(
                f"draw is {draw.dtype} {tuple(draw.shape)} on {draw.device}, must be one int64 on sample_ids' "
                f"{sample_ids.device}"
            )
        if not readable(draw):
            return
    if not 0 <= int(draw) <= WORD:
        raise InputError(f"draw is {int(draw)}, must lie in 0 to 2^32 - 1")


def readable(x: torch.Tensor) -> bool:
    """Whether values may be looked at: neither a device stall nor a graph break, and not one of many under vmap."""
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or is_transformed(x))
