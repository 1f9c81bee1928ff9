"""Block `right`: every kernel on this device, forward and every gradient, against float64.

A case is an op at a shape of the paper's model, in a dtype. Its inputs are drawn anew from a seed; the reference
computes in float64 on the same, rounded, inputs. The error is ||out - exact|| / ||exact||; what it may be follows from
the dtype of the products. NaN never passes. Outputs are computed twice: a difference between the two is a race.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from encdiff.kernels.cross_attention.plan import can_fold
from torch import Tensor

from bench.gpu.lab import Lab
from encdiff import ops
from encdiff.engine import float32_precision
from encdiff.models import EncDiffConfig
from encdiff.ops._check import LIMITS, relative_error
from encdiff.ops._triton import NAMES
from encdiff.ops.cross_attention_folded import cross_attention_folded, fold


class Case(NamedTuple):
    """`make(dtype)` gives the inputs, float; `run(inputs, impl)` the outputs."""

    name: str
    dtype: torch.dtype
    make: Callable[[], dict[str, Tensor]]
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    gradients: bool = True


def layers(config: EncDiffConfig) -> list[tuple[int, int]]:
    """(positions, channels) of every level, and of the deepest once more where it attends in the middle."""
    side = config.image_size // config.downsampling
    found = [((side // 2**i) ** 2, config.width * m) for i, m in enumerate(config.multipliers)]
    return found


def cases(lab: Lab, batch: int) -> Iterator[Case]:
    c, on = lab.config, lab.device
    types = [torch.bfloat16, torch.float32] if not lab.cpu else [torch.float32]

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=on) * scale

    for dtype in types:
        for L, C in layers(c):
            yield from _attention(draw, dtype, batch, L, C, c)
            yield _group_norm(draw, dtype, batch, L, C, c.groups)
            yield _group_norm(draw, dtype, batch, L, C, c.groups, with_input=True)
            yield _group_norm(draw, dtype, batch, L, C, c.groups, x_bias=True)
            yield _residual_add(draw, dtype, batch, L, C)
            yield from _resample(draw, dtype, batch, L, C)
            yield _geglu(draw, dtype, batch, L, c.feedforward * C)
            yield _layer_norm(draw, dtype, batch, L, C)
            if dtype != torch.float32:
                yield from _projection(draw, dtype, batch, L, C, c.feedforward * C)
            yield _linear(draw, dtype, batch, L, C, 2 * c.feedforward * C)
            yield _conv2d(draw, dtype, batch, L, C)
        widest = max(C for _, C in layers(c))
        yield _group_norm(draw, dtype, batch, layers(c)[-1][0], 2 * widest, c.groups)
        yield _bank(draw, dtype, batch, c)
        yield _adamw(draw, dtype)


def _attention(draw, dtype, B, L, C, c) -> Iterator[Case]:
    """Cross-attention by each route, and folded before; self-attention."""
    N, D, H = c.concepts, c.token_width, c.heads

    def weights(context_width: int) -> dict[str, Tensor]:
        shapes = {"w_q": (C, C), "w_k": (C, context_width), "w_v": (C, context_width), "w_o": (C, C)}
        made = {name: draw(*shape, scale=2 * shape[1] ** -0.5) for name, shape in shapes.items()}
        made |= {"b_o": draw(C), "norm_weight": 1 + 0.1 * draw(C), "norm_bias": 0.1 * draw(C)}
        return {"x": draw(B, L, C)} | made

    def cross(i, impl, **options):
        return ops.cross_attention(**i, heads=H, residual=True, impl=impl, **options)

    def folded(i, impl):
        i = dict(i)
        token_side = [i.pop(k) for k in ("context", "w_q", "w_k", "w_v", "w_o")]
        return cross_attention_folded(
            i.pop("x"), fold(*token_side, heads=H), i.pop("b_o"), **i, residual=True, impl=impl
        )

    def self_attention(i, impl):
        return ops.self_attention(**i, heads=H, residual=True, impl=impl)

    def inputs():
        return {"context": draw(B, N, D)} | weights(D)

    at = f"{dtype} L={L} C={C}".removeprefix("torch.")
    bias = lambda i: torch.linspace(-1, 1, N, device=i["x"].device, dtype=i["x"].dtype).expand(B, N)  # noqa: E731
    yield Case(f"cross_attention {at}", dtype, inputs, cross)
    yield Case(f"cross_attention bias, maps {at}", dtype, inputs,
               lambda i, impl: cross(i, impl, token_bias=bias(i), maps="mean"), gradients=False)  # fmt: skip
    if can_fold(C, N, dtype.itemsize):
        yield Case(f"cross_attention_folded {at}", dtype, inputs, folded)
    yield Case(f"self_attention {at}", dtype, lambda: weights(C), self_attention)


def _group_norm(draw, dtype, B, L, C, groups, x_bias=False, **options) -> Case:
    side, named = int(L**0.5), ["x_bias"] * x_bias + [*options]

    def inputs():
        x = draw(B, C, side, side).to(memory_format=torch.channels_last)
        small = {"weight": 1 + 0.1 * draw(C), "bias": 0.1 * draw(C), "scale": 0.3 * draw(B, C), "shift": draw(B, C)}
        return {"x": x} | small | ({"x_bias": draw(C)} if x_bias else {})

    name = f"group_norm {' '.join([*named, str(dtype)])} {side}x{side} C={C}".replace("torch.", "")
    return Case(name, dtype, inputs,
                lambda i, impl: ops.group_norm(**i, groups=groups, silu=True, **options, impl=impl))  # fmt: skip


def _residual_add(draw, dtype, B, L, C) -> Case:
    side = int(L**0.5)

    def inputs():
        maps = {n: draw(B, C, side, side).to(memory_format=torch.channels_last) for n in ("x", "h")}
        return maps | {"bias": draw(C)}

    name = f"residual_add {dtype} {side}x{side} C={C}".replace("torch.", "")
    return Case(name, dtype, inputs, lambda i, impl: ops.residual_add(**i, impl=impl))


def _projection(draw, dtype, B, L, C, inner) -> Iterator[Case]:
    """LayerNorm and GEGLU of a feed-forward's first product, the residual behind its second."""
    shapes = {"weight": (2 * inner, C), "bias": (2 * inner,), "norm_weight": (C,), "norm_bias": (C,)}

    def first():
        return {"x": draw(B, L, C)} | {n: draw(*shape, scale=shape[-1] ** -0.5) for n, shape in shapes.items()}

    def second():
        small = {"weight": draw(C, inner, scale=inner**-0.5), "bias": draw(C)}
        return {"x": draw(B, L, inner), "residual": draw(B, L, C)} | small

    at = f"{dtype} L={L} C={C}".removeprefix("torch.")
    for name, make, gated in (("first", first, True), ("second", second, False)):

        def run(i, impl, gated=gated):
            return ops.projection(**i, gated=gated, impl=impl)

        yield Case(f"projection {name} {at}", dtype, make, run, gradients=False)


def _adamw(draw, dtype) -> Case:
    """One step on copies; the gradient is of the case's type, the state exact."""
    names = ("master", "exp_avg", "exp_avg_sq", "average")

    def inputs():
        return {"gradient": draw(100_003)} | {n: draw(100_003).abs() for n in names}

    def run(i, impl):
        exact = torch.promote_types(i["gradient"].dtype, torch.float32)
        state = {n: i[n].detach().to(exact, copy=True) for n in names}
        schedule = torch.tensor([1e-2, 0.3, 0.1, 0.05], device=i["gradient"].device, dtype=exact)
        ops.adamw(gradient=i["gradient"].detach(), schedule=schedule, **state, impl=impl)
        return tuple(state.values())

    return Case(f"adamw {dtype}".replace("torch.", ""), dtype, inputs, run, gradients=False)


def _geglu(draw, dtype, B, L, inner) -> Case:
    name = f"geglu {dtype} L={L} N={inner}".replace("torch.", "")
    return Case(name, dtype, lambda: {"x": draw(B, L, 2 * inner)}, lambda i, impl: ops.geglu(i["x"], impl=impl))


def _resample(draw, dtype, B, L, C) -> Iterator[Case]:
    side = int(L**0.5)

    def inputs():
        return {n: draw(B, C, side, side).to(memory_format=torch.channels_last) for n in ("x", "beside")}

    for kind in ("down", "up"):
        name = f"resample {kind} {dtype} {side}x{side} C={C}".replace("torch.", "")
        yield Case(name, dtype, inputs, lambda i, impl, kind=kind: ops.resample(**i, kind=kind, impl=impl))


def _layer_norm(draw, dtype, B, L, C) -> Case:
    name = f"layer_norm {dtype} L={L} C={C}".replace("torch.", "")

    def inputs():
        return {"x": 1 + 2 * draw(B, L, C), "weight": 1 + 0.1 * draw(C), "bias": 0.1 * draw(C)}

    return Case(name, dtype, inputs, lambda i, impl: ops.layer_norm(**i, impl=impl))


def _linear(draw, dtype, B, L, C, inner) -> Case:
    def inputs():
        return {"x": draw(B, L, C), "weight": draw(inner, C, scale=C**-0.5), "bias": draw(inner)}

    return Case(f"linear {dtype} L={L} C={C} N={inner}".replace("torch.", ""), dtype, inputs,
                lambda i, impl: ops.linear(**i, impl=impl))  # fmt: skip


def _conv2d(draw, dtype, B, L, C) -> Case:
    side = int(L**0.5)

    def inputs():
        x, weight = draw(B, C, side, side), draw(C, C, 3, 3, scale=C**-0.5 / 3)
        maps = {"x": x, "weight": weight}
        return {n: t.to(memory_format=torch.channels_last) for n, t in maps.items()} | {"bias": draw(C)}

    return Case(f"conv2d {dtype} {side}x{side} C={C}".replace("torch.", ""), dtype, inputs,
                lambda i, impl: ops.conv2d(**i, padding=1, impl=impl))  # fmt: skip


def _bank(draw, dtype, B, c) -> Case:
    N, chain = c.concepts, (1, *c.bank_widths, c.token_width)

    def inputs():
        pairs = list(zip(chain, chain[1:], strict=False))
        made = {f"w{k}": draw(N, o, i, scale=i**-0.5) for k, (i, o) in enumerate(pairs)}
        return {"scalars": draw(B, N)} | made | {f"b{k}": draw(N, o) for k, (_, o) in enumerate(pairs)}

    def run(i, impl):
        layers = range(len(chain) - 1)
        return ops.mlp_bank(i["scalars"], [i[f"w{k}"] for k in layers], [i[f"b{k}"] for k in layers], impl=impl)

    return Case(f"mlp_bank {dtype} B={B}".replace("torch.", ""), dtype, inputs, run)


@contextmanager
def _repeatable() -> Iterator[None]:
    """Convolutions in float32 itself, and in an order that is the same each time: cuDNN has others."""
    cudnn = torch.backends.cudnn
    before, cudnn.deterministic = cudnn.deterministic, True
    try:
        with float32_precision(tf32=False):
            yield
    finally:
        cudnn.deterministic = before


def check(case: Case, seed: int) -> dict:
    """Errors of every output and gradient, and whether two runs gave the same bits."""
    torch.manual_seed(seed)
    rounded = {name: t.to(case.dtype) for name, t in case.make().items()}
    with _repeatable():
        actual = _results(case, rounded, "triton")
        again = _results(case, rounded, "triton", upstream=actual.pop("upstream"))
    upstream = again.pop("upstream")
    exact = _results(case, {n: t.double() for n, t in rounded.items()}, "reference", upstream)
    exact.pop("upstream")
    errors = {name: relative_error(actual[name], exact[name].cpu()) for name in exact}
    unstable = [name for name in actual if not torch.equal(actual[name], again[name])]
    limit = LIMITS[NAMES[case.dtype]]
    wrong = [f"{n} {e:.2g}" for n, e in errors.items() if not e <= limit]
    return {
        "case": case.name, "errors": errors, "limit": limit, "unstable": unstable, "wrong": wrong,
        "ok": not (wrong or unstable),
    }  # fmt: skip


def _results(case: Case, inputs: dict[str, Tensor], impl, upstream=None) -> dict[str, object]:
    leaves = {n: t.detach().requires_grad_(case.gradients) for n, t in inputs.items()}
    outputs = case.run(leaves, impl)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = upstream or [torch.randn_like(y.float()).to(y.dtype) for y in outputs]
    results = {f"y{k}": y.detach() for k, y in enumerate(outputs)}
    if case.gradients:
        given = [u.to(y.dtype) for u, y in zip(upstream, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), given)
        results |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return results | {"upstream": upstream}


def measure(lab: Lab, share: int, shares: int, batch: int) -> list[dict]:
    """The cases of one process; a case that raises is a finding, and the others go on."""
    found = []
    for n, case in enumerate(cases(lab, batch)):
        if n % shares != share:
            continue
        try:
            found.append(check(case, seed=n))
        except Exception as error:
            found.append(missing(case.name, f"{type(error).__name__}: {str(error).strip()[:300]}"))
    return found


def missing(name: str, why: str) -> dict:
    """What stands for a case, or for a share of them, that gave no result."""
    return {"case": name, "ok": False, "wrong": [why], "errors": {}, "unstable": []}


def lines(found: list[dict]) -> list[str]:
    bad = [r for r in found if not r["ok"]]
    worst = {}
    for r in (r for r in found if r["errors"]):
        op, dtype = r["case"].split()[0], "bfloat16" if "bfloat16" in r["case"] else "float32"
        worst[op, dtype] = max(worst.get((op, dtype), 0.0), *r["errors"].values(), 0.0)
    said = [f"{len(found)} cases, {len(bad)} wrong; worst error by op: " + ", ".join(
        f"{op} {dtype} {e:.1e}" for (op, dtype), e in sorted(worst.items())
    )]  # fmt: skip
    return said + [f"WRONG {r['case']}: {'; '.join(r['wrong'])} unstable {r['unstable']}" for r in bad][:20]
